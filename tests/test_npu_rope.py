"""npu rope: rotated neighbours and halves become torch_npu's ops, equal to what the model writes, and are lowered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import pytest
import torch
from ascend_process import AscendProcess
from ge_forms_checked import rewritten, worst_of_lowered
from test_ge_forms import targets, traced
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.deepseek_v32.modeling_deepseek_v32 import apply_rotary_pos_emb

from cpcompile.passes.npu_rope import NpuRope

HEADS, ROWS, WIDTH = 3, 5, 64


def interleaved(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own."""
    return apply_rotary_pos_emb_interleave(query, key, cos, sin)  # type: ignore[no-any-return]


def half(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """That of the indexer, rows before heads."""
    query, key = (x.transpose(1, 2) for x in (query, key))
    return apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)  # type: ignore[no-any-return]


def operands(width: int = WIDTH, dtype: torch.dtype = torch.float64, batch: int = 1) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn((batch, n, ROWS, width), generator=generator).to(dtype) for n in (HEADS, 1))
    angles = torch.rand((batch, ROWS, width // 2), generator=generator)
    angles = torch.cat([angles, angles], -1)
    return query, key, angles.cos().to(dtype), angles.sin().to(dtype)


CASES = [(interleaved, "npu.npu_interleave_rope.default"), (half, "npu.npu_rotary_mul.default")]


@pytest.mark.parametrize(("function", "op"), CASES)
def test_rotations_are_one_op_each_and_equal(function: Callable[..., Any], op: str) -> None:
    given = operands(dtype=torch.float32)
    gm = traced(function, *given, mode="fake")
    result = NpuRope()(gm)
    assert (result.rewrites, result.refusals) == (2, [])
    assert targets(gm).count(op) == 2
    assert not {"aten.mul.Tensor", "aten.neg.default", "aten.sub.Tensor"} & set(targets(gm))
    for found, expected in zip(gm(*given), function(*given), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert NpuRope()(gm).rewrites == 0


def test_cosines_of_pairs_are_repeated_once_for_all() -> None:
    query, *others = operands(dtype=torch.bfloat16)
    gm = traced(interleaved, query.transpose(1, 2).contiguous().transpose(1, 2), *others, mode="fake")
    NpuRope()(gm)
    assert targets(gm).count("aten.cat.default") == 2
    calls = gm.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_interleave_rope.default)
    assert len(calls) == 2
    for call in calls:
        assert all(node.meta["val"].is_contiguous() for node in call.all_input_nodes)


def refusals(function: Callable[..., Any], *given: Tensor) -> list[str]:
    gm = traced(function, *given, mode="fake")
    result = NpuRope()(gm)
    assert result.rewrites == 0
    return sorted({refusal.reason for refusal in result.refusals})


def test_what_the_kernels_do_not_take_is_refused() -> None:
    assert refusals(interleaved, *operands(8, torch.float32)) == ["the last dim is 8: npu_interleave_rope takes 64"]
    assert refusals(half, *operands(896, torch.float32)) == [
        "the last dim is 896: npu_rotary_mul takes even sizes below 896"
    ]
    many = [x.expand(1000, *x.shape[1:]) for x in operands(8, torch.float32)]
    assert refusals(half, *many) == [
        "1000 requests of 1 heads: npu_rotary_mul takes fewer than 1000",
        "1000 requests of 3 heads: npu_rotary_mul takes fewer than 1000",
    ]
    (reason,) = refusals(interleaved, *operands())
    assert reason.startswith("operands of torch.float64: the kernels take one of")
    one = (*operands(dtype=torch.float32, batch=2)[:2], *operands(dtype=torch.float32)[2:])
    assert refusals(interleaved, *one) == ["cosines are not [B, 1, S, D]"]


def other_sign(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([first.neg(), second], -1) * sin


def other_order(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([odd * cos - even * sin, even * cos + odd * sin], -1)


def other_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * sin + even * cos], -1)


def other_cosine(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., ::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * (cos + 1) + even * sin], -1)


@pytest.mark.parametrize("function", [other_sign, other_order, other_pairs, other_cosine])
def test_other_rotations_stay(function: Callable[..., Any]) -> None:
    x = operands(dtype=torch.float32)[0]
    angle = torch.rand(1, 1, ROWS, WIDTH if function is other_sign else WIDTH // 2)
    gm = traced(function, x, angle, angle + 1, mode="fake")
    assert NpuRope()(gm).rewrites == 0


def test_a_missing_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpcompile.passes.npu_rope.missing_ops", lambda names: f"there is no op npu::{names[0]}")
    assert refusals(half, *operands(dtype=torch.float32)) == ["there is no op npu::npu_rotary_mul"]


@pytest.mark.parametrize("kind", ["v3", "v32"])
def test_every_rotation_of_a_model_is_found(kind: str) -> None:
    changes = {"qk_rope_head_dim": WIDTH, **({"index_head_dim": WIDTH + 16} if kind == "v32" else {})}
    gm, error = rewritten(kind, NpuRope(), 7, **changes)
    assert error < 2e-5
    assert targets(gm).count("npu.npu_interleave_rope.default") == 4
    assert targets(gm).count("npu.npu_rotary_mul.default") == (4 if kind == "v32" else 0)


@pytest.mark.parametrize(("function", "op"), [(interleaved, "InterleaveRope"), (half, "RotaryMul")])
def test_the_lowered_graph_is_the_model(ascend: AscendProcess, function: Callable[..., Any], op: str) -> None:
    error, ops = ascend(worst_of_lowered, function, operands(dtype=torch.float32))
    assert ops[op] == 2
    assert error < 2e-6
