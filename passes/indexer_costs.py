"""Indexer costs: what it saves and costs to run a sparse-attention indexer's queries on each rank's rows, at some T.

The rest of the plan stays as it is. What may move are the indexer and its *queries' ops*: those that no one but its
queries needs (their projection, rotation, weights). The plan's placement of them is set against the best one in which
the indexer has the other label: the same minimum cut, of a dozen ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch.fx as fx

from cpcompile.costs import PICOSECONDS
from cpcompile.passes.collectives import op_name
from cpcompile.passes.mincut import (
    LABELS,
    OpChoice,
    P,
    Problem,
    R,
    S,
    Use,
    available_levels,
    raise_route,
    solve,
)
from cpcompile.passes.placement_problem import PlacementGraph
from cpcompile.plan import Interval

INDEXERS = frozenset({"cpcompile::lightning_indexer", "cpcompile::paged_lightning_indexer"})


def is_indexer(node: fx.Node) -> bool:
    """Whether ``node`` chooses the keys that each query row attends to."""
    return op_name(node.target) in INDEXERS


def least_sharded(intervals: Sequence[Interval], name: str) -> int | None:
    """Break-even: the least token count of the axis at which ``intervals`` run op ``name`` on shards; None if never."""
    return next((i.first for i in intervals if i.labels.get(name) == "S"), None)


@dataclass(frozen=True)
class IndexerCosts:
    """Seconds by which an indexer that is sharded differs from one that is whole, by the plan's cost model.

    Args:
        sharded: whether the plan shards it.
        compute: compute that sharding saves, in the indexer and its queries' ops.
        own: the part of ``compute`` that is the indexer's own: scores and top-k.
        indices: what the gather of its indices takes; 0 where their readers run on the same rows.
        operands: what sharding saves in gathers of the queries and weights that a whole indexer reads.
        helpers: number of its queries' ops.
    """

    sharded: bool
    compute: float
    own: float
    indices: float
    operands: float
    helpers: int

    @property
    def pays(self) -> bool:
        """Whether sharding is the cheaper one, all else as it is."""
        return self.compute + self.operands > self.indices


class IndexerModel:
    """The placement problem around each indexer of a graph, under one interval's plan at one token count."""

    def __init__(self, graph: PlacementGraph, interval: Interval, tokens: int) -> None:
        """Number the plan's labels, and who reads what, for ``tokens`` tokens of the axis."""
        self.problem = graph.problem(tokens, graph.hardware)
        self.labels = [
            P if c.reduced else S if c.gathered else LABELS.index(interval.labels.get(c.node.name, "R"))
            for c in graph.choices
        ]
        self.movable = [not (c.reduced or c.gathered or c.picks) for c in graph.choices]
        self.uses: list[list[Use]] = [[] for _ in graph.choices]  # of each op's values
        for use in self.problem.uses:
            self.uses[self.problem.values[use.value].op].append(use)

    def costs(self, number: int) -> IndexerCosts:
        """Of the indexer that is choice ``number``."""
        ops = self._with_queries_ops(number)
        sharded = self.labels[number] == S
        problem = self._local(ops)
        here = [self.labels[op] for op in ops] + [_only_label(op) for op in problem.ops[len(ops) :]]
        forced = [*problem.ops]
        place = ops.index(number)
        forced[place] = _held_at(forced[place], R if sharded else S)
        other = solve(replace(problem, ops=forced)).labels
        s, r = (here, other) if sharded else (other, here)
        indices = {v for v, value in enumerate(problem.values) if value.op == place}
        at_s, at_r = _raises(problem, s), _raises(problem, r)
        return IndexerCosts(
            sharded,
            (_compute(problem, r) - _compute(problem, s)) / PICOSECONDS,
            ((problem.ops[place].costs[R] or 0) - (problem.ops[place].costs[S] or 0)) / PICOSECONDS,
            sum(at_s[v] for v in indices) / PICOSECONDS,
            sum(r - s for v, (s, r) in enumerate(zip(at_s, at_r, strict=True)) if v not in indices) / PICOSECONDS,
            len(ops) - 1,
        )

    def _with_queries_ops(self, number: int) -> list[int]:
        """The indexer and the ops all of whose readers are among these, and read rows: not what keys are made of."""
        found = {number}
        for op in reversed(range(number)):
            uses = self.uses[op]
            if self.movable[op] and uses and all(u.op in found for u in uses) and any(u.demand[S] == S for u in uses):
                found.add(op)
        return sorted(found)

    def _local(self, ops: Sequence[int]) -> Problem:
        """The problem of ``ops`` alone: what they read is there at the level at which the plan has it for others."""
        at = {op: i for i, op in enumerate(ops)}
        read = {u.value for u in self.problem.uses if u.op in at}
        outside = sorted(v for v in read if self.problem.values[v].op not in at)
        inside = [v for v, value in enumerate(self.problem.values) if value.op in at]
        index = {v: i for i, v in enumerate([*inside, *outside])}
        sources = [_held_at(OpChoice(f"value {v}", (0, 0, 0)), self._level(v, at)) for v in outside]
        values = [replace(self.problem.values[v], op=at[self.problem.values[v].op]) for v in inside]
        values += [replace(self.problem.values[v], op=len(ops) + i) for i, v in enumerate(outside)]
        uses = [Use(index[u.value], at[u.op], u.demand) for u in self.problem.uses if u.op in at]
        for v in inside:
            for use in self.uses[self.problem.values[v].op]:
                if use.value == v and use.op not in at:
                    uses.append(Use(index[v], None, (self._demand(use),) * 3))
        return Problem([*(self.problem.ops[op] for op in ops), *sources], values, uses)

    def _demand(self, use: Use) -> int:
        return use.demand[R if use.op is None else self.labels[use.op]]

    def _level(self, value: int, but: dict[int, int]) -> int:
        """The highest label at which the plan has ``value`` for readers that are not in ``but``."""
        op = self.problem.values[value].op
        demands = [self._demand(u) for u in self.uses[op] if u.value == value and u.op not in but]
        return max([self.labels[op], *demands])


def _held_at(op: OpChoice, label: int) -> OpChoice:
    costs = [cost if at == label else None for at, cost in enumerate(op.costs)]
    return replace(op, costs=(costs[P], costs[S], costs[R]))


def _only_label(op: OpChoice) -> int:
    (label,) = (at for at, cost in enumerate(op.costs) if cost is not None)
    return label


def _compute(problem: Problem, labels: Sequence[int]) -> int:
    return sum(op.costs[label] or 0 for op, label in zip(problem.ops, labels, strict=True))


def _raises(problem: Problem, labels: Sequence[int]) -> list[int]:
    """Cost of each value's collectives."""
    levels = available_levels(problem, labels)
    return [raise_route(v, labels[v.op], level)[0] or 0 for v, level in zip(problem.values, levels, strict=True)]
