"""npu gating: the model's own router becomes one op, equal to it, and other routers stay."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import pytest
import torch
from ascend_process import AscendProcess
from ge_forms_checked import rewritten, worst_of_lowered
from test_ge_forms import targets, traced
from torch import Tensor

from cpcompile.passes.npu_gating import NpuGating

ROWS, EXPERTS, CHOSEN, GROUPS, OPEN = 9, 16, 3, 4, 2


def router(
    logits: Tensor, bias: Tensor, *, groups: int = GROUPS, closed: float = -torch.inf, summed: bool = True,
    pairs: int = 2, scores: Callable[[Tensor], Tensor] = torch.sigmoid, ordered: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``DeepseekV3TopkRouter.forward`` behind its product, with what may differ as arguments."""
    plain = scores(logits)
    choice = plain + bias
    best = choice.view(-1, groups, EXPERTS // groups).topk(pairs, dim=-1)[0].sum(dim=-1)
    mask = torch.zeros_like(best).scatter(1, torch.topk(best, k=OPEN, dim=-1, sorted=False)[1], 1)
    mask = mask.unsqueeze(-1).expand(-1, groups, EXPERTS // groups).reshape(-1, EXPERTS)
    choice = choice.masked_fill(~mask.bool(), closed)
    ids = torch.topk(choice, k=CHOSEN, dim=-1, sorted=ordered)[1]
    weights = plain.gather(1, ids)
    if summed:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * 2.5, ids


def in_order(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """With the best first, in which order the op has them."""
    return router(logits, bias, ordered=True)


def operands(rows: int = ROWS, bias: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits, shift = torch.randn((rows, EXPERTS), generator=generator), torch.randn(EXPERTS, generator=generator)
    return logits, shift.to(bias)


@pytest.mark.parametrize("bias", [torch.float32, torch.bfloat16])
def test_the_router_is_one_op_and_equal(bias: torch.dtype) -> None:
    given = operands(bias=bias)
    gm = traced(in_order, *given, mode="fake")
    result = NpuGating()(gm)
    assert (result.rewrites, result.refusals) == (1, [])
    computed = [name for name in targets(gm) if "sym" not in name and "getitem" not in name]
    cast = ["aten._to_copy.default"]
    assert computed == [*(cast if bias != torch.float32 else []), "npu.npu_moe_gating_top_k.default", *cast]
    (weights, ids), (expected, chosen) = gm(*given), in_order(*given)
    assert torch.equal(ids, chosen) and ids.dtype == torch.int64
    torch.testing.assert_close(weights, expected, rtol=0, atol=2e-6)
    assert NpuGating()(gm).rewrites == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"closed": 0.0}, "closed groups are at 0.0: expected minus infinity"),
        ({"summed": False}, "weights are not over their sum, as the op has them"),
        ({"pairs": 1}, "groups are not chosen by their two best"),
        ({"groups": 8}, "8 groups of 2 experts: too few or many"),
        ({"scores": torch.tanh}, "the scores are no sigmoids"),
    ],
)
def test_other_routers_are_refused(changes: dict[str, Any], reason: str) -> None:
    gm = traced(lambda logits, bias: router(logits, bias, **changes), *operands(), mode="fake")
    before = targets(gm)
    result = NpuGating()(gm)
    assert [refusal.reason for refusal in result.refusals] == [reason]
    assert targets(gm) == before


def test_a_wider_bias_is_refused() -> None:
    logits, bias = operands()
    gm = traced(in_order, logits.bfloat16(), bias, mode="fake")
    (refusal,) = NpuGating()(gm).refusals
    assert refusal.reason == "scores of torch.bfloat16, torch.float32"


def test_a_missing_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "npu", types.SimpleNamespace())
    (refusal,) = NpuGating()(traced(in_order, *operands(), mode="fake")).refusals
    assert refusal.reason == "there is no op npu::npu_moe_gating_top_k: import torch_npu"


@pytest.mark.parametrize("kind", ["v3", "v32"])
def test_the_router_of_a_model_is_found(kind: str) -> None:
    gm, error = rewritten(kind, NpuGating(), 7)
    assert error < 2e-5
    assert "aten.sigmoid.default" not in targets(gm)
    (call,) = gm.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_moe_gating_top_k.default)
    said = {"k_group": 1, "group_count": 2, "norm_type": 1, "routed_scaling_factor": 2.5, "eps": 1e-20}
    assert said.items() <= call.kwargs.items() and call.args[1] == 2


def test_the_lowered_graph_is_the_router(ascend: AscendProcess) -> None:
    error, ops = ascend(worst_of_lowered, in_order, operands(33))
    assert ops["MoeGatingTopK"] == 1 and "TopKV2" not in ops
    assert error < 2e-6
