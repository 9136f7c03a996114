"""GE ops that move elements without computing: shapes, joins, slices, padding, and constants made at run time.

Prototypes: CANN's ``array_ops.h``, ``split_combination_ops.h``, ``selection_ops.h``, ``transformation_ops.h`` and
``pad_ops.h``, which torchair's ``auto_generated_ge_raw_ops.py`` and ``dynamic_output_ops.py`` repeat.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.signatures import (
    INDEX,
    NUMBER,
    DType,
    Tensors,
    expect,
    expect_default,
    op,
)


def ints(tensor: Tensor, name: str) -> list[int]:
    """The numbers of a scalar or vector that says sizes, dims or positions."""
    expect(tensor.ndim <= 1, f"input {name!r}: expected a scalar or a vector, found {list(tensor.shape)}")
    return [int(value) for value in tensor.reshape(-1).tolist()]


def one(tensor: Tensor, name: str) -> int:
    """The number of a tensor that has one."""
    expect(tensor.numel() == 1, f"input {name!r}: expected one number, found {list(tensor.shape)}")
    return int(tensor.item())


def dim_of(dim: int, ndim: int) -> int:
    """``dim`` counted from the front."""
    expect(-ndim <= dim < max(ndim, 1), f"expected a dim within {ndim} dims, found {dim}")
    return dim % ndim if ndim else 0


@op("Identity", "T -> y:T")
def identity(x: Tensor) -> Tensor:
    """``x``. Source: REG_OP(Identity)."""
    return x


@op("TensorMove", "T -> y:T")
def tensor_move(x: Tensor) -> Tensor:
    """A copy of ``x`` in memory of its own, which later ops may write. Source: REG_OP(TensorMove)."""
    return x.clone()


@op("Assign", "T, T -> ref:T")
def assign(ref: Tensor, value: Tensor, *, validate_shape: bool = True, use_locking: bool = False) -> Tensor:
    """Write ``value`` into ``ref``. Source: REG_OP(Assign)."""
    expect(ref.shape == value.shape, f"expected a value of {list(ref.shape)}, found {list(value.shape)}")
    return ref.copy_(value)


@op("Shape", "any -> y:=dtype")
def shape_of(x: Tensor, *, dtype: DType = torch.int32) -> Tensor:  # type: ignore[assignment]
    """The sizes of ``x``. Source: REG_OP(Shape)."""
    return torch.tensor(list(x.shape), dtype=dtype)


@op("Reshape", f"T, {INDEX} -> y:T")
def reshape(x: Tensor, shape: Tensor, *, axis: int = 0, num_axes: int = -1) -> Tensor:
    """``x`` with the sizes ``shape``, one of which may be -1: what is left. Source: REG_OP(Reshape).

    Reshaping a part of the dims (``axis``, ``num_axes``) is refused.
    """
    expect_default({"axis": axis, "num_axes": num_axes}, axis=0, num_axes=-1)
    return x.reshape(ints(shape, "shape"))


@op("Unsqueeze", "T -> y:T")
def unsqueeze(x: Tensor, *, axes: list[int] = []) -> Tensor:  # noqa: B006 (never written; the prototype's default)
    """``x`` with dims of size 1 at ``axes`` of the result. Source: REG_OP(Unsqueeze)."""
    ndim = x.ndim + len(axes)
    for axis in sorted(dim_of(a, ndim) for a in axes):
        x = x.unsqueeze(axis)
    return x


@op("Squeeze", "T -> y:T")
def squeeze(x: Tensor, *, axis: list[int] = []) -> Tensor:  # noqa: B006
    """``x`` without the dims ``axis``, which have size 1; without all such if none is said. Source: REG_OP(Squeeze)."""
    if not axis:
        return x.squeeze()
    dims = sorted((dim_of(a, x.ndim) for a in axis), reverse=True)
    for dim in dims:
        expect(x.shape[dim] == 1, f"expected size 1 of dim {dim}, found shape {list(x.shape)}")
        x = x.squeeze(dim)
    return x


@op("ExpandDims", f"T, {INDEX} -> y:T")
def expand_dims(x: Tensor, axis: Tensor) -> Tensor:
    """``x`` with a dim of size 1 at ``axis`` of the result. Source: REG_OP(ExpandDims)."""
    return x.unsqueeze(dim_of(one(axis, "axis"), x.ndim + 1))


@op("FlattenV2", "T -> y:T")
def flatten(x: Tensor, *, axis: int = 1, end_axis: int = -1) -> Tensor:
    """``x`` with the dims from ``axis`` to ``end_axis`` as one. Source: REG_OP(FlattenV2)."""
    return x.flatten(axis, end_axis)


@op("Transpose", f"T, {INDEX} -> y:T")
def transpose(x: Tensor, perm: Tensor) -> Tensor:
    """Dim ``i`` of the result is dim ``perm[i]`` of ``x``. Source: REG_OP(Transpose)."""
    order = ints(perm, "perm")
    expect(sorted(order) == list(range(x.ndim)), f"input 'perm': expected an order of {x.ndim} dims, found {order}")
    return x.permute(order)


@op("BroadcastTo", f"T, {INDEX} -> y:T")
def broadcast_to(x: Tensor, shape: Tensor) -> Tensor:
    """``x`` repeated along dims of size 1, to the sizes ``shape``; -1 keeps a size. Source: REG_OP(BroadcastTo)."""
    return x.expand(ints(shape, "shape"))


@op("Expand", f"T, int16|{INDEX} -> y:T")
def expand(x: Tensor, shape: Tensor) -> Tensor:
    """``x`` broadcast against the sizes ``shape``; a size of 1 or -1 keeps that of ``x``. Source: REG_OP(Expand)."""
    sizes = [1 if size == -1 else size for size in ints(shape, "shape")]
    return x.expand(torch.broadcast_shapes(x.shape, sizes))


@op("Tile", f"T, {INDEX} -> y:T")
def tile(x: Tensor, multiples: Tensor) -> Tensor:
    """``x`` repeated as a whole, ``multiples[i]`` times along dim ``i``. Source: REG_OP(Tile)."""
    times = ints(multiples, "multiples")
    expect(len(times) == x.ndim, f"input 'multiples': expected {x.ndim} numbers, found {len(times)}")
    return x.repeat(times)


@op("ConcatV2", f"T, {INDEX} -> y:T")
def concat_v2(x: Tensors, concat_dim: Tensor, *, N: int = 1) -> Tensor:
    """The operands one after another along ``concat_dim``. Source: REG_OP(ConcatV2)."""
    expect(len(x) == N, f"attribute 'N': expected {len(x)} as there are inputs, found {N}")
    expect(len({tensor.ndim for tensor in x}) == 1, "expected operands with one number of dims")
    return torch.cat(list(x), dim_of(one(concat_dim, "concat_dim"), x[0].ndim))


@op("Pack", "T -> y:T")
def pack(x: Tensors, *, N: int, axis: int = 0) -> Tensor:
    """The operands, of one shape, stacked along a new dim ``axis``. Source: REG_OP(Pack)."""
    expect(len(x) == N, f"attribute 'N': expected {len(x)} as there are inputs, found {N}")
    return torch.stack(list(x), axis)


@op("Unpack", "T -> *y:T")
def unpack(x: Tensor, *, num: int, axis: int = 0) -> list[Tensor]:
    """The ``num`` slices of ``x`` along ``axis``, without that dim. Source: REG_OP(Unpack)."""
    expect(x.shape[axis] == num, f"attribute 'num': expected {x.shape[axis]}, the size of dim {axis}, found {num}")
    return list(x.unbind(axis))


@op("Split", "int32, T -> *y:T")
def split(split_dim: Tensor, x: Tensor, *, num_split: int) -> list[Tensor]:
    """``num_split`` equal parts of ``x`` along ``split_dim``. Source: REG_OP(Split)."""
    dim = dim_of(one(split_dim, "split_dim"), x.ndim)
    expect(x.shape[dim] % num_split == 0, f"expected dim {dim} divisible by {num_split}, found {list(x.shape)}")
    return list(x.split(x.shape[dim] // num_split, dim))


@op("SplitD", "T -> *y:T")
def split_d(x: Tensor, *, split_dim: int, num_split: int) -> list[Tensor]:
    """``num_split`` equal parts of ``x`` along ``split_dim``. Source: REG_OP(SplitD)."""
    return split(torch.tensor(split_dim), x, num_split=num_split)


@op("SplitV", f"T, {INDEX}, {INDEX} -> *y:T")
def split_v(x: Tensor, size_splits: Tensor, split_dim: Tensor, *, num_split: int) -> list[Tensor]:
    """Parts of ``x`` along ``split_dim`` of the sizes ``size_splits``, one of which may be -1: what is left.

    Source: REG_OP(SplitV).
    """
    dim, sizes = dim_of(one(split_dim, "split_dim"), x.ndim), ints(size_splits, "size_splits")
    expect(len(sizes) == num_split, f"attribute 'num_split': expected {len(sizes)}, found {num_split}")
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = x.shape[dim] - sum(sizes) - 1
    expect(
        sum(sizes) == x.shape[dim] and min(sizes) >= 0, f"expected sizes that add up to {x.shape[dim]}, found {sizes}"
    )
    return list(x.split(sizes, dim))


@op("SplitVD", "T -> *y:T")
def split_vd(x: Tensor, *, size_splits: list[int], split_dim: int, num_split: int) -> list[Tensor]:
    """Parts of ``x`` along ``split_dim`` of the sizes ``size_splits``. Source: REG_OP(SplitVD)."""
    return split_v(x, torch.tensor(size_splits), torch.tensor(split_dim), num_split=num_split)


@op("Fill", f"{INDEX}, T -> y:T")
def fill(dims: Tensor, value: Tensor) -> Tensor:
    """The sizes ``dims``, each element ``value``. Source: REG_OP(Fill)."""
    expect(value.numel() == 1, f"input 'value': expected one number, found {list(value.shape)}")
    return value.reshape(()).repeat(ints(dims, "dims"))


@op("Empty", f"{INDEX} -> y:=dtype")
def empty(shape: Tensor, *, dtype: DType = torch.int32, init: bool = False) -> Tensor:  # type: ignore[assignment]
    """Memory of the sizes ``shape``: zeros if ``init``, else anything, here NaN or the largest integer.

    So whatever reads it shows. Source: REG_OP(Empty).
    """
    kind: torch.dtype = dtype
    if init:
        return torch.zeros(ints(shape, "shape"), dtype=kind)
    anything: float = torch.nan if kind.is_floating_point else 1 if kind == torch.bool else torch.iinfo(kind).max
    return torch.full(ints(shape, "shape"), anything, dtype=kind)


@op("Range", f"{NUMBER}, {NUMBER}, {NUMBER} -> y:{NUMBER}")
def range_(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    """``start``, ``start + delta``, ... below ``limit``, or above it if ``delta`` is negative, in ``start``'s dtype.

    The prototype does not tie the three dtypes, and torchair gives an int32 start and a size, int64, as the limit.
    Integers may differ so; all else is refused. Source: REG_OP(Range).
    """
    kinds = {tensor.dtype for tensor in (start, limit, delta)}
    expect(len(kinds) == 1 or kinds == {torch.int32, torch.int64}, f"expected operands of one dtype, found {kinds}")
    first, last, step = (tensor.reshape(()).item() for tensor in (start, limit, delta))
    expect(step != 0, "input 'delta': expected a number other than 0")
    if (last - first) / step <= 0:
        return start.new_empty(0)
    return torch.arange(first, last, step, dtype=start.dtype)


@op("Bitcast", "any -> y:=type")
def bitcast(x: Tensor, *, type: DType, keep_dim: bool = False) -> Tensor:
    """The same bits as another dtype of the same width. Source: REG_OP(Bitcast); other widths are refused."""
    kind: torch.dtype = type
    expect(kind.itemsize == x.dtype.itemsize, f"expected a dtype of {x.dtype.itemsize} bytes, found {kind}")
    return x.contiguous().view(kind)


@op("AsStrided", f"T, {INDEX}, {INDEX}, {INDEX} -> y:T")
def as_strided(x: Tensor, size: Tensor, stride: Tensor, storage_offset: Tensor) -> Tensor:
    """Elements of contiguous ``x`` at ``storage_offset`` plus an index times ``stride``. Source: REG_OP(AsStrided)."""
    sizes, strides, offset = ints(size, "size"), ints(stride, "stride"), one(storage_offset, "storage_offset")
    return x.contiguous().as_strided(sizes, strides, offset)
