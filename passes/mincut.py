"""The placement problem as numbers, and its two exact solvers: a minimum cut, and an integer programme.

Each op gets a label P < S < R. Each value is produced at its op's label and is raised once to the highest label
that any use demands: P→S costs ``scatter``, S→R ``gather``, P→R ``reduce``; going down is free. Where
``reduce >= scatter + gather`` for every value this is Ishikawa's construction for ordered labels ("Exact
optimization for Markov random fields with convex priors", 2003) with one auxiliary node per value and threshold,
so that a gather shared by several uses is paid once, and the minimum s-t cut is the optimum. An all-reduce that is
cheaper than its two halves breaks the order; those problems go to ``scipy.optimize.milp``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

P, S, R = 0, 1, 2
LABELS = "PSR"
SOURCE, SINK = "s", "t"
BoolNode = str | tuple[str, int, int]
Edge = tuple[BoolNode, BoolNode, int | None]


@dataclass(frozen=True)
class OpChoice:
    """One op: its cost at P, S and R (integers, any one unit); None where it cannot have that label."""

    name: str
    costs: tuple[int | None, int | None, int | None]


@dataclass(frozen=True)
class ValueChoice:
    """One output of op number ``op`` and the cost of raising it. ``None``: it cannot be raised."""

    op: int
    scatter: int | None
    gather: int | None
    reduce: int | None


@dataclass(frozen=True)
class Use:
    """Op number ``op`` (None: something that is whole on every rank) reads value number ``value``.

    ``demand[l]`` is the lowest label at which the value must be available when the op has label ``l``; it does not
    fall as ``l`` rises. ``demand[P] == P`` says that the op at P sums partial values: then the value's own label must
    be P too, for a whole value is no partial sum (n ranks would count it n times).
    """

    value: int
    op: int | None
    demand: tuple[int, int, int]


@dataclass(frozen=True)
class Problem:
    """A placement problem. All numbers are integers in one unit, so that the cut's value is exact."""

    ops: Sequence[OpChoice]
    values: Sequence[ValueChoice]
    uses: Sequence[Use]


@dataclass(frozen=True)
class Solution:
    """Labels of the ops, the cost of the plan, and how it was found.

    Args:
        labels: per op, ``P``, ``S`` or ``R``.
        cost: cost of ``labels`` by :func:`cost_of`.
        bound: no plan costs less than this; equal to ``cost`` where the plan is proven optimal.
        solver: ``"minimum cut"`` or ``"integer programme"``.
    """

    labels: tuple[int, ...]
    cost: int
    bound: int
    solver: str


def available_levels(problem: Problem, labels: Sequence[int]) -> list[int]:
    """Per value, the highest label at which any use demands it; at least its own."""
    levels = [labels[v.op] for v in problem.values]
    for use in problem.uses:
        demanded = use.demand[R if use.op is None else labels[use.op]]
        levels[use.value] = max(levels[use.value], demanded)
    return levels


def raise_route(value: ValueChoice, low: int, high: int) -> tuple[int | None, str]:
    """Cheapest way from label ``low`` up to ``high``: its cost (None if impossible) and its collectives.

    The collectives are ``""``, ``"scatter"``, ``"gather"``, ``"scatter+gather"`` or ``"reduce"``; where the
    all-reduce is cheaper than the reduce-scatter alone, a shard is a slice of its result.
    """
    if low >= high:
        return 0, ""
    if (low, high) == (S, R):
        return value.gather, "gather"
    two_steps = None if value.scatter is None or value.gather is None else value.scatter + value.gather
    steps = (value.scatter, "scatter") if high == S else (two_steps, "scatter+gather")
    routes = [route for route in (steps, (value.reduce, "reduce")) if route[0] is not None]
    return min(routes, key=lambda route: route[0] or 0) if routes else (None, "")


def sums_partial(problem: Problem, use: Use) -> bool:
    """Whether ``use.op`` may run at P and reads ``use.value`` as a partial sum there."""
    return use.op is not None and use.demand[P] == P and problem.ops[use.op].costs[P] is not None


def cost_of(problem: Problem, labels: Sequence[int]) -> int | None:
    """Exact cost of a labelling; None if it is not allowed."""
    total = 0
    for op, label in zip(problem.ops, labels, strict=True):
        cost = op.costs[label]
        if cost is None:
            return None
        total += cost
    for use in problem.uses:
        if sums_partial(problem, use) and labels[use.op] == P != labels[problem.values[use.value].op]:  # type: ignore[index]
            return None
    for value, level in zip(problem.values, available_levels(problem, labels), strict=True):
        cost, _ = raise_route(value, labels[value.op], level)
        if cost is None:
            return None
        total += cost
    return total


def is_one_step(problem: Problem, value: ValueChoice) -> bool:
    """Whether an all-reduce alone raises ``value``, which is never a shard: both of its steps at one price."""
    never_a_shard = problem.ops[value.op].costs[S] is None
    return never_a_shard and value.scatter is None and value.gather is None and value.reduce is not None


def _threshold(problem: Problem, op: int, level: int) -> BoolNode:
    """The Boolean "op's label is at least ``level``"; a constant where the allowed labels decide it."""
    allowed = [label for label in (P, S, R) if problem.ops[op].costs[label] is not None]
    assert allowed, f"op {problem.ops[op].name} has no allowed label"
    if min(allowed) >= level:
        return SOURCE
    if max(allowed) < level:
        return SINK
    return ("x", op, level)


def _trigger(problem: Problem, use: Use, level: int) -> BoolNode:
    """The Boolean under which ``use`` demands its value at ``level`` or above."""
    lowest = next((label for label in (P, S, R) if use.demand[label] >= level), None)
    if lowest is None:
        return SINK
    return SOURCE if use.op is None or lowest == P else _threshold(problem, use.op, lowest)


def edges_of(problem: Problem) -> list[Edge]:
    """The cut's edges: ``(u, v, capacity)`` is paid if ``u`` is true and ``v`` false; None is infinite."""
    edges: list[Edge] = []
    for index, op in enumerate(problem.ops):
        at_s, at_r = _threshold(problem, index, S), _threshold(problem, index, R)
        edges += [(SOURCE, at_s, op.costs[P]), (at_s, at_r, op.costs[S]), (at_r, SINK, op.costs[R]), (at_r, at_s, None)]
    for index, value in enumerate(problem.values):
        prices = (value.reduce, 0) if is_one_step(problem, value) else (value.scatter, value.gather)
        for level, price in zip((S, R), prices, strict=True):
            edges.append((("m", index, level), _threshold(problem, value.op, level), price))
        if _threshold(problem, value.op, S) != SOURCE:
            edges.append((("m", index, R), ("m", index, S), None))
    for use in problem.uses:
        assert list(use.demand) == sorted(use.demand), f"demand {use.demand} falls"
        if sums_partial(problem, use):
            assert use.op is not None
            edges.append((_threshold(problem, problem.values[use.value].op, S), _threshold(problem, use.op, S), None))
        for level in (S, R):
            if _threshold(problem, problem.values[use.value].op, level) == SOURCE:
                continue  # the value is always there
            trigger = _trigger(problem, use, level)
            edges.append((trigger, ("m", use.value, level), None))
    # Edges out of a constant-false or into a constant-true node are never paid.
    return [(u, v, c) for u, v, c in edges if u != SINK and v != SOURCE and u != v and c != 0]


def _labels(problem: Problem, true: set[BoolNode]) -> tuple[int, ...]:
    true = true | {SOURCE}
    return tuple(
        sum(_threshold(problem, index, level) in true for level in (S, R)) for index in range(len(problem.ops))
    )


def is_exact(problem: Problem) -> bool:
    """Whether the minimum cut is the optimum: no all-reduce is cheaper than its two halves, where it has any."""
    for value in problem.values:
        if problem.ops[value.op].costs[P] is None or value.reduce is None or is_one_step(problem, value):
            continue
        if value.scatter is None or value.gather is None or value.reduce < value.scatter + value.gather:
            return False
    return True


def solve_cut(problem: Problem) -> Solution:
    """The minimum cut. Its ``bound`` is its own value where the model is exact."""
    graph = nx.DiGraph()
    graph.add_nodes_from([SOURCE, SINK])
    for u, v, capacity in edges_of(problem):
        if not graph.has_edge(u, v):
            graph.add_edge(u, v, capacity=0)
        data = graph[u][v]
        if capacity is None:
            data.pop("capacity", None)  # networkx: no capacity means infinite
        elif "capacity" in data:
            data["capacity"] += capacity
    value, (true, _) = nx.minimum_cut(graph, SOURCE, SINK, flow_func=nx.algorithms.flow.preflow_push)
    labels = _labels(problem, true)
    cost = cost_of(problem, labels)
    assert cost is not None and cost <= value, f"the cut's value {value} is below its plan's cost {cost}"
    assert not is_exact(problem) or cost == value, f"the cut's value {value} is not its plan's cost {cost}"
    return Solution(labels, cost, cost if is_exact(problem) else 0, "minimum cut")


def solve_milp(problem: Problem, time_limit: float = 20.0) -> Solution:
    """The integer programme: the same edges, plus one saving per all-reduce that is cheaper than its halves.

    Falls back on the minimum cut, with the programme's lower bound, where the time limit leaves no plan.
    """
    rows: list[tuple[list[tuple[int, float]], float]] = []  # sum(coefficient * variable) <= limit
    cost: list[float] = []
    index: dict[BoolNode, int] = {}
    constant = 0.0
    scale = float(max([c for _, _, c in edges_of(problem) if c] or [1]))

    def variable(weight: float) -> int:
        cost.append(weight / scale)
        return len(cost) - 1

    def boolean(node: BoolNode) -> int:
        if node not in index:
            index[node] = variable(0.0)
        return index[node]

    edges = edges_of(problem)
    for u, v, _ in edges:
        for node in (u, v):
            if node not in (SOURCE, SINK):
                boolean(node)
    integers = len(index)
    for u, v, capacity in edges:
        terms = [(boolean(u), 1.0)] if u != SOURCE else []
        terms += [(boolean(v), -1.0)] if v != SINK else []
        limit = 0.0 if u != SOURCE else -1.0
        if capacity is not None:
            terms.append((variable(float(capacity)), -1.0))
        if terms:
            rows.append((terms, limit))
        else:
            constant += float(capacity or 0)
    for number, value in enumerate(problem.values):
        two_steps = None if value.scatter is None or value.gather is None else value.scatter + value.gather
        if problem.ops[value.op].costs[P] is None or value.reduce is None or is_one_step(problem, value):
            continue
        assert two_steps is not None, "an all-reduce without its two halves"
        saving = two_steps - value.reduce
        at_s = _threshold(problem, value.op, S)
        if saving <= 0 or ("m", number, R) not in index:
            continue
        used = variable(-float(saving))
        rows.append(([(used, 1.0), (boolean(("m", number, R)), -1.0)], 0.0))
        if at_s != SINK:
            rows.append(([(used, 1.0), (boolean(at_s), 1.0)], 1.0))
    entries = [(r, column, weight) for r, (terms, _) in enumerate(rows) for column, weight in terms]
    data = np.array([e[2] for e in entries])
    matrix = coo_array(
        (data, (np.array([e[0] for e in entries]), np.array([e[1] for e in entries]))), shape=(len(rows), len(cost))
    ).tocsr()
    result = milp(
        np.array(cost),
        integrality=np.array([1] * integers + [0] * (len(cost) - integers)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(matrix, ub=np.array([limit for _, limit in rows])),
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    dual = result.get("mip_dual_bound")
    bound = 0 if dual is None else max(0, int(np.floor(dual * scale + constant)))
    labels: tuple[int, ...] = ()
    exact = None
    if result.x is not None:
        labels = _labels(problem, {node for node, column in index.items() if result.x[column] > 0.5})
        exact = cost_of(problem, labels)
    if result.status != 0 or exact is None:
        cut = solve_cut(problem)
        if exact is None or cut.cost < exact:
            return Solution(cut.labels, cut.cost, min(bound, cut.cost), cut.solver)
    # The dual bound is floating point: within rounding of the plan's exact cost, the plan is the optimum.
    proven = exact if exact - bound <= max(1, exact * 1e-9) else bound
    return Solution(labels, exact, proven, "integer programme")


def solve(problem: Problem) -> Solution:
    """Solve by the minimum cut where that is exact, else by the integer programme."""
    return solve_cut(problem) if is_exact(problem) else solve_milp(problem)
