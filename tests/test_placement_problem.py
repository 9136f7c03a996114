"""From real annotated traces to numbers: who may be placed, what it costs in T, who demands what, and why not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.distributed._functional_collectives as funcol
from placed import HIDDEN, INNER, layer
from sympy import floor
from test_token_dims import of

from cpcompile.costs import PICOSECONDS, profile
from cpcompile.passes.mincut import P, R, S
from cpcompile.passes.placement_problem import (
    CARRYING_PARTS,
    PlacementGraph,
    evaluate,
    latency_free,
    polynomial_in,
    why_whole,
)

A3 = profile("ascend-a3")
SIZE = 4
NORM = ["pow_1", "mean", "add_22", "rsqrt", "mul_15", "mul_18"]


def names(graph: PlacementGraph) -> list[str]:
    return [c.node.name for c in graph.choices]


# ---- polynomials ---------------------------------------------------------------------------------------------------

T, B = sympy.symbols("T B", positive=True, integer=True)


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        (sympy.Integer(7), (7.0,)),
        (3 * T, (0.0, 3.0)),
        (2 * T**2 + 5, (5.0, 0.0, 2.0)),
        (B * T + B, (10.0, 10.0)),
        (B, (10.0,)),
        (floor(T / 2), (50.0,)),
    ],
    ids=str,
)
def test_polynomials_in_the_tokens(expr: sympy.Expr, expected: tuple[float, ...]) -> None:
    """Other symbols take their hint (10); what is no polynomial takes its value at the hint of T (100)."""
    assert polynomial_in(expr, T, lambda s: {T: 100, B: 10}[s]) == expected


def test_a_polynomial_in_a_sum_of_counts() -> None:
    """A prefix of B rows before T tokens; what has T rows only does not grow with B."""
    hint = {T: 100, B: 10}.__getitem__
    assert polynomial_in(7 * T + 7 * B, T + B, hint) == (0.0, 7.0)
    assert polynomial_in(T * B + T * T, T + B, hint) == (0.0, 100.0)
    assert polynomial_in(5 * T + 15, T + 3, hint) == (0.0, 5.0)


def test_evaluation() -> None:
    assert evaluate((1.0, 2.0, 3.0), 10) == 321.0 and evaluate((), 5) == 0


# ---- choices and uses ----------------------------------------------------------------------------------------------


def test_row_wise_ops_on_whole_values_and_all_reduces_are_choices() -> None:
    graph = layer().graph()
    assert names(graph) == ["embedding", "wait_tensor", "add_12", *NORM, "wait_tensor_1", "add_50"]
    assert [c.node.name for c in graph.choices if c.reduced] == ["wait_tensor", "wait_tensor_1"]
    assert not any(c.partial for c in graph.choices)
    assert [graph.number[c.node] for c in graph.choices] == list(range(len(graph.choices)))


def test_products_with_shards_need_their_operand_whole_and_say_why() -> None:
    found = layer()
    graph = found.graph()
    differs = "its other operands differ between the ranks, so every rank needs every row"
    consumers = {v.name: [(c.name, why) for c, why in found] for v, found in graph.consumers.items()}
    assert consumers == {
        "embedding": [("mm", differs)],
        "mul_18": [("mm_1", differs)],
        "add_50": [("output", "the graph returns it whole")],
    }
    assert [(v.name, c, d) for v, c, d in graph.uses if c is None] == [
        (name, None, (R, R, R)) for name in ("embedding", "mul_18", "add_50")
    ]
    assert why_whole(graph, found.node("rsqrt")) == "it is not placed"


def test_who_reads_whom() -> None:
    graph = layer().graph()
    reads = {(v.name, graph.choices[c].node.name): d for v, c, d in graph.uses if c is not None}
    assert reads == dict.fromkeys(
        [
            ("embedding", "add_12"), ("wait_tensor", "add_12"), ("add_12", "pow_1"), ("pow_1", "mean"),
            ("mean", "add_22"), ("add_22", "rsqrt"), ("add_12", "mul_15"), ("rsqrt", "mul_15"), ("mul_15", "mul_18"),
            ("add_12", "add_50"), ("wait_tensor_1", "add_50"),
        ],
        (S, S, R),
    )  # fmt: skip


def test_views_stand_for_the_value_that_they_view() -> None:
    found = layer(shape=(3, 12))
    graph = found.graph()
    views = found.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    placed = [v for v in views if v in graph.origin]
    assert placed and all(graph.origin[v] is not v and v not in graph.number for v in placed)
    # The product's reader sees the view; what is gathered is the value behind it.
    assert {v.name for v, c, _ in graph.uses if c is None} == {graph.origin[v].name for v in placed} | {
        found.gm.graph.find_nodes(op="output")[0].all_input_nodes[0].name
    }


def test_a_consumer_that_mixes_rows_gives_its_own_reason() -> None:
    graph = of(lambda x, g: x.cumsum(0)).graph()
    ((_, reason),) = [c for found in graph.consumers.values() for c in found if c[0].name == "cumsum"]
    assert reason == "works along the token dim"


# ---- partial sums --------------------------------------------------------------------------------------------------


def summed(x: Any, g: Any) -> Any:
    return funcol.all_reduce(torch.sin(x) * 1, "sum", g)


@pytest.mark.parametrize(
    ("f", "op", "partial"),
    [
        (lambda x, g: x + summed(x, g), torch.ops.aten.add.Tensor, True),
        (lambda x, g: x - summed(x, g), torch.ops.aten.sub.Tensor, True),
        (lambda x, g: x * 3, torch.ops.aten.mul.Tensor, True),
        (lambda x, g: x / 3, torch.ops.aten.div.Tensor, True),
        (lambda x, g: x + 3, torch.ops.aten.add.Tensor, False),
        (lambda x, g: x * summed(x, g), torch.ops.aten.mul.Tensor, False),
        (lambda x, g: torch.ones(HIDDEN) / x, torch.ops.aten.div.Tensor, False),
        (lambda x, g: torch.relu(x), torch.ops.aten.relu.default, False),
        (lambda x, g: x + torch.sin(x), torch.ops.aten.add.Tensor, False),
    ],
    ids=["a+b", "a-b", "3a", "a/3", "a+3", "a*b", "1/a", "relu", "a+sin(a)"],
)
def test_what_may_run_on_partial_sums(f: Any, op: Any, partial: bool) -> None:
    found = of(f)
    graph = found.graph()
    node = found.gm.graph.find_nodes(op="call_function", target=op)[-1]
    choice = graph.choices[graph.number[node]]
    assert choice.partial == partial
    demands = {d for _, c, d in graph.uses if c == graph.number[node]}
    assert demands == {(P if partial else S, S, R)}
    assert (graph.problem(8, A3).ops[graph.number[node]].costs[P] is not None) == partial


def test_an_op_on_partial_sums_must_beat_one_on_whole_values_by_a_margin() -> None:
    found = of(lambda x, g: x * 3)
    graph = found.graph()
    op = next(o for o, c in zip(graph.problem(8, A3).ops, graph.choices, strict=True) if c.partial)
    assert op.costs[P] is not None and op.costs[R] is not None
    assert op.costs[P] - op.costs[R] == CARRYING_PARTS


# ---- costs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 3, 4, 1000, 4097])
def test_costs_by_hand(tokens: int) -> None:
    """float32 rows of 8: 32 bytes a token; a shard holds ``ceil(T/4)`` rows, and what is moved is padded to them."""
    graph = layer().graph()
    problem = graph.problem(tokens, A3)
    local = -(-tokens // SIZE)
    number = graph.number[next(c.node for c in graph.choices if c.node.name == "mul_18")]
    at_p, at_s, at_r = problem.ops[number].costs
    whole = round(32 * tokens / A3.memory_bandwidth * PICOSECONDS)
    assert (at_p, at_r) == (None, whole) and at_s == whole * local // tokens
    value = problem.values[list(graph.values).index(graph.choices[1].node)]
    per_byte = A3.seconds_per_byte(SIZE)
    half = (A3.latency + 32 * local * SIZE * per_byte) * PICOSECONDS
    assert value.scatter == value.gather == pytest.approx(half, abs=2)
    assert value.reduce == pytest.approx((A3.all_reduce_latency + 2 * 32 * tokens * per_byte) * PICOSECONDS, abs=3)
    whole_value = problem.values[list(graph.values).index(graph.choices[2].node)]
    assert (whole_value.scatter, whole_value.reduce) == (None, None) and whole_value.gather == value.gather
    assert problem.ops[1].costs == (0, None, None)


def test_a_product_costs_its_flops_and_what_it_reads_and_writes() -> None:
    """``[T, 8] @ [8, 24]`` with the same weight on every rank may be placed."""
    found = layer(up=True)
    graph = found.graph()
    choice = graph.choices[graph.number[found.node("mm_1")]]
    width = INNER // SIZE
    moved, flops = 4 * (HIDDEN + width), 2 * HIDDEN * width
    expected = flops / A3.flops + moved / A3.memory_bandwidth
    assert choice.seconds == (0.0, pytest.approx(expected, rel=1e-9, abs=0))


def test_no_tokens_cost_no_division() -> None:
    problem = layer().graph().problem(0, A3)
    assert all(cost in (None, 0) for op in problem.ops for cost in op.costs)


def test_other_symbols_take_the_traced_size() -> None:
    """A batch of 3 moves three times the bytes of one."""
    one, three = layer(shape=(1, 12)).graph(), layer(shape=(3, 12)).graph()
    rows = [next(p for v, (_, p) in g.values.items() if v.name == "wait_tensor") for g in (one, three)]
    assert rows == [(32.0,), (96.0,)]
    assert sorted(three.hints.values()) == [3, 12]


def test_free_launches_change_nothing_else() -> None:
    assert latency_free(A3) == replace(A3, latency=0.0, all_reduce_latency=0.0)
