"""Matrix products of GE.

Prototypes: CANN's ``matrix_calculation_ops.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats. Half
precisions are accumulated in float32 and rounded once, as the cube unit does and torch's CPU products do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.signatures import expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"


def product(x1: Tensor, x2: Tensor, transpose_x1: bool, transpose_x2: bool, bias: Tensor | None = None) -> Tensor:
    """``op(x1) @ op(x2) + bias``; the last two dims are the matrices, the others broadcast."""
    a = x1.mT if transpose_x1 else x1
    b = x2.mT if transpose_x2 else x2
    expect(a.shape[-1] == b.shape[-2], f"expected inner sizes that agree, found {list(a.shape)} and {list(b.shape)}")
    y = torch.matmul(a, b)
    if bias is None:
        return y
    expect(bias.shape[-1] == b.shape[-1], f"expected a bias of {b.shape[-1]}, found {list(bias.shape)}")
    return (y.float() + bias.float()).to(y.dtype)


def _matrices(x1: Tensor, x2: Tensor) -> None:
    expect(x1.ndim == x2.ndim == 2, f"expected two matrices, found {list(x1.shape)} and {list(x2.shape)}")


@op("MatMul", "T, T, any -> y:T", T=_FLOAT)
def mat_mul(
    x1: Tensor, x2: Tensor, bias: Tensor | None = None, *, transpose_x1: bool = False, transpose_x2: bool = False
) -> Tensor:
    """``op(x1) @ op(x2) + bias`` of two matrices. Source: REG_OP(MatMul)."""
    _matrices(x1, x2)
    return product(x1, x2, transpose_x1, transpose_x2, bias)


@op("MatMulV2 MatMulV3", "T, T, any, int8 -> y:T", T=_FLOAT)
def mat_mul_v2(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
    *,
    transpose_x1: bool = False,
    transpose_x2: bool = False,
    offset_x: int = 0,
    enable_hf32: bool = False,
    opImplMode: int = 0,
) -> Tensor:
    """``op(x1) @ op(x2) + bias`` of two matrices; offsets of quantised operands are refused.

    ``enable_hf32`` allows the device to round float32 operands, so the reference is what is rounded.
    Source: REG_OP(MatMulV2), REG_OP(MatMulV3).
    """
    expect_unfed(offset_w=offset_w)
    expect_default({"offset_x": offset_x}, offset_x=0)
    _matrices(x1, x2)
    return product(x1, x2, transpose_x1, transpose_x2, bias)


@op("BatchMatMul", "T, T -> y:T", T=_FLOAT)
def batch_mat_mul(x1: Tensor, x2: Tensor, *, adj_x1: bool = False, adj_x2: bool = False) -> Tensor:
    """``op(x1) @ op(x2)`` of the matrices in the last two dims; the others broadcast. Source: REG_OP(BatchMatMul)."""
    return product(x1, x2, adj_x1, adj_x2)


@op("BatchMatMulV2 BatchMatMulV3", "T, T, any, int8 -> y:T", T=_FLOAT)
def batch_mat_mul_v2(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    offset_w: Tensor | None = None,
    *,
    adj_x1: bool = False,
    adj_x2: bool = False,
    offset_x: int = 0,
    enable_hf32: bool = False,
) -> Tensor:
    """As BatchMatMul, with a bias of the last dim. Source: REG_OP(BatchMatMulV2), REG_OP(BatchMatMulV3)."""
    expect_unfed(offset_w=offset_w)
    expect_default({"offset_x": offset_x}, offset_x=0)
    return product(x1, x2, adj_x1, adj_x2, bias)


@op("TransposeBatchMatMul", "T, T, any, int64|uint64 -> y:T", T=_FLOAT)
def transpose_batch_mat_mul(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    *,
    perm_x1: list[int] = [],  # noqa: B006
    perm_x2: list[int] = [],  # noqa: B006
    perm_y: list[int] = [],  # noqa: B006
    enable_hf32: bool = False,
    batch_split_factor: int = 1,
) -> Tensor:
    """Products of batches of matrices whose dims are ordered by ``perm_x1`` and ``perm_x2`` before, ``perm_y`` after.

    Source: REG_OP(TransposeBatchMatMul); aclnnTransposeBatchMatMul. A quantising scale and a split result are refused.
    """
    expect_unfed(bias=bias, scale=scale)
    expect_default({"batch_split_factor": batch_split_factor}, batch_split_factor=1)
    a = x1.permute(perm_x1) if perm_x1 else x1
    b = x2.permute(perm_x2) if perm_x2 else x2
    y = product(a, b, False, False)
    return y.permute(perm_y) if perm_y else y
