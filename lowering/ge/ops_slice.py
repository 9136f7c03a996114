"""GE ops that take a part of a tensor, or put something around it.

Prototypes: CANN's ``selection_ops.h`` and ``pad_ops.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats.
"""

from __future__ import annotations

from torch import Tensor

from cpcompile.lowering.ge.ops_shape import dim_of, ints
from cpcompile.lowering.ge.signatures import INDEX, expect, expect_default, op


@op("Slice", f"T, {INDEX}, {INDEX} -> y:T")
def slice_(x: Tensor, offsets: Tensor, size: Tensor) -> Tensor:
    """``size[i]`` elements from ``offsets[i]`` along each dim; a size of -1 is what is left. Source: REG_OP(Slice)."""
    first, sizes = ints(offsets, "offsets"), ints(size, "size")
    expect(len(first) == len(sizes) == x.ndim, f"expected {x.ndim} offsets and sizes, found {first} and {sizes}")
    for dim, (at, count) in enumerate(zip(first, sizes, strict=True)):
        count = x.shape[dim] - at if count == -1 else count
        expect(
            at >= 0 and at + count <= x.shape[dim], f"dim {dim} of {list(x.shape)} has no {count} elements from {at}"
        )
        x = x.narrow(dim, at, count)
    return x


@op("StridedSliceV2", f"T, {INDEX}, {INDEX}, {INDEX}, {INDEX} -> y:T")
def strided_slice_v2(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    axes: Tensor | None = None,
    strides: Tensor | None = None,
    *,
    begin_mask: int = 0,
    end_mask: int = 0,
    ellipsis_mask: int = 0,
    new_axis_mask: int = 0,
    shrink_axis_mask: int = 0,
) -> Tensor:
    """``x[begin:end:stride]`` along ``axes``, all from the front if unfed, with Python's reading of positions.

    Bit ``i`` of ``begin_mask`` or ``end_mask`` leaves the ``i``-th begin or end out. Other masks are refused.
    Source: REG_OP(StridedSliceV2).
    """
    masks = {"ellipsis_mask": ellipsis_mask, "new_axis_mask": new_axis_mask, "shrink_axis_mask": shrink_axis_mask}
    expect_default(masks, ellipsis_mask=0, new_axis_mask=0, shrink_axis_mask=0)
    first, last = ints(begin, "begin"), ints(end, "end")
    dims = list(range(len(first))) if axes is None else ints(axes, "axes")
    steps = [1] * len(first) if strides is None else ints(strides, "strides")
    return _sliced(x, dims, first, last, steps, begin_mask, end_mask)


@op("StridedSlice", f"T, {INDEX}, {INDEX}, {INDEX} -> y:T")
def strided_slice(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    strides: Tensor,
    *,
    begin_mask: int = 0,
    end_mask: int = 0,
    ellipsis_mask: int = 0,
    new_axis_mask: int = 0,
    shrink_axis_mask: int = 0,
) -> Tensor:
    """``x[begin:end:stride]`` along the first dims; bits of ``shrink_axis_mask`` take the one element at ``begin``.

    Source: REG_OP(StridedSlice), as TensorFlow's StridedSlice; ``ellipsis_mask`` and ``new_axis_mask`` are refused.
    """
    masks = {"ellipsis_mask": ellipsis_mask, "new_axis_mask": new_axis_mask}
    expect_default(masks, ellipsis_mask=0, new_axis_mask=0)
    first, last, steps = ints(begin, "begin"), ints(end, "end"), ints(strides, "strides")
    single = [dim for dim in range(len(first)) if shrink_axis_mask >> dim & 1]
    for dim in single:
        at = first[dim] % x.shape[dim] if -x.shape[dim] <= first[dim] < x.shape[dim] else -1
        expect(at >= 0, f"dim {dim} of {list(x.shape)} has no element {first[dim]}")
        first[dim], last[dim], steps[dim] = at, at + 1, 1
    keep = ~shrink_axis_mask
    x = _sliced(x, list(range(len(first))), first, last, steps, begin_mask & keep, end_mask & keep)
    for dim in reversed(single):
        x = x.squeeze(dim)
    return x


def _sliced(
    x: Tensor, dims: list[int], first: list[int], last: list[int], steps: list[int], begin_mask: int, end_mask: int
) -> Tensor:
    counts = {len(dims), len(first), len(last), len(steps)}
    expect(len(counts) == 1, f"expected one begin, end and stride for each axis, found {first}, {last}, {steps}")
    index: list[slice] = [slice(None)] * x.ndim
    for i, dim in enumerate(dims):
        expect(steps[i] > 0, f"input 'strides': expected positive numbers, found {steps}")
        begin = None if begin_mask >> i & 1 else first[i]
        end = None if end_mask >> i & 1 else last[i]
        index[dim_of(dim, x.ndim)] = slice(begin, end, steps[i])
    return x[tuple(index)]


@op("Pad", f"T, {INDEX} -> y:T")
def pad(x: Tensor, paddings: Tensor) -> Tensor:
    """Zeros around ``x``: ``paddings[i]`` says how many before and behind along dim ``i``. Source: REG_OP(Pad)."""
    expect(
        tuple(paddings.shape) == (x.ndim, 2), f"input 'paddings': expected [{x.ndim}, 2], found {list(paddings.shape)}"
    )
    return _padded(x, paddings.tolist(), 0)


@op("PadV3", f"T, {INDEX}, T -> y:T")
def pad_v3(
    x: Tensor,
    paddings: Tensor,
    constant_values: Tensor | None = None,
    *,
    mode: str = "constant",
    paddings_contiguous: bool = True,
) -> Tensor:
    """``constant_values``, or zeros, around ``x``.

    ``paddings`` has before and behind for each dim in turn, or all before and then all behind if not
    ``paddings_contiguous``. Other modes are refused. Source: REG_OP(PadV3).
    """
    expect_default({"mode": mode}, mode="constant")
    flat = [int(value) for value in paddings.reshape(-1).tolist()]
    expect(len(flat) == 2 * x.ndim, f"input 'paddings': expected {2 * x.ndim} numbers, found {len(flat)}")
    pairs = (
        zip(flat[::2], flat[1::2], strict=True)
        if paddings_contiguous
        else zip(flat[: x.ndim], flat[x.ndim :], strict=True)
    )
    value = 0 if constant_values is None else constant_values.item()
    return _padded(x, [list(pair) for pair in pairs], value)


def _padded(x: Tensor, pairs: list[list[int]], value: float) -> Tensor:
    expect(all(min(pair) >= 0 for pair in pairs), f"input 'paddings': expected none below 0, found {pairs}")
    sizes = [before + size + behind for size, (before, behind) in zip(x.shape, pairs, strict=True)]
    y = x.new_full(sizes, value)
    y[tuple(slice(before, before + size) for size, (before, _) in zip(x.shape, pairs, strict=True))] = x
    return y
