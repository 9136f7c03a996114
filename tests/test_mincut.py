"""The two solvers against brute force over all labellings, on small random problems, and the cases that shaped them."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcompile.passes.mincut import (
    OpChoice,
    P,
    Problem,
    R,
    S,
    Solution,
    Use,
    ValueChoice,
    available_levels,
    cost_of,
    edges_of,
    is_exact,
    raise_route,
    solve,
    solve_cut,
    solve_milp,
)

WHOLE = (R, R, R)
ROW_WISE = (S, S, R)
LINEAR = (P, S, R)
KEYS = (R, R, R)  # what attention asks of its keys; of its queries it asks ROW_WISE


def random_problem(rng: random.Random, exact: bool) -> Problem:
    """A DAG of all-reduces, linear and row-wise ops; some cannot be sharded, some values cannot be raised."""
    ops: list[OpChoice] = []
    values: list[ValueChoice] = []
    uses: list[Use] = []
    for number in range(rng.randint(2, 8)):
        kind = rng.choice(["all-reduce", "all-reduce", "linear", "row-wise", "row-wise", "row-wise", "whole"])
        whole = rng.randint(0, 20)
        costs: tuple[int | None, int | None, int | None] = {
            "all-reduce": (0, None, None),
            "linear": (whole, whole // 4, whole),
            "row-wise": (None, whole // 4, whole),
            "whole": (None, None, whole),
        }[kind]
        ops.append(OpChoice(f"{kind} {number}", costs))
        available = range(len(values))
        if kind != "all-reduce":
            for value in rng.sample(available, min(len(values), rng.randint(1, 3))):
                uses.append(Use(value, number, random_demand(rng, kind)))
        for _ in range(rng.choice([1, 1, 2])):
            values.append(random_value(rng, number, costs[P] is not None, exact))
    uses += [Use(value, None, WHOLE) for value in range(len(values)) if rng.random() < 0.4]
    for value in rng.sample(range(len(values)), min(len(values), rng.choice([0, 1, 2]))):
        # Rows picked of a shard are a sum, which one step raises.
        ops.append(OpChoice(f"picks {len(ops)}", (rng.randint(0, 5), None, rng.randint(0, 5))))
        values.append(ValueChoice(len(ops) - 1, None, None, rng.randint(0, 20)))
        uses += [Use(value, len(ops) - 1, ROW_WISE), Use(len(values) - 1, None, WHOLE)]
    return Problem(ops, values, uses)


def random_demand(rng: random.Random, kind: str) -> tuple[int, int, int]:
    if kind == "linear":
        return rng.choice([LINEAR, LINEAR, (P, P, P), (P, R, R)])
    return rng.choice([ROW_WISE, ROW_WISE, KEYS, (S, S, S)])


def random_value(rng: random.Random, op: int, partial: bool, exact: bool) -> ValueChoice:
    scatter, gather = rng.randint(0, 20), rng.randint(0, 20)
    if not partial:
        return ValueChoice(op, None, None if rng.random() < 0.1 else gather, None)
    if exact:
        return ValueChoice(op, scatter, gather, rng.choice([None, scatter + gather + rng.randint(0, 3)]))
    return ValueChoice(op, scatter, gather, rng.randint((scatter + gather) // 3, scatter + gather))


def brute_force(problem: Problem) -> int | None:
    """Cost of the best labelling, by trying all."""
    allowed = [[label for label in (P, S, R) if op.costs[label] is not None] for op in problem.ops]
    costs = [cost_of(problem, labels) for labels in itertools.product(*allowed)]
    return min((c for c in costs if c is not None), default=None)


def problems(count: int, exact: bool) -> list[Problem]:
    """Seeded problems that have a solution."""
    rng = random.Random(7)
    found: list[Problem] = []
    while len(found) < count:
        problem = random_problem(rng, exact)
        if is_exact(problem) == exact and brute_force(problem) is not None:
            found.append(problem)
    return found


# Equality with brute force


def test_the_cut_is_the_optimum_on_1200_problems() -> None:
    used: set[int] = set()
    for problem in problems(1200, exact=True):
        found = solve(problem)
        assert found.solver == "minimum cut"
        assert found.cost == found.bound == cost_of(problem, found.labels) == brute_force(problem), problem
        used |= set(found.labels)
    assert used == {P, S, R}


def test_the_integer_programme_is_the_optimum_on_320_problems() -> None:
    improved = 0
    for problem in problems(320, exact=False):
        found, best = solve(problem), brute_force(problem)
        assert best is not None
        assert found.cost == cost_of(problem, found.labels) == best, problem
        assert found.bound == best, problem
        improved += best < solve_cut(problem).cost
    assert improved >= 10, "the problems do not need the integer programme"


def test_both_solvers_agree_where_the_cut_is_exact() -> None:
    for problem in problems(100, exact=True):
        assert solve_milp(problem).cost == solve_cut(problem).cost


def test_the_cut_alone_claims_no_bound_where_it_is_inexact() -> None:
    for problem in problems(100, exact=False):
        found, best = solve_cut(problem), brute_force(problem)
        assert best is not None and found.bound <= best <= found.cost


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False), st.booleans())
def test_no_labelling_is_cheaper(rng: random.Random, exact: bool) -> None:
    problem = random_problem(rng, exact)
    best = brute_force(problem)
    if best is None:
        return
    found = solve(problem)
    assert found.bound <= best == found.cost


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_cut_is_a_certificate(rng: random.Random) -> None:
    """The flow through the edges, found by another algorithm, equals the cost: no plan can be cheaper."""
    problem = random_problem(rng, exact=True)
    if not is_exact(problem) or brute_force(problem) is None:
        return
    graph = nx.DiGraph()
    graph.add_nodes_from("st")
    for u, v, capacity in edges_of(problem):
        known = graph[u][v]["capacity"] if graph.has_edge(u, v) else 0
        graph.add_edge(u, v, capacity=known + (10**9 if capacity is None else capacity))
    flow = nx.maximum_flow_value(graph, "s", "t", flow_func=nx.algorithms.flow.edmonds_karp)
    assert flow == solve(problem).bound


# The cases that shaped the construction


def chain(reduce: int, scatter: int = 10, gather: int = 10, norm: int = 8) -> Problem:
    """An all-reduce, a norm, and a consumer that needs it whole."""
    ops = [OpChoice("all-reduce", (0, None, None)), OpChoice("norm", (None, norm // 4, norm))]
    values = [ValueChoice(0, scatter, gather, reduce), ValueChoice(1, None, gather, None)]
    return Problem(ops, values, [Use(0, 1, ROW_WISE), Use(1, None, WHOLE)])


def test_reduce_scatter_norm_all_gather() -> None:
    assert solve(chain(reduce=20)) == Solution((P, S), 10 + 2 + 10, 22, "minimum cut")
    assert available_levels(chain(reduce=20), (P, S)) == [S, R]


def test_left_alone_where_the_all_reduce_is_cheap() -> None:
    assert solve(chain(reduce=13)) == Solution((P, R), 13 + 8, 21, "integer programme")
    assert solve(chain(reduce=14)).cost == 22


def test_one_gather_serves_all_consumers() -> None:
    """Three whole uses of a shard pay for one gather; the cut that paid each would keep the op whole."""
    ops = [OpChoice("norm", (None, 10, 20))]
    problem = Problem(ops, [ValueChoice(0, None, 9, None)], [Use(0, None, WHOLE)] * 3)
    assert solve(problem) == Solution((S,), 19, 19, "minimum cut")
    one_more = Problem(ops, [ValueChoice(0, None, 11, None)], [Use(0, None, WHOLE)] * 3)
    assert solve(one_more).labels == (R,)


def test_one_scatter_serves_a_shard_and_a_whole_use() -> None:
    problem = Problem(
        [OpChoice("all-reduce", (0, None, None)), OpChoice("norm", (None, 1, 100))],
        [ValueChoice(0, 5, 5, 10)],
        [Use(0, 1, ROW_WISE), Use(0, None, WHOLE)],
    )
    assert solve(problem).cost == 5 + 5 + 1


def test_a_shard_is_a_slice_of_a_cheaper_all_reduce() -> None:
    problem = Problem(
        [OpChoice("all-reduce", (0, None, None)), OpChoice("norm", (None, 1, 100))],
        [ValueChoice(0, 10, 10, 4)],
        [Use(0, 1, ROW_WISE)],
    )
    assert raise_route(problem.values[0], P, S) == (4, "reduce")
    assert solve(problem) == Solution((P, S), 5, 5, "integer programme")


def test_the_gather_moves_past_a_shrinking_projection() -> None:
    ops = [OpChoice("hidden", (None, 5, 10)), OpChoice("latent", (None, 5, 10))]
    values = [ValueChoice(0, None, 71, None), ValueChoice(1, None, 21, None)]
    uses = [Use(0, 1, ROW_WISE), Use(1, None, WHOLE)]
    assert solve(Problem(ops, values, uses)).labels == (R, R)
    ops = [OpChoice("hidden", (None, 25, 100)), OpChoice("latent", (None, 25, 100))]
    found = solve(Problem(ops, values, uses))
    assert (found.labels, found.cost) == ((S, S), 25 + 25 + 21)


def test_queries_in_shards_keys_whole() -> None:
    ops = [OpChoice("q", (None, 1, 4)), OpChoice("k", (None, 1, 4)), OpChoice("attention", (None, 100, 400))]
    values = [ValueChoice(0, None, 50, None), ValueChoice(1, None, 2, None), ValueChoice(2, None, 60, None)]
    uses = [Use(0, 2, ROW_WISE), Use(1, 2, KEYS), Use(2, None, WHOLE)]
    found = solve(Problem(ops, values, uses))
    assert (found.labels, found.cost) == ((S, S, S), 1 + 1 + 2 + 100 + 60)


def test_partial_sums_flow_through_linear_ops() -> None:
    """Two all-reduces, each through a projection that shrinks: reduce after it."""
    ops = [OpChoice("all-reduce", (0, None, None)), OpChoice("projection", (2, 1, 2))]
    values = [ValueChoice(0, 50, 50, 100), ValueChoice(1, 3, 3, 6)]
    found = solve(Problem(ops, values, [Use(0, 1, LINEAR), Use(1, None, WHOLE)]))
    assert (found.labels, found.cost) == ((P, P), 2 + 6)


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [
        (ValueChoice(0, 3, 4, 9), P, P, (0, "")),
        (ValueChoice(0, 3, 4, 9), R, S, (0, "")),
        (ValueChoice(0, 3, 4, 9), P, S, (3, "scatter")),
        (ValueChoice(0, 3, 4, 9), S, R, (4, "gather")),
        (ValueChoice(0, 3, 4, 9), P, R, (7, "scatter+gather")),
        (ValueChoice(0, 3, 4, 6), P, R, (6, "reduce")),
        (ValueChoice(0, 3, 4, 2), P, S, (2, "reduce")),
        (ValueChoice(0, 0, 0, 0), P, R, (0, "scatter+gather")),
        (ValueChoice(0, None, 4, 9), P, R, (9, "reduce")),
        (ValueChoice(0, None, 4, 9), P, S, (9, "reduce")),
        (ValueChoice(0, None, 4, None), P, S, (None, "")),
        (ValueChoice(0, None, None, None), S, R, (None, "gather")),
    ],
)
def test_routes(value: ValueChoice, low: int, high: int, expected: tuple[int | None, str]) -> None:
    assert raise_route(value, low, high) == expected


# What is impossible


def test_impossible_labels_and_raises_are_never_chosen() -> None:
    """The shard is free, and nothing can gather it: the op stays whole at any price."""
    ops = [OpChoice("norm", (None, 0, 10**15))]
    problem = Problem(ops, [ValueChoice(0, None, None, None)], [Use(0, None, WHOLE)])
    assert cost_of(problem, (S,)) is None
    assert cost_of(problem, (P,)) is None
    assert solve(problem) == Solution((R,), 10**15, 10**15, "minimum cut")


def test_an_op_that_cannot_be_sharded_pulls_its_operands_up() -> None:
    ops = [OpChoice("norm", (None, 1, 4)), OpChoice("mixing", (None, None, 0))]
    problem = Problem(ops, [ValueChoice(0, None, 1, None)], [Use(0, 1, WHOLE)])
    assert solve(problem) == Solution((S, R), 2, 2, "minimum cut")


def test_an_op_without_labels_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="op nothing has no allowed label"):
        solve(Problem([OpChoice("nothing", (None, None, None))], [], []))


@pytest.mark.parametrize("demand", [(R, S, R), (S, P, R), (S, R, S)])
def test_a_demand_that_falls_is_a_bug(demand: tuple[int, int, int]) -> None:
    problem = Problem(
        [OpChoice("a", (None, 1, 1)), OpChoice("b", (1, 1, 1))], [ValueChoice(0, 1, 1, 2)], [Use(0, 1, demand)]
    )
    with pytest.raises(AssertionError, match="falls"):
        solve(problem)


def test_empty_problem() -> None:
    assert solve(Problem([], [], [])) == Solution((), 0, 0, "minimum cut")


def test_large_costs_stay_exact() -> None:
    """Picoseconds of a long step: the numbers are integers beyond what a float distinguishes."""
    big = 2**60
    ops = [OpChoice("norm", (None, big, 2 * big + 1))]
    assert solve(Problem(ops, [ValueChoice(0, None, big, None)], [Use(0, None, WHOLE)])).labels == (S,)
    assert solve(Problem(ops, [ValueChoice(0, None, big + 2, None)], [Use(0, None, WHOLE)])).labels == (R,)


def test_rows_are_picked_from_shards_where_the_sum_of_few_is_cheaper() -> None:
    """The norm stays in shards, and its picked rows are reduced, in one step, not gathered."""
    ops = [OpChoice("norm", (None, 2, 8)), OpChoice("last row", (1, None, 0))]
    values = [ValueChoice(0, None, 10, None), ValueChoice(1, None, None, 3)]
    uses = [Use(0, 1, ROW_WISE), Use(1, None, WHOLE)]
    found = solve(Problem(ops, values, uses))
    assert found == Solution((S, P), 2 + 1 + 3, 6, "minimum cut")
    assert raise_route(values[1], P, R) == (3, "reduce")
    dear = [values[0], replace(values[1], reduce=30)]
    assert solve(Problem(ops, dear, uses)).labels == (R, R)


def test_is_exact() -> None:
    assert is_exact(chain(reduce=20)) and not is_exact(chain(reduce=19))
    partial = OpChoice("all-reduce", (0, None, None))
    assert not is_exact(Problem([partial], [ValueChoice(0, None, 1, 9)], []))  # no halves at all
    assert is_exact(Problem([partial], [ValueChoice(0, 1, 1, None)], []))
    assert is_exact(Problem([OpChoice("norm", (None, 1, 1))], [ValueChoice(0, 5, 5, 1)], []))  # never a partial sum


def test_the_time_limit_falls_back_on_the_cut() -> None:
    rng = random.Random(3)
    for problem in itertools.islice((p for p in iter(lambda: random_problem(rng, False), None) if not is_exact(p)), 20):
        best = brute_force(problem)
        if best is not None:
            found = solve_milp(problem, time_limit=0.0)
            assert found.bound <= best <= found.cost == cost_of(problem, found.labels)
