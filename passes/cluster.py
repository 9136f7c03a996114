"""Large problems whose order breaks: solve one of each kind of layer by the integer programme, bound by a minimum cut.

Layers repeat, so ops that look alike to a distance of ``ROUNDS`` uses (Weisfeiler and Leman's colour refinement)
are given one label. That makes the problem as large as the distinct layers; the plan's cost is then computed on the
whole problem, and a minimum cut with the all-reduce's price for its two halves says how far the optimum can be below.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from cpcompile.passes.mincut import (
    SINK,
    SOURCE,
    BoolNode,
    Edge,
    OpChoice,
    P,
    Problem,
    Solution,
    Use,
    ValueChoice,
    cost_of,
    edges_of,
    is_one_step,
    solve_milp,
)

ROUNDS = 6
UNBOUNDED = 2**31 - 1


def solve_clustered(problem: Problem) -> Solution:
    """One label per kind of op, by the integer programme. States no bound: see :func:`lower_bound`."""
    colours = _colours(problem)
    small = _quotient(problem, colours)
    chosen = solve_milp(small).labels
    labels = tuple(chosen[colour] for colour in colours)
    cost = cost_of(problem, labels)
    assert cost is not None, "labels that are allowed for a kind of op are allowed for each"
    return Solution(labels, cost, 0, "integer programme over kinds of layers")


def lower_bound(problem: Problem) -> int:
    """No labelling costs less: the minimum cut with each all-reduce's halves together as cheap as the all-reduce."""
    values = []
    for value in problem.values:
        halved = problem.ops[value.op].costs[P] is not None and not is_one_step(problem, value)
        if halved and value.reduce is not None:
            assert value.scatter is not None and value.gather is not None
            halves = value.scatter + value.gather
            if value.reduce < halves:
                gather = value.reduce * value.gather // halves
                value = replace(value, scatter=value.reduce - gather, gather=gather)
        values.append(value)
    return _flow(edges_of(Problem(problem.ops, values, problem.uses)))


def _flow(edges: Sequence[Edge]) -> int:
    """The maximum flow, rounded down: scipy's is compiled, and takes 32-bit capacities, so they are made coarser."""
    finite = sum(c for u, _, c in edges if c is not None and u == SOURCE)
    unit = max(1, -(-finite // 2**30))
    numbers: dict[BoolNode, int] = {SOURCE: 0, SINK: 1}
    capacities: dict[tuple[int, int], int] = {}
    for u, v, capacity in edges:
        key = numbers.setdefault(u, len(numbers)), numbers.setdefault(v, len(numbers))
        more = UNBOUNDED if capacity is None else capacity // unit
        capacities[key] = min(UNBOUNDED, capacities.get(key, 0) + more)
    rows, columns = zip(*capacities, strict=True) if capacities else ((), ())
    data = np.fromiter(capacities.values(), np.int32)
    graph = csr_array((data, (rows, columns)), shape=(len(numbers), len(numbers)), dtype=np.int32)
    return int(maximum_flow(graph, 0, 1).flow_value) * unit


def _colours(problem: Problem) -> list[int]:
    """A number for each op; ops with the same number look alike to a distance of ``ROUNDS`` uses."""
    outputs: list[list[int]] = [[] for _ in problem.ops]
    for number, value in enumerate(problem.values):
        outputs[value.op].append(number)
    readers: list[list[tuple[int, Use]]] = [[] for _ in problem.ops]  # per producing op: (position of its value, use)
    operands: list[list[tuple[int, Use]]] = [[] for _ in problem.ops]  # per reading op
    position = {number: place for numbers in outputs for place, number in enumerate(numbers)}
    for use in problem.uses:
        readers[problem.values[use.value].op].append((position[use.value], use))
        if use.op is not None:
            operands[use.op].append((position[use.value], use))
    colours = _number(
        [(op.costs, tuple(replace(problem.values[v], op=0) for v in outputs[i])) for i, op in enumerate(problem.ops)]
    )
    for _ in range(ROUNDS):
        colours = _number(
            [
                (
                    colours[i],
                    tuple((place, u.demand, colours[problem.values[u.value].op]) for place, u in operands[i]),
                    tuple(sorted((place, u.demand, -1 if u.op is None else colours[u.op]) for place, u in readers[i])),
                )
                for i in range(len(problem.ops))
            ]
        )
    return colours


def _number(keys: list[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _quotient(problem: Problem, colours: list[int]) -> Problem:
    """One op per colour, with the summed costs of its members; uses between colours once."""
    members: dict[int, int] = {}
    first: dict[int, int] = {}
    for index, colour in enumerate(colours):
        members[colour] = members.get(colour, 0) + 1
        first.setdefault(colour, index)
    ops = [_times(problem.ops[first[colour]], members[colour]) for colour in range(len(members))]
    number: dict[tuple[int, int], int] = {}
    values: list[ValueChoice] = []
    place: dict[int, int] = {}
    seen: dict[int, int] = {}
    for index, value in enumerate(problem.values):
        colour = colours[value.op]
        seen[value.op] = position = seen.get(value.op, -1) + 1
        if (colour, position) not in number:
            number[colour, position] = len(values)
            n = members[colour]
            values.append(
                ValueChoice(
                    colour, *(None if c is None else c * n for c in (value.scatter, value.gather, value.reduce))
                )
            )
        place[index] = number[colour, position]
    uses = dict.fromkeys(Use(place[u.value], None if u.op is None else colours[u.op], u.demand) for u in problem.uses)
    return Problem(ops, values, list(uses))


def _times(op: OpChoice, count: int) -> OpChoice:
    costs = tuple(None if cost is None else cost * count for cost in op.costs)
    return OpChoice(op.name, costs)  # type: ignore[arg-type]
