"""Further token counts: all of them are placed and proven, or refused one by one, on two simulated ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.fx as fx
from conftest import SharedRanks
from several_counts import CASES, WORLD, ids_of
from simulate import fake_rank
from torch import Tensor

from cpcompile import axis_rewrite
from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.explanation import Explanation
from cpcompile.passes.collectives import op_name
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.token_layout import Expr, size_expr
from cpcompile.plan import Plan
from cpcompile.report import REWRITTEN

TOLERANCE = 2e-5
BATCHES = "two micro-batches"
LENGTHS = [1, 2, 3, 0, 5]  # of the parts, in turn: fewer than ranks, none, odd ones
CHAINED = "three, chained"  # with attention between the parts, which all ranks compute alike


@functools.cache
def ranks(name: str) -> SharedRanks:
    case, traces, axes = CASES[name], [], []
    ids = ids_of([tuple(min(size, 11 + 3 * part) for size in shape) for part, shape in enumerate(case.calls[0])])
    for rank in range(WORLD):
        with fake_rank(rank, WORLD) as mesh:
            traces.append(capture(case.model(mesh.get_group(), rank), *ids))
            axes.append(axis_of("tp", mesh))
    return SharedRanks(traces, axes)


@functools.cache
def compiled(name: str, **options: Any) -> list[Compiled]:
    made: list[Compiled] = ranks(name).compile(**options)
    return made


def inputs(trace: Trace, ids: Sequence[Tensor]) -> list[Any]:
    nodes, left = trace.gm.graph.find_nodes(op="placeholder"), list(ids)
    given = {node: left.pop(0) for node, i in zip(nodes, trace.inputs, strict=True) if i.kind == "input"}
    sizes = {s.node.expr: r for n, v in given.items() for s, r in zip(n.meta["val"].shape, v.shape, strict=True)
             if isinstance(s, torch.SymInt)}  # fmt: skip
    rest = {n: i.value for n, i in zip(nodes, trace.inputs, strict=True)}
    return [
        given[n] if n in given else sizes[v.node.expr] if isinstance(v := n.meta["val"], torch.SymInt) else rest[n]
        for n in nodes
    ]


def check_numbers(name: str, made: Sequence[Compiled]) -> None:
    """Every variant at every length of every part, against the graphs as they came."""
    case, of = CASES[name], ranks(name)

    def run(graphs: Sequence[fx.GraphModule], ids: Sequence[Tensor]) -> list[Any]:
        return run_lockstep(
            [
                RankProgram(gm, inputs(trace, ids), {axis.group_name: axis.ranks})
                for gm, trace, axis in zip(graphs, of.traces, of.axes, strict=True)
            ]
        )

    counts = [length for length in LENGTHS if length or name != CHAINED]  # eager's mean of no rows is not a number
    for first in range(len(counts)):
        lengths = [counts[(first + part) % len(counts)] for part in range(len(case.dims))]
        shapes = [
            tuple(lengths[part] if dim == case.dims[part] else size for dim, size in enumerate(shape))
            for part, shape in enumerate(case.calls[0])
        ]
        ids = ids_of(shapes)
        expected = run([one.original for one in made], ids)
        for variants in zip(*(one.variants for one in made), strict=True):
            for rank, outputs in enumerate(run([v.gm for v in variants], ids)):
                for found, wanted in zip(outputs, expected[rank], strict=True):
                    assert found.shape == wanted.shape
                    assert (found - wanted).norm() <= TOLERANCE * wanted.norm(), (shapes, rank)


def decisions(made: Compiled, tokens: int) -> dict[str, str]:
    rows = [c for c in made.report(tokens).collectives if c.kind == "all_reduce"]
    assert len({c.name for c in rows}) == len(rows)  # each is told once
    return {c.name: c.decision for c in rows}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("strategy", ["auto", "tp"])
def test_all_counts_are_placed(name: str, strategy: str) -> None:
    made = compiled(name, strategy="hybrid" if name == CHAINED and strategy == "tp" else strategy)
    for one in made:
        assert not one.left_alone and one.proofs and all(p["holds"] for p in one.proofs), (one.left_alone, one.proofs)
        found = decisions(one, 1 << 16)
        assert len(found) == CASES[name].all_reduces and set(found.values()) <= set(REWRITTEN), found
    assert len({one.plan.to_json() for one in made}) == 1
    check_numbers(name, made)


def test_without_a_proof_the_numbers_are_the_same() -> None:
    """What the planner takes for the same on all ranks after the first count is so: nothing else looks here."""
    made = compiled(CHAINED, strategy="hybrid", verify="off")
    assert set(decisions(made[0], 9).values()) <= set(REWRITTEN)
    check_numbers(CHAINED, made)


def test_numbers_are_checked_of_each_count() -> None:
    made = ranks(BATCHES).compile(strategy="tp", verify="numeric")
    assert [(p["method"], p["holds"]) for p in made[0].proofs] == [("static", True), ("numeric", True)] * 2


def test_where_one_all_reduce_is_cheaper_both_counts_are_kept() -> None:
    """A further count is placed for as many tokens as the variant is made for."""
    made = compiled(BATCHES, strategy="auto")[0]
    assert set(decisions(made, 1).values()) == {"keep"} and set(decisions(made, 1 << 16).values()) == {"scatter"}


def test_the_explanation_has_a_line_for_each_count() -> None:
    made = compiled(BATCHES, strategy="tp")[0]
    lines = Explanation(made, 4096, {}).to_dict()["intervals"]
    assert [line["count"] for line in lines] == [plan.tokens for plan in made.plan.axes]
    assert len({line["count"] for line in lines}) == 2
    assert [line["counts"]["scatter"] for line in lines] == [2, 2]


# ---- plans -----------------------------------------------------------------------------------------------------------


def text(gm: fx.GraphModule) -> str:
    return str(gm.print_readable(print_output=False)).partition("\n")[2]


def test_a_saved_plan_gives_the_same_graphs() -> None:
    made = compiled(BATCHES, strategy="tp")
    plan = Plan.from_json(made[0].plan.to_json())
    assert [axis.axis for axis in plan.axes] == ["tp", "tp"] and plan.diff(made[0].plan) == []
    for a, b in zip(made, ranks(BATCHES).compile(plan=plan, profile="ascend-a3"), strict=True):
        assert b.plan == plan and [text(v.gm) for v in a.variants] == [text(v.gm) for v in b.variants]


def test_a_plan_of_one_count_leaves_the_others_as_they_came() -> None:
    plan = Plan(compiled(BATCHES, strategy="tp")[0].plan.axes[:1])
    assert plan.diff(compiled(BATCHES, strategy="tp")[0].plan) == ["axis tp, plan 2: only in the second plan"]
    made = ranks(BATCHES).compile(plan=plan)
    assert list(decisions(made[0], 9).values()) == ["scatter", "scatter", "keep", "keep"]
    (reason,) = made[0].left_alone.values()
    assert reason.startswith("the plan has none for") and made[0].plan == plan
    check_numbers(BATCHES, made)


# ---- faults in the rewrite of a further count ------------------------------------------------------------------------

aten = torch.ops.aten


def rows_of_another_rank(gm: fx.GraphModule, counts: tuple[Expr, Expr]) -> None:
    """Of a value of the second count, rank 0 takes the rows of rank 1, and the other way round."""
    padded = [n for n in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor) if _is_padded(n, counts[1])]
    node = padded[0]
    node.args = (*node.args[:2], *((node.args[3], None) if node.args[2] == 0 else (0, node.args[2])))


def rows_of_the_other_count(gm: fx.GraphModule, counts: tuple[Expr, Expr]) -> None:
    """As many rows as the first count has are left of what the second one gathers."""
    first, second = ([n for n in gm.graph.nodes if _drops_pads(n, count)] for count in counts)
    second[0].update_arg(3, first[0].args[3])


def first_counts_rows_changed(gm: fx.GraphModule, counts: tuple[Expr, Expr]) -> None:
    """Of what the first count has placed, other rows are taken."""
    rows_of_another_rank(gm, counts[::-1])


def scattered_by_max(gm: fx.GraphModule, counts: tuple[Expr, Expr]) -> None:
    """The second count's last rows are not summed."""
    starts = [n for n in gm.graph.nodes if op_name(n.target) == "_c10d_functional::reduce_scatter_tensor"]
    starts[-1].update_arg(1, "max")


def _is_padded(node: fx.Node, count: Expr) -> bool:
    source: Any = node.args[0]
    sizes = [size_expr(size).free_symbols for size in source.meta["val"].shape]
    return op_name(source.target) == "aten::constant_pad_nd" and count.free_symbols in sizes


def _drops_pads(node: fx.Node, count: Expr) -> bool:
    source: Any = node.args[0] if node.target is aten.slice.Tensor else node
    gathered = source is not node and op_name(source.target).endswith("wait_tensor")
    return gathered and size_expr(node.meta["val"].shape[0]) == count


FAULTS = [rows_of_another_rank, rows_of_the_other_count, first_counts_rows_changed, scattered_by_max]


@pytest.mark.parametrize("fault", FAULTS)
def test_the_proof_refuses_a_wrong_rewrite_of_the_second_count(fault: Callable[..., None]) -> None:
    """The first count's rewrite stays, the second one's all-reduces stay as they came, and say why."""
    right = axis_rewrite.materialise

    def wrong(gm: fx.GraphModule, graph: Any, interval: Any) -> fx.GraphModule:
        made = right(gm, graph, interval)
        if graph.known.further:
            first = compiled(BATCHES, strategy="tp")[0].tokens
            assert first is not None and first != graph.known.tokens
            before = made.print_readable(print_output=False)
            fault(made, (first, graph.known.tokens))
            made.graph.lint()
            made.recompile()
            assert made.print_readable(print_output=False) != before
        return made

    with patch.object(axis_rewrite, "materialise", wrong):
        made = ranks(BATCHES).compile(strategy="tp")
    for one in made:
        assert [p["holds"] for p in one.proofs] == [True, False], one.proofs
        rows = [c for c in one.report(9).collectives if c.kind == "all_reduce"]
        assert [c.decision for c in rows] == ["scatter", "scatter", "keep", "keep"]
        assert all("not proven: " in c.reason for c in rows[2:]), rows
        ((unit, reason),) = one.left_alone.items()
        assert unit.startswith("tp (") and reason == rows[2].reason
    check_numbers(BATCHES, made)
