"""The proof of FlashComm 2: every rank has the rows and columns that it should, for every T, and nothing else changed.

Elements are followed by index arithmetic. A tensor of rank r = i + jG holds, at each place, an element of what all
ranks hold: ``rank*S + row*width + column``, which is a sum of digits (``verify_index``) and of multiples of i and j. An
all-to-all, a reduce-scatter and an all-gather exchange i or j for a digit. Each sum over tp of the original is so a
statement; a value of the rewritten graph with the same statement is that sum. All other calls must be the original's
(``verify_same_calls``). Shares no code with the pass. Rows of padding may hold anything.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import group_name_of, is_wait
from cpcompile.passes.verify_arguments import Argument, Arguments, Refused, communicates, op_name, reshaped
from cpcompile.passes.verify_gathered import GatheredWeights
from cpcompile.passes.verify_index import (
    Digit,
    Dims,
    Shape,
    Size,
    divide,
    is_row_major,
    merged,
    plain,
    product,
    row_major,
    same,
    shape,
    tensor_shape,
    times,
)
from cpcompile.passes.verify_same_calls import Copies, Original, check_shape
from cpcompile.passes.verify_static import Failure, Proof

# What a whole rank's rows are: larger than any row or column, so that the digits of ranks never run on into rows.
RANK = sympy.Symbol("S", integer=True, positive=True)
OWN, OVER_ODP, OVER_TP = "this rank's summand", "summed over ODP", "summed over tp"
_C10D = "_c10d_functional::"
# Op -> its row operand, weight and bias: the products of which the proof knows that a row of the result is a row of the
# operand times the weight. Sources: native_functions.yaml, torch_npu's schemas.
ROW_PRODUCTS: Mapping[str, tuple[str, str, str]] = {
    "aten::mm": ("self", "mat2", ""),
    "aten::_int_mm": ("self", "mat2", ""),
    "aten::addmm": ("mat1", "mat2", "self"),
    "aten::_scaled_mm": ("self", "mat2", "bias"),
    "npu::npu_quant_matmul": ("x1", "x2", "bias"),
}
_ROW_SCALES = ("scale_a", "pertoken_scale")


@dataclass(frozen=True)
class Value:
    """One statement about a tensor of rank ``i + jG``.

    Args:
        of: the operand ``"rows"`` or the result ``"sums"`` of a product, and that node's number in the original.
        width: the size of a row.
        dims: the tensor's digits in ``rank*S + row*width + column``.
        at: what i and j count in the same.
        pads: how the rows were padded, each as ``(rows before, T, rows within, N)``.
        summed: over which ranks.
    """

    of: tuple[str, int]
    width: Size
    dims: Dims
    at: tuple[Size, Size]
    pads: tuple[tuple[Size, ...], ...] = ()
    summed: str = OWN


def prove_flashcomm2(
    original: fx.GraphModule,
    rewritten: fx.GraphModule,
    axes: tuple[Axis, Axis, Axis],
    recipes: Mapping[str, Any],
    same_on_ranks: Callable[[str], bool],
) -> Proof:
    """Prove that ``rewritten`` with inputs changed by ``recipes`` computes what ``original`` does.

    All ranks of tp run graphs that are alike but for the rows and vocabulary that each takes as its own.

    Args:
        original: functional ATen graph of one rank, ``meta["val"]`` set.
        rewritten: the graph that is to replace it.
        axes: this rank's tp, OTP and ODP.
        recipes: graph input → ``Gather`` or ``Sum``, or nothing where it stays.
        same_on_ranks: whether the graph input of that name is the same on every rank of tp.
    """
    return _Prover(original, rewritten, axes, recipes, same_on_ranks).run()


class Moves:
    """What moving makes of a value, on the ranks of tp."""

    def __init__(self, tp: Axis, otp: Axis, odp: Axis) -> None:
        """Check the groups' ranks: tp's are ``i + jG``, OTP's those of one i, ODP's those of one j."""
        self.tp, self.otp, self.odp = tp, otp, odp
        self.width = odp.size
        wanted = [tp.ranks[r] for r in range(tp.size) if r % odp.size == tp.rank % odp.size]
        beside = [tp.ranks[r] for r in range(tp.size) if r // odp.size == tp.rank // odp.size]
        self.groups_fit = list(otp.ranks) == wanted and list(odp.ranks) == beside and len(set(tp.ranks)) == tp.size

    @property
    def own(self) -> tuple[Size, Size]:
        """What i and j count for this rank's own elements."""
        return self.by_rank(RANK)

    def by_rank(self, step: Size) -> tuple[Size, Size]:
        """What i and j count where ``r = i + jG`` counts ``step``; j, where it is never but 0, counts nothing."""
        return step, times(self.width, step) if self.otp.size > 1 else 0

    def moved(self, node: fx.Node, args: Mapping[str, Argument], value: Value) -> Value | None:
        """``value`` after ``node``, None for an op that does not move.

        Raises:
            Refused: the op moves it in a way about which nothing is known.
        """
        name = op_name(node.target)
        if is_wait(node):
            return value
        dims = reshaped(node, args, value.dims)
        if dims is not None:
            return replace(value, dims=tuple(merged(dim) for dim in dims))
        if name == "aten::constant_pad_nd":
            return self._padded(value, args)
        if name == "aten::slice":
            return self._unpadded(value, args)
        if not communicates(node):
            return None
        return self._communicated(name.removeprefix(_C10D), group_name_of(node), value, args)

    def _communicated(self, kind: str, group: str, value: Value, args: Mapping[str, Argument]) -> Value:
        axis = next((a for a in (self.tp, self.otp, self.odp) if a.owns(group)), None)
        if axis is None or args.get("group_size", axis.size) != axis.size or args.get("reduce_op", "sum") != "sum":
            raise Refused(f"expected a sum or move over tp, OTP or ODP; found {kind} over {group}", 2)
        if kind == "all_to_all_single" and axis is self.odp and value.summed == OWN:
            return self._exchanged(value, args)
        whole = {OWN: self.tp, OVER_ODP: self.otp}.get(value.summed)
        if kind in ("all_reduce", "reduce_scatter_tensor") and axis is whole and value.of[0] == "sums":
            if value.at[1] != 0 or (axis is self.tp and value.at[0] != 0):
                raise Refused(f"expected the same rows on all ranks of the sum; found {self.rows(value)}", 3)
            return self._scattered(value, axis) if kind != "all_reduce" else replace(value, summed=OVER_TP)
        if kind == "all_gather_into_tensor" and axis is self.tp and value.summed == OVER_TP:
            if not same(value.at[1], self.by_rank(value.at[0])[1]):
                raise Refused(f"expected rank r's rows to be a multiple of r; found {self.rows(value)}", 3)
            dims = (merged(((self.tp.size, value.at[0]), *value.dims[0])), *value.dims[1:])
            return replace(value, dims=dims, at=(0, 0))
        raise Refused(f"expected what completes {value.summed}; found {kind} over {axis.name}", 2)

    def _exchanged(self, value: Value, args: Mapping[str, Argument]) -> Value:
        """Block b goes to ODP's rank b, and comes from it: i and the block number change places."""
        blocks, rest = self._leading(value.dims, self.odp.size)
        part = divide(shape(value.dims)[0], self.odp.size)
        for name in ("input_split_sizes", "output_split_sizes"):
            splits = args[name]
            if len(splits) != self.odp.size or part is None or not all(same(s, part) for s in splits):
                raise Refused(f"expected {self.odp.size} {name} of {part}; found {list(splits)}", 3)
        dims = (merged(((self.odp.size, value.at[0]), *rest)), *value.dims[1:])
        return replace(value, dims=dims, at=(blocks[1], value.at[1]))

    def _scattered(self, value: Value, axis: Axis) -> Value:
        (_, step), rest = self._leading(value.dims, axis.size)
        own = self.by_rank(step) if axis is self.tp else (value.at[0], step)
        return replace(value, dims=(merged(rest), *value.dims[1:]), at=own, summed=OVER_TP)

    def _leading(self, dims: Dims, blocks: int) -> tuple[Digit, tuple[Digit, ...]]:
        """The digit of ``blocks`` equal parts of dim 0, and the digits within a part."""
        size, stride = dims[0][0] if dims[0] else (1, 1)
        kept = divide(size, blocks)
        if kept is None:
            raise Refused(f"expected dim 0 in {blocks} parts; found {list(dims[0])}", 3)
        return (blocks, times(stride, kept)), ((kept, stride), *dims[0][1:])

    def _padded(self, value: Value, args: Mapping[str, Argument]) -> Value:
        sizes, amounts = shape(value.dims), args["pad"]
        dims = [len(sizes) - 1 - k // 2 for k, amount in enumerate(amounts) if k % 2 and amount != 0]
        local = replace(value, at=(0, 0))
        if len(dims) != 1 or any(amounts[::2]) or args["value"] != 0 or not is_row_major(local.dims):
            raise Refused("expected rows of zeros behind the rows; found other padding", 2)
        (dim,) = dims
        more = amounts[2 * (len(sizes) - 1 - dim) + 1]
        within = divide(product(sizes[dim + 1 :]), value.width)
        if within is None or value.at not in ((0, 0), self.own):
            raise Refused("expected rows of zeros; found zeros among the columns", 2)
        after = plain(sympy.expand(sizes[dim] + more))
        pads = (*value.pads, (product(sizes[:dim]), sizes[dim], within, after))
        return replace(value, dims=row_major((*sizes[:dim], after, *sizes[dim + 1 :])), pads=pads)

    def _unpadded(self, value: Value, args: Mapping[str, Argument]) -> Value:
        """All rows without those of the last padding."""
        sizes, dim = shape(value.dims), args["dim"] % len(value.dims)
        if not value.pads or not is_row_major(value.dims) or value.at != (0, 0):
            raise Refused(f"expected whole padded rows; found a slice of {self.rows(value)}", 2)
        before, rows, within, padded = value.pads[-1]
        lies = same(product(sizes[:dim]), before) and same(sizes[dim], padded)
        lies = lies and same(product(sizes[dim + 1 :]), times(within, value.width))
        if not lies or (args["start"] or 0) != 0 or args["step"] != 1 or not same(args["end"], rows):
            raise Refused(f"expected rows 0:{rows} of {padded}; found {args['start']}:{args['end']} of {sizes[dim]}", 3)
        return replace(value, dims=row_major((*sizes[:dim], rows, *sizes[dim + 1 :])), pads=value.pads[:-1])

    def multiplied(self, value: Value, k: Size, result: tuple[int, Size]) -> Value:
        """The product of rows that ODP gathered the columns of, with its weight; ``result`` is its number and width.

        Raises:
            Refused: the columns are not those of the weight's rows, or rows are not whole.
        """
        if value.of[0] != "rows" or len(value.dims) != 2:
            raise Refused("expected rows of two dims", 1)
        columns = merged(((self.odp.size, RANK), (k, 1)))
        if merged(value.dims[1]) != columns:
            raise Refused(f"expected the columns of ODP's ranks in order; found digits {list(value.dims[1])}", 3)
        i, j = value.at
        j = plain(sympy.expand(j - self.own[1]))
        number, width = result
        digits = [(size, self._row(stride, value.width)) for size, stride in value.dims[0]]
        rows = merged((size, times(step, width)) for size, step in digits)
        at = (times(self._row(i, value.width), width), times(self._row(j, value.width), width))
        dims = (rows, () if width == 1 else ((width, 1),))
        summed = OVER_TP if self.otp.size == 1 else OVER_ODP
        return Value(("sums", number), width, dims, at, value.pads, summed)

    def _row(self, stride: Size, width: Size) -> Size:
        rows = divide(stride, width)
        if rows is None or sympy.sympify(rows).has(RANK):
            raise Refused(f"expected rows of one rank's columns each; found a step of {stride}", 3)
        return rows

    def rows(self, value: Value) -> str:
        """``value`` in words."""
        return f"{value.summed}, i counts {value.at[0]}, j counts {value.at[1]}, digits {list(value.dims)}"


class _Prover:
    def __init__(
        self,
        original: fx.GraphModule,
        rewritten: fx.GraphModule,
        axes: tuple[Axis, Axis, Axis],
        recipes: Mapping[str, Any],
        same_on_ranks: Callable[[str], bool],
    ) -> None:
        self.moves, self.gm = Moves(*axes), rewritten
        self.original = Original(original, axes[0])
        self.copies = Copies(self.original, rewritten, axes[0])
        self.weights = GatheredWeights(self.original, self.copies, axes[2], recipes, same_on_ranks)
        self.values: dict[fx.Node, Value] = {}
        self.waiting: set[fx.Node] = set()
        self.replaced: set[int] = set()
        self.products: dict[tuple[int, int], list[fx.Node]] = {}
        self.sums: list[tuple[Value, fx.Node]] = self._sums()
        self.facts: dict[str, str] = {}

    def run(self) -> Proof:
        failures = [Failure(node, message) for node, message in self.weights.check_recipes()]
        if not self.moves.groups_fit:
            failures.append(Failure("placeholder", "expected OTP {i + jG} and ODP {jG ...} of tp; found other ranks"))
        for node in self.gm.graph.nodes:
            try:
                if node.op != "output" and not self.copies.arguments.visit_size(node, self._shape):
                    self._visit(node)
            except Refused as refused:
                failures.append(Failure(node.name, f"{node.name}: {refused}"))
        failures += [Failure(name, message) for name, message in self.copies.check_rest(self.replaced)]
        return Proof(not failures, tuple(failures), self.facts)

    def _sums(self) -> list[tuple[Value, fx.Node]]:
        """The original's sums over tp of products: what each says, and its wait."""
        found, values = [], dict[fx.Node, Value]()
        for node in self.original.gm.graph.nodes:
            form = ROW_PRODUCTS.get(op_name(node.target)) if node.op == "call_function" else None
            source = node.all_input_nodes[0] if node.all_input_nodes else None
            if form is not None:
                args = self.original.arguments.arguments(node)
                key = (self.original.number(args[form[0]]), self.original.number(args[form[1]]))
                self.products.setdefault(key, []).append(node)
                sizes = tensor_shape(node.meta["val"])
                values[node] = Value(("sums", self.original.number(node)), sizes[1], row_major(sizes), (0, 0))
            elif source in values and node.op == "call_function":
                try:
                    moved = self.moves.moved(node, self.original.arguments.arguments(node), values[source])
                except Refused:
                    continue
                if moved is None or (moved.summed == OVER_TP and not is_wait(node) and not communicates(node)):
                    continue
                values[node] = moved
                if is_wait(node) and moved.summed == OVER_TP:
                    found.append((moved, node))
        return found

    def _shape(self, node: fx.Node) -> Shape:
        if node in self.values:
            return shape(self.values[node].dims)
        if node in self.copies.at:
            return shape(self.copies.at[node][1])
        raise Refused(f"the size of {node} is asked for, which was not proven")

    def _visit(self, node: fx.Node) -> None:
        if self.weights.visit(node) or any(not self._is_known(n) for n in node.all_input_nodes):
            return  # or the failure of an operand has been told
        waiting = next((n for n in node.all_input_nodes if n in self.waiting and not is_wait(node)), None)
        if waiting is not None:
            raise Refused(f"expected the wait_tensor of {waiting}; found {waiting} itself", 2)
        reason: Refused | None = None
        try:
            self.copies.copy(node)
        except Refused as refused:
            reason = refused
        try:
            value = self._value(node)
        except Refused as refused:
            value, reason = None, max((r for r in (reason, refused) if r), key=lambda r: r.specific)
        if value is not None:
            self._state(node, value)
        elif node not in self.copies.at:
            assert reason is not None
            moved = next((n for n in node.all_input_nodes if n in self.values and n not in self.copies.at), None)
            if moved is not None and reason.specific <= 1:
                found = self.moves.rows(self.values[moved])
                raise Refused(f"expected {moved} to be a sum of the original; found {found}")
            raise reason

    def _is_known(self, node: fx.Node) -> bool:
        known = (self.copies.at, self.copies.arguments.sizes, self.values, self.weights.at, self.weights.summed)
        return any(node in one for one in known)

    def _state(self, node: fx.Node, value: Value) -> None:
        check_shape(node, shape(value.dims))
        self.values[node] = value
        self.facts[node.name] = self.moves.rows(value)
        if communicates(node) and not is_wait(node):
            self.waiting.add(node)
            return
        wait = next((w for said, w in self.sums if _alike(said, value)), None)
        if wait is not None and node not in self.copies.at:
            self.copies.take(node, self.original.at[wait])
            self.replaced |= {self.original.number(n) for n in (wait, *wait.all_input_nodes)}

    def _value(self, node: fx.Node) -> Value | None:
        arguments: Arguments = self.copies.arguments
        if node.op != "call_function":
            return None
        if op_name(node.target) in ROW_PRODUCTS:
            return self._product(node, arguments.arguments(node))
        source = node.all_input_nodes[0] if node.all_input_nodes else None
        value = None if source is None else self.values.get(source) or self._own_rows(source)
        return None if value is None else self.moves.moved(node, arguments.arguments(node), value)

    def _own_rows(self, node: fx.Node) -> Value | None:
        """A copy of the rows operand of one of the original's products, on this rank."""
        number = self.copies.at[node][0] if node in self.copies.at else None
        if number is None or all(rows != number for rows, _ in self.products):
            return None
        sizes = shape(self.copies.at[node][1])
        return Value(("rows", number), sizes[-1], row_major(sizes), self.moves.own) if len(sizes) == 2 else None

    def _product(self, node: fx.Node, args: Mapping[str, Argument]) -> Value | None:
        rows, weight, bias = ROW_PRODUCTS[op_name(node.target)]
        value, found = self.values.get(args[rows]), self.weights.at.get(args[weight])
        if value is None or found is None:
            return None
        number, dim = found
        if dim != 0:
            raise Refused(f"expected the rows of ODP's weights one after another; found dim {dim}", 3)
        for old in self.products.get((value.of[1], number), ()):
            theirs = self.original.arguments.arguments(old)
            others = [n for n in theirs if n not in (rows, weight, bias)]
            if old.target is node.target and all(self._same_argument(n, args[n], theirs[n]) for n in others):
                if bias and not self.weights.is_sum(args[bias], theirs[bias]):
                    raise Refused(f"expected the sum of ODP's {theirs[bias]}; found {args[bias]}", 3)
                width, k = tensor_shape(old.meta["val"])[1], tensor_shape(theirs[rows].meta["val"])[1]
                return self.moves.multiplied(value, k, (self.original.number(old), width))
        raise Refused("expected the weight of its rows' own product; found another", 3)

    def _same_argument(self, name: str, mine: Argument, theirs: Argument) -> bool:
        """Whether a factor of a product is the original's, and the same on all ranks."""
        if not isinstance(theirs, fx.Node):
            return bool(mine == theirs)
        alike = isinstance(mine, fx.Node) and self.copies.at.get(mine) == self.original.at[theirs]
        single = name not in _ROW_SCALES or product(tensor_shape(theirs.meta["val"])) == 1
        return alike and single and self.weights.is_same(theirs)


def _alike(a: Value, b: Value) -> bool:
    if (a.of, a.width, a.summed, len(a.pads)) != (b.of, b.width, b.summed, len(b.pads)):
        return False
    numbers: Collection[tuple[Size, Size]] = [*zip(a.at, b.at, strict=True)]
    numbers = [*numbers, *(pair for x, y in zip(a.pads, b.pads, strict=True) for pair in zip(x, y, strict=True))]
    if [len(dim) for dim in a.dims] != [len(dim) for dim in b.dims]:
        return False
    digits = zip((d for dim in a.dims for d in dim), (d for dim in b.dims for d in dim), strict=True)
    return all(same(x, y) for x, y in numbers) and all(same(x[0], y[0]) and same(x[1], y[1]) for x, y in digits)
