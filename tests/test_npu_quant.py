"""npu quant: dynamically quantised products become torch_npu's ops, and those that compute other numbers stay."""

from __future__ import annotations

import types
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import pytest
import torch
from ascend_process import AscendProcess
from ge_forms_checked import worst_of_lowered
from small_modules import trace_of_small
from test_ge_forms import targets, traced
from torch import Tensor

from cpcompile.passes.npu_quant import NpuQuant

ROWS, INNER, OUTER = 20, 32, 24


def quantised(
    x: Tensor, weight: Tensor, scale: Tensor, *, least: float = 1e-10, added: float = 0.0, over: float = 127.0,
    low: int = -127, wide: torch.dtype = torch.float32, first: str = "step", out: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    rows = x.to(wide)
    step = rows.abs().amax(-1, keepdim=True).clamp(min=least) / over
    if added:
        step = step + added
    narrow = torch.clamp(torch.round(rows / step), low, 127).to(torch.int8)
    product = torch._int_mm(narrow, weight.t()).to(wide)
    product = product * step * scale.t() if first == "step" else product * scale.t() * step
    return product.to(out or x.dtype)


def by_column_first(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """In the order of the op."""
    return quantised(x, weight, scale, first="scale")


def twice(x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Two products of the same rows."""
    rows = x.float()
    step = rows.abs().amax(-1, keepdim=True) / 127
    narrow = torch.round(rows / step).to(torch.int8)
    products = [torch._int_mm(narrow, w.t()).float() * scale.t() * step for w in (weight, weight * 2)]
    return products[0].to(x.dtype), products[1].to(x.dtype)


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((ROWS, INNER), generator=generator)
    x[3] = 0
    weight = torch.randint(-127, 128, (OUTER, INNER), generator=generator).to(torch.int8)
    return x.to(dtype), weight, torch.rand((OUTER, 1), generator=generator) * 0.01 + 0.001


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_quantised_product_is_two_ops_and_bit_equal(dtype: torch.dtype) -> None:
    given = operands(dtype)
    gm = traced(by_column_first, *given, mode="fake")
    result = NpuQuant()(gm)
    assert (result.rewrites, result.refusals) == (1, [])
    assert {"npu.npu_dynamic_quant.default", "npu.npu_quant_matmul.default"} < set(targets(gm))
    assert not {"aten._int_mm.default", "aten.amax.default", "aten.div.Tensor"} & set(targets(gm))
    assert torch.equal(gm(*given), by_column_first(*given))
    assert NpuQuant()(gm).rewrites == 0


def test_factors_in_the_other_order_differ_by_one_rounding() -> None:
    given = operands()
    gm = traced(lambda *a: quantised(*a), *given, mode="fake")
    assert NpuQuant()(gm).rewrites == 1
    torch.testing.assert_close(gm(*given), quantised(*given), rtol=2**-7, atol=0)


def test_rows_are_quantised_once_for_all_products() -> None:
    x, *rest = operands()
    given = (x + 1, *rest)
    gm = traced(twice, *given, mode="fake")
    assert NpuQuant()(gm).rewrites == 2
    assert targets(gm).count("npu.npu_dynamic_quant.default") == 1
    for found, expected in zip(gm(*given), twice(*given), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"added": 1e-6}, "something is added to the steps"),
        ({"over": 128.0}, "the steps are not over 127"),
        ({"low": -100}, "rows are cut off within int8"),
        ({"wide": torch.bfloat16}, "the rows are not half precision in float32"),
        ({"out": torch.float16}, "rows of torch.bfloat16 give torch.float16"),
        ({"out": torch.float32}, "the op gives half precision alone"),
    ],
)
def test_other_numbers_are_refused(changes: dict[str, Any], reason: str) -> None:
    gm = traced(lambda *given: quantised(*given, **changes), *operands(), mode="fake")
    before = targets(gm)
    assert [refusal.reason for refusal in NpuQuant()(gm).refusals] == [reason]
    assert targets(gm) == before


def test_a_product_that_steps_scale_twice_is_refused() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        rows = x.float()
        step = rows.abs().amax(-1, keepdim=True) / 127
        product = torch._int_mm(torch.round(rows / step).to(torch.int8), weight.t()).float()
        return (product * step * step).to(x.dtype)

    (refusal,) = NpuQuant()(traced(function, *operands()[:2], mode="fake")).refusals
    assert refusal.reason == "the product is not scaled by column"


def test_a_layer_of_float32_with_something_added_is_refused() -> None:
    (refusal,) = NpuQuant()(trace_of_small("both").gm).refusals
    assert refusal.reason == "the rows are not half precision in float32"


def test_a_missing_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = traced(by_column_first, *operands(), mode="fake")
    monkeypatch.setattr(torch.ops, "npu", types.SimpleNamespace())
    (refusal,) = NpuQuant()(gm).refusals
    assert refusal.reason == "there is no op npu::npu_dynamic_quant: import torch_npu"


def test_the_lowered_graph_is_the_layer(ascend: AscendProcess) -> None:
    error, ops = ascend(worst_of_lowered, by_column_first, operands())
    assert (ops["DynamicQuant"], ops["QuantBatchMatmulV3"], error) == (1, 1, 0.0)
