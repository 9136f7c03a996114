"""What the report says of an indexer: V3.2 at real sizes on 8 ranks, numbers by hand and by the solver."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch.fx as fx
from test_sparse_attention_placement import LAYERS, LONG, SHORT, SIZE, compiled

from cpcompile.compiled import Compiled, Step
from cpcompile.costs import PICOSECONDS, profile
from cpcompile.passes.indexer_costs import IndexerModel, is_indexer, least_sharded
from cpcompile.passes.mincut import LABELS, R, S, cost_of, solve
from cpcompile.report import Collective

TOP, HEADS, WIDTH, LATENT, HIDDEN = 2048, 64, 128, 1536, 7168
A3 = profile("ascend-a3")
OTHER = 1 - 1 / SIZE


def rows(made: Compiled, tokens: int) -> list[Collective]:
    return [c for c in made.report(tokens).collectives if c.kind == "indexer"]


def microseconds(reason: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"([\d,.]+) us", reason)]


def own(tokens: int) -> float:
    """Scores of every key for every query, and 2048 int32 written for each: what 7 of 8 ranks' rows take, in us."""
    return OTHER * A3.compute(2 * HEADS * WIDTH * tokens**2, 4 * TOP * tokens) * 1e6


def products(tokens: int) -> float:
    """The projections of queries and of weights, likewise: at least this much is in the ops for the queries."""
    flops = 2 * tokens * (LATENT * HEADS * WIDTH + HIDDEN * HEADS)
    return OTHER * A3.compute(flops, 2 * tokens * (LATENT + HEADS * WIDTH + HIDDEN + HEADS)) * 1e6


def indices(tokens: int) -> float:
    return (A3.latency + 4 * TOP * tokens * A3.seconds_per_byte(SIZE)) * 1e6


def break_even(made: Compiled, name: str) -> int:
    """From the plan's intervals: the first one that labels the indexer S."""
    (plan,) = made.plan.axes
    return min(i.first for i in plan.intervals if i.labels.get(name) == "S")


@pytest.mark.parametrize("tokens", [SHORT, LONG])
def test_a_long_prompt_is_sharded(tokens: int) -> None:
    found = rows(compiled(), tokens)
    assert [r.module for r in found] == [f"model.layers.{n}.self_attn.indexer" for n in range(LAYERS)]
    for row in found:
        assert (row.decision, row.becomes) == ("shard", "all_gather") and row.fused is not None
        assert (row.elements_before, row.elements_after) == (0, TOP * tokens * (SIZE - 1) // SIZE)
        assert row.reason.startswith(f"its queries run on 1/{SIZE} of the rows: saves ")
        compute, alone, operands, gather = microseconds(row.reason)
        assert alone == pytest.approx(own(tokens), abs=0.06) and gather == pytest.approx(indices(tokens), abs=0.06)
        assert alone <= compute <= alone + 3 * products(tokens) and compute + operands > gather
        assert "; needed whole by sparse_attention_default" in row.reason and "; alone it" not in row.reason


@pytest.mark.parametrize("tokens", [64, 128])
def test_below_the_break_even_it_is_kept(tokens: int) -> None:
    found = rows(compiled(), tokens)
    assert len(found) == LAYERS
    for row in found:
        assert (row.decision, row.elements_before, row.elements_after) == ("keep", 0, 0)
        compute, alone, gather = microseconds(row.reason)
        assert row.reason.startswith("sharding its queries would save ")
        assert alone == pytest.approx(own(tokens), abs=0.06) and gather == pytest.approx(indices(tokens), abs=0.06)
        # Rotating and scaling the queries costs less than their projection.
        assert alone + products(tokens) < compute < alone + 2 * products(tokens) and compute < gather


def test_the_break_even_is_the_bound_of_an_interval() -> None:
    made = compiled()
    for tokens in (1, LONG):
        for row in rows(made, tokens):
            assert f"; break-even T = {break_even(made, row.name)}" in row.reason
    bound = break_even(made, rows(made, LONG)[0].name)
    decisions = [{r.decision for r in rows(made, t)} for t in (bound - 1, bound)]
    assert decisions == [{"keep"}, {"shard"}]


def test_the_volume_counts_each_gather_once() -> None:
    report = compiled().report(LONG)
    assert len({(c.axis, c.name) for c in report.collectives}) == len(report.collectives)


def test_a_requirement_is_met_where_it_is_sharded() -> None:
    made = compiled()
    assert [made.report(t).missing(["*.indexer"]) for t in (128, LONG)] == [["*.indexer"], []]


def test_indices_that_stay_cost_nothing() -> None:
    """Attention runs on the same rows there: the row has no collective."""
    for row in rows(compiled(parallel_attention=False), LONG):
        assert (row.decision, row.becomes, row.elements_after) == (
            "shard",
            "nothing: its readers run on the same rows",
            0,
        )
        assert "its indices are not gathered; break-even" in row.reason


def test_a_strategy_without_intervals_has_no_break_even() -> None:
    """The plan of a large step shards at every T; for one token that does not pay, and the row says so."""
    made = compiled(strategy="tp")
    for tokens, alone in ((LONG, False), (1, True)):
        for row in rows(made, tokens):
            assert row.decision == "shard" and "break-even" not in row.reason
            assert (
                f"; alone it would be the other way, but plans are chosen as a whole, this one at T = {LONG}"
                in row.reason
            ) == alone


def step_at(tokens: int) -> Step:
    (step,) = compiled().at(tokens).steps
    return step


def indexers(step: Step) -> list[fx.Node]:
    found = list(filter(is_indexer, step.graph.number))
    assert len(found) == LAYERS
    return found


@pytest.mark.parametrize("tokens", [1, 128, 181, LONG])
def test_the_terms_are_what_the_whole_problem_changes_by(tokens: int) -> None:
    """Against the solver on every op of the graph, all of them held but the indexer and its queries' ops."""
    step = step_at(tokens)
    model = IndexerModel(step.graph, step.interval, tokens)
    problem = step.graph.problem(tokens, A3)
    for node in indexers(step):
        number = step.graph.number[node]
        costs = model.costs(number)
        free = {n for n, op in enumerate(problem.ops) if n in model._with_queries_ops(number)}
        wanted = {n: model.labels[n] for n in range(len(problem.ops)) if n not in free}
        wanted[number] = R if model.labels[number] == S else S
        ops = [
            replace(op, costs=tuple(c if wanted.get(n, at) == at else None for at, c in enumerate(op.costs)))
            for n, op in enumerate(problem.ops)
        ]
        here = cost_of(problem, model.labels)
        assert here is not None
        change = (solve(replace(problem, ops=ops)).cost - here) / PICOSECONDS
        assert costs.sharded == (step.interval.labels.get(node.name) == LABELS[S])
        gained = costs.compute + costs.operands - costs.indices
        assert gained == pytest.approx(change if costs.sharded else -change, rel=1e-6, abs=1e-11)


def test_its_queries_ops_are_of_the_same_module_and_make_no_keys() -> None:
    step = step_at(LONG)
    model = IndexerModel(step.graph, step.interval, LONG)
    for node in indexers(step):
        ops = [step.graph.choices[n].node for n in model._with_queries_ops(step.graph.number[node])]
        assert {"mm", "lightning_indexer"} <= {op.target.overloadpacket.__name__ for op in ops}
        read = {use.value for use in model.problem.uses if use.op == step.graph.number[node]}
        by_rows = {step.graph.origin[node.args[n]] for n in (0, 2)}
        keys = step.graph.origin[node.args[1]]
        assert by_rows <= set(ops) and keys not in ops and len(read) >= 3


def test_never_sharded_has_no_break_even() -> None:
    (plan,) = compiled().plan.axes
    assert least_sharded(plan.intervals, "not there") is None
    assert least_sharded(plan.intervals[:1], "lightning_indexer_default") is None
