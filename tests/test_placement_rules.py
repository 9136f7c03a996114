"""Every row of the op table against two oracles: the numbers of each shard, and DTensor's own sharding propagation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import sympy
import torch
import torch.distributed as dist
import torch.fx as fx
from op_calls import Op, X, blocks, expr, f, i, op, positions, take
from op_cases import CASES, OTHERS, SAME, SQUARE
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from versions import needs_torch

from cpcompile.passes.collectives import op_name
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.op_call import UNUSED, Mixing, RowWise
from cpcompile.passes.placement_rules import RULES, classify, find_rule
from cpcompile.passes.token_layout import TokenDim

A = torch.ops.aten
C10D = torch.ops._c10d_functional
RANKS = 2


EVERY = {**CASES, **OTHERS}
CALLS = [pytest.param(name, call, id=str(call)) for name, calls in EVERY.items() for call in calls]
UNDEFINED = {"aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}  # nothing to compare but shapes
SIZES = {"aten::sym_size", "aten::sym_numel"}  # the rewrite computes the whole value's size; there is no tensor

Layouts = dict[X, "TokenDim | None"]


@dataclass(frozen=True)
class Claim:
    tokens: int
    layouts: Layouts
    outcome: RowWise | Mixing
    demands: dict[X, Any]


def claims(call: Op) -> Iterator[Claim]:
    """What the table says of ``call`` for every token count and every place of the tokens in its operands."""
    node, nodes, shapes = call.node()
    sizes = {s for x in call.operands for s in x.shape if s > 1}
    for tokens in sorted(sizes | {s // 2 for s in sizes if s % 2 == 0 and s > 2}):
        for places in itertools.product(*(positions(x, tokens) for x in call.operands)):
            if not any(places):
                continue
            layouts = dict(zip(call.operands, places, strict=True))
            known = {nodes[x]: (place,) for x, place in layouts.items() if place is not None}
            outcome = classify(node, sympy.Integer(tokens), known, shapes)
            demands = {x: outcome.operands.get(n) for x, n in nodes.items()} if isinstance(outcome, RowWise) else {}
            yield Claim(tokens, layouts, outcome, demands)


def local_values(call: Op, claim: Claim, values: Mapping[X, Tensor], rows: slice) -> dict[X, Tensor]:
    """What each demand asks for; of an operand whose data is not read, something else of its dtype."""
    return {
        x: values[x].flatten()[:1] if d is UNUSED else take(values[x], d, claim.tokens, rows)
        for x, d in claim.demands.items()
    }


def local_sizes(call: Op, outcome: RowWise, count: int) -> tuple[int, list[int]] | None:
    if outcome.size_arg is None:
        return None
    sizes, layout = list(call.args[outcome.size_arg]), outcome.outputs[0]
    assert layout is not None
    sizes[layout.dim] = int(layout.size(sympy.Integer(count)))
    return outcome.size_arg, sizes


def row_wise(call: Op) -> Iterator[tuple[Claim, RowWise]]:
    return ((c, c.outcome) for c in claims(call) if isinstance(c.outcome, RowWise))


# Kernels of CUDA alone: their schemas are checked, in test_fused_attention.py, and not their numbers.
ON_CUDA = {f"aten::_scaled_dot_product_{n}_attention" for n in ("flash", "efficient", "cudnn", "fused")} - {
    "aten::_scaled_dot_product_fused_attention"
} | {"aten::_scaled_dot_product_fused_attention_overrideable"}

# The table


def test_every_row_has_cases() -> None:
    assert CASES.keys() - {"pointwise"} == {name for name in RULES if name.startswith("aten::")} - ON_CUDA
    assert OTHERS.keys() == {name for name in RULES if name.startswith(("npu::", "cpcompile::paged_", "vllm_ir::"))}
    for name, calls in EVERY.items():
        if name != "pointwise":
            assert {op_name(call.target) for call in calls} == {name}
            assert any(call.rows for call in calls), f"{name} is never row-wise"


def test_every_row_says_where_its_knowledge_comes_from() -> None:
    assert all(rule.source for rule in RULES.values())
    assert {rule.linear for rule in RULES.values()} == {"", "additive", "homogeneous"}


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_row_wise_in_the_dims_expected(name: str, call: Op) -> None:
    """Neither less nor more: a rule that gives up costs speed silently."""
    first = call.operands[call.of]
    places = [c.layouts[first] for c, _ in row_wise(call) if c.demands[first] is not None]
    found = {place.dim for place in places if place is not None}
    assert tuple(sorted(found)) == call.rows


@pytest.mark.parametrize(("name", "call"), [p for p in CALLS if p.values[0] not in SIZES])
def test_every_shard_computes_its_rows_of_the_whole(name: str, call: Op) -> None:
    values = call.values()
    whole = call.run(values)
    for claim, outcome in row_wise(call):
        assert len(outcome.outputs) == len(whole)
        for rows in blocks(claim.tokens):
            local = local_values(call, claim, values, rows)
            count = len(range(claim.tokens)[rows])
            sizes = local_sizes(call, outcome, count)
            got = [local[call.operands[0]]] if outcome.identity else call.run(local, sizes)
            for mine, full, layout in zip(got, whole, outcome.outputs, strict=True):
                want = take(full, layout, claim.tokens, rows)
                assert mine.shape == want.shape, (claim, rows)
                if name not in UNDEFINED:
                    torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12, equal_nan=True)


# Linear


def is_sum(call: Op, changed: list[X], scale: float = 1.0) -> bool:
    """Whether op(a1 + a2) = op(a1) + op(a2), where ``changed`` are the operands that are sums."""
    first, second = call.values(1), call.values(100)
    second |= {x: first[x] for x in call.operands if x not in changed}
    both = {x: first[x] + second[x] if x in changed else first[x] for x in call.operands}
    parts = zip(call.run(both), call.run(first), call.run(second), strict=True)
    return all(torch.allclose(s, a + b, rtol=1e-10, atol=1e-10) for s, a, b in parts)


def linear_of(call: Op) -> str:
    rule = find_rule(call.node()[0])
    return "" if rule is None else rule.linear


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if r.linear and n.startswith("aten::")])
def test_a_linear_op_of_a_sum_is_the_sum_of_the_ops(name: str) -> None:
    linear = [(call, kind) for call in CASES[name] if any(True for _ in row_wise(call)) and (kind := linear_of(call))]
    assert linear
    for call, kind in linear:
        if kind == "additive":
            assert is_sum(call, call.operands)
            continue
        # A sum is divided, never divided by.
        operands = call.operands[:1] if name == "aten::div" else call.operands
        for operand in operands:
            assert is_sum(call, [operand]), f"{call} is not linear in its operand {operand.shape}"


@pytest.mark.parametrize(
    "call",
    [
        op("", A.linear.default, f(6, 8), f(10, 8), f(10)),
        op("", A.linear.default, f(6, 8), f(10, 8), bias=f(10)),
        op("", A.mul.Tensor, SAME, SAME),
        op("", A.div.Tensor, SAME, SAME),
        op("", A.mm.default, SQUARE, SQUARE),
        op("", A.div.Tensor_mode, f(6, 8), f(8), rounding_mode="floor"),
        op("", A.add.Tensor, f(6, 8), 2.0),
        op("", A.sub.Scalar, f(6, 8), 2.0),
    ],
    ids=str,
)
def test_calls_of_linear_ops_that_are_not_linear(call: Op) -> None:
    assert not is_sum(call, call.operands[:1])
    assert linear_of(call) == ""
    assert RULES[op_name(call.target)].linear


# Ops outside the table


@pytest.mark.parametrize(
    "call",
    [
        op("", A.native_dropout.default, f(6, 8), 0.5, True),
        op("", A.dropout.default, f(6, 8), 0.5, True),
        op("", A.bernoulli.p, f(6, 8), 0.5),
        op("", A.rrelu.default, f(6, 8), 0.1, 0.2, True),
        op("", A.add_.Tensor, f(6, 8), f(6, 8)),
        op("", A.topk.values, f(6, 8), 2, values=f(6, 2), indices=i(6, 2)),
        op("", A.nonzero.default, f(6, 8)),
        op("", A.bincount.default, i(6)),
        op("", A.histc.default, f(6, 8)),
    ],
    ids=str,
)
def test_random_in_place_and_unknown_ops_mix_and_are_named(call: Op) -> None:
    found = list(claims(call))
    assert found and all(
        c.outcome == Mixing(f"{op_name(call.target)} is not in the table of token-wise ops") for c in found
    )


def test_ops_without_tensors_or_tokens_mix() -> None:
    assert {c.outcome for c in claims(op("", A.equal.default, f(6, 8), f(6, 8)))} == {Mixing("returns no tensor")}
    node, _, shapes = op("", A.mul.Tensor, f(6, 8), f(6, 8)).node()
    assert classify(node, sympy.Integer(6), {}, shapes) == Mixing("no operand carries tokens")


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_every_refusal_says_why(name: str, call: Op) -> None:
    for claim in claims(call):
        if isinstance(claim.outcome, Mixing):
            assert claim.outcome.reason and "\n" not in claim.outcome.reason


def test_getitem_picks_one_output() -> None:
    node, _, shapes = op("", A.topk.default, f(6, 8), 2).node()
    item = node.graph.call_function(operator.getitem, (node, 1))
    here = TokenDim(0)
    outcome = classify(item, sympy.Integer(6), {node: (None, here)}, {**shapes, item: shapes[node][1:]})
    assert outcome == RowWise({node: here}, (here,))
    outcome = classify(item, sympy.Integer(6), {node: (here, None)}, {**shapes, item: shapes[node][1:]})
    assert isinstance(outcome, Mixing)


@pytest.mark.parametrize(("reduce_op", "linear"), [("sum", "homogeneous"), ("avg", "homogeneous"), ("max", "")])
def test_all_reduce_over_another_axis_is_row_wise(reduce_op: str, linear: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    start = graph.call_function(C10D.all_reduce.default, (x, reduce_op, "dp"))
    wait = graph.call_function(C10D.wait_tensor.default, (start,))
    graph.output(wait)
    shapes = dict.fromkeys((x, start, wait), (expr(f(6, 8)),))
    for node, source in ((start, x), (wait, start)):
        assert classify(node, sympy.Integer(6), {source: (TokenDim(0),)}, shapes) == RowWise(
            {source: TokenDim(0)}, (TokenDim(0),)
        )
    assert find_rule(start).linear == linear  # type: ignore[union-attr]
    gm = fx.GraphModule(torch.nn.Module(), graph)
    data = [f(6, 8).make(seed) for seed in range(2)]
    whole, top, bottom = (
        run_lockstep([RankProgram(gm, [x], {"dp": (0, 1)}) for x in part])[0]
        for part in (data, [x[:4] for x in data], [x[4:] for x in data])
    )
    assert isinstance(whole, Tensor) and isinstance(top, Tensor) and isinstance(bottom, Tensor)
    assert torch.equal(torch.cat([top, bottom]), whole)


# DTensor

# Rows that DTensor cannot confirm, and why; their numbers are checked above like all others'.
NO_STRATEGY = {
    "aten::index_put": "its strategy takes a mask for integers: on shards of both it asks for shapes that differ",
    "aten::scaled_dot_product_attention": "composite: DTensor decomposes it to a CPU kernel without a strategy",
    "aten::_scaled_dot_product_attention_math": "composite, likewise",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "no strategy is registered: only CUDA's kernels have one",
    "aten::copy": "no strategy is registered: functionalisation does not show it copy, only copy_",
    "aten::lift_fresh_copy": "no strategy is registered: it is met in tracing only, on constants",
    "aten::fill": "no strategy is registered: functionalisation makes a full_like of it, as a rule",
    "aten::tril": "its strategy wants whole matrices and gathers the batches, too",
    "aten::triu": "its strategy wants whole matrices and gathers the batches, too",
    **dict.fromkeys(
        [f"aten::{n}" for n in ("_conj_physical", "_neg_view", "scatter_reduce", "searchsorted", "isin")],
        "no strategy is registered",
    ),
    "aten::sym_size": "returns an int, which DTensor answers without a strategy",
    "aten::sym_numel": "returns an int, which DTensor answers without a strategy",
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def distribute(value: Tensor, demand: object, claim: Claim, mesh: DeviceMesh) -> DTensor:
    if not isinstance(demand, TokenDim):
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    mine = take(value, demand, claim.tokens, slice(0, claim.tokens // RANKS))
    return DTensor.from_local(mine, mesh, [Shard(demand.dim)], run_check=False)


# Strategies that DTensor has had since, or that communicate in older releases where nothing has to move.
LATER = {
    *("squeeze", "scatter", "linear", "constant_pad_nd", "flip", "roll", "polar", "complex", "stack", "select_scatter"),
    *("var_mean", "std_mean", "median", "mode", "kthvalue", "cumprod", "cummax", "cummin", "logcumsumexp", "glu"),
    *("index_copy", "index_add", "index_fill"),
}
SINCE = needs_torch("2.13", "its DTensor has no such strategy yet, or one that communicates")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=[SINCE] if n == "pointwise" or n.removeprefix("aten::") in LATER else [])
        for n in CASES
        if n not in NO_STRATEGY
    ],
)
def test_dtensor_agrees(name: str, mesh: DeviceMesh) -> None:
    """With the operands placed as demanded, DTensor communicates nothing and shards the output where we say."""
    asked = 0
    for call in CASES[name]:
        values = call.values()
        for claim, outcome in row_wise(call):
            folded = [
                d for d in [*claim.demands.values(), *outcome.outputs] if isinstance(d, TokenDim) and d.outer != 1
            ]
            if folded or claim.tokens % RANKS:
                continue  # the rows of a shard are not contiguous, or DTensor would have uneven shards
            asked += 1
            placed = {x: distribute(values[x], d, claim, mesh) for x, d in claim.demands.items()}
            with CommDebugMode() as communication:
                got = call.run(placed)
            assert communication.get_total_counts() == 0, (str(call), claim)
            split = any(isinstance(d, TokenDim) for d in claim.demands.values())
            for mine, layout in zip(got, outcome.outputs, strict=True):
                # Rows that only a size argument makes (of constants, of one row expanded) DTensor makes whole.
                want = Shard(layout.dim) if layout is not None and split else Replicate()
                assert mine.placements == (want,), (str(call), claim)
    assert asked


def test_rows_without_a_dtensor_strategy_have_a_reason() -> None:
    assert all(NO_STRATEGY.values()) and NO_STRATEGY.keys() <= RULES.keys()
