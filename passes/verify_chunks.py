"""For the proof of FlashComm 2: which rows and columns of which ranks a tensor holds, and what moving makes of that.

Elements are followed by index arithmetic. A tensor of rank r = i + jG holds, at each place, an element of what all
ranks hold: ``rank*S + row*width + column``, which is a sum of digits (``verify_index``) and of multiples of i and j. An
all-to-all, a reduce-scatter and an all-gather exchange i or j for a digit.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import sympy
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import group_name_of, is_wait
from cpcompile.passes.verify_arguments import Argument, Refused, communicates, op_name, reshaped
from cpcompile.passes.verify_index import (
    Digit,
    Dims,
    Size,
    divide,
    is_row_major,
    merged,
    plain,
    product,
    row_major,
    same,
    shape,
    times,
)

# What a whole rank's rows are: larger than any row or column, so that the digits of ranks never run on into rows.
RANK = sympy.Symbol("S", integer=True, positive=True)
OWN, OVER_ODP, OVER_TP = "this rank's summand", "summed over ODP", "summed over tp"
_C10D = "_c10d_functional::"


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
        if kind == "all_to_all_single" and self.odp.owns(group) and value.summed == OWN:  # it may be tp's group too
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


def alike(a: Value, b: Value) -> bool:
    """Whether two statements say the same of two tensors."""
    if (a.of, a.width, a.summed, len(a.pads)) != (b.of, b.width, b.summed, len(b.pads)):
        return False
    numbers: Collection[tuple[Size, Size]] = [*zip(a.at, b.at, strict=True)]
    numbers = [*numbers, *(pair for x, y in zip(a.pads, b.pads, strict=True) for pair in zip(x, y, strict=True))]
    if [len(dim) for dim in a.dims] != [len(dim) for dim in b.dims]:
        return False
    digits = zip((d for dim in a.dims for d in dim), (d for dim in b.dims for d in dim), strict=True)
    return all(same(x, y) for x, y in numbers) and all(same(x[0], y[0]) and same(x[1], y[1]) for x, y in digits)
