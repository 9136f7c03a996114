"""GE ops that reduce, accumulate or order along dims.

Prototypes: CANN's ``reduce_ops.h``, ``math_ops.h``, ``selection_ops.h`` and ``nn_norm_ops.h``, which torchair's
``auto_generated_ge_raw_ops.py`` repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_shape import dim_of, ints, one
from cpcompile.lowering.ge.signatures import FLOAT, INDEX, NUMBER, DType, expect, op


def _dims(x: Tensor, axes: Tensor) -> list[int]:
    dims = [dim_of(axis, x.ndim) for axis in ints(axes, "axes")]
    expect(bool(dims), "input 'axes': expected at least one dim, as releases differ in what none means")
    expect(len(set(dims)) == len(dims), f"input 'axes': expected distinct dims, found {dims}")
    return dims


@op("ReduceSum", f"T, {INDEX} -> y:T", T=NUMBER)
def reduce_sum(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """The sum over the dims ``axes``. Source: REG_OP(ReduceSum)."""
    return x.sum(_dims(x, axes), keepdim=keep_dims, dtype=x.dtype)


@op("ReduceMean", f"T, {INDEX} -> y:T", T=FLOAT)
def reduce_mean(x: Tensor, axes: Tensor, *, keep_dims: bool = False, noop_with_empty_axes: bool = True) -> Tensor:
    """The mean over the dims ``axes``. Source: REG_OP(ReduceMean)."""
    return x.mean(_dims(x, axes), keepdim=keep_dims)


@op("ReduceMax", f"T, {INDEX} -> y:T", T=NUMBER)
def reduce_max(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """The largest over the dims ``axes``. Source: REG_OP(ReduceMax)."""
    return x.amax(_dims(x, axes), keepdim=keep_dims)


@op("ReduceMin", f"T, {INDEX} -> y:T", T=NUMBER)
def reduce_min(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """The smallest over the dims ``axes``. Source: REG_OP(ReduceMin)."""
    return x.amin(_dims(x, axes), keepdim=keep_dims)


@op("ReduceAny", f"bool, {INDEX} -> y:bool")
def reduce_any(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """Whether any holds over the dims ``axes``. Source: REG_OP(ReduceAny)."""
    return torch.any(x, _dims(x, axes), keepdim=keep_dims)


@op("ReduceAll", f"bool, {INDEX} -> y:bool")
def reduce_all(x: Tensor, axes: Tensor, *, keep_dims: bool = False) -> Tensor:
    """Whether all hold over the dims ``axes``. Source: REG_OP(ReduceAll)."""
    return torch.all(x, _dims(x, axes), keepdim=keep_dims)


@op("Cumsum", f"T, {INDEX} -> y:T", T=NUMBER)
def cumsum(x: Tensor, axis: Tensor, *, exclusive: bool = False, reverse: bool = False) -> Tensor:
    """Sums along ``axis`` of everything up to an element, without it if ``exclusive``, from the end if ``reverse``.

    Source: REG_OP(Cumsum), as TensorFlow's Cumsum.
    """
    dim = dim_of(one(axis, "axis"), x.ndim)
    y = x.flip(dim) if reverse else x
    total = y.cumsum(dim, dtype=x.dtype)
    total = total - y if exclusive else total
    return total.flip(dim) if reverse else total


@op("SoftmaxV2", "T -> y:any", T=FLOAT)
def softmax_v2(x: Tensor, *, axes: list[int] = [-1], half_to_float: bool = False) -> Tensor:  # noqa: B006
    """``exp(x)`` over its sum along ``axes``, one dim; in float32 if ``half_to_float``. Source: REG_OP(SoftmaxV2)."""
    expect(len(axes) == 1, f"attribute 'axes': expected one dim, found {axes}")
    wide = half_to_float and x.dtype == torch.float16
    return x.softmax(axes[0], dtype=torch.float32 if wide else x.dtype)


@op("TopKV2", f"T, {INDEX} -> values:T, indices:=indices_dtype", T=NUMBER)
def top_k_v2(
    x: Tensor,
    k: Tensor,
    *,
    sorted: bool = True,
    dim: int = -1,
    largest: bool = True,
    sort_policy: int = 1,
    indices_dtype: DType = torch.int32,  # type: ignore[assignment]
) -> tuple[Tensor, Tensor]:
    """The ``k`` largest or smallest along ``dim`` and where they are; best first, also if not ``sorted``.

    Which of equal ones are taken is left open, as by ``torch.topk``. Source: REG_OP(TopKV2); aclnnTopk.
    """
    values, indices = x.topk(one(k, "k"), dim, largest, True)
    return values, indices.to(indices_dtype)


@op("Sort", "T -> y1:T, y2:int32", T=NUMBER)
def sort(x: Tensor, *, axis: int = -1, descending: bool = False, stable: bool = False) -> tuple[Tensor, Tensor]:
    """``x`` in order along ``axis``, the last dim, and where each came from; equal ones stay in order.

    Source: REG_OP(Sort), which leaves the order of equal ones open unless ``stable``.
    """
    expect(dim_of(axis, x.ndim) == max(x.ndim - 1, 0), f"attribute 'axis': expected the last dim, found {axis}")
    values, indices = x.sort(dim=axis, descending=descending, stable=True)
    return values, indices.to(torch.int32)


@op("ArgMaxV2", f"T, {INDEX} -> y:=dtype", T=NUMBER)
def arg_max_v2(x: Tensor, dimension: Tensor, *, dtype: DType = torch.int64) -> Tensor:  # type: ignore[assignment]
    """Where along ``dimension`` the largest is, the first of equal ones. Source: REG_OP(ArgMaxV2)."""
    dim = dim_of(one(dimension, "dimension"), x.ndim)
    # torch leaves open which of several it finds.
    return x.sort(dim=dim, descending=True, stable=True).indices.select(dim, 0).to(dtype)


@op("Histogram", "T -> y:any", T="float16|float32|int32")
def histogram(x: Tensor, *, bins: int = 100, min: float = 0.0, max: float = 0.0) -> Tensor:
    """How many elements lie in each of ``bins`` equal parts of ``[min, max]``; the last part has its end.

    float32 counts, int32 ones of int32. Source: REG_OP(Histogram), as torch.histc; bounds from the data are refused.
    """
    expect(max > min, f"expected 'min' below 'max', found {min} and {max}")
    counted = torch.histc(x.float(), bins, min, max)
    return counted.to(torch.int32) if x.dtype == torch.int32 else counted
