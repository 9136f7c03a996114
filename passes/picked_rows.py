"""Picked rows: ops that take a few tokens' rows of a sharded value, and how each row comes from the rank that owns it.

Before: ``hidden[:, -1:]``, ``hidden.select(1, 0)``, ``hidden[:, rows]`` and ``index_select(hidden, 1, rows)`` on all
rows. After: every rank takes those of its own rows, with zeros for all others, and one all-reduce sums them. Each row
has one owner, so the sum is exact (as for vocabulary-parallel embeddings: Megatron-LM, ``VocabParallelEmbedding``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from cpcompile.passes.collectives import op_name
from cpcompile.passes.op_call import Call, Mixing
from cpcompile.passes.shard_ops import ShardEmitter
from cpcompile.passes.token_layout import Expr, Shape, TokenDim, product, shape_of, size_expr

aten = torch.ops.aten
_INDEX_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Picks(Mixing):
    """The op takes some rows of ``source``: of whole rows as it is, or of shards as a partial sum.

    Args:
        reason: as for any op that mixes tokens.
        source: the operand whose rows are taken; its token dim holds tokens alone.
        place: where its tokens lie.
        first: number of the first of consecutive rows, None where ``index`` names the rows.
        index: integer operand with the rows' numbers, whole on every rank.
        wraps: negative numbers of ``index`` count from the last row.
    """

    source: fx.Node
    place: TokenDim
    first: Expr | None = None
    index: fx.Node | None = None
    wraps: bool = False


def picks_of(call: Call) -> Picks | None:
    """What rows ``call`` takes, None if it takes none or all, or cannot be told.

    Values whose sum is not exact or not defined (integers, booleans) are left alone, as are tokens that share their
    dim with a batch, steps other than 1, masks, and several index tensors.
    """
    rule = {"slice": _slice, "select": _select, "index_select": _index_select, "index": _index}.get(
        op_name(call.node.target).removeprefix("aten::")
    )
    source = call.node.args[0] if rule is not None and call.node.args else None
    place = call.layout(source)
    if rule is None or not isinstance(source, fx.Node) or place is None or place != TokenDim(place.dim):
        return None
    if not source.meta["val"].dtype.is_floating_point or free_unbacked_symbols(source.meta["val"]):
        return None
    return rule(call, source, place)


def _slice(call: Call, source: fx.Node, place: TokenDim) -> Picks | None:
    whole, ndim = call.shape(source)[place.dim], len(call.shape(source))
    start, end = (_number(call.arg(i, name)) for i, name in ((2, "start"), (3, "end")))
    if _dim(call, 1, "dim", ndim) != place.dim or call.arg(4, "step", 1) != 1:
        return None
    count = call.out[place.dim]
    if not whole.is_number and count.free_symbols & whole.free_symbols:
        return None  # most of the rows
    if end is None or end == whole or end == torch.iinfo(torch.int64).max:
        first: Expr | None = whole - count
    else:
        first = None if start is None else _from_the_front(start, whole)
    return _consecutive("takes some of the tokens", source, place, first, count)


def _select(call: Call, source: fx.Node, place: TokenDim) -> Picks | None:
    index = _number(call.arg(2, "index"))
    if index is None or _dim(call, 1, "dim", len(call.shape(source))) != place.dim:
        return None
    first = _from_the_front(index, call.shape(source)[place.dim])
    return _consecutive("selects some tokens", source, place, first, index)


def _consecutive(reason: str, source: fx.Node, place: TokenDim, first: Expr | None, size: Expr) -> Picks | None:
    if first is None or free_unbacked_symbols(first) or free_unbacked_symbols(size):
        return None
    return Picks(reason, source, place, first)


def _index_select(call: Call, source: fx.Node, place: TokenDim) -> Picks | None:
    index = call.arg(2, "index")
    if _dim(call, 1, "dim", len(call.shape(source))) != place.dim:
        return None
    return _named(source, place, index, wraps=False)


def _index(call: Call, source: fx.Node, place: TokenDim) -> Picks | None:
    indices = call.arg(1, "indices")
    assert isinstance(indices, list | tuple)
    named = [dim for dim, index in enumerate(indices) if index is not None]
    return _named(source, place, indices[place.dim], wraps=True) if named == [place.dim] else None


def _named(source: fx.Node, place: TokenDim, index: object, *, wraps: bool) -> Picks | None:
    value = index.meta.get("val") if isinstance(index, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dtype not in _INDEX_DTYPES or free_unbacked_symbols(value):
        return None
    assert isinstance(index, fx.Node)
    return Picks("takes the tokens that an index names", source, place, None, index, wraps)


def _dim(call: Call, index: int, name: str, ndim: int) -> int:
    dim = call.arg(index, name, 0)
    assert isinstance(dim, int)
    return dim % ndim


def _number(value: object) -> Expr | None:
    """An int, SymInt or the node of one as an expression."""
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    return size_expr(value) if isinstance(value, int | torch.SymInt) else None


def _from_the_front(index: Expr, size: Expr) -> Expr | None:
    """Row ``index`` of ``size`` counted from 0; None where its sign is not known."""
    if index.is_nonnegative:
        return index
    return size + index if index.is_negative else None


def emit_picked(emitter: ShardEmitter, node: fx.Node, picks: Picks, shard: fx.Node, index: fx.Node | None) -> fx.Node:
    """``node`` as a partial sum: the rows that this rank owns, zeros for all others.

    Args:
        emitter: of the graph under construction.
        node: the original op.
        picks: which rows it takes.
        shard: this rank's rows of ``picks.source``, in the new graph.
        index: ``picks.index`` in the new graph.
    """
    value, source, dim = node.meta["val"], shape_of(picks.source.meta["val"]), picks.place.dim
    if index is None:
        rows = shape_of(value)[dim] if len(value.shape) == len(source) else size_expr(1)
        like, local = _consecutive_rows(emitter, picks, value, rows)
    else:
        assert picks.index is not None
        like = picks.index.meta["val"]
        rows = product(shape_of(like))
        local = _named_rows(emitter, picks, like, index, rows)
    flag = like.new_empty((), dtype=torch.bool)
    below = emitter.call(aten.lt.Scalar, (local, 0), flag, (rows,))
    above = emitter.call(aten.ge.Scalar, (local, emitter.size(emitter.local)), flag, (rows,))
    others = emitter.call(aten.bitwise_or.Tensor, (below, above), flag, (rows,))
    inside = emitter.call(aten.clamp.default, (local, 0, emitter.size(emitter.local - 1)), like, (rows,))
    shape = (*source[:dim], rows, *source[dim + 1 :])
    taken = emitter.call(aten.index_select.default, (shard, dim, inside), value, shape)
    column: Shape = (rows, *(size_expr(1) for _ in source[dim + 1 :]))
    others = emitter.reshape(others, flag, (rows,), column)
    kept = emitter.call(aten.masked_fill.Scalar, (taken, others, 0), value, shape)
    return emitter.reshape(kept, value, shape, shape_of(value))


def _consecutive_rows(
    emitter: ShardEmitter, picks: Picks, value: torch.Tensor, rows: Expr
) -> tuple[torch.Tensor, fx.Node]:
    """Numbers of the rows counted from this rank's first, ``[rows]``."""
    assert picks.first is not None
    like = value.new_empty((), dtype=torch.int64)
    counted = emitter.call(
        aten.arange.default, (emitter.size(rows),), like, (rows,), dtype=torch.int64, device=value.device
    )
    first = emitter.size(picks.first - emitter.local * emitter.axis.rank)
    return like, emitter.call(aten.add.Tensor, (counted, first), like, (rows,))


def _named_rows(emitter: ShardEmitter, picks: Picks, like: torch.Tensor, index: fx.Node, rows: Expr) -> fx.Node:
    """Likewise for the rows that ``index`` names."""
    if shape_of(like) != (rows,):
        index = emitter.call(aten.reshape.default, (index, [emitter.size(rows)]), like, (rows,))
    if picks.wraps:
        flag = like.new_empty((), dtype=torch.bool)
        negative = emitter.call(aten.lt.Scalar, (index, 0), flag, (rows,))
        wrapped = emitter.call(aten.add.Tensor, (index, emitter.size(emitter.tokens)), like, (rows,))
        index = emitter.call(aten.where.self, (negative, wrapped, index), like, (rows,))
    return emitter.call(aten.sub.Tensor, (index, emitter.size(emitter.local * emitter.axis.rank)), like, (rows,))
