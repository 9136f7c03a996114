"""Placing one axis: break-even points, which plans are worth a graph, and plans of a real layer against the optimum."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from placed import layer

from cpcompile.costs import PICOSECONDS, profile
from cpcompile.passes.mincut import LABELS, P, Solution, cost_of, solve
from cpcompile.passes.place import (
    MANY_TOKENS,
    WORTH_A_GRAPH,
    Candidate,
    _cost_function,
    _crossing,
    _envelope,
    _fewer,
    _optimum,
    place,
)
from cpcompile.passes.placement_problem import PlacementGraph, latency_free
from cpcompile.plan import AxisPlan, Interval

A3 = profile("ascend-a3")


def line(start: float, slope: float) -> Callable[[int], float]:
    return lambda tokens: start + slope * tokens


def candidate(at: int, label: int, seconds: Callable[[int], float], raises: tuple[str, ...] = ()) -> Candidate:
    return Candidate(at, Solution((label,), 0, 0, "minimum cut"), raises, seconds)


# ---- break-even ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("b", "expected"),
    [(line(10, 1), 5), (line(11, 1), 5), (line(12, 1), 6), (line(30, 1), None), (line(-1, 3), None)],
)
def test_the_last_count_at_which_the_first_costs_no_more(b: Callable[[int], float], expected: int | None) -> None:
    """Of ``3 T`` and ``10 + T`` in [1, 12): equal at 5; never, where one is always cheaper."""
    assert _crossing(line(0, 3), b, 1, 12) == expected


def spans(pieces: list[tuple[int, int | None, Candidate]]) -> list[tuple[int, int | None, int]]:
    return [(first, last, c.solution.labels[0]) for first, last, c in pieces]


def test_neighbours_meet_where_their_costs_cross() -> None:
    a, b, c = candidate(1, 0, line(0, 3)), candidate(50, 1, line(10, 1)), candidate(1000, 2, line(110, 0))
    assert spans(_envelope([a, b, c])) == [(0, 5, 0), (6, 100, 1), (101, None, 2)]


def test_equal_plans_become_one_piece_unless_their_collectives_differ() -> None:
    a, b = candidate(1, 1, line(0, 2)), candidate(1000, 1, line(0, 2))
    assert spans(_envelope([a, b])) == [(0, None, 1)]
    other = candidate(1000, 1, line(100, 1), ("reduce",))
    assert spans(_envelope([a, other])) == [(0, 100, 1), (101, None, 1)]


def test_a_plan_that_gains_too_little_anywhere_is_dropped() -> None:
    a, c = candidate(1, 0, line(1000, 10)), candidate(MANY_TOKENS, 2, line(100_000, 1))
    little = candidate(11_000, 1, line(54_000, 5))  # 1.8 % below the other two where those meet
    much = candidate(11_000, 1, line(40_000, 4))  # 24 %
    assert spans(_fewer([a, little, c])) == [(0, 11_000, 0), (11_001, None, 2)]
    assert [piece[2] for piece in spans(_envelope([a, little, c]))] == [0, 1, 2]
    assert [piece[2] for piece in spans(_fewer([a, much, c]))] == [0, 1, 2]


def test_plans_that_take_no_time_are_one() -> None:
    """An all-reduce that nobody reads: whatever is done with it, there is nothing to gain."""
    a, b = candidate(1, 0, line(0, 0)), candidate(1000, 1, line(0, 0))
    assert len(_fewer([a, b])) == 1


def test_one_plan_is_always_kept() -> None:
    assert spans(_fewer([candidate(1, 2, line(0, 0.1))])) == [(0, None, 2)]


# ---- a real layer --------------------------------------------------------------------------------------------------


def planned(graph: PlacementGraph, strategy: str = "auto", hardware: str = "ascend-a3") -> AxisPlan:
    return place(graph, profile(hardware), strategy, "fingerprint")


def labels_of(graph: PlacementGraph, interval: Interval) -> list[int]:
    return [P if c.reduced else LABELS.index(interval.labels.get(c.node.name, "R")) for c in graph.choices]


COUNTS = [1, 2, 3, 4, 5, 64, 1000, 4099, 60_000, 1 << 17, 1 << 18, 1 << 19, MANY_TOKENS]


@pytest.mark.parametrize("hardware", ["ascend-a3", "h100-nvlink", "pcie", "gloo"])
@pytest.mark.parametrize("size", [2, 4])
def test_no_count_is_served_worse_than_the_optimum_by_more_than_a_graph_is_worth(hardware: str, size: int) -> None:
    graph = layer(size).graph(hardware)
    plan = planned(graph, hardware=hardware)
    for tokens in COUNTS:
        problem = graph.problem(tokens, profile(hardware))
        cost, best = cost_of(problem, labels_of(graph, plan.at(tokens))), solve(problem).cost
        assert cost is not None and best <= cost <= best * (1 + WORTH_A_GRAPH) + 10, tokens


def test_intervals_cover_every_count_and_state_their_costs() -> None:
    graph = layer().graph()
    plan = planned(graph)
    assert (plan.axis, plan.size, plan.graph, plan.strategy, plan.profile) == (
        "tp", 4, "fingerprint", "auto", "ascend-a3",
    )  # fmt: skip
    assert plan.tokens == str(graph.known.tokens)
    few, many = plan.intervals
    assert (few.first, few.last) == (0, many.first - 1) and many.last is None
    assert (
        few.unchanged
        and few.cost_s == few.unchanged_s
        and few.raises == dict.fromkeys(["wait_tensor", "wait_tensor_1"], "reduce")
    )
    assert set(many.labels.values()) == {"S"} and "wait_tensor" not in many.labels
    assert many.raises == {
        "wait_tensor": "scatter", "mul_18": "gather", "wait_tensor_1": "scatter", "add_50": "gather",
    }  # fmt: skip
    for interval in plan.intervals:
        problem = graph.problem(interval.at, A3)
        assert interval.cost_s * PICOSECONDS == pytest.approx(cost_of(problem, labels_of(graph, interval)))
        assert interval.bound_s == interval.cost_s <= interval.unchanged_s
        assert interval.holds(interval.at)


def test_the_plans_change_at_the_break_even_count() -> None:
    graph = layer().graph()
    few, many = planned(graph).intervals
    for tokens, better in ((few.last, few), (many.first, many)):
        assert tokens is not None
        problem = graph.problem(tokens, A3)
        costs = {i.first: cost_of(problem, labels_of(graph, i)) for i in (few, many)}
        other = many if better is few else few
        assert costs[better.first] <= costs[other.first] + 10  # type: ignore[operator]  # picoseconds of rounding


@pytest.mark.parametrize(("at", "counts"), [(1, (1, 2, 5, 4097)), (MANY_TOKENS, (1 << 18, (1 << 18) + 3, 1 << 20))])
def test_a_plans_cost_in_the_tokens_is_its_exact_cost(at: int, counts: tuple[int, ...]) -> None:
    """Where its collectives are the cheapest; padding included."""
    graph = layer().graph()
    best = _optimum(graph, A3, at)
    seconds = _cost_function(graph, A3, best.solution.labels, best.raises)
    for tokens in counts:
        exact = cost_of(graph.problem(tokens, A3), best.solution.labels)
        assert exact is not None and seconds(tokens) * PICOSECONDS == pytest.approx(exact, abs=30)
        assert best.seconds(tokens) == seconds(tokens)


def test_strategy_tp_is_the_plan_of_a_large_step_at_every_count() -> None:
    graph = layer().graph()
    (interval,) = planned(graph, "tp").intervals
    assert (interval.first, interval.last) == (0, None)
    assert interval.labels == planned(graph).intervals[-1].labels
    problem = graph.problem(interval.at, latency_free(A3))
    assert interval.cost_s * PICOSECONDS == pytest.approx(cost_of(problem, labels_of(graph, interval)))


@pytest.mark.parametrize("strategy", ["auto", "tp"])
def test_a_static_count_has_one_plan_stated_at_it(strategy: str) -> None:
    (interval,) = planned(layer(shape=(1, 1)).graph(), strategy).intervals
    assert (interval.first, interval.last, interval.at) == (0, None, 1)
    assert interval.unchanged and interval.raises
