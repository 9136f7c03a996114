"""DeepSeek sparse attention (DSA) as two ops: which keys a query reads, and attention over those keys.

They map one to one onto ``npu_lightning_indexer`` and ``npu_sparse_flash_attention`` (layout BSND, attention mode 2)
and run elsewhere by the reference implementations here, in chunks of query rows: no scores of all rows at once. On CUDA
bf16 and fp16 operands run by the Triton kernels of cpcompile/kernels/, where Triton is installed.

Both are row-wise in the queries, given whole keys: what a row may see is said per row by ``key_lengths`` and not by
the row's number, so that any part of the rows gives those rows' results.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor

# What one chunk's intermediate values may take; a single row may take more.
SCRATCH_BYTES = 64 << 20
HAS_TRITON = find_spec("triton") is not None


@torch.library.custom_op("cpcompile::lightning_indexer", mutates_args=())
def lightning_indexer(query: Tensor, key: Tensor, weights: Tensor, key_lengths: Tensor, sparse_count: int) -> Tensor:
    """The ``sparse_count`` keys with the largest ``sum_h weights_h * relu(query_h . key)``, for each query row.

    Args:
        query: ``[B, S, H, D]``, floating point.
        key: ``[B, K, 1, D]``, all keys that any row may see.
        weights: ``[B, S, H]``, of each head; a scale of the scores is part of them.
        key_lengths: ``[B, S]`` int32, how many keys each row sees: those below its length.
        sparse_count: how many keys to choose.

    Returns:
        ``[B, S, 1, sparse_count]`` int32 on the keys, in any order. A row that sees fewer keys has all of them, then
        -1. Which of several equal scores are chosen is left open, as it is for ``torch.topk``; it depends on nothing
        but the row and the keys. Scores are in float32.

    Raises:
        ValueError: shapes or dtypes differ from these.

    Source: DeepSeek-V3.2-Exp, "DeepSeek Sparse Attention", equation 1; ``npu_lightning_indexer`` with one row for each
    token (``actual_seq_lengths_key = key_lengths``).
    """
    _check_queries(query, key, key_lengths)
    expect_shape("weights", weights, query.shape[:3])
    if by_triton(query.device):
        from cpcompile.kernels import lightning_indexer as kernel  # Triton is optional

        if kernel.fits(query, key, sparse_count):
            with torch.cuda.device_of(query):  # Triton starts kernels on the current device
                return kernel.lightning_indexer(query, key, weights, key_lengths, sparse_count)
    batch, rows, heads, _ = query.shape
    keys = key.shape[1]
    indices = query.new_full((batch, rows, 1, sparse_count), -1, dtype=torch.int32)
    chosen = min(sparse_count, keys)
    columns = key[:, :, 0].float().transpose(1, 2)  # [B, D, K]
    places = torch.arange(keys, device=key.device)
    for part in row_chunks(slice(0, rows), 4 * batch * heads * keys):
        q = query[:, part].float()  # [B, R, H, D]
        scores = torch.bmm(q.flatten(1, 2), columns).view(*q.shape[:3], keys).relu_()
        # A batched vector by matrix product, as a sum over heads of one row: [B, R, 1, H] x [B, R, H, K].
        total = torch.matmul(weights[:, part, None].float(), scores).squeeze(2)
        lengths = key_lengths[:, part, None]
        best = total.masked_fill_(places >= lengths, -torch.inf).topk(chosen, dim=-1).indices
        indices[:, part, 0, :chosen] = best.masked_fill_(best >= lengths, -1).to(torch.int32)
    return indices


@lightning_indexer.register_fake
def _(query: Tensor, key: Tensor, weights: Tensor, key_lengths: Tensor, sparse_count: int) -> Tensor:
    return query.new_empty((*query.shape[:2], 1, sparse_count), dtype=torch.int32)


@torch.library.custom_op("cpcompile::sparse_attention", mutates_args=())
def sparse_attention(
    query: Tensor,
    key: Tensor,
    sparse_indices: Tensor,
    query_rope: Tensor,
    key_rope: Tensor,
    key_lengths: Tensor,
    scale: float,
) -> Tensor:
    """Attention of each query row over the keys that ``sparse_indices`` names, in MLA's latent space.

    ``softmax(scale * (query . key + query_rope . key_rope)) key``: keys are the latents and so are the values.

    Args:
        query: ``[B, S, H, L]``, the part without position, multiplied with the heads' key up-projection.
        key: ``[B, K, 1, L]``, the latents.
        sparse_indices: ``[B, S, 1, C]`` int32; entries that are negative or at least the row's length are left out.
        query_rope: ``[B, S, H, R]``, the rotated part.
        key_rope: ``[B, K, 1, R]``.
        key_lengths: ``[B, S]`` int32, how many keys each row sees.
        scale: factor of the scores.

    Returns:
        ``[B, S, H, L]`` in the query's dtype, to be multiplied with the heads' value up-projection; zeros for a row
        without keys. Computed in float32; on CUDA, bf16 and fp16 are multiplied as they are and summed in float32.

    Raises:
        ValueError: shapes or dtypes differ from these.

    Source: DeepSeek-V2, "Multi-head Latent Attention", with absorbed up-projections; ``npu_sparse_flash_attention``
    with ``attention_mode=2``, ``sparse_block_size=1`` and one row for each token.
    """
    _check_queries(query, key, key_lengths)
    expect_shape("sparse_indices", sparse_indices, (*query.shape[:2], 1, sparse_indices.shape[-1]))
    expect_shape("query_rope", query_rope, (*query.shape[:3], query_rope.shape[-1]))
    expect_shape("key_rope", key_rope, (*key.shape[:3], query_rope.shape[-1]))
    if by_triton(query.device):
        from cpcompile.kernels import sparse_attention as kernel  # Triton is optional

        if kernel.fits(query, key, query_rope, key_rope):
            with torch.cuda.device_of(query):  # Triton starts kernels on the current device
                return kernel.sparse_attention(query, key, sparse_indices, query_rope, key_rope, key_lengths, scale)
    batch, rows, heads, width = query.shape
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    requests = torch.arange(batch, device=key.device)[:, None, None]
    chosen = sparse_indices.shape[-1]
    row_bytes = 4 * batch * chosen * (2 * (width + query_rope.shape[-1]) + 3 * heads)
    for part in row_chunks(slice(0, rows if key.shape[1] else 0), row_bytes):
        index = sparse_indices[:, part, 0].long()  # [B, R, C]
        hidden = ((index < 0) | (index >= key_lengths[:, part, None])).unsqueeze(2)
        index = index.clamp(0, key.shape[1] - 1)
        latent = key[:, :, 0][requests, index].float()  # [B, R, C, L]
        rope = key_rope[:, :, 0][requests, index].float()
        scores = torch.matmul(query[:, part].float(), latent.mT) + torch.matmul(query_rope[:, part].float(), rope.mT)
        weights = scores.mul_(scale).masked_fill_(hidden, -torch.inf).softmax(-1)
        # A row without keys has no softmax.
        out[:, part] = torch.matmul(weights.masked_fill_(hidden, 0), latent).to(out.dtype)
    return out


@sparse_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    sparse_indices: Tensor,
    query_rope: Tensor,
    key_rope: Tensor,
    key_lengths: Tensor,
    scale: float,
) -> Tensor:
    return query.new_empty(query.shape)


def by_triton(device: torch.device) -> bool:
    """Whether operands on ``device`` go to the Triton kernels, where these take them."""
    return device.type == "cuda" and HAS_TRITON


def row_chunks(rows: slice, row_bytes: int) -> Iterator[slice]:
    """Parts of ``rows`` whose intermediate values fit the scratch memory."""
    step = max(1, SCRATCH_BYTES // max(1, row_bytes))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))


def _check_queries(query: Tensor, key: Tensor, key_lengths: Tensor) -> None:
    for name, tensor, wanted in (("query", query, "[B, S, H, D]"), ("key", key, "[B, K, 1, D]")):
        if tensor.ndim != 4:
            raise ValueError(f"{name}: expected {wanted}, found {list(tensor.shape)}")
    expect_shape("key", key, (query.shape[0], key.shape[1], 1, query.shape[3]))
    expect_shape("key_lengths", key_lengths, query.shape[:2])
    if key_lengths.dtype != torch.int32:
        raise ValueError(f"key_lengths: expected int32, found {key_lengths.dtype}")


def expect_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError where operand ``name`` is of another shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected {list(shape)}, found {list(tensor.shape)}")
