"""Moves of token rows that a graph already makes over an axis: all-gathers of rows, and taking a rank's own rows.

A gather's result is there as a shard for free, as that is what it gathers; who takes its own rows demands only a shard.
Both only where rows are split evenly and in rank order, by the graph's own arithmetic.
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import NATIVE, bound, group_name_of, is_wait, only_user
from cpcompile.passes.group_relations import GroupRelations
from cpcompile.passes.token_layout import ONE, Expr, Shape, TokenDim, size_expr

aten = torch.ops.aten
_LAST = torch.iinfo(torch.int64).max


def find_gathers(gm: fx.GraphModule, groups: GroupRelations) -> dict[fx.Node, fx.Node]:
    """``wait_tensor`` of every all-gather over all of the axis, in its order, along dim 0 -> its start."""
    found = {}
    for node in gm.graph.find_nodes(op="call_function", target=NATIVE.all_gather_into_tensor.default):
        readers = [n for n in node.users if n.target is not aten.sym_size.int]
        over_axis = groups.in_rank_order(group_name_of(node)) and bound(node)[1] == groups.axis.size
        if over_axis and len(readers) == 1 and is_wait(readers[0]):
            found[readers[0]] = node
    return found


def gathers_rows(whole: Shape, part: Shape, tokens: Expr | None) -> bool:
    """Whether a gather of ``part`` to ``whole`` has a token per row, or, with no tokens known yet, may have."""
    return bool(part) and part[0] != ONE and (tokens is None or tokens == whole[0])


def own_rows(node: fx.Node, axis: Axis, tokens: Expr, shape: Shape, layout: TokenDim) -> bool:
    """Whether ``node``, a slice or an item of a split of a whole value, is exactly this rank's rows of it.

    Args:
        node: the slice or ``getitem``.
        axis: the axis.
        tokens: T.
        shape: of the whole value.
        layout: where its tokens lie.
    """
    local = tokens / axis.size
    if not local.is_integer or layout.outer != ONE or layout.inner != ONE:
        return False
    if node.target is aten.slice.Tensor:
        _, dim, start, end, step = bound(node)
        first, last = _size(start or 0), shape[layout.dim] if end is None or end == _LAST else _size(end)
        mine = (first, last) == (local * axis.rank, local * (axis.rank + 1))
        return bool(dim % len(shape) == layout.dim and step == 1 and mine)
    split = node.all_input_nodes[0]
    _, size, dim = bound(split)
    return bool(dim % len(shape) == layout.dim and _size(size) == local and node.args[1] == axis.rank)


def taken_from(node: fx.Node) -> fx.Node | None:
    """The value of which ``node`` takes a part: by a slice, or as the only item that is read of a split."""
    if node.target is aten.slice.Tensor:
        return node.all_input_nodes[0]
    if node.target is operator.getitem and node.all_input_nodes[0].target is aten.split.Tensor:
        split = node.all_input_nodes[0]
        return split.all_input_nodes[0] if only_user(split) is node else None
    return None


def _size(value: object) -> Expr:
    return size_expr(value.meta["val"] if isinstance(value, fx.Node) else value)
