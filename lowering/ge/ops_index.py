"""GE ops that take or write elements at positions given by tensors.

Prototypes: CANN's ``selection_ops.h``, ``matrix_calculation_ops.h`` and ``experiment_ops.h``, which torchair's
``auto_generated_ge_raw_ops.py`` repeats. A position out of range is an error: on the device it reads anything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_shape import dim_of, one
from cpcompile.lowering.ge.signatures import INDEX, Tensors, expect, expect_default, expect_unfed, op


def _within(indices: Tensor, size: int, negative: bool = False) -> Tensor:
    """``indices`` as int64 from the front."""
    wide = indices.long()
    lowest = -size if negative else 0
    if wide.numel():
        least, most = int(wide.min()), int(wide.max())
        expect(lowest <= least and most < size, f"expected positions in [{lowest}, {size}), found {least} to {most}")
    return torch.where(wide < 0, wide + size, wide)


@op("Gather", f"T, {INDEX} -> y:T")
def gather(
    x: Tensor,
    indices: Tensor,
    *,
    validate_indices: bool = True,
    batch_dims: int = 0,
    is_preprocessed: bool = False,
    negative_index_support: bool = False,
) -> Tensor:
    """Rows ``x[indices]``: ``[*indices, ...]``. Source: REG_OP(Gather), as TensorFlow's Gather."""
    expect_default({"batch_dims": batch_dims}, batch_dims=0)
    return x[_within(indices, x.shape[0], negative_index_support)]


@op("GatherV2", f"T, {INDEX}, {INDEX} -> y:T")
def gather_v2(
    x: Tensor,
    indices: Tensor,
    axis: Tensor,
    *,
    batch_dims: int = 0,
    is_preprocessed: bool = False,
    negative_index_support: bool = False,
) -> Tensor:
    """Slices of ``x`` at ``indices`` along ``axis``, whose dims stand in that dim's place. Source: REG_OP(GatherV2)."""
    expect_default({"batch_dims": batch_dims}, batch_dims=0)
    dim = dim_of(one(axis, "axis"), x.ndim)
    places = _within(indices, x.shape[dim], negative_index_support)
    taken = x.index_select(dim, places.reshape(-1))
    return taken.reshape([*x.shape[:dim], *indices.shape, *x.shape[dim + 1 :]])  # of no dims, too


@op("GatherElements", f"T, {INDEX} -> y:T")
def gather_elements(x: Tensor, index: Tensor, *, dim: int = 0) -> Tensor:
    """``y[i, j] = x[index[i, j], j]`` for ``dim`` 0, and so on. Source: REG_OP(GatherElements)."""
    return x.gather(dim, _within(index, x.shape[dim], negative=True))


@op("GatherNd", f"T, {INDEX} -> y:T")
def gather_nd(x: Tensor, indices: Tensor, *, negative_index_support: bool = False) -> Tensor:
    """``x`` at the positions that the last dim of ``indices`` names. Source: REG_OP(GatherNd)."""
    parts = [_within(i, size, negative_index_support) for i, size in zip(indices.unbind(-1), x.shape, strict=False)]
    return x[tuple(parts)]


@op("IndexByTensor", "T, int64 -> y:T")
def index_by_tensor(x: Tensor, indices: Tensors, *, indices_mask: list[int] = []) -> Tensor:  # noqa: B006
    """``x`` at tensors of positions for the dims whose ``indices_mask`` is 1, as ``x[:, i, j]`` of NumPy.

    Source: REG_OP(IndexByTensor), made from ``aten.index.Tensor``.
    """
    expect(sum(indices_mask) == len(indices), f"expected {sum(indices_mask)} index tensors, found {len(indices)}")
    left = iter(indices)
    index = [
        _within(next(left), x.shape[dim], negative=True) if masked else slice(None)
        for dim, masked in enumerate(indices_mask)
    ]
    return x[tuple(index)]


@op("ScatterElements", f"T, {INDEX}, T -> y:T")
def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """``data`` with ``y[indices[i, j], j] = updates[i, j]`` for ``axis`` 0, or added to it if ``reduction`` is "add".

    Source: REG_OP(ScatterElements).
    """
    expect_default({"reduction": reduction}, reduction=("none", "add"))
    expect(updates.shape == indices.shape, f"expected updates of {list(indices.shape)}, found {list(updates.shape)}")
    places = _within(indices, data.shape[axis], negative=True)
    return data.scatter_add(axis, places, updates) if reduction == "add" else data.scatter(axis, places, updates)


@op("ScatterNdUpdate", f"T, {INDEX}, T -> var:T")
def scatter_nd_update(var: Tensor, indices: Tensor, updates: Tensor, *, use_locking: bool = False) -> Tensor:
    """Write ``updates`` into ``var`` at the positions that the last dim of ``indices`` names.

    Source: REG_OP(ScatterNdUpdate), as TensorFlow's ScatterNdUpdate.
    """
    depth = indices.shape[-1]
    expected = [*indices.shape[:-1], *var.shape[depth:]]
    expect(list(updates.shape) == expected, f"expected updates of {expected}, found {list(updates.shape)}")
    parts = [_within(i, size) for i, size in zip(indices.unbind(-1), var.shape, strict=False)]
    var[tuple(parts)] = updates
    return var


@op("ScatterUpdate", f"T, {INDEX}, T -> var:T")
def scatter_update(var: Tensor, indices: Tensor, updates: Tensor, *, use_locking: bool = False) -> Tensor:
    """Write ``updates [*indices, ...]`` into the rows ``indices`` of ``var``. Source: REG_OP(ScatterUpdate)."""
    expected = [*indices.shape, *var.shape[1:]]
    expect(list(updates.shape) == expected, f"expected updates of {expected}, found {list(updates.shape)}")
    var[_within(indices, var.shape[0])] = updates
    return var


@op("Scatter", f"T, {INDEX}, T -> var:T")
def scatter(var: Tensor, indices: Tensor, updates: Tensor, *, reduce: str, axis: int = 0) -> Tensor:
    """Write ``updates[b]`` into ``var[b]`` from position ``indices[b]`` on along ``axis``, which is not the batch dim.

    Source: REG_OP(Scatter); torch_npu's ``scatter_update``: "updates the data at the given indices along axis". Two
    numbers a row (the batch, the position) and other reductions are refused.
    """
    expect_default({"reduce": reduce}, reduce="update")
    dim = dim_of(axis, var.ndim)
    expect(
        dim > 0 and indices.ndim == 1, f"expected positions [B] along another dim than 0, found {list(indices.shape)}"
    )
    expect(len(indices) == updates.shape[0], f"expected {updates.shape[0]} positions, found {len(indices)}")
    for row, (at, update) in enumerate(zip(indices.tolist(), updates, strict=True)):
        size = update.shape[dim - 1]
        expect(at >= 0 and at + size <= var.shape[dim], f"no {size} elements from {at} in {list(var.shape)}")
        var[row].narrow(dim - 1, at, size).copy_(update)
    return var


@op("ScatterPaKvCache", f"T, T, {INDEX}, U, U, {INDEX}, {INDEX}, {INDEX} -> key_cache:T, value_cache:U")
def scatter_pa_kv_cache(
    key: Tensor,
    key_cache: Tensor,
    slot_mapping: Tensor,
    value: Tensor,
    value_cache: Tensor,
    compress_lens: Tensor | None = None,
    compress_seq_offset: Tensor | None = None,
    seq_lens: Tensor | None = None,
    *,
    cache_mode: str = "Norm",
    scatter_mode: str = "None",
    strides: list[int] = [1, 1],  # noqa: B006
    offsets: list[int] = [0, 0],  # noqa: B006
) -> tuple[Tensor, Tensor]:
    """Write rows ``key [T, H, D]`` into paged caches ``[blocks, size, H, D]`` at slots ``block * size + place``.

    A negative slot is left out. Source: aclnnScatterPaKvCache, cache mode "Norm" without compression; the fractal
    layout "PA_NZ" is refused.
    """
    expect_unfed(compress_lens=compress_lens, compress_seq_offset=compress_seq_offset, seq_lens=seq_lens)
    found = {"cache_mode": cache_mode, "scatter_mode": scatter_mode, "strides": strides, "offsets": offsets}
    expect_default(found, cache_mode="Norm", scatter_mode="None", strides=([1, 1],), offsets=([0, 0],))
    for rows, cache in ((key, key_cache), (value, value_cache)):
        kept = slot_mapping >= 0
        places = _within(slot_mapping[kept], cache.shape[0] * cache.shape[1])
        cache.view(-1, *cache.shape[2:])[places] = rows[kept]
    return key_cache, value_cache
