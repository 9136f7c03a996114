"""Quantisation of GE, and products of quantised matrices.

Prototypes: CANN's ``quantize_ops.h`` and ``matrix_calculation_ops.h``, which torchair's
``auto_generated_ge_raw_ops.py`` repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.signatures import DType, expect, expect_default, expect_unfed, op

_HALF = "float16|bfloat16"


@op("DynamicQuant", "T, T, int32 -> y:int8, scale:float32", T=f"{_HALF}|float32")
def dynamic_quant(
    x: Tensor,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    *,
    dst_type: DType = torch.int8,  # type: ignore[assignment]
) -> tuple[Tensor, Tensor]:
    """``y = round(x * smooth / scale)`` with ``scale = max |x * smooth| / 127`` for each row; a row of zeros stays.

    Source: REG_OP(DynamicQuant); aclnnDynamicQuant. Smoothing by groups and other dtypes are refused.
    """
    expect_unfed(group_index=group_index)
    expect_default({"dst_type": dst_type}, dst_type=torch.int8)
    wide = x.float() if smooth_scales is None else x.float() * smooth_scales.float()
    scale = wide.abs().amax(-1) / 127
    y = torch.where(scale[..., None] > 0, wide / scale[..., None], 0)
    return y.round().clamp(-128, 127).to(torch.int8), scale


@op("AscendQuantV2", "T, T, T -> y:int8", T=f"{_HALF}|float32")
def ascend_quant_v2(
    x: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    *,
    sqrt_mode: bool = False,
    round_mode: str = "round",
    dst_type: DType = torch.int8,  # type: ignore[assignment]
    axis: int = -1,
) -> Tensor:
    """``round(x * scale + offset)``, half to even, within int8. Source: REG_OP(AscendQuantV2); aclnnAscendQuantV3.

    Other modes, dtypes and axes than the last are refused.
    """
    found = {"sqrt_mode": sqrt_mode, "round_mode": round_mode, "dst_type": dst_type}
    expect_default(found, sqrt_mode=False, round_mode="round", dst_type=torch.int8)
    expect(axis in (-1, x.ndim - 1), f"attribute 'axis': expected the last dim, found {axis}")
    y = x.float() * scale.float()
    y = y if offset is None else y + offset.float()
    return y.round().clamp(-128, 127).to(torch.int8)


def unpacked_scale(scale: Tensor) -> Tensor:
    """A scale as float32: itself, or the bits in the lower half of 64, as ``npu_trans_quant_param`` packs them."""
    if scale.dtype not in (torch.int64, torch.uint64):
        return scale.float()
    return (scale.view(torch.int64) & 0xFFFFFFFF).to(torch.int32).view(torch.float32)


@op(
    "QuantBatchMatmulV3",
    "int8, int8, uint64|float32|int64|bfloat16, float32, int32|bfloat16|float16|float32, float32 -> y:=dtype",
)
def quant_batch_matmul_v3(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset: Tensor | None = None,
    bias: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    *,
    dtype: DType,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    group_size: int = 0,
) -> Tensor:
    """``(x1 @ x2 + bias) * scale * pertoken_scale`` of int8 matrices; a bias that is no int32 is added behind.

    ``scale [N]`` or ``[1]``, ``pertoken_scale [M]``. Source: REG_OP(QuantBatchMatmulV3); aclnnQuantMatmulV4. An
    int8 result with its offset, and scales of groups, are refused.
    """
    expect_unfed(offset=offset)
    expect_default({"dtype": dtype, "group_size": group_size}, dtype=(torch.float16, torch.bfloat16), group_size=0)
    return _dequantised(
        x1.mT if transpose_x1 else x1, x2.mT if transpose_x2 else x2, scale, bias, pertoken_scale, dtype
    )


@op("QuantBatchMatmul", "int8, int8, int32, uint64 -> y:float16")
def quant_batch_matmul(
    x1: Tensor, x2: Tensor, bias: Tensor, deq_scale: Tensor, *, adj_x1: bool = False, adj_x2: bool = False
) -> Tensor:
    """``(x1 @ x2 + bias) * deq_scale`` of int8 matrices. Source: REG_OP(QuantBatchMatmul); aclnnQuantMatmul."""
    a, b = x1.mT if adj_x1 else x1, x2.mT if adj_x2 else x2
    return _dequantised(a, b, deq_scale, bias, None, torch.float16)


@op(
    "QuantBatchMatmulV4",
    "T, T, int32|bfloat16|float16|float32, float32, uint64|float32|int64|bfloat16, any, any, any, any, any -> y:=dtype",
    T="int8|float8_e4m3fn|float8_e5m2",
)
def quant_batch_matmul_v4(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    x1_scale: Tensor | None = None,
    x2_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
    x1_offset: Tensor | None = None,
    x2_offset: Tensor | None = None,
    y_offset: Tensor | None = None,
    x2_table: Tensor | None = None,
    *,
    dtype: DType,
    compute_type: int = -1,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    group_size: int = -1,
) -> Tensor:
    """As QuantBatchMatmulV3, whose ``pertoken_scale`` is ``x1_scale [M]`` and whose ``scale`` is ``x2_scale``.

    Source: REG_OP(QuantBatchMatmulV4), as torchair's converter of ``npu_quant_matmul`` makes it for later chips;
    aclnnQuantMatmulV5. Offsets, tables, scales of groups and quantised results are refused.
    """
    expect_unfed(y_scale=y_scale, x1_offset=x1_offset, x2_offset=x2_offset, y_offset=y_offset, x2_table=x2_table)
    found = {"dtype": dtype, "compute_type": compute_type, "group_size": group_size}
    expect_default(found, dtype=(torch.float16, torch.bfloat16, torch.float32), compute_type=-1, group_size=(-1, 0))
    expect(x2_scale is not None, "expected x2_scale, found none")
    assert x2_scale is not None
    a, b = x1.mT if transpose_x1 else x1, x2.mT if transpose_x2 else x2
    return _dequantised(a, b, x2_scale, bias, x1_scale, dtype)


def _dequantised(
    a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None, per_token: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``(a @ b + bias) * scale * per_token``; a bias that is no int32 is added behind."""
    expect(a.shape[-1] == b.shape[-2], f"expected inner sizes that agree, found {list(a.shape)} and {list(b.shape)}")
    # Doubles hold sums of products of int8 exactly.
    exact = torch.matmul(a.double(), b.double())
    if bias is not None and bias.dtype == torch.int32:
        exact = exact + bias.double()
    y = exact.float() * unpacked_scale(scale)
    y = y if per_token is None else y * per_token[..., None]
    if bias is not None and bias.dtype != torch.int32:
        y = y + bias.float()
    return y.to(dtype)
