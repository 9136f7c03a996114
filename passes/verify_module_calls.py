"""The original's calls, for the static proof of module tensor parallelism, and what their operands are.

Before: a functional ATen graph. After: every product, elementwise op, slice of columns and lookup is found by its
operands as matrices, whatever batch dims they have there; a product with a bias is also one without and a sum.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload

from cpcompile.axes import Axis
from cpcompile.passes.verify_arguments import LAST, Arguments, View, is_mutable, is_random, op_name
from cpcompile.passes.verify_index import Shape, Size, product, regroup, shape
from cpcompile.passes.verify_module_values import flat
from cpcompile.passes.verify_numbering import Numbering

NO_AXIS = Axis("", "", 1, 0, (0,))  # no collective is over it


@dataclass(frozen=True)
class Operands:
    """Which argument of ``[R, K] x [K, M] -> [R, M]`` is what; all names are those of the op's schema.

    Args:
        rows: ``[R, K]``.
        weight: ``[K, M]``.
        bias: ``[M]``, added once.
        by_row: one number for each of R, or one for all.
        by_column: one number for each of M, or one for all.
        unscaled: results are no sums of summands where these are given.
        ones: nor where these are not 1.
    """

    rows: str
    weight: str
    bias: str = ""
    by_row: tuple[str, ...] = ()
    by_column: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()


# native_functions.yaml; the schema of torch_npu 2.13. An offset or another scale is of a result that is quantised.
MULTIPLIED: Mapping[str, Operands] = {
    "aten::mm": Operands("self", "mat2"),
    "aten::_int_mm": Operands("self", "mat2"),
    "aten::addmm": Operands("mat1", "mat2", "self", ones=("beta", "alpha")),
    "aten::_scaled_mm": Operands("self", "mat2", "bias", ("scale_a",), ("scale_b",), ("scale_result",)),
    "npu::npu_quant_matmul": Operands(
        "x1", "x2", "bias", ("pertoken_scale",), ("scale",), ("offset", "y_scale", "x1_scale", "x2_scale")
    ),
}
CASTS = frozenset({"aten::_to_copy"})
PIECES = frozenset({"aten::slice", "aten::split", "aten::split_with_sizes"})
# Ops on two halves of the last dim: how many segments of columns each takes, and the argument that names the dim.
HALVED: Mapping[str, tuple[int, str]] = {"npu::npu_swiglu": (2, "dim")}


def is_elementwise(node: fx.Node) -> bool:
    """Whether every element of the result depends on the same elements of the operands, and on nothing else."""
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace not in ("aten", "prims") or is_random(node):
        return False
    return not is_mutable(node) and (torch.Tag.pointwise in target.tags or op_name(target) in CASTS)


def signature(arguments: Arguments, node: fx.Node, at: Mapping[fx.Node, View], without: str = "") -> object:
    """What calls of the same op on the same values have in common, however they spell their arguments."""
    given = [(k, None if k == without else v) for k, v in arguments.arguments(node).items()]
    return node.target, tuple((k, arguments.frozen(v, at)) for k, v in given)


class Calls(Numbering):
    """The original graph, numbered, its calls found by operands of which only some rows and columns are at hand.

    Args:
        by_rows: signature of a product or elementwise op, all operands as matrices → the result as a matrix.
        pieces: matrix, first and last of its columns and the step between them → the value that is these columns.
        lookups: table and ids → the rows as a matrix.
    """

    def __init__(self, gm: fx.GraphModule, axis: Axis) -> None:
        """As for a numbering."""
        super().__init__(gm, axis)
        self.by_rows: dict[object, View] = {}
        self.pieces: dict[tuple[View, Size, Size, int], View] = {}
        self.lookups: dict[tuple[View, View], View] = {}
        self._elements: dict[int, Size] = {}

    @classmethod
    def of_graph(cls, gm: fx.GraphModule) -> Calls:
        """Number ``gm``; its own collectives are calls like any other."""
        found = cls.of(gm, NO_AXIS, lambda _: False, ())
        assert isinstance(found, Calls)
        for node, views in found.env.items():
            found._elements.update({content: product(shape(dims)) for content, dims in views})
            if isinstance(node.target, OpOverload) and not is_mutable(node):
                found._index(node, views)
        return found

    def size_of(self, content: int) -> Size:
        """Elements of a content."""
        return self._elements[content]

    def common(self, stated: Collection[str]) -> frozenset[int]:
        """Contents that are the same on all ranks where the nodes called ``stated`` are."""
        found: set[int] = set()
        for node, views in self.env.items():
            operands = [self.env[n][0][0] for n in node.all_input_nodes if self.env.get(n)]
            follows = bool(operands) and all(c in found for c in operands) and _is_function(node)
            if node.name in stated or follows:
                found |= {content for content, _ in views if content not in self.volatile}
        return frozenset(found)

    def _unnamed(self, sizes: Shape, name: str) -> View:
        """A new value of ``sizes``, called ``name`` in messages."""
        view = self._content(sizes)
        self._elements[view[0]] = product(sizes)
        self.names[view] = self.names[view[0], None] = name
        return view

    def _add_sum(self, a: View, b: View, result: View) -> None:
        """Note that ``a + b`` is ``result``."""
        for pair in ((a, b), (b, a)):
            self.calls.setdefault((torch.ops.aten.add.Tensor, pair, (), None, 0), (result,))

    def _index(self, node: fx.Node, views: Sequence[View]) -> None:
        name = op_name(node.target)
        at = {n: self.env[n][0] for n in node.all_input_nodes if self.env.get(n)}
        if any(content in self.volatile for content, _ in [*at.values(), *views]):
            return
        flats = {n: f for n, v in at.items() if (f := flat(v)) is not None}
        out = flat(views[0]) if len(views) == 1 else None
        if name in PIECES:
            self._index_pieces(node, at, views)
        elif out is not None and len(flats) == len(at):
            if name == "aten::embedding":
                table, ids = (at[n] for n in node.args[:2])  # type: ignore[index]
                line = regroup(ids[1], (product(shape(ids[1])),))
                if line is not None:
                    self.lookups[table, (ids[0], line)] = out
            elif name in MULTIPLIED or name in HALVED or (is_elementwise(node) and at):
                self.by_rows.setdefault(signature(self, node, flats), out)
            if name in MULTIPLIED:
                self._index_without_bias(node, at, flats, views[0])

    def _index_without_bias(
        self, node: fx.Node, at: Mapping[fx.Node, View], flats: Mapping[fx.Node, View], result: View
    ) -> None:
        """A product with a bias is the product without one, which the original does not name, and the bias."""
        operands, args = MULTIPLIED[op_name(node.target)], self.arguments(node)
        bias: Any = args.get(operands.bias)
        if bias not in at or len(shape(at[bias][1])) != 1 or any(args[name] != 1 for name in operands.ones):
            return
        alone = signature(self, node, flats, operands.bias)
        if node.target is torch.ops.aten.addmm.default:
            found = {"self": flats[args["mat1"]], "mat2": flats[args["mat2"]]}
            alone = torch.ops.aten.mm.default, tuple(found.items())
        elif not args[operands.rows].meta["val"].dtype.is_floating_point:
            return  # a bias of integers is added before the scale
        if alone not in self.by_rows:
            self.by_rows[alone] = self._unnamed(shape(result[1]), f"{node.name} without its bias")
        unbiased = self.by_rows[alone]
        self._add_sum(unbiased, at[bias], result)

    def _index_pieces(self, node: fx.Node, at: Mapping[fx.Node, View], views: Sequence[View]) -> None:
        source = next(iter(at.values()))
        ranges = pieces_of(self, node, shape(source[1]))
        whole = flat(source)
        if ranges is None or whole is None:
            return
        for (first, last, step), view in zip(ranges, views, strict=True):
            self.pieces.setdefault((whole, first, last, step), view)


def _is_function(node: fx.Node) -> bool:
    """Whether equal operands give equal results on ranks whose graphs may differ in integer constants."""
    if not isinstance(node.target, OpOverload):
        return False
    if op_name(node.target) in MULTIPLIED:
        return True
    constants = [*node.args, *node.kwargs.values()]
    return is_elementwise(node) and not any(type(a) is int or isinstance(a, list | tuple) for a in constants)


def pieces_of(arguments: Arguments, node: fx.Node, sizes: Shape) -> list[tuple[Size, Size, int]] | None:
    """First and last column and step of each result of a slice or split of the last dim; None for another dim.

    With a step, ``last`` is where all columns end, or there is no answer.
    """
    args, name = arguments.arguments(node), op_name(node.target)
    if args["dim"] % len(sizes) != len(sizes) - 1:
        return None
    width = sizes[-1]
    if name == "aten::slice":
        first, last, step = args["start"] or 0, args["end"], args["step"]
        last = width if last is None or last == LAST else last
        if isinstance(width, int) and isinstance(first, int) and isinstance(last, int):
            first, last, _ = slice(first, last).indices(width)
        whole_steps = isinstance(first, int) and isinstance(width, int) and first < step and width % step == 0
        return [(first, last, step)] if step == 1 or (whole_steps and last == width) else None
    widths = args.get("split_sizes")
    if widths is None:
        if not isinstance(width, int) or not isinstance(args["split_size"], int):
            return None
        step = args["split_size"]
        return [(first, min(first + step, width), 1) for first in range(0, width, step)]
    firsts = [sum(widths[:k]) for k in range(len(widths))]
    return [(first, first + width, 1) for first, width in zip(firsts, widths, strict=True)]
