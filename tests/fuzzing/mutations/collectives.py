"""Mutations of collectives: dropped, doubled, over other ranks, by other reductions, in other places."""

from __future__ import annotations

import operator

from fuzzing.mutations.table import (
    ALL_REDUCE,
    C10D,
    GATHER,
    MOVING,
    REDUCING,
    SCATTER,
    UNARY,
    WAIT,
    Mutation,
    aten,
    floats,
    kind,
    shape,
    wait_of,
)
from fuzzing.worlds import AXIS


@kind
def sum_dropped(m: Mutation) -> str:
    wait = wait_of(m, ALL_REDUCE)
    return m.instead(wait, wait.args[0].args[0])


@kind
def rows_not_summed(m: Mutation) -> str:
    """Of a reduce-scatter this rank's rows of its own summand."""
    wait = wait_of(m, SCATTER)
    operand, _, n, group = wait.args[0].args
    rows = m.after(wait, aten.chunk.default, operand, n)
    place = m.world.members(group, m.rank).index(m.rank)
    return m.instead(wait, m.after(rows, operator.getitem, rows, place))


@kind
def own_rows_repeated(m: Mutation) -> str:
    """Of an all-gather this rank's rows over and over."""
    wait = wait_of(m, GATHER)
    operand, n, _ = wait.args[0].args
    return m.instead(wait, m.after(wait, aten.cat.default, [operand] * n))


@kind
def wrong_group(m: Mutation) -> str:
    node = m.one(*MOVING)
    others = [g for g in m.world.groups if g != node.args[-1] and m.world.width(g) == m.world.width(str(node.args[-1]))]
    return m.set(node, len(node.args) - 1, m.choice(others))


@kind
def unknown_group(m: Mutation) -> str:
    node = m.one(*MOVING)
    return m.set(node, len(node.args) - 1, "nobody")


@kind
def summed_otherwise(m: Mutation) -> str:
    node = m.one(ALL_REDUCE)
    return m.set(node, 1, m.choice([o for o in ("sum", "avg", "max", "min", "product") if o != node.args[1]]))


@kind
def scattered_by_max(m: Mutation) -> str:
    return m.set(m.one(SCATTER), 1, "max")


@kind
def scattered_mean(m: Mutation) -> str:
    return m.set(m.one(SCATTER), 1, "avg")


@kind
def wait_dropped(m: Mutation) -> str:
    wait = m.one(WAIT)
    return m.instead(wait, wait.args[0])


@kind
def summed_twice(m: Mutation) -> str:
    wait = wait_of(m, *REDUCING)
    again = m.after(wait, ALL_REDUCE, wait, "sum", AXIS)
    return m.instead(wait, m.after(again, WAIT, again), [again])


@kind
def pieces_swapped(m: Mutation) -> str:
    """Gathered rows of ranks in another order."""
    wait = wait_of(m, GATHER)
    n = wait.args[0].args[1]
    pieces = m.after(wait, aten.chunk.default, wait, n)
    picked = pieces
    parts = []
    for index in range(n):
        picked = m.after(picked, operator.getitem, pieces, index)
        parts.append(picked)
    return m.instead(wait, m.after(picked, aten.cat.default, parts[1:] + parts[:1]), [pieces])


@kind
def summand_doubled(m: Mutation) -> str:
    node = m.one(*REDUCING)
    return m.set(node, 0, m.after(node.args[0], aten.add.Tensor, node.args[0], node.args[0]))


@kind
def activation_before_sum(m: Mutation) -> str:
    wait = wait_of(m, *REDUCING)
    acts = m.choice([u for u in wait.users if u.target in UNARY])
    start = wait.args[0]
    early = m.after(start.args[0], acts.target, start.args[0])
    m.set(start, 0, early)
    return m.instead(acts, wait)


@kind
def added_before_sum(m: Mutation) -> str:
    """A vector of all ranks added to each summand."""
    wait = wait_of(m, *REDUCING)
    start = wait.args[0]
    vectors = [n for n in m.graph.find_nodes(op="placeholder") if floats(n) and shape(n) == shape(start.args[0])[-1:]]
    return m.set(start, 0, m.after(start.args[0], aten.add.Tensor, start.args[0], m.choice(vectors)))


@kind
def other_source(m: Mutation) -> str:
    node = m.one(C10D.broadcast.default)
    return m.set(node, 1, (node.args[1] + 1) % m.world.width(str(node.args[2])))  # type: ignore[operator]
