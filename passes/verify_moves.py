"""Values of the rewritten graph for the static proof, and what moving them between placements makes of them.

Padding, own rows, reduce-scatter, all-gather, and several values in one row are followed by index arithmetic: no chain
of ops is expected, any that leads to the same elements will do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import group_name_of
from cpcompile.passes.verify_arguments import (
    RESHAPES,
    Argument,
    Arguments,
    Refused,
    View,
    aliases,
    communicates,
    op_name,
    reshaped,
)
from cpcompile.passes.verify_index import (
    Dims,
    Rows,
    Shape,
    Size,
    Split,
    divide,
    is_row_major,
    product,
    row_major,
    same,
    shape,
    times,
)
from cpcompile.passes.verify_numbering import Numbering

# Ops of this project that put rows in another order; what they do is tested, not proven: tests/test_layout_ops.py.
DEALING = frozenset(f"cpcompile::{n}" for n in ("own_rows", "deal_rows", "collect_rows"))
MOVING = RESHAPES | DEALING | {"aten::cat", "aten::split_with_sizes"}


@dataclass(frozen=True)
class Value:
    """One true statement about a rewritten tensor.

    Args:
        pieces: contents side by side in each row, with their widths; one unless values travel together.
        dims: the tensor's digits in ``[pre, extent, post]``, or in the one content as a whole.
        extent: ``"T"`` all tokens, ``"N"`` all tokens and arbitrary pad rows, ``"L"`` this rank's rows of that.
        pre: what lies before the rows, if they have been told apart.
        post: the width of a row, likewise.
        partial: the sum of all ranks' copies is meant.
    """

    pieces: tuple[tuple[int, Size], ...]
    dims: Dims
    extent: str = "T"
    pre: Size = 1
    post: Size = 1
    partial: bool = False

    @property
    def content(self) -> int:
        """The one content of an undivided row."""
        return self.pieces[0][0]

    @property
    def whole(self) -> bool:
        """Whether this is all of one content (or its summand)."""
        return self.extent == "T" and len(self.pieces) == 1


def whole(view: View) -> Value:
    """The statement that a tensor is all of an original value."""
    return Value(((view[0], 1),), view[1])


class Mover:
    """Follows what moves values of one axis, given the original's numbers and the rewritten graph's arguments."""

    def __init__(self, original: Numbering, numbering: Arguments, axis: Axis, split: Split) -> None:
        """``original`` is numbered, ``numbering`` reads the rewritten graph, ``split`` says how rows are split."""
        self.original, self.numbering, self.axis, self.split = original, numbering, axis, split

    def moved(self, node: fx.Node, at: Mapping[fx.Node, Value]) -> list[tuple[Value, ...]]:
        """What padding, slicing, views and collectives of the axis make of ``at``, by index arithmetic alone."""
        name = op_name(node.target)
        if name not in MOVING and not communicates(node):
            return []
        args = self.numbering.arguments(node)
        operand = node.args[0] if node.args else None
        value = at.get(operand) if isinstance(operand, fx.Node) else None
        made: list[Value | None] = []
        if value is not None and any(c in self.original.volatile for c, _ in value.pieces) and not aliases(node):
            return []
        if name == "aten::cat":
            made = [self._joined(list(node.args[0]), at, args)]  # type: ignore[arg-type]
        elif value is None:
            return []
        elif (dims := reshaped(node, args, value.dims, value.extent == "L")) is not None:
            made = [replace(value, dims=dims)]
        elif name == "aten::constant_pad_nd":
            made = [self._padded(value, args)]
        elif name in DEALING:
            made = [self._dealt(name, value, args)]
        elif name == "aten::slice":
            made = [self._narrowed(value, args)]
        elif name == "aten::split_with_sizes":
            made = self._pieces(value, args)
        elif communicates(node):
            made = [self._communicated(node, value, args)]
        found = tuple(value for value in made if value is not None)
        return [found] if found and len(found) == len(made) else []

    def _communicated(self, node: fx.Node, value: Value, args: Mapping[str, Argument]) -> Value | None:
        kind, group = op_name(node.target).removeprefix("_c10d_functional::"), group_name_of(node)
        holdings = self.original.holdings
        alone = kind == "all_reduce" and value.whole and not value.partial
        if alone and self.original.leaves_copies(node, value.content):
            return value
        if not (holdings.same_ranks(group) if kind == "all_reduce" else holdings.same_order(group)):
            return None
        if args.get("group_size", self.axis.size) != self.axis.size:
            raise Refused(f"expected group_size {self.axis.size}; found {args['group_size']}", 3)
        if kind == "all_gather_into_tensor" and value.extent == "L":
            dims = self.split.gathered(value.dims, value.post)
            if dims is None or not self.split.unpadded:
                return None if dims is None else replace(value, dims=dims, extent="N")
            return self._unpadded(value, dims)
        if kind not in ("all_reduce", "reduce_scatter_tensor") or args["reduce_op"] != "sum":
            return None
        reduced = value if value.partial else self.as_partial(value)
        if reduced is None:
            if kind == "all_reduce" and value.whole:
                return None
            message = "expected a summand of one of the original all-reduces; found"
            raise Refused(f"{message} {self.describe(value)}: sum only what the original sums", 2)
        if kind == "all_reduce":
            return replace(reduced, partial=False) if reduced.whole else None
        scattered = self.split.scattered(reduced.dims)
        if scattered is None or reduced.extent == "L":
            raise Refused("expected each rank's rows one after another along dim 0; found them interleaved", 2)
        return self._own(reduced, *scattered)

    def _own(self, value: Value, dims: Dims, post: Size) -> Value | None:
        """``value`` with only this rank's rows, as ``dims``; a value not yet told into rows must need no padding."""
        if value.extent == "N":
            if post != value.post:
                return None
            return replace(value, dims=dims, extent="L", partial=False)
        pre = divide(product(shape(value.dims)), times(self.split.tokens, post))
        if not self.split.unpadded or pre is None or len(value.pieces) != 1:
            return None
        pieces = ((value.content, post),)
        return replace(value, pieces=pieces, dims=dims, extent="L", pre=pre, post=post, partial=False)

    def _padded(self, value: Value, args: Mapping[str, Argument]) -> Value | None:
        """All tokens and zeros up to ``N``, of a value whose tokens are a dim of their own."""
        amounts, sizes = args["pad"], shape(value.dims)
        assert isinstance(amounts, tuple)
        padded = [len(sizes) - 1 - k // 2 for k, amount in enumerate(amounts) if k % 2 and amount != 0]
        if len(padded) != 1 or any(amounts[::2]) or not value.whole or self.split.layout != "contiguous":
            return None
        at, amount = padded[0], amounts[2 * (len(sizes) - 1 - padded[0]) + 1]
        if sizes[at] != self.split.tokens or args["value"] not in (0, 0.0):
            return None
        if not same(amount + self.split.tokens, self.split.padded):
            raise Refused(f"expected zeros up to {self.split.padded} rows; found {amount} of them", 1)
        if is_row_major(value.dims):
            pre, post = product(sizes[:at]), product(sizes[at + 1 :])
            dims = row_major((*sizes[:at], self.split.padded, *sizes[at + 1 :]))
            return Value(((value.content, post),), dims, "N", pre, post, value.partial)
        rows = self.split.rows_apart(value.dims, at, self.split.tokens, self.split.padded)
        if rows is None:
            return None
        dims, pre, post = rows
        return Value(((value.content, post),), dims, "N", pre, post, value.partial)

    def _dealt(self, name: str, value: Value, args: Mapping[str, Argument]) -> Value | None:
        """Rows put in rank order, or this rank's of them, or back in token order."""
        sizes = shape(value.dims)
        dim = args["dim"] % len(sizes)
        expected = {"ranks": self.axis.size, "rank": self.axis.rank, "kind": self.split.layout}
        for key, wanted in expected.items():
            if args.get(key, wanted) != wanted:
                raise Refused(f"expected {key}={wanted}; found {args[key]}", 3)
        pre, post = product(sizes[:dim]), product(sizes[dim + 1 :])
        if not is_row_major(value.dims):
            return None
        if name == "cpcompile::collect_rows":
            if value.extent != "N" or value.partial or not same(sizes[dim], self.split.padded) or pre != value.pre:
                return None
            if not same(args["tokens"], self.split.tokens):
                raise Refused(f"expected {self.split.tokens} rows to be collected; found {args['tokens']}", 2)
            return self._unpadded(value, row_major((*sizes[:dim], self.split.tokens, *sizes[dim + 1 :])))
        if not value.whole or not same(sizes[dim], self.split.tokens):
            return None
        own = name == "cpcompile::own_rows"
        if own and (value.partial or not self.original.replicated[value.content]):
            raise Refused(f"expected a value that all ranks share; found own rows of {self.describe(value)}", 2)
        rows, extent = (self.split.local, "L") if own else (self.split.padded, "N")
        dims = row_major((*sizes[:dim], rows, *sizes[dim + 1 :]))
        return Value(((value.content, post),), dims, extent, pre, post, value.partial)

    def _narrowed(self, value: Value, args: Mapping[str, Argument]) -> Value | None:
        """A slice of the rows: this rank's, or all without the padding."""
        sizes, (dim, first, last) = shape(value.dims), _slice_bounds(args, shape(value.dims))
        if value.extent == "N" and self.split.layout != "contiguous" and same(sizes[dim], self.split.padded):
            raise Refused(f"expected {self.split.layout} rows to be collected; found {first}:{last} of them", 2)
        if value.extent == "N" and value.dims[dim] == ((self.split.padded, value.post),) and args["step"] == 1:
            # Rows that are a dim of their own, wherever the others lie.
            rest = self.split.rescale(value.dims, self.split.padded, self.split.tokens, value.post)
            if rest is not None and same(first, 0) and same(last, self.split.tokens) and not value.partial:
                return self._unpadded(value, (*rest[:dim], ((self.split.tokens, value.post),), *rest[dim + 1 :]))
        if args["step"] != 1 or value.partial or value.extent == "L":
            return None
        if not is_row_major(value.dims):
            return self._own_apart(value, dim, first, last)
        pre, post = product(sizes[:dim]), product(sizes[dim + 1 :])
        told = value.extent == "N"
        if sizes[dim] != self.split.padded or (told and pre != value.pre):
            return None
        if told and same(first, 0) and same(last, self.split.tokens):
            dims = row_major((*sizes[:dim], self.split.tokens, *sizes[dim + 1 :]))
            return self._unpadded(value, dims)
        mine = times(self.split.local, self.split.rank)
        if same(first, mine) and same(last, mine + self.split.local):
            if not self.original.replicated[value.content]:
                raise Refused(f"expected a value that all ranks share; found own rows of {self.describe(value)}", 2)
            return self._own(value, row_major((*sizes[:dim], self.split.local, *sizes[dim + 1 :])), post)
        if told:
            bounds = f"0:{self.split.tokens} or {mine}:{mine + self.split.local}"
            raise Refused(f"expected rows {bounds} of the padded ones; found {first}:{last}", 2)
        return None

    def _own_apart(self, value: Value, dim: int, first: Size, last: Size) -> Value | None:
        """This rank's rows, which are a dim of their own, wherever the others lie."""
        mine = times(self.split.local, self.split.rank)
        if len(value.pieces) != 1 or not same(first, mine) or not same(last, mine + self.split.local):
            return None
        rows = self.split.rows_apart(value.dims, dim, self.split.padded, self.split.local)
        if rows is None:
            return None
        if not self.original.replicated[value.content]:
            raise Refused(f"expected a value that all ranks share; found own rows of {self.describe(value)}", 2)
        return self._own(value, rows[0], rows[2])

    def _unpadded(self, value: Value, dims: Dims) -> Value:
        """All tokens of ``value`` and no more, as ``dims``."""
        return replace(value, dims=dims, extent="T") if len(value.pieces) > 1 else whole((value.content, dims))

    def _joined(self, nodes: list[fx.Node], at: Mapping[fx.Node, Value], args: Mapping[str, Argument]) -> Value | None:
        """Several values side by side in each row."""
        values = [at[n] for n in nodes]
        first = values[0]
        sizes, dim = [shape(v.dims) for v in values], args["dim"]
        dim = dim + len(sizes[0]) if dim < 0 else dim
        if first.extent == "T":
            return None
        rows = times(first.pre, self.split.local if first.extent == "L" else self.split.padded)
        if first.partial or any((v.extent, v.pre, v.partial) != (first.extent, first.pre, False) for v in values):
            return None
        if any(product(s[:dim]) != rows or s[dim + 1 :] != sizes[0][dim + 1 :] for s in sizes):
            return None
        if not all(is_row_major(v.dims) for v in values):
            return None
        width: Size = sum(s[dim] for s in sizes)
        dims = row_major((*sizes[0][:dim], width, *sizes[0][dim + 1 :]))
        pieces = tuple(piece for v in values for piece in v.pieces)
        return Value(pieces, dims, first.extent, first.pre, sum(v.post for v in values))

    def _pieces(self, value: Value, args: Mapping[str, Argument]) -> list[Value | None]:
        """A row of several values taken apart again."""
        widths, dim, sizes = args["split_sizes"], args["dim"], shape(value.dims)
        assert isinstance(widths, tuple) and isinstance(dim, int)
        dim = dim + len(sizes) if dim < 0 else dim
        if len(value.pieces) == 1 or not is_row_major(value.dims) or product(sizes[dim:]) != value.post:
            return []
        found = []
        pending = list(value.pieces)
        for width in widths:
            part = times(width, product(sizes[dim + 1 :]))
            if not pending or pending[0][1] != part:
                expected = [w for _, w in value.pieces]
                raise Refused(f"expected pieces of widths {expected}; found {list(widths)}", 2)
            dims = row_major((*sizes[:dim], width, *sizes[dim + 1 :]))
            found.append(replace(value, pieces=(pending.pop(0),), dims=dims, post=part))
        return [] if pending else [whole((v.content, v.dims)) if v.extent == "T" else v for v in found]

    def alike(self, value: Value) -> list[Value]:
        """What else ``value`` is where the original gathers it over the axis, or takes this rank's rows itself."""
        local, tokens = self.split.local, self.split.tokens
        if value.partial or len(value.pieces) != 1 or not self.split.unpadded:
            return []
        if value.whole:
            gathered = self.original.gathers.get((value.content, value.dims))
            sizes = shape(value.dims)
            if gathered is None or not sizes or not same(sizes[0], local) or shape(gathered[1])[0] != tokens:
                return []
            post = product(sizes[1:])
            return [Value(((gathered[0], post),), row_major(sizes), "L", 1, post)]
        parts = self.original.parts.get(value.content)
        if value.extent != "L" or not parts:
            return []
        mine = times(local, self.split.rank)
        wholes = self.split.wholes(value.dims, value.post)
        return [
            whole(part)
            for dims, dim, first, last, part in parts
            if same(first, mine) and same(last, mine + local) and (dims, Rows(dim)) in wholes
        ]

    def as_partial(self, value: Value) -> Value | None:
        """What the original all-reduces, as a summand of the result."""
        total = self.original.sums.get(value.content)
        if total is None or len(value.pieces) != 1 or value.extent == "L":
            return None
        return replace(value, pieces=((total, value.pieces[0][1]),), partial=True)

    def describe(self, value: Value) -> str:
        """``value`` in words."""
        dims = value.dims if value.extent == "T" else None
        names = "+".join(self.original.name((content, dims)) for content, _ in value.pieces)
        if value.extent == "N":
            return f"{'Partial' if value.partial else 'all'} padded rows of {names}"
        if value.extent == "T":
            return f"{'Partial' if value.partial else 'Whole'} of {names}"
        wholes = self.split.wholes(value.dims, value.post) if len(value.pieces) == 1 else ()
        for dims, where in wholes:
            if (name := self.original.names.get((value.content, dims))) is not None:
                return f"Shard({where.dim}) of {name}"
        return f"rows of {names}"


def _slice_bounds(args: Mapping[str, Argument], sizes: Shape) -> tuple[int, Size, Size]:
    dim = args["dim"]
    assert isinstance(dim, int)
    dim = dim + len(sizes) if dim < 0 else dim
    last = args["end"]
    return dim, args["start"] or 0, sizes[dim] if last is None or last == torch.iinfo(torch.int64).max else last
