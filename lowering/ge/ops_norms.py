"""Normalisations of GE. Half precisions are computed in float32, as the vector unit does.

Prototypes: CANN's ``nn_norm_ops.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_shape import ints
from cpcompile.lowering.ge.signatures import INDEX, expect, op

_FLOAT = "float16|bfloat16|float32"


def rms_normed(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x * x) + epsilon) * gamma`` over the dims of ``gamma``, and one over the root, float32."""
    dims = tuple(range(-gamma.ndim, 0))
    expect(x.shape[x.ndim - gamma.ndim :] == gamma.shape, f"expected gamma of the last dims of {list(x.shape)}")
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(dims, keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(x.dtype), rstd


@op("RmsNorm", "T, U -> y:T, rstd:float32", T=_FLOAT, U=_FLOAT)
def rms_norm(x: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """``x / sqrt(mean(x * x) + epsilon) * gamma``. Source: REG_OP(RmsNorm); aclnnRmsNorm.

    ``gamma`` may be float32 for halves.
    """
    return rms_normed(x, gamma, epsilon)


@op("AddRmsNorm", "T, T, T -> y:T, rstd:float32, x:T", T=_FLOAT)
def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """``RmsNorm(x1 + x2)``, and the sum as the third result. Source: REG_OP(AddRmsNorm); aclnnAddRmsNorm."""
    expect(x1.shape == x2.shape, f"expected operands of one shape, found {list(x1.shape)} and {list(x2.shape)}")
    x = x1 + x2
    return (*rms_normed(x, gamma, epsilon), x)


@op("AddRmsNormCast", "T, T, T -> y1:float32, y2:T, rstd:float32, x:T", T="float16|bfloat16")
def add_rms_norm_cast(
    x1: Tensor, x2: Tensor, gamma: Tensor, *, epsilon: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As AddRmsNorm, with the result in float32 first. Source: REG_OP(AddRmsNormCast); aclnnAddRmsNormCast."""
    y, rstd, x = add_rms_norm(x1, x2, gamma, epsilon=epsilon)
    return y.float(), y, rstd, x


@op("LayerNormV4", f"T, {INDEX}, U, U -> y:T, mean:float32, rstd:float32", T=_FLOAT, U=_FLOAT)
def layer_norm_v4(
    x: Tensor,
    normalized_shape: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    epsilon: float = 0.00001,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(x - mean) / sqrt(variance + epsilon) * gamma + beta`` over the last dims, ``normalized_shape``.

    Source: REG_OP(LayerNormV4); aclnnLayerNorm.
    """
    sizes = ints(normalized_shape, "normalized_shape")
    expect(list(x.shape[x.ndim - len(sizes) :]) == sizes, f"expected {sizes} as the last dims, found {list(x.shape)}")
    dims = tuple(range(-len(sizes), 0))
    wide = x.float()
    mean = wide.mean(dims, keepdim=True)
    rstd = torch.rsqrt((wide - mean).square().mean(dims, keepdim=True) + epsilon)
    y = (wide - mean) * rstd
    y = y if gamma is None else y * gamma.float()
    y = y if beta is None else y + beta.float()
    return y.to(x.dtype), mean, rstd
