"""npu SwiGLU: halves of one value become one op, equal to what the model writes; two products stay, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import npu_ops  # noqa: F401  defines the ops
import pytest
import torch
from test_ge_forms import targets, traced
from torch import Tensor
from torch.nn.functional import silu

from cpcompile.passes.npu_swiglu import NpuSwiglu

HALVES = "gate and factor are not the halves of one value"
ORDER = "the gate is not the first half, or its factor not the second"
PRODUCTS = (
    "gate and factor are products of two weights: joining either costs more than the op saves; "
    "give the model one weight for both"
)


def chunked(x: Tensor, weight: Tensor) -> Tensor:
    gate, up = (x @ weight).chunk(2, -1)
    return silu(gate) * up


def sliced(x: Tensor, weight: Tensor) -> Tensor:
    both = x @ weight
    return both[:, 4:] * silu(both[:, :4])


@pytest.mark.parametrize("function", [chunked, sliced])
def test_halves_are_one_op_and_equal(function: Callable[..., Tensor]) -> None:
    x, weight = torch.randn(3, 5), torch.randn(5, 8)
    gm = traced(function, x, weight, mode="fake")
    result = NpuSwiglu()(gm)
    assert (result.rewrites, result.refusals) == (1, [])
    assert targets(gm) == ["aten.mm.default", "npu.npu_swiglu.default"]
    torch.testing.assert_close(gm(x, weight), function(x, weight), rtol=0, atol=1e-6)
    assert NpuSwiglu()(gm).rewrites == 0


REFUSED: list[tuple[str, Callable[..., Tensor]]] = [
    (PRODUCTS, lambda x, w: silu(x @ w[:, :4]) * (x @ w[:, 4:])),
    (PRODUCTS, lambda x, w: (x @ w[:, 4:]).view(1, 3, 4) * silu((x @ w[:, :4]).view(1, 3, 4))),
    (HALVES, lambda x, w: silu(x @ w[:, :4]) * x[:, :4]),
    (HALVES, lambda x, w: silu((x @ w)[:, :4]) * (x @ w)[:, 4:].relu()),
    (HALVES, lambda x, w: silu((x @ w)[:, :4]) * (x @ w.exp())[:, 4:]),
    (HALVES, lambda x, w: silu((b := x @ w)[:, 1:5]) * b[:, 4:]),
    (ORDER, lambda x, w: silu((b := x @ w)[:, 4:]) * b[:, :4]),
    (ORDER, lambda x, w: silu((b := x @ w)[:, :4]) * b[:, :4]),
    ("the gate does not multiply one value", lambda x, w: silu((b := x @ w)[:, :4]) + b[:, 4:]),
    ("the gate does not multiply one value", lambda x, w: (g := silu((b := x @ w)[:, :4])) * b[:, 4:] + g),
]


@pytest.mark.parametrize(("reason", "function"), REFUSED)
def test_other_gates_stay(reason: str, function: Callable[..., Tensor]) -> None:
    gm = traced(function, torch.randn(3, 5), torch.randn(5, 8), mode="fake")
    before = targets(gm)
    result = NpuSwiglu()(gm)
    assert (result.rewrites, [r.reason for r in result.refusals]) == (0, [reason])
    assert targets(gm) == before


def test_a_missing_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpcompile.passes.npu_swiglu.missing_ops", lambda names: f"there is no op npu::{names[0]}")
    result = NpuSwiglu()(traced(chunked, torch.randn(3, 5), torch.randn(5, 8), mode="fake"))
    assert [r.reason for r in result.refusals] == ["there is no op npu::npu_swiglu"]
