"""What AOTAutograd makes of vLLM's ops that write in place, and what ``VllmOps`` makes of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
import torch.fx as fx
import vllm_ops  # noqa: F401  defines the ops
from torch import Tensor

from cpcompile.axes import Axis
from cpcompile.capture import lower_inference
from cpcompile.passes.base import PassResult
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.module_roles import find_modules
from cpcompile.passes.placement_rules import find_rule
from cpcompile.passes.token_dims import annotate
from cpcompile.passes.verify_arguments import sees_more
from cpcompile.passes.verify_static import prove
from cpcompile.passes.vllm_ops import OPAQUE, VllmOps, count_rows_of_what_is_read, inner_op, why_whole

IR, VLLM = torch.ops.vllm_ir, torch.ops.vllm
FUNCTIONALISED = torch.ops.higher_order.auto_functionalized_v2


def graph_of(f: Callable[..., Any], *args: Tensor) -> fx.GraphModule:
    """The functional graph that the backend gets of ``f``."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return lambda args: pytest.fail("not to be run")

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        lower_inference(gm, inputs, keep, keep)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend, fullgraph=True)(*[a.clone() for a in args])
    return found[0]


def targets(gm: fx.GraphModule) -> list[Any]:
    return [n.target for n in gm.graph.find_nodes(op="call_function", target=FUNCTIONALISED)] + [
        n.target for n in gm.graph.nodes if isinstance(n.target, torch._ops.OpOverload) and "vllm" in n.target.namespace
    ]


def norms(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    y, residual = IR.fused_add_rms_norm.maybe_inplace(x * 2, residual * 1, weight, 1e-6)
    y, residual = IR.fused_add_rms_norm.maybe_inplace(y * 3, residual, weight, 1e-6)
    return y, residual


X, RESIDUAL, WEIGHT = torch.randn(5, 8), torch.randn(5, 8), torch.randn(8)


def test_norms_that_may_write_in_place_become_values() -> None:
    gm = graph_of(norms, X, RESIDUAL, WEIGHT)
    assert targets(gm) == [FUNCTIONALISED] * 2
    assert VllmOps()(gm).rewrites == 2
    assert targets(gm) == [IR.fused_add_rms_norm.default] * 2
    assert VllmOps()(gm).rewrites == 0
    expected = norms(X.clone(), RESIDUAL.clone(), WEIGHT)
    for found, wanted in zip(gm(X, RESIDUAL, WEIGHT), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert all(find_rule(n) for n in gm.graph.nodes if n.target is IR.fused_add_rms_norm.default)


def test_a_norm_whose_operand_is_read_afterwards_stays() -> None:
    def f(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        y, _ = IR.fused_add_rms_norm.maybe_inplace(x, residual * 1, weight, 1e-6)  # writes the graph's input
        return y, x + 1

    gm = graph_of(f, X, RESIDUAL, WEIGHT)
    result = VllmOps()(gm)
    assert result.rewrites == 0 and targets(gm) == [FUNCTIONALISED]
    (refusal,) = result.refusals
    assert refusal.reason == "vllm_ir::fused_add_rms_norm: an operand that it may write to is read afterwards"


def index(hidden: Tensor, prefix: str, read: Tensor, buffer: Tensor) -> Tensor:
    found: Tensor = VLLM.sparse_attn_indexer(hidden, prefix, read, None, read, buffer)
    return found


def test_an_indexer_writes_the_buffer_that_attention_reads_elsewhere() -> None:
    """Twice into one buffer: each write is there before the next op, which does not name it, runs."""
    buffer = torch.zeros(8, 1, dtype=torch.int64)
    seen: list[int] = []

    def f(hidden: Tensor, buffer: Tensor) -> Tensor:
        index(hidden, "layer 0", hidden * 1, buffer)
        index(hidden, "layer 1", hidden + 1, buffer)
        return hidden * 2

    gm = graph_of(f, torch.full((5, 2), 3.0), buffer)
    assert VllmOps()(gm).rewrites == 2 + 2
    assert targets(gm) == [VLLM.sparse_attn_indexer.default] * 2

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is VLLM.sparse_attn_indexer.default:
                seen.append(int(buffer[0]))
            return result

    outputs = Watching(gm).run(torch.full((5, 2), 3.0), buffer)
    assert seen == [3, 4]
    assert any(out is buffer for out in outputs)  # what AOTAutograd then copies into the buffer is the buffer


def test_calls_that_see_more_than_their_arguments_stay_in_order() -> None:
    gm = graph_of(lambda h, b: (index(h, "layer 0", h + 1, b), h * 2)[1], torch.ones(5, 2), torch.zeros(8, 1))
    (wrapped,) = gm.graph.find_nodes(op="call_function", target=FUNCTIONALISED)
    assert sees_more(wrapped)
    VllmOps()(gm)
    (call,) = gm.graph.find_nodes(op="call_function", target=VLLM.sparse_attn_indexer.default)
    assert sees_more(call)
    reason = "vllm::sparse_attn_indexer: " + OPAQUE["vllm::sparse_attn_indexer"]
    assert why_whole(call) == reason and find_rule(call) is None
    assert not any(sees_more(n) for n in graph_of(norms, X, RESIDUAL, WEIGHT).graph.nodes)


@pytest.mark.parametrize("is_input", [True, False], ids=["in place", "functionalised"])
def test_an_indexer_is_given_what_it_reads_where_it_counts_rows(is_input: bool) -> None:
    """Its own numbers stay; of the hidden states nothing is read any more."""

    def f(hidden: Tensor, buffer: Tensor) -> Tensor:
        given = buffer if is_input else torch.zeros_like(buffer)
        index(hidden, "layer 0", hidden[:, :1] + 1, given)
        return given * 2

    given = torch.full((5, 2), 3.0), torch.zeros(8, 1)
    gm = graph_of(f, *given)
    inputs = gm.graph.find_nodes(op="placeholder")
    (hidden,) = [n for n in inputs if n.meta["val"].shape == (5, 2)]
    values = [given[n is not hidden] for n in inputs]

    def calls() -> list[fx.Node]:
        return [n for n in gm.graph.nodes if inner_op(n) is VLLM.sparse_attn_indexer.default]

    assert calls()[0] in hidden.users
    result = VllmOps()(gm)
    (call,) = calls()
    assert result.rewrites == 1 + is_input and not result.refusals and call not in hidden.users
    torch.testing.assert_close(gm(*[a.clone() for a in values])[-1], f(*[a.clone() for a in given]))
    assert VllmOps()(gm).rewrites == 0


def test_an_indexer_in_dynamos_graph_too() -> None:
    """Before vLLM cuts it at the op: what the op is given leaves a piece whole."""
    found: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    def f(hidden: Tensor, buffer: Tensor) -> Tensor:
        index(hidden, "layer 0", hidden[:, :1] + 1, buffer)
        return hidden * 2

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(f, backend=backend, fullgraph=True, dynamic=True)(torch.ones(5, 2), torch.zeros(8, 1))
    for rewrites in (1, 0):
        result = PassResult()
        count_rows_of_what_is_read(found[0].graph, result)
        assert result.finish(found[0]).rewrites == rewrites and not result.refusals
    (call,) = [n for n in found[0].graph.nodes if "sparse_attn_indexer" in str(n.target)]
    assert call.args[0] is call.args[2] and "add" in str(call.args[0].target)


def test_an_indexer_keeps_an_operand_whose_rows_no_other_has() -> None:
    gm = graph_of(lambda h, b: (index(h, "layer 0", h[:4], b), h * 2)[1], torch.ones(5, 2), torch.zeros(8, 1))
    (refusal,) = VllmOps()(gm).refusals
    (call,) = gm.graph.find_nodes(op="call_function", target=VLLM.sparse_attn_indexer.default)
    assert call.args[0].meta["val"].shape == (5, 2)
    assert refusal.reason == "vllm::sparse_attn_indexer: no operand that it reads has as many rows as hidden_states"


def test_nothing_is_known_of_what_a_functionalised_op_returns() -> None:
    """Its weights and caches are not among its arguments: equal arguments do not make equal results on all ranks."""

    def f(hidden: Tensor) -> Tensor:
        buffer = torch.zeros_like(hidden)
        index(hidden, "layer 0", hidden, buffer)
        return buffer * 2

    gm = graph_of(f, torch.ones(4, 2))
    (hidden,) = gm.graph.find_nodes(op="placeholder")
    known = annotate(gm, Axis("tp", "0", 2, 0, (0, 1)), {hidden.name: True})
    (call,) = gm.graph.find_nodes(op="call_function", target=FUNCTIONALISED)
    assert hidden in known.replicated and call.all_input_nodes[-1] in known.replicated
    assert not {call, *call.users} & known.replicated


def test_a_view_as_the_same_dtype_is_gone_and_as_another_stays() -> None:
    gm = graph_of(lambda x: (x * 2).view(torch.float32) + (x * 3).view(torch.int32), torch.ones(4, 2))
    before = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.dtype)
    Canonicalise()(gm)
    after = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.dtype)
    assert len(before) == 2 and [n.args[1] for n in after] == [torch.int32]
    axis = Axis("tp", "0", 2, 0, (0, 1))
    assert prove(gm, gm, axis, sympy.Integer(4), lambda _: True).holds


def test_the_product_behind_attention_that_writes_its_result_is_o_proj() -> None:
    def layer(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        q = x @ first.t()
        output = torch.empty_like(q)
        VLLM.unified_mla_attention_with_output(q, output)
        return output.view(-1, 8) @ second.t()

    gm = graph_of(layer, X, torch.randn(8, 8), torch.randn(4, 8))
    (found,), refused = find_modules(gm, ["o_proj"])
    assert gm.graph.find_nodes(op="call_function", target=FUNCTIONALISED) and not refused
    assert found.nodes[0] is gm.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)[-1]
