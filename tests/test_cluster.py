"""Solving by kinds of layers: never below the optimum, equal to it on repeated layers, and the bound is one."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from test_mincut import ROW_WISE, WHOLE, brute_force, random_problem

from cpcompile.passes.cluster import _colours, lower_bound, solve_clustered
from cpcompile.passes.mincut import OpChoice, P, Problem, R, S, Use, ValueChoice, cost_of, is_exact, solve_milp


def copies(problem: Problem, count: int) -> Problem:
    """``count`` problems side by side."""
    ops, values, uses = [], [], []
    for number in range(count):
        op, value = number * len(problem.ops), number * len(problem.values)
        ops += problem.ops
        values += [replace(v, op=v.op + op) for v in problem.values]
        uses += [Use(u.value + value, None if u.op is None else u.op + op, u.demand) for u in problem.uses]
    return Problem(ops, values, uses)


def layers(count: int, scatter: int = 10, gather: int = 10, reduce: int = 15) -> Problem:
    """``count`` layers of: an all-reduce, a norm of it and the residual, and a product that needs the norm whole."""
    ops: list[OpChoice] = []
    values: list[ValueChoice] = []
    uses: list[Use] = []
    residual = None
    for number in range(count):
        summed = len(ops)
        ops += [OpChoice(f"all-reduce {number}", (0, None, None)), OpChoice(f"norm {number}", (None, 1, 8))]
        values += [ValueChoice(summed, scatter, gather, reduce), ValueChoice(summed + 1, None, gather, None)]
        uses.append(Use(summed, summed + 1, ROW_WISE))
        uses.append(Use(summed + 1, None, WHOLE) if number == count - 1 else Use(summed + 1, summed + 3, ROW_WISE))
        if residual is not None:
            uses.append(Use(residual, summed + 1, ROW_WISE))
        residual = summed + 1
    return Problem(ops, values, uses)


@pytest.mark.parametrize("exact", [False, True])
def test_between_the_bound_and_the_graph_as_it_is_on_300_problems(exact: bool) -> None:
    reached = 0
    for seed in range(150):
        problem = random_problem(random.Random(seed), exact)
        best = brute_force(problem)
        if best is None:
            continue
        found = solve_clustered(problem)
        assert cost_of(problem, found.labels) == found.cost
        assert lower_bound(problem) <= best <= found.cost, seed
        whole = cost_of(problem, [P if op.costs[R] is None else R for op in problem.ops])
        assert whole is None or found.cost <= whole
        reached += found.cost == best
        if is_exact(problem):
            assert lower_bound(problem) == best, seed
    assert reached > 120


def test_copies_of_a_problem_whose_ops_all_differ_are_solved_exactly() -> None:
    solved = 0
    for seed in range(120):
        problem = random_problem(random.Random(1000 + seed), exact=False)
        best = brute_force(problem)
        if best is None or len(set(_colours(problem))) < len(problem.ops):
            continue
        found = solve_clustered(copies(problem, 5))
        assert found.cost == 5 * best, seed
        assert found.labels == found.labels[: len(problem.ops)] * 5
        solved += 1
    assert solved > 40


@pytest.mark.parametrize(("scatter", "gather", "reduce"), [(10, 10, 15), (10, 10, 5), (10, 10, 20), (3, 9, 10)])
def test_repeated_layers_cost_what_the_exact_plan_costs(scatter: int, gather: int, reduce: int) -> None:
    problem = layers(20, scatter, gather, reduce)
    exact = solve_milp(problem)
    assert exact.bound == exact.cost
    found = solve_clustered(problem)
    assert lower_bound(problem) <= exact.cost <= found.cost <= 1.02 * exact.cost
    assert found.solver == "integer programme over kinds of layers"
    assert found.bound == 0  # the caller asks for the bound


def test_layers_of_one_kind_share_a_colour_and_the_ends_do_not() -> None:
    colours = _colours(layers(40))
    norms = colours[1::2]
    assert len(set(norms)) == 2 * 6 + 1  # six uses from either end, and what lies between
    assert len(set(norms[6:-6])) == 1 and norms[0] != norms[6] != norms[-1]
    assert not set(norms) & set(colours[0::2])


def test_what_a_use_demands_makes_a_kind() -> None:
    def of(demand: Sequence[int]) -> Problem:
        ops = [OpChoice("a", (None, 1, 2)), OpChoice("b", (None, 1, 2))]
        values = [ValueChoice(0, None, 3, None), ValueChoice(1, None, 3, None)]
        return Problem(ops, values, [Use(0, None, WHOLE), Use(1, None, tuple(demand))])  # type: ignore[arg-type]

    assert len(set(_colours(of(WHOLE)))) == 1
    assert len(set(_colours(of((S, S, S))))) == 2


def test_two_readers_of_one_value_that_demand_otherwise_are_two_kinds() -> None:
    ops = [OpChoice("a", (None, 1, 2)), *[OpChoice(name, (None, 3, 4)) for name in "bcd"]]
    uses = [Use(0, 1, ROW_WISE), Use(0, 2, WHOLE), Use(0, 3, ROW_WISE)]
    _, b, c, d = _colours(Problem(ops, [ValueChoice(0, None, 3, None)], uses))
    assert b == d != c


def test_the_bound_of_an_all_reduce_that_is_cheaper_than_its_halves() -> None:
    """All-reduced and computed whole, 5 + 4. The halves' prices alone lead to shards, 5 + 0 + 10: no bound."""
    ops = [OpChoice("all-reduce", (0, None, None)), OpChoice("norm", (None, 0, 4))]
    values = [ValueChoice(0, 10, 10, 5), ValueChoice(1, None, 10, None)]
    problem = Problem(ops, values, [Use(0, 1, ROW_WISE), Use(1, None, WHOLE)])
    assert lower_bound(problem) == brute_force(problem) == 9
