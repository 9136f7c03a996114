"""Mutations of what is computed from what: ops, constants, dims, masks, operands, weights, positions."""

from __future__ import annotations

import torch
import torch.fx as fx

from fuzzing.mutations.table import (
    ALONG,
    BINARY,
    COMPARED,
    MOVING,
    ORDERED,
    UNARY,
    WAIT,
    Mutation,
    NotHere,
    aten,
    before,
    dtype_of,
    floats,
    kind,
    like,
    shape,
)


@kind
def other_function(m: Mutation) -> str:
    node = m.one(*UNARY)
    return m.retarget(node, m.choice([t for t in UNARY if t is not node.target]))


@kind
def other_arithmetic(m: Mutation) -> str:
    node = m.one(*BINARY, where=lambda n: all(isinstance(a, fx.Node) and floats(a) for a in n.args[:2]))
    return m.retarget(node, m.choice([t for t in BINARY if t is not node.target]))


@kind
def operands_swapped(m: Mutation) -> str:
    node = m.one(*ORDERED, where=lambda n: len(n.args) == 2 and isinstance(n.args[1], fx.Node))
    node.args = (node.args[1], node.args[0])
    node.meta["mutated"] = True
    return f"{node}: operands swapped"


@kind
def summand_dropped(m: Mutation) -> str:
    """A residual that is not added."""
    node = m.one(aten.add.Tensor, aten.sub.Tensor, where=lambda n: any(like(a, n) for a in n.args[:2]))
    return m.instead(node, m.choice([a for a in node.args[:2] if like(a, node)]))


@kind
def constant_changed(m: Mutation) -> str:
    scalars = lambda n: [i for i, a in enumerate(n.args) if isinstance(a, float)]  # noqa: E731
    node = m.one(where=scalars)
    at = m.choice(scalars(node))
    return m.set(node, at, node.args[at] * 1.5 + 0.25)  # type: ignore[operator]


@kind
def epsilon_changed(m: Mutation) -> str:
    small = lambda n: [i for i, a in enumerate(n.args) if isinstance(a, float) and 0 < a < 0.01]  # noqa: E731
    node = m.one(where=small)
    at = m.choice(small(node))
    return m.set(node, at, node.args[at] * 20)  # type: ignore[operator]


@kind
def rank_number_changed(m: Mutation) -> str:
    """A whole number among the operands of arithmetic."""
    node = m.one(*BINARY, aten.lt.Scalar, aten.ge.Scalar, where=lambda n: isinstance(n.args[1], int))
    return m.set(node, 1, node.args[1] + 1)  # type: ignore[operator]


@kind
def other_dim(m: Mutation) -> str:
    node = m.one(*ALONG, where=lambda n: len(shape(n.args[0])) > 1)
    at, ndim = ALONG[node.target], len(shape(node.args[0]))
    dim = node.args[at] if at < len(node.args) else -1
    moved = [(d + 1) % ndim for d in dim] if isinstance(dim, list | tuple) else (dim + 1) % ndim  # type: ignore[operator]
    return m.set(node, at, moved)


@kind
def other_mean(m: Mutation) -> str:
    """A mean for the greatest, a sum for a mean."""
    node = m.one(aten.mean.dim, aten.amax.default, aten.sum.dim_IntList)
    return m.retarget(node, m.choice([t for t in (aten.mean.dim, aten.amax.default) if t is not node.target]))


@kind
def comparison_changed(m: Mutation) -> str:
    node = m.one(where=lambda n: getattr(n.target, "overloadpacket", None) in COMPARED)
    packet = COMPARED[node.target.overloadpacket]  # type: ignore[union-attr]
    return m.retarget(node, getattr(packet, node.target._overloadname))  # type: ignore[union-attr]


@kind
def mask_dropped(m: Mutation) -> str:
    node = m.one(aten.masked_fill.Scalar, aten.where.self)
    return m.instead(node, node.args[0] if node.target is aten.masked_fill.Scalar else node.args[1])  # type: ignore[arg-type]


@kind
def filled_otherwise(m: Mutation) -> str:
    node = m.one(aten.masked_fill.Scalar)
    return m.set(node, 2, 0.5)


@kind
def step_skipped(m: Mutation) -> str:
    """An op's operand taken for its result: a value from before the norm."""
    node = m.one(where=lambda n: n.target not in MOVING and n.target is not WAIT and floats(n) and _earlier(n))
    return m.instead(node, m.choice(_earlier(node)))


def _earlier(node: fx.Node) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if like(a, node) and a.target not in MOVING]


@kind
def other_operand(m: Mutation) -> str:
    """An operand replaced by another value of its shape."""
    node = m.one(
        where=lambda n: n.target not in MOVING and n.target is not WAIT and any(map(floats, n.all_input_nodes))
    )
    operand = m.choice([a for a in node.all_input_nodes if floats(a)])
    others = [n for n in before(m, node) if n is not operand and like(n, operand) and n.target not in MOVING]
    node.replace_input_with(operand, m.choice(others))
    node.meta["mutated"] = True
    return f"{node}: {operand} replaced by another value"


@kind
def wrong_weight(m: Mutation) -> str:
    weights = [n for n in m.graph.find_nodes(op="placeholder") if floats(n)]
    one = m.choice([w for w in weights if w.users])
    user = m.choice(list(one.users))
    other = m.choice([w for w in weights if w is not one and like(w, one)])
    user.replace_input_with(one, other)
    user.meta["mutated"] = True
    return f"{user}: {one} replaced by {other}"


@kind
def positions_shifted(m: Mutation) -> str:
    node = m.one(aten.arange.default, aten.arange.start_step)
    return m.instead(node, m.after(node, aten.add.Tensor, node, 1))


@kind
def indices_reversed(m: Mutation) -> str:
    node = m.one(aten.embedding.default, aten.index_select.default, aten.index.Tensor, aten.gather.default)
    at = next((i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and dtype_of(a) == torch.int64), None)
    if at is None:
        raise NotHere
    return m.set(node, at, m.after(node.args[at], aten.flip.default, node.args[at], [0]))  # type: ignore[arg-type]


@kind
def sorted_downwards(m: Mutation) -> str:
    node = m.one(aten.sort.default)
    node.args = (node.args[0], *(node.args[1:2] or (-1,)), True)
    node.meta["mutated"] = True
    return f"{node}: downwards"


@kind
def rounded(m: Mutation) -> str:
    node = m.one(where=lambda n: floats(n) and n.target not in MOVING)
    made = m.after(node, aten._to_copy.default, node, dtype=torch.bfloat16)
    return m.instead(node, m.after(made, aten._to_copy.default, made, dtype=dtype_of(node)), [made])
