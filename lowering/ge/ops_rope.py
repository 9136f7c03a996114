"""Rotary position embeddings of GE.

Prototypes: CANN's ``fusion_ops.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.signatures import expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"


def _halves(x: Tensor) -> Tensor:
    """``(-second, first)`` of the halves of the last dim."""
    expect(x.shape[-1] % 2 == 0, f"expected an even last dim, found {list(x.shape)}")
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def _neighbours(x: Tensor) -> Tensor:
    """Each pair of neighbours ``(a, b)`` as ``(-b, a)``."""
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The even elements, then the odd ones, rotated as halves."""
    halves = torch.cat([x[..., ::2], x[..., 1::2]], -1)
    return halves * cos + _halves(halves) * sin


@op("InterleaveRope", "T, T, T -> y:T", T=_FLOAT)
def interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``q * cos + rotate_half(q) * sin`` of ``q``, the even and then the odd elements of ``x [B, N, S, D]``.

    Source: REG_OP(InterleaveRope); torch_npu.npu_interleave_rope. Its prototype says float16; hardware takes bfloat16.
    """
    expect(x.ndim == cos.ndim == sin.ndim == 4, f"expected 4 dims, found {list(x.shape)} and {list(cos.shape)}")
    return interleaved(x, cos, sin)


@op("RotaryMul", "T, T, T -> y:T", T=_FLOAT)
def rotary_mul(x: Tensor, r1: Tensor, r2: Tensor) -> Tensor:
    """``x * r1 + rotate_half(x) * r2``. Source: REG_OP(RotaryMul); torch_npu.npu_rotary_mul."""
    return x * r1 + _halves(x) * r2


@op("RotaryPositionEmbedding", "T, T, T, T -> y:T", T=_FLOAT)
def rotary_position_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, rotate: Tensor | None = None, *, mode: int = 0
) -> Tensor:
    """``x * cos + rotated(x) * sin``: halves in ``mode`` 0, neighbours in 1, and the even, odd order in 3.

    Source: REG_OP(RotaryPositionEmbedding); aclnnRotaryPositionEmbedding, modes "half", "interleave" and
    "interleave-half". Quarters, and a matrix ``rotate``, are refused.
    """
    expect_unfed(rotate=rotate)
    expect_default({"mode": mode}, mode=(0, 1, 3))
    if mode == 3:
        return interleaved(x, cos, sin)
    return x * cos + (_neighbours(x) if mode == 1 else _halves(x)) * sin
