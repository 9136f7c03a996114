"""Attention over picked keys in MLA's latent space on CUDA: a row's heads share its keys, so they are one tile."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program holds this many heads of a row, and this many picked keys at a time.
HEAD_BLOCK, KEY_BLOCK = 64, 64
_WIDTHS = (16, 32, 64, 128, 256, 512)


def fits(query: Tensor, key: Tensor, query_rope: Tensor, key_rope: Tensor) -> bool:
    """Whether this kernel takes the operands: all bf16 or all fp16, widths that tiles divide."""
    dtypes = {t.dtype for t in (query, key, query_rope, key_rope)}
    return (
        dtypes in ({torch.bfloat16}, {torch.float16}) and query.shape[-1] in _WIDTHS and query_rope.shape[-1] in _WIDTHS
    )


def sparse_attention(
    query: Tensor,
    key: Tensor,
    sparse_indices: Tensor,
    query_rope: Tensor,
    key_rope: Tensor,
    key_lengths: Tensor,
    scale: float,
) -> Tensor:
    """``cpcompile::sparse_attention`` (see cpcompile/ops.py): no memory beside the result; softmax in float32.

    Weights are rounded to the keys' dtype before they meet the latents, as flash attention does.
    """
    batch, rows, heads, latent = query.shape
    if not query.numel() or not key.shape[1]:
        return torch.zeros_like(query, memory_format=torch.contiguous_format)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    query, key, query_rope, key_rope = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, query_rope, key_rope)
    )
    sparse_indices, key_lengths = sparse_indices.contiguous(), key_lengths.contiguous()
    # Offsets in 32 bits leave registers for the tile of results.
    near = max(key.shape[1] * key.stride(1), key_rope.shape[1] * key_rope.stride(1)) < 2**31
    block = min(HEAD_BLOCK, max(16, triton.next_power_of_2(heads)))
    _attend[rows * triton.cdiv(heads, block), batch](
        query, key, sparse_indices, query_rope, key_rope, key_lengths, out,
        rows, heads, key.shape[1], sparse_indices.shape[-1], scale / math.log(2),
        *query.stride()[:3], *query_rope.stride()[:3], *key.stride()[:2], *key_rope.stride()[:2],
        HEADS=block, LATENT=latent, ROPE=query_rope.shape[-1], KEYS=KEY_BLOCK, NEAR=near, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit
def _attend(
    query, key, indices, query_rope, key_rope, lengths, out,
    rows, heads, keys, count, scale,
    q_batch, q_row, q_head, qr_batch, qr_row, qr_head, k_batch, k_row, kr_batch, kr_row,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, KEYS: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """A block of heads of one row over the row's picked keys, with a running softmax in base 2."""
    blocks = tl.cdiv(heads, HEADS)
    row, batch = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)
    wide, narrow, lane = tl.arange(0, LATENT), tl.arange(0, ROPE), tl.arange(0, KEYS)
    real = head[:, None] < heads
    query += batch * q_batch + row * q_row
    query_rope += batch * qr_batch + row * qr_row
    key += batch * k_batch
    key_rope += batch * kr_batch
    indices += (batch * rows + row) * count
    length = tl.minimum(tl.load(lengths + batch * rows + row), keys)
    q = tl.load(query + head[:, None] * q_head + wide[None, :], mask=real, other=0.0)
    qr = tl.load(query_rope + head[:, None] * qr_head + narrow[None, :], mask=real, other=0.0)
    end = tl.zeros((), tl.int32)  # behind the last key that counts: short rows do not run over all of `count`
    for start in range(0, count, 1024):
        at = start + tl.arange(0, 1024)
        index = tl.load(indices + at, mask=at < count, other=-1)
        end = tl.maximum(end, tl.max(tl.where((index >= 0) & (index < length), at + 1, 0)))
    most = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    found = tl.zeros((HEADS, LATENT), tl.float32)
    for start in range(0, end, KEYS):
        at = start + lane
        index = tl.load(indices + at, mask=at < count, other=-1)
        shown = (index >= 0) & (index < length)
        place = tl.where(shown, index, 0)
        if not NEAR:
            place = place.to(tl.int64)
        k = tl.load(key + (place * k_row)[:, None] + wide[None, :])
        kr = tl.load(key_rope + (place * kr_row)[:, None] + narrow[None, :])
        scores = tl.dot(q, tl.trans(k))
        scores = tl.dot(qr, tl.trans(kr), scores)
        scores = tl.where(shown[None, :], scores * scale, float("-inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)  # no key yet: exp2(-inf - 0) is 0
        weights = tl.exp2(scores - base[:, None])
        kept = tl.exp2(most - base)
        total = total * kept + tl.sum(weights, 1)
        found = tl.dot(weights.to(k.dtype), k, found * kept[:, None])
        most = highest
    found = found / tl.where(total == 0.0, 1.0, total)[:, None]
    out += ((batch * rows + row) * heads) * LATENT
    tl.store(out + head[:, None] * LATENT + wide[None, :], found.to(out.dtype.element_ty), mask=real)
