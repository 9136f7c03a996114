"""The lightning indexer on CUDA: scores of a chunk of rows by matrix products, then a selection in each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Scores of one chunk of rows, float32: about what stays in the L2 cache of an H100 or H200 (50 and 60 MB).
SCORE_BYTES = 32 << 20
# A program scores this many keys for this many rows, one row at a time against all of its heads.
KEY_BLOCK, ROW_BLOCK = 256, 16
# Scores of a row that one program holds in registers; up to 8192 with 4 warps, the most with 16.
LEAST_TILE, MOST_TILE = 1024, 16384


def fits(query: Tensor, key: Tensor, sparse_count: int) -> bool:
    """Whether these kernels take the operands: bf16 or fp16, a width that tiles divide."""
    width = query.shape[-1]
    return (
        query.dtype == key.dtype
        and query.dtype in (torch.bfloat16, torch.float16)
        and width in (16, 32, 64, 128, 256)
        and query.shape[2] <= 256
        and sparse_count <= MOST_TILE // 2
    )


def lightning_indexer(query: Tensor, key: Tensor, weights: Tensor, key_lengths: Tensor, sparse_count: int) -> Tensor:
    """``cpcompile::lightning_indexer`` (see cpcompile/ops.py); a row's keys come in the order of the keys.

    Memory: ``SCORE_BYTES``, or one block of rows where that is more. Of equal scores the first keys are chosen.
    """
    batch, rows, heads, width = query.shape
    keys = key.shape[1]
    indices = query.new_empty((batch, rows, 1, sparse_count), dtype=torch.int32)
    if not indices.numel():
        return indices
    query, key, weights = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, weights))
    key_lengths = key_lengths.contiguous()
    step = max(ROW_BLOCK, SCORE_BYTES // (4 * max(1, keys)) // ROW_BLOCK * ROW_BLOCK)
    # `_select` reads of a row what `_scores` has written: visible keys.
    scores = torch.empty((min(rows, step), keys), dtype=torch.float32, device=query.device)
    padded = max(16, triton.next_power_of_2(heads))
    for b in range(batch):
        for start in range(0, rows, step):
            count = min(step, rows - start)
            q, w, lengths = query[b, start:], weights[b, start:], key_lengths[b, start:]
            if keys:
                _scores[triton.cdiv(keys, KEY_BLOCK), triton.cdiv(count, ROW_BLOCK)](
                    q, key[b], w, lengths, scores, count, keys, heads,
                    q.stride(0), q.stride(1), key.stride(1), w.stride(0),
                    HEADS=padded, WIDTH=width, ROWS=ROW_BLOCK, KEYS=KEY_BLOCK, num_warps=8, num_stages=3,
                )  # fmt: skip
            _largest(scores[:count], lengths, indices[b, start : start + count, 0])
    return indices


def _largest(scores: Tensor, lengths: Tensor, indices: Tensor) -> None:
    """``indices[r]`` becomes the places of the largest of ``scores[r, :lengths[r]]``, -1 where there are fewer.

    A tile's largest are candidates for the row's, until they are one tile.
    """
    rows, columns = scores.shape
    count = indices.shape[-1]
    keys_of, first = None, True
    while True:
        tile = min(MOST_TILE, max(LEAST_TILE, triton.next_power_of_2(max(columns, count))))
        tiles = max(1, triton.cdiv(columns, tile))
        last = tiles == 1
        found = indices if last else indices.new_empty((rows, tiles * count))
        kept = scores if last else scores.new_empty((rows, tiles * count))
        _select[rows, tiles](
            scores, keys_of, lengths, found, kept, columns, scores.stride(0), count,
            TILE=tile, FIRST=first, LAST=last, num_warps=4 if tile < MOST_TILE else 16,
        )  # fmt: skip
        if last:
            return
        scores, keys_of, columns, first = kept, found, tiles * count, False


@triton.jit
def _scores(
    query, key, weights, lengths, scores, rows, keys, heads,
    row_stride, head_stride, key_stride, weight_stride,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """``scores[r, k] = sum_h weights[r, h] * relu(query[r, h] . key[k])`` for a block of rows and keys."""
    first = tl.program_id(1) * ROWS
    block = first + tl.arange(0, ROWS)
    visible = tl.max(tl.load(lengths + block, mask=block < rows, other=0))
    if tl.program_id(0) * KEYS >= visible:
        return  # no row of the block sees one of these keys
    at = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    head, place = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    k = tl.load(key + at[:, None].to(tl.int64) * key_stride + place[None, :], mask=at[:, None] < keys, other=0.0)
    for r in range(0, tl.minimum(ROWS, rows - first)):
        row = first.to(tl.int64) + r
        tile = query + row * row_stride + head[:, None] * head_stride + place[None, :]
        q = tl.load(tile, mask=head[:, None] < heads, other=0.0)
        w = tl.load(weights + row * weight_stride + head, mask=head < heads, other=0.0).to(tl.float32)
        found = tl.maximum(tl.dot(k, tl.trans(q)), 0.0) * w[None, :]  # [KEYS, HEADS]: the sum stays within a warp
        tl.store(scores + row * keys + at, tl.sum(found, axis=1), mask=at < keys)


@triton.jit
def _select(
    scores, keys_of, lengths, indices, kept, columns, row_length, count,
    TILE: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """The ``count`` largest of a tile of a row's scores, which stay in registers.

    A bound is found bit by bit, from the highest, by counting what is not below it, until it is as many as wanted or
    the bound is the least of them; then what is above and, of what equals it, the first. ``FIRST``: columns are keys,
    those below the row's length; else they are candidates, ``keys_of`` them. ``LAST``: the row's result; else the
    tile's candidates, with their scores in ``kept``.
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tile * TILE + tl.arange(0, TILE)
    if FIRST:
        key = at
        there = at < tl.minimum(tl.load(lengths + row), columns)
    else:
        key = tl.load(keys_of + row * columns + at, mask=at < columns, other=-1)
        there = key >= 0
    bits = tl.load(scores + row * row_length + at, mask=there, other=0.0).to(tl.uint32, bitcast=True)
    # Unsigned integers of the same order; 0, less than any number's, for what is not there.
    bits = tl.where(there, tl.where(bits >> 31 != 0, bits ^ 0xFFFFFFFF, bits | 0x80000000), 0)
    wanted = tl.minimum(count, tl.sum(there.to(tl.int32)))
    least, step = tl.full((), 0, tl.uint32), tl.full((), 1 << 31, tl.uint32)
    exact = wanted == 0
    while (step != 0) & (exact == 0):
        found = tl.sum((bits >= (least | step)).to(tl.int32))
        least = tl.where(found >= wanted, least | step, least)
        exact = found == wanted
        step = step >> 1
    above, equal = there & (bits > least), there & (bits == least)
    # Both counts in one scan, at most TILE < 2**15 each; in two steps, which compile to less than a scan of one dim.
    both = tl.reshape((above.to(tl.int32) << 16) + equal.to(tl.int32), (TILE // 32, 32))
    whole = tl.sum(both, 1)
    before = tl.reshape(tl.cumsum(both, 1) + (tl.cumsum(whole, 0) - whole)[:, None], (TILE,))
    place = tl.where(above, before >> 16, (tl.sum(whole) >> 16) + (before & 0xFFFF)) - 1
    chosen = (above | equal) & (place < wanted)
    lane = tl.arange(0, TILE)
    out = (row * tl.num_programs(1) + tile) * count
    tl.store(indices + out + place, key, mask=chosen)
    tl.store(indices + out + lane, -1, mask=(lane >= wanted) & (lane < count))
    if not LAST:
        value = tl.where(bits >> 31 != 0, bits ^ 0x80000000, bits ^ 0xFFFFFFFF)
        tl.store(kept + out + place, value.to(tl.float32, bitcast=True), mask=chosen)
