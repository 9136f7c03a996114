"""Attention of flat rows over paged caches, as serving frameworks have them: dense MLA, DSA's indexer and attention.

They map one to one onto ``npu_lightning_indexer``, ``npu_sparse_flash_attention`` and
``npu_fused_infer_attention_score`` (layouts TND and PA_BSND) called with one row for each token: query lengths
1, 2, ..., T, one key length and one block table row for each token. Elsewhere the reference implementations here run,
in chunks of rows.

All are row-wise in the queries, given whole caches: what a row may see is said per row, by ``key_lengths [T]`` and
``block_table [T, M]``, both int32, so that any part of the rows gives those rows' results. Key ``k`` of a row is
``cache[block_table[row, k // size], k % size]``, where ``size`` is that of a block.

Scores are in float32, or float64 where the operands are.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cpcompile.ops import expect_shape, row_chunks


@torch.library.custom_op("cpcompile::paged_lightning_indexer", mutates_args=())
def paged_lightning_indexer(
    query: Tensor, key_cache: Tensor, weights: Tensor, key_lengths: Tensor, block_table: Tensor, sparse_count: int
) -> Tensor:
    """The ``sparse_count`` keys with the largest ``sum_h weights_h * relu(query_h . key)``, for each query row.

    Args:
        query: ``[T, H, D]``, floating point.
        key_cache: ``[blocks, size, 1, D]``.
        weights: ``[T, H]``, of each head; a scale of the scores is part of them.
        key_lengths: ``[T]`` int32, how many keys each row sees; none where it is not positive.
        block_table: ``[T, M]`` int32, each row's blocks in the order of its keys.
        sparse_count: how many keys to choose.

    Returns:
        ``[T, 1, sparse_count]`` int32, numbers of keys, best first, of equal scores the first key. A row that sees
        fewer keys has all of them, then -1.

    Raises:
        ValueError: shapes or dtypes differ from these.

    Source: DeepSeek-V3.2-Exp, "DeepSeek Sparse Attention", equation 1.
    """
    _check_rows(query, key_lengths, block_table)
    expect_shape("key_cache", key_cache, (*key_cache.shape[:2], 1, query.shape[2]))
    expect_shape("weights", weights, query.shape[:2])
    dtype = _wide(query)
    indices = query.new_full((query.shape[0], 1, sparse_count), -1, dtype=torch.int32)
    for rows, keys in _requests(key_lengths, block_table, key_cache.shape[1]):
        columns = key_cache.flatten(0, 1)[keys, 0].to(dtype).T  # [D, K]
        chosen = min(sparse_count, len(keys))
        places = torch.arange(len(keys), device=query.device)
        for part in row_chunks(rows, 4 * len(keys) * (query.shape[1] + 4)):
            scores = torch.matmul(query[part].to(dtype), columns).relu_()  # [R, H, K]
            total = torch.matmul(weights[part, None].to(dtype), scores).squeeze(1)
            hidden = places >= key_lengths[part, None]
            # A stable sort, as which of several equal scores top-k takes depends on how many keys there are.
            best = total.masked_fill_(hidden, -torch.inf).sort(dim=-1, descending=True, stable=True).indices[:, :chosen]
            indices[part, 0, :chosen] = best.masked_fill_(best >= key_lengths[part, None], -1).to(torch.int32)
    return indices


@paged_lightning_indexer.register_fake
def _(
    query: Tensor, key_cache: Tensor, weights: Tensor, key_lengths: Tensor, block_table: Tensor, sparse_count: int
) -> Tensor:
    return query.new_empty((query.shape[0], 1, sparse_count), dtype=torch.int32)


@torch.library.custom_op("cpcompile::paged_sparse_attention", mutates_args=())
def paged_sparse_attention(
    query: Tensor,
    key_cache: Tensor,
    sparse_indices: Tensor,
    query_rope: Tensor,
    rope_cache: Tensor,
    key_lengths: Tensor,
    block_table: Tensor,
    scale: float,
) -> Tensor:
    """Attention of each query row over the keys that ``sparse_indices`` names, in MLA's latent space.

    ``softmax(scale * (query . key + query_rope . key_rope)) key``: keys are the latents and so are the values.

    Args:
        query: ``[T, H, L]``, the part without position, multiplied with the heads' key up-projection.
        key_cache: ``[blocks, size, 1, L]``, the latents.
        sparse_indices: ``[T, 1, C]`` int32; entries that are negative or at least the row's length are left out.
        query_rope: ``[T, H, R]``, the rotated part.
        rope_cache: ``[blocks, size, 1, R]``.
        key_lengths: ``[T]`` int32, how many keys each row sees; none where it is not positive.
        block_table: ``[T, M]`` int32, each row's blocks in the order of its keys.
        scale: factor of the scores.

    Returns:
        ``[T, H, L]`` in the query's dtype; zeros for a row without keys.

    Raises:
        ValueError: shapes or dtypes differ from these.

    Source: DeepSeek-V2, "Multi-head Latent Attention", with absorbed up-projections; ``npu_sparse_flash_attention``
    with ``attention_mode=2`` and ``sparse_block_size=1``.
    """
    _check_mla(query, key_cache, query_rope, rope_cache, key_lengths, block_table)
    expect_shape("sparse_indices", sparse_indices, (query.shape[0], 1, sparse_indices.shape[-1]))
    dtype, (heads, width), block = _wide(query), query.shape[1:], key_cache.shape[1]
    latents, ropes = key_cache.flatten(0, 1)[:, 0], rope_cache.flatten(0, 1)[:, 0]
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    if not block_table.numel() or not latents.numel():
        return out
    row_bytes = 4 * sparse_indices.shape[-1] * (2 * (width + query_rope.shape[-1]) + 3 * heads)
    for part in row_chunks(slice(0, query.shape[0]), row_bytes):
        index = sparse_indices[part, 0].long()  # [R, C]
        hidden = (index < 0) | (index >= key_lengths[part, None])
        index = index.masked_fill(hidden, 0)
        place = block_table[part].long().gather(1, index // block).mul_(block).add_(index % block)
        place = place.masked_fill_(hidden, 0)  # what lies behind a row's keys in its table is not read
        out[part] = _attend(query[part], query_rope[part], latents[place], ropes[place], hidden, scale, dtype)
    return out


@paged_sparse_attention.register_fake
def _(
    query: Tensor,
    key_cache: Tensor,
    sparse_indices: Tensor,
    query_rope: Tensor,
    rope_cache: Tensor,
    key_lengths: Tensor,
    block_table: Tensor,
    scale: float,
) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op("cpcompile::paged_attention", mutates_args=())
def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    query_rope: Tensor,
    rope_cache: Tensor,
    key_lengths: Tensor,
    block_table: Tensor,
    scale: float,
) -> Tensor:
    """Attention of each query row over all keys that it sees, in MLA's latent space.

    Args, result and errors are those of :func:`paged_sparse_attention`, which takes some of the keys.

    Source: DeepSeek-V2, "Multi-head Latent Attention", with absorbed up-projections.
    """
    _check_mla(query, key_cache, query_rope, rope_cache, key_lengths, block_table)
    dtype = _wide(query)
    latents, ropes = key_cache.flatten(0, 1)[:, 0], rope_cache.flatten(0, 1)[:, 0]
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    for rows, keys in _requests(key_lengths, block_table, key_cache.shape[1]):
        latent, rope = latents[keys], ropes[keys]
        places = torch.arange(len(keys), device=query.device)
        for part in row_chunks(rows, 4 * len(keys) * 3 * query.shape[1]):
            hidden = places >= key_lengths[part, None]
            out[part] = _attend(query[part], query_rope[part], latent, rope, hidden, scale, dtype)
    return out


@paged_attention.register_fake
def _(
    query: Tensor,
    key_cache: Tensor,
    query_rope: Tensor,
    rope_cache: Tensor,
    key_lengths: Tensor,
    block_table: Tensor,
    scale: float,
) -> Tensor:
    return query.new_empty(query.shape)


def _attend(
    query: Tensor, query_rope: Tensor, latent: Tensor, rope: Tensor, hidden: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """``[R, H, L]`` of rows over keys ``[K, L]`` or ``[R, K, L]`` that are not ``hidden [R, K]``; zeros over none."""
    latent, hidden = latent.to(dtype), hidden.unsqueeze(1)
    scores = torch.matmul(query.to(dtype), latent.mT) + torch.matmul(query_rope.to(dtype), rope.to(dtype).mT)
    weights = scores.mul_(scale).masked_fill_(hidden, -torch.inf).softmax(-1)
    # A row without keys has no softmax.
    return torch.matmul(weights.masked_fill_(hidden, 0), latent).to(query.dtype)


def _requests(key_lengths: Tensor, block_table: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Neighbouring rows that have one block table row, and where in the flattened cache lie the keys that they see."""
    if not block_table.numel():
        return
    tables, counts = torch.unique_consecutive(block_table, dim=0, return_counts=True)
    first = 0
    for table, count in zip(tables, counts.tolist(), strict=True):
        rows = slice(first, first + count)
        first += count
        longest = int(key_lengths[rows].max())
        if longest > 0:
            keys = torch.arange(longest, device=table.device)
            yield rows, table.long()[keys // size] * size + keys % size


def _wide(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _check_mla(
    query: Tensor, key_cache: Tensor, query_rope: Tensor, rope_cache: Tensor, key_lengths: Tensor, block_table: Tensor
) -> None:
    _check_rows(query, key_lengths, block_table)
    expect_shape("key_cache", key_cache, (*key_cache.shape[:2], 1, query.shape[2]))
    expect_shape("query_rope", query_rope, (*query.shape[:2], query_rope.shape[-1]))
    expect_shape("rope_cache", rope_cache, (*key_cache.shape[:3], query_rope.shape[-1]))


def _check_rows(query: Tensor, key_lengths: Tensor, block_table: Tensor) -> None:
    if query.ndim != 3:
        raise ValueError(f"query: expected [T, H, D], found {list(query.shape)}")
    expect_shape("key_lengths", key_lengths, query.shape[:1])
    expect_shape("block_table", block_table, (query.shape[0], block_table.shape[-1]))
    for name, tensor in (("key_lengths", key_lengths), ("block_table", block_table)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name}: expected int32, found {tensor.dtype}")
