"""Routed experts: what is recognised computes what it stood for, what differs is refused with the reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import sympy
import torch
import torch.fx as fx
from simulate import fake_rank, real_inputs
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.capture import Trace, capture
from cpcompile.expert_ops import grouped_mm, routed_experts
from cpcompile.passes import verify_rules
from cpcompile.passes.op_call import Mixing, RowWise
from cpcompile.passes.placement_rules import classify
from cpcompile.passes.recognise_routed_experts import RecogniseRoutedExperts
from cpcompile.passes.token_layout import TokenDim, value_shapes
from cpcompile.passes.verify_call import Call
from cpcompile.passes.verify_index import Rows, tensor_shape
from cpcompile.pipeline import copy_graph

aten = torch.ops.aten
OP = torch.ops.cpcompile.routed_experts.default


@functools.cache
def traced(kind: str, sharded: bool = False, dtype: torch.dtype = torch.float32, form: str = "grouped_mm") -> Trace:
    model = models.build(models.tiny_config(kind), dtype)
    model.config._experts_implementation = form
    with fake_rank(0, 2) as mesh:
        model = models.shard(model, mesh) if sharded else model
        return capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)


def fresh(trace: Trace) -> fx.GraphModule:
    return fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))


def operands(rows: int, dtype: torch.dtype = torch.float64, experts: int = 5, chosen: int = 3) -> tuple[Any, ...]:
    g = torch.Generator().manual_seed(rows)
    ids = torch.stack([torch.randperm(experts, generator=g)[:chosen] for _ in range(rows)]) if rows else None
    return (
        torch.randn(rows, 8, generator=g).to(dtype),
        torch.zeros(0, chosen, dtype=torch.long) if ids is None else ids,
        torch.rand(rows, chosen, generator=g).to(dtype),
        torch.randn(experts, 8, 32, generator=g).to(dtype),
        torch.randn(experts, 16, 8, generator=g).to(dtype),
    )


def slot_by_slot(hidden: Any, ids: Any, weights: Any, gate_up: Any, down: Any) -> torch.Tensor:
    out = torch.zeros_like(hidden)
    for n in range(hidden.shape[0]):
        for e, w in zip(ids[n].tolist(), weights[n], strict=True):
            gate, up = (hidden[n] @ gate_up[e]).chunk(2)
            out[n] += w * ((torch.nn.functional.silu(gate) * up) @ down[e])
    return out


# ---- the op --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_the_op_is_the_sum_over_the_chosen_experts(rows: int) -> None:
    given = operands(rows)
    torch.testing.assert_close(OP(*given), slot_by_slot(*given), rtol=1e-12, atol=1e-12)


def test_the_op_in_bfloat16() -> None:
    given = operands(7, torch.bfloat16)
    expected = slot_by_slot(*(x.double() if x.is_floating_point() else x for x in given))
    assert ((OP(*given).double() - expected).norm() / expected.norm()).item() < 1e-2


@pytest.mark.parametrize("cut", [(0, 1), (1, 4), (4, 7)])
def test_rows_of_the_op_are_the_op_of_rows(cut: tuple[int, int]) -> None:
    """Against the numbers, in the planner's table and in the proof's."""
    hidden, ids, weights, *tables = operands(7)
    part = OP(*(x[slice(*cut)] for x in (hidden, ids, weights)), *tables)
    torch.testing.assert_close(part, OP(hidden, ids, weights, *tables)[slice(*cut)], rtol=1e-12, atol=1e-12)


def call_of_op() -> tuple[fx.Node, list[fx.Node]]:
    gm = make_fx(lambda *a: torch.ops.aten.neg(a[0]), tracing_mode="fake")(*operands(7))
    nodes = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_before(gm.graph.output_node()):
        node = gm.graph.call_function(OP, tuple(nodes))
    node.meta["val"] = nodes[0].meta["val"]
    return node, nodes


def test_the_op_is_row_wise_in_tokens_that_go_together() -> None:
    node, nodes = call_of_op()
    shapes = {n: value_shapes(n) for n in (node, *nodes)}
    rows = TokenDim(0)
    split = dict.fromkeys(nodes[:3], (rows,))
    outcome = classify(node, sympy.Integer(7), split, shapes)
    assert outcome == RowWise({**dict.fromkeys(nodes[:3], rows), **dict.fromkeys(nodes[3:])}, (rows,))
    wholes = {n: tensor_shape(n.meta["val"]) for n in nodes}
    out = (wholes[nodes[0]],)
    assert verify_rules.rows_of(Call(node, wholes, dict.fromkeys(nodes[:3], Rows(0)), out)) == Rows(0)
    for missing in nodes[:3]:
        some = {n: place for n, place in split.items() if n is not missing}
        assert isinstance(classify(node, sympy.Integer(7), some, shapes), Mixing)
        found = verify_rules.rows_of(Call(node, wholes, dict.fromkeys(some, Rows(0)), out))
        assert found == "its tokens, their experts and weights are not split alike"


def test_the_op_says_what_it_expects() -> None:
    hidden, ids, weights, *tables = operands(3)
    with pytest.raises(ValueError, match=r"expert_weights: expected \[3, 3\], found \[3, 2\]"):
        routed_experts(hidden, ids, weights[:, :2], *tables)
    with pytest.raises(ValueError, match=r"expected \[N, H\] and \[N, K\], found \[3, 8\] and \[2, 3\]"):
        routed_experts(hidden, ids[:2], weights, *tables)


def test_a_compiler_sees_the_steps() -> None:
    names = {str(n.target) for n in make_fx(OP)(*operands(3)).graph.nodes}
    assert {"aten.sort.default", "cpcompile.grouped_mm.default"} <= names and str(OP) not in names
    torch.library.opcheck(grouped_mm, (operands(3)[0], operands(3)[3], torch.tensor([0, 1, 1, 3, 3])))


# ---- the recogniser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize("sharded", [False, True])
def test_real_models_keep_their_numbers(kind: str, sharded: bool) -> None:
    trace = traced(kind, sharded)
    gm = fresh(trace)
    result = RecogniseRoutedExperts()(gm)
    assert (result.rewrites, result.refusals) == (1, [])
    assert not gm.graph.find_nodes(op="call_function", target=aten.histc.default)
    assert RecogniseRoutedExperts()(gm).rewrites == 0
    if sharded:
        return  # its collectives need other ranks; in tests/test_context_parallel.py they are there
    for tokens in (1, 2, 9):
        ids = torch.arange(tokens)[None] % models.TINY["vocab_size"]
        given = real_inputs(trace, ids)
        for mine, theirs in zip(fx.Interpreter(gm).run(*given), fx.Interpreter(trace.gm).run(*given), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_recognised() -> None:
    assert RecogniseRoutedExperts()(fresh(traced("v3", dtype=torch.bfloat16))).rewrites == 1


def test_unsorted_experts_are_left() -> None:
    gm = fresh(traced("v3", form="batched_mm"))
    result = RecogniseRoutedExperts()(gm)
    assert (result.rewrites, result.refusals) == (0, [])


def only(gm: fx.GraphModule, target: Any, index: int = -1) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[index]


GROUPED = torch.ops.transformers.grouped_mm_fallback.default


def descending(gm: fx.GraphModule) -> None:
    sort = only(gm, aten.sort.default)
    sort.args = (sort.args[0], -1, True)


def other_activation(gm: fx.GraphModule) -> None:
    (gate,) = (n for n in only(gm, aten.split.Tensor).users if n.args[1] == 0)
    next(iter(gate.users)).target = aten.sigmoid.default


def gate_last(gm: fx.GraphModule) -> None:
    split = only(gm, aten.split.Tensor)
    for item in list(split.users):
        item.args = (split, 1 - item.args[1])  # type: ignore[operator]


def one_expert_more(gm: fx.GraphModule) -> None:
    histc = only(gm, aten.histc.default)
    histc.args = (histc.args[0], histc.args[1] + 1, 0, histc.args[1])  # type: ignore[operator]
    for mask in gm.graph.find_nodes(op="call_function", target=aten.ge.Scalar):  # transformers 5.17
        mask.args = (mask.args[0], histc.args[1])


def counts_from_one(gm: fx.GraphModule) -> None:
    histc = only(gm, aten.histc.default)
    histc.args = (*histc.args[:2], 1, histc.args[3])


def not_put_back(gm: fx.GraphModule) -> None:
    back = only(gm, aten.index.Tensor)
    order = only(gm, aten.index_put.default).args[1][0]  # type: ignore[index]
    back.args = (back.args[0], [order])


def slots_of_the_next_token(gm: fx.GraphModule) -> None:
    rows = only(gm, aten.floor_divide.default)
    rows.args = (rows.args[0], 1)


def weights_unsorted(gm: fx.GraphModule) -> None:
    weights = only(gm, aten.index.Tensor, -2)
    weights.args = (weights.args[0], [only(gm, aten.floor_divide.default)])


def summed_over_tokens(gm: fx.GraphModule) -> None:
    total = next(n for n in only(gm, aten.index.Tensor).users for n in n.users)
    total.args = (total.args[0], [0])


def mean_of_slots(gm: fx.GraphModule) -> None:
    total = next(n for n in only(gm, aten.index.Tensor).users for n in n.users)
    total.target = aten.mean.dim


def read_twice(gm: fx.GraphModule) -> None:
    product = only(gm, GROUPED)
    with gm.graph.inserting_after(product):
        gm.graph.call_function(aten.neg.default, (product,))


REFUSALS: dict[Callable[[fx.GraphModule], None], str] = {
    descending: "its slots are not sorted upwards",
    other_activation: "its activation is",
    gate_last: "its gate is not the first half",
    one_expert_more: "it has tables of other numbers of experts",
    counts_from_one: "it counts other experts than it has",
    not_put_back: "the order in which it puts rows back is",
    slots_of_the_next_token: "its slots are not [N, 1, H]",
    weights_unsorted: "its weights are not the slots'",
    summed_over_tokens: "it does not sum a token's slots",
    mean_of_slots: "what reads a token's slots is",
    read_twice: "what reads its result is",
}


@pytest.mark.parametrize("change", REFUSALS, ids=lambda c: c.__name__)
def test_anything_else_is_refused(change: Callable[[fx.GraphModule], None]) -> None:
    gm = fresh(traced("v3"))
    change(gm)
    before = str(gm.graph)
    result = RecogniseRoutedExperts()(gm)
    assert result.rewrites == 0 and str(gm.graph) == before
    (refusal,) = result.refusals
    assert REFUSALS[change] in refusal.reason and refusal.reason.endswith("they need all tokens")
