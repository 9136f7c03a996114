"""Mutations of where values lie: transpositions, views, concatenations."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from fuzzing.mutations.table import TURNS, VIEWS, Mutation, aten, before, kind, shape


@kind
def turn_dropped(m: Mutation) -> str:
    """A transposition as a view of the same shape."""
    node = m.one(*TURNS, where=lambda n: n.args[0].op != "placeholder")
    sizes = [s if isinstance(s, int) else _size_node(m, node, s) for s in node.meta["val"].shape]
    made = m.after(node, aten.reshape.default, node.args[0], sizes)
    return m.instead(node, made)


def _size_node(m: Mutation, node: fx.Node, size: Any) -> fx.Node:
    return m.choice([n for n in before(m, node) if str(n.meta.get("val")) == str(size)])  # type: ignore[no-any-return]


@kind
def viewed_in_other_order(m: Mutation) -> str:
    node = m.one(*VIEWS, where=lambda n: len(shape(n.args[0])) > 1)
    turned = m.after(node.args[0], aten.transpose.int, node.args[0], 0, len(shape(node.args[0])) - 1)  # type: ignore[arg-type]
    node.target = aten.reshape.default
    return m.set(node, 0, turned)


@kind
def other_turn(m: Mutation) -> str:
    node = m.one(aten.permute.default)
    dims = list(node.args[1])  # type: ignore[arg-type]
    a, b = m.rng.sample(range(len(dims)), 2)
    dims[a], dims[b] = dims[b], dims[a]
    return m.set(node, 1, dims)


@kind
def cat_order(m: Mutation) -> str:
    node = m.one(aten.cat.default, where=lambda n: len(set(n.args[0])) > 1)
    return m.set(node, 0, list(reversed(node.args[0])))  # type: ignore[call-overload]


@kind
def cat_of_other_dim(m: Mutation) -> str:
    node = m.one(aten.cat.default, where=lambda n: len(n.args) > 1)
    return m.set(node, 1, (node.args[1] + 1) % len(shape(node)))  # type: ignore[operator]


@kind
def other_row_taken(m: Mutation) -> str:
    node = m.one(aten.select.int)
    index = node.args[2]
    return m.set(node, 2, 0 if index not in (0, -1) else 1 if index == 0 else -2)
