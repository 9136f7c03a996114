"""Mutations of which rows a rank takes: slices, pads and sizes."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from fuzzing.mutations.table import ALL_REDUCE, LAST, MOVING, VIEWS, WAIT, Mutation, aten, before, floats, kind, shape
from fuzzing.worlds import AXIS


@kind
def starts_one_later(m: Mutation) -> str:
    node = m.one(aten.slice.Tensor, where=lambda n: len(n.args) > 3)
    if not isinstance(node.args[2], fx.Node):
        return m.set(node, 2, node.args[2] + 1)
    return m.set(node, 2, m.after(node.args[2], operator.add, node.args[2], 1))


@kind
def ends_one_earlier(m: Mutation) -> str:
    node = m.one(aten.slice.Tensor, where=lambda n: len(n.args) > 3)
    if not isinstance(node.args[3], fx.Node):
        return m.set(node, 3, -1 if node.args[3] == LAST else node.args[3] - 1)
    return m.set(node, 3, m.after(node.args[3], operator.sub, node.args[3], 1))


@kind
def first_rows_for_all(m: Mutation) -> str:
    """Every rank takes the first rank's rows."""
    node = m.one(aten.slice.Tensor, where=lambda n: len(n.args) > 3 and m.world.width(AXIS) > 1)
    if not isinstance(node.args[3], fx.Node):
        length = node.args[3] - node.args[2] if isinstance(node.args[2], int) and node.args[3] != LAST else m.choice([])
    else:
        length = m.after(node.args[3], operator.sub, node.args[3], node.args[2])
        node.prepend(length)
    m.set(node, 3, length)
    return m.set(node, 2, 0)


@kind
def other_ranks_rows(m: Mutation) -> str:
    """The rank's number in a row's place is another's."""
    place = m.world.members(AXIS, m.rank).index(m.rank)
    node = m.one(operator.mul, where=lambda n: isinstance(n.args[0], int) and n.args[0] in (place, place + 1))
    return m.set(node, 0, (node.args[0] + 1) % (m.world.width(AXIS) + 1))  # type: ignore[operator]


@kind
def slice_of_other_dim(m: Mutation) -> str:
    node = m.one(aten.slice.Tensor, where=lambda n: len(shape(n)) > 1)
    return m.set(node, 1, (node.args[1] + 1) % len(shape(node)))  # type: ignore[operator]


@kind
def padded_in_front(m: Mutation) -> str:
    node = m.one(aten.constant_pad_nd.default)
    pad = list(node.args[1])  # type: ignore[arg-type]
    return m.set(node, 1, [p for i in range(0, len(pad), 2) for p in (pad[i + 1], pad[i])])


@kind
def pad_value(m: Mutation) -> str:
    node = m.one(aten.constant_pad_nd.default)
    return m.set(node, 2, 1.0) if len(node.args) > 2 else m.set(node, 1, node.args[1])


@kind
def padding_kept(m: Mutation) -> str:
    """The cut that drops pad rows is gone."""
    node = m.one(aten.slice.Tensor, where=lambda n: n.args[0].target is WAIT)
    return m.instead(node, node.args[0])  # type: ignore[arg-type]


@kind
def whole_size_for_local(m: Mutation) -> str:
    """In a view, another size that the graph knows."""
    return _other_size(m, VIEWS)


@kind
def other_size_expanded(m: Mutation) -> str:
    return _other_size(m, (aten.expand.default,))


def _other_size(m: Mutation, targets: Sequence[Any]) -> str:
    node = m.one(*targets, where=lambda n: any(isinstance(s, fx.Node) for s in n.args[1]))
    sizes = list(node.args[1])  # type: ignore[arg-type]
    at = m.choice([i for i, s in enumerate(sizes) if isinstance(s, fx.Node)])
    sizes[at] = m.choice(
        [n for n in before(m, node) if isinstance(n.meta.get("val"), torch.SymInt) and n is not sizes[at]]
    )
    return m.set(node, 1, sizes)


@kind
def rows_rotated(m: Mutation) -> str:
    node = m.one(where=lambda n: floats(n) and n.target is not ALL_REDUCE and n.target not in MOVING)
    made = m.after(node, aten.roll.default, node, [1], [0])
    return m.instead(node, made)


@kind
def rows_reversed(m: Mutation) -> str:
    node = m.one(where=lambda n: floats(n) and n.target not in MOVING)
    return m.instead(node, m.after(node, aten.flip.default, node, [0]))
