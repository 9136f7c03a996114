"""What ops make of rows of all ranks and of parts of columns, for the static proof of module tensor parallelism.

Written without looking at the pass: a product whose weight is cut by columns gives these columns, one whose operands
are both cut along what is summed gives a summand; elementwise ops keep rows and columns apart. Every result is one of
the original's own calls. What is not here proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.verify_arguments import Arguments, Refused, View, op_name
from cpcompile.passes.verify_index import Shape, Size, divide, product, shape, times
from cpcompile.passes.verify_module_calls import (
    HALVED,
    MULTIPLIED,
    PIECES,
    Calls,
    Operands,
    is_elementwise,
    pieces_of,
    signature,
)
from cpcompile.passes.verify_module_values import Cut, Form, flat
from cpcompile.passes.verify_proof import told_op

SUMMED_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32, torch.int64})
ADDED = frozenset({"aten::add", "aten::sub"})
SCALED = frozenset({"aten::mul", "aten::div", "aten::neg"})


class Rules:
    """The rules.

    Args:
        original: numbered.
        arguments: reads the shared graph.
        common: whether a content is the same on all ranks of a group.
    """

    def __init__(self, original: Calls, arguments: Arguments, common: Callable[[int, Axis | None], bool]) -> None:
        """See the class."""
        self.original, self.arguments, self.common = original, arguments, common

    def results(self, node: fx.Node, at: Mapping[fx.Node, Form], shapes: Mapping[fx.Node, Shape]) -> list[Form]:
        """What ``node`` makes of ``at``, whose shapes on this rank are ``shapes``.

        Raises:
            Refused: nothing that can be said.
        """
        name = op_name(node.target)
        if any(f.view[0] in self.original.volatile for f in at.values()):
            raise Refused("expected values that nothing writes into")
        if name in MULTIPLIED:
            return [self._product(node, MULTIPLIED[name], at)]
        if name in PIECES:
            return self._split(node, at, shapes)
        if name in HALVED:
            return [self._halves(node, at)]
        if is_elementwise(node) and at:
            return [self._elementwise(node, at)]
        found = ", ".join(f.rows or "a part" for f in at.values())
        raise Refused(f"expected an op that keeps rows and columns apart; found {told_op(node)} of {found}", 2)

    def _found(self, node: fx.Node, at: Mapping[fx.Node, Form]) -> View:
        flats = {n: view for n, f in at.items() if (view := flat(f.view)) is not None}
        found = self.original.by_rows.get(signature(self.arguments, node, flats)) if len(flats) == len(at) else None
        if found is None:
            names = ", ".join(self.original.name(f.view) for f in at.values())
            raise Refused(f"expected a call of the original; found {told_op(node)} of {names}", 1)
        return found

    def _check_common(self, form: Form, axis: Axis | None, what: str) -> None:
        if form.partial or form.rows or not self.common(form.view[0], axis):
            name = self.original.name(form.view)
            raise Refused(f"expected {what} {name} to be the same on all ranks; it is not known to be", 3)

    def _product(self, node: fx.Node, operands: Operands, at: Mapping[fx.Node, Form]) -> Form:
        args = self.arguments.arguments(node)
        x, weight = at[args[operands.rows]], at[args[operands.weight]]
        axis = _agreed(x, weight)
        if x.partial or weight.partial or weight.rows:
            raise Refused(f"expected rows and a weight; found {told_op(node)} of summands or of rows of all ranks", 3)
        found = self._found(node, at)
        made = Form(found, x.rows, x.count, axis=axis)
        by_column = [n for name in operands.by_column if (n := args[name]) in at]
        for name in operands.by_row:
            if args[name] in at:
                self._check_by_row(at[args[name]], x, axis)
        if x.cut is not None:
            if weight.cut is None or (x.cut.dim, weight.cut.dim) != (1, 0) or _span(x.cut) != _span(weight.cut):
                raise Refused("expected the rows of the weight that go with these columns; found others", 3)
            self._check_summand(node, operands, at, x, axis)
            self._check_common(weight, axis, "the weight")
            for scale in by_column:
                self._check_by_column(at[scale], None, x, axis)
            return replace(made, partial=True)
        bias = [args[operands.bias]] if operands.bias and args[operands.bias] in at else []
        if weight.cut is not None and weight.cut.dim != 1:
            raise Refused("expected columns that go with these rows of the weight; found all of them", 3)
        if x.rows == "all":
            self._check_common(weight, axis, "the weight")
        for factor in [*bias, *by_column]:
            self._check_by_column(at[factor], weight.cut, x, axis)
        return replace(made, cut=weight.cut)

    def _check_summand(
        self, node: fx.Node, operands: Operands, at: Mapping[fx.Node, Form], x: Form, axis: Axis | None
    ) -> None:
        """The results of all ranks add up to the original's."""
        args = self.arguments.arguments(node)
        if operands.bias and args[operands.bias] is not None:
            raise Refused("expected the bias to be added once; found it in the summand of every rank", 3)
        if any(args.get(name) is not None for name in operands.unscaled) or any(args[n] != 1 for n in operands.ones):
            raise Refused(f"expected a plain product; found {told_op(node)} with more", 3)
        if node.meta["val"].dtype not in SUMMED_DTYPES:
            raise Refused(f"expected summands that can be added; found {node.meta['val'].dtype}", 3)
        if x.rows == "own" or (not x.rows and not self.common(x.view[0], axis)):
            raise Refused("expected columns of rows that all ranks have; found every rank's own rows", 3)

    def _check_by_row(self, form: Form, x: Form, axis: Axis | None) -> None:
        if all(size == 1 for size in form.sizes) and not form.rows:
            return self._check_common(form, axis, "the scale") if x.rows == "all" or x.cut else None
        if form.cut or form.partial or (form.rows, form.count) != (x.rows, x.count) or form.sizes[0] != x.sizes[0]:
            raise Refused("expected one scale for each of these rows; found others", 3)
        return None

    def _check_by_column(self, form: Form, cut: Cut | None, x: Form, axis: Axis | None) -> None:
        if x.rows == "all" or x.cut:
            self._check_common(form, axis, "the bias or scale")
        if cut is None or all(size == 1 for size in form.sizes):
            if form.rows or form.cut or form.partial:
                raise Refused("expected a whole bias or scale; found a part", 3)
            return None
        if form.rows or form.partial or form.cut is None or form.axis != axis or _span(form.cut) != _span(cut):
            raise Refused("expected the part of the bias or scale that goes with these columns; found another", 3)
        if form.cut.dim != len(form.sizes) - 1:
            raise Refused("expected a bias or scale of the columns; found another", 3)
        return None

    def _elementwise(self, node: fx.Node, at: Mapping[fx.Node, Form]) -> Form:
        axis = _agreed(*at.values())
        found = self._found(node, at)
        sizes = shape(found[1])
        kinds = {(f.rows, f.count) for f in at.values() if f.rows}
        cuts = {_flat_cut(f) for f in at.values() if f.cut}
        if len(kinds) > 1 or len(cuts) > 1:
            raise Refused("expected operands with the same rows and columns; found others", 3)
        rows, count = next(iter(kinds), ("", None))
        cut = next(iter(cuts), None)
        for form in at.values():
            mine = _flat_sizes(form)
            if form.rows and len(form.sizes) != 2:
                raise Refused(f"expected rows of a matrix; found rows of {list(form.sizes)}", 2)
            if rows and not form.rows and mine[0] != 1:
                raise Refused("expected the same rows of every operand; found this rank's and others", 3)
            if rows == "all" and not form.rows:
                self._check_common(form, axis, "an operand of all ranks' rows,")
            if cut and (form.cut is None) != (mine[cut.dim] == 1):
                raise Refused("expected the same columns of every operand; found parts and wholes", 3)
        partial = any(f.partial for f in at.values())
        if partial and cut:
            raise Refused("expected summands of all columns; found a part of them", 3)
        if partial:
            self._check_linear(node, at, axis)
        assert len(sizes) == 2
        return Form(found, rows, count, cut, partial, axis)

    def _check_linear(self, node: fx.Node, at: Mapping[fx.Node, Form], axis: Axis | None) -> None:
        """The op of the sum is the sum of the op of the summands."""
        name, args = op_name(node.target), list(node.args)
        summands = [n for n, f in at.items() if f.partial]
        if name in ADDED and len(summands) == len(at) and args[1] in at:
            return
        scaled = name in SCALED and len(summands) == 1 and args.count(summands[0]) == 1 and not node.kwargs
        if scaled and (name != "aten::div" or args[0] is summands[0]):
            for other in (f for f in at.values() if not f.partial and f.rows != "all"):
                self._check_common(other, axis, "a factor of summands,")
            return
        raise Refused(f"expected an op linear in its summands; found {told_op(node)}: reduce first", 3)

    def _split(self, node: fx.Node, at: Mapping[fx.Node, Form], shapes: Mapping[fx.Node, Shape]) -> list[Form]:
        """Segments of the columns: each rank's part of a piece is a piece of its part."""
        (source,) = at
        form = at[source]
        ranges = pieces_of(self.arguments, node, shapes[source])
        whole = flat(form.view)
        if ranges is None or whole is None or form.partial:
            raise Refused(f"expected pieces of columns; found {told_op(node)}", 1)
        if form.cut is None or form.cut.dim != len(form.sizes) - 1:
            raise Refused(f"expected pieces of a part of the columns; found {told_op(node)} of all of them", 1)
        assert form.axis is not None
        return [self._piece(form, whole, *one) for one in ranges]

    def _piece(self, form: Form, whole: View, first: Size, last: Size, step: int) -> Form:
        """Columns ``first`` to ``last`` of this rank's part, or every ``step``-th from ``first`` on."""
        assert form.cut is not None and form.axis is not None
        inner = form.cut.inner
        low, high = divide(first, inner), divide(last, inner)
        wide, piece, cut = times(form.axis.size, inner), None, None
        if step > 1:
            # Column s + k*j of the part of rank r is column s + k*(j + r*inner/k) of all, where k divides inner.
            part = divide(inner, step)
            if part is not None:
                piece = self.original.pieces.get((whole, first, times(form.cut.outer, wide), step))
                cut = (form.cut.outer, part)
        elif low is not None and high is not None:
            piece = self.original.pieces.get((whole, times(low, wide), times(high, wide), 1))
            cut = (high - low, inner)
        if piece is None or cut is None:
            every = f", every {step}th," if step > 1 else ""
            expected = f"segments of {inner} columns that the original has"
            raise Refused(f"expected {expected}; found columns {first}:{last}{every}", 3)
        return replace(form, view=piece, cut=Cut(len(shape(piece[1])) - 1, *cut))

    def _halves(self, node: fx.Node, at: Mapping[fx.Node, Form]) -> Form:
        (form,) = at.values()
        segments, name = HALVED[op_name(node.target)]
        dim = self.arguments.arguments(node)[name] % len(form.sizes)
        if form.partial or form.cut is None or dim != len(form.sizes) - 1 or len(form.sizes) != 2:
            raise Refused(f"expected both halves' parts of the columns; found {told_op(node)} of others", 3)
        if form.cut.dim != dim or form.cut.outer != segments:
            raise Refused(f"expected {segments} segments of columns; found {form.cut.outer}", 3)
        return replace(form, view=self._found(node, at), cut=replace(form.cut, outer=1))


def _span(cut: Cut) -> tuple[Size, Size]:
    return cut.outer, cut.inner


def _agreed(*forms: Form) -> Axis | None:
    """The one group of all ``forms``."""
    axes = list(dict.fromkeys(f.axis for f in forms if f.axis is not None))
    if len(axes) > 1:
        raise Refused(f"expected one group; found {', '.join(a.group_name for a in axes)}", 3)
    return axes[0] if axes else None


def _flat_sizes(form: Form) -> Shape:
    sizes = form.sizes
    return product(sizes[:-1]), sizes[-1] if sizes else 1


def _flat_cut(form: Form) -> Cut:
    """The cut of the last dim, or of the first of a matrix, as one of a matrix."""
    assert form.cut is not None
    ndim = len(form.sizes)
    if form.cut.dim == ndim - 1:
        return replace(form.cut, dim=1)
    if ndim == 2:
        return form.cut
    raise Refused("expected a part of the columns; found a part of another dim", 3)
