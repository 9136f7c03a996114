"""The layouts of ``cpcompile.layouts`` inside a graph: no ``.item()``, no shape that depends on data, any token count.

``split_rows`` and ``restore_rows`` serve one request (or a batch, taken for one request) with views and pads.
``index_tensors`` serves batches whose query lengths are a tensor on the device.

Trace them where ``torch.fx.experimental._config.backed_size_oblivious`` holds: one graph then serves every T, and its
only guard is one that holds for all of them. Elsewhere torch guards on "one row per rank" and on "T divides".
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cpcompile.errors import LayoutError
from cpcompile.layouts import blocks_per_rank, check_kind, check_rank


class IndexTensors(NamedTuple):
    """Index maps of a batch.

    Args:
        split: token of each row, int64 [ranks, m]; 0 in pad rows.
        valid: whether a row holds a token, bool [ranks, m].
        restore: row of each token among the ``ranks * m`` gathered rows, int64 [tokens]; 0 past the batch's last token.
    """

    split: Tensor
    valid: Tensor
    restore: Tensor


def split_rows(x: Tensor, dim: int, rank: int, ranks: int, kind: str) -> Tensor:
    """A replicated tensor's rows that ``rank`` owns: T rows of ``dim`` -> m rows, the pad rows zero.

    ``m`` is ``ceil(T/ranks)``; zigzag takes the batch for one request and pads it to equal blocks:
    ``2*ceil(T/(2*ranks))``. sp takes the batch for one request, too. Any T, 0 included. Built from pad, view, select,
    slice and cat.

    Raises:
        LayoutError: the kind is unknown, or rank or ranks is out of range.
    """
    check_kind(kind, ranks)
    check_rank(rank, ranks)
    dim %= x.dim()
    blocks = blocks_per_rank(kind) * ranks
    size = (x.shape[dim] + blocks - 1) // blocks
    if kind == "sp":
        start, length = _piece(x.shape[dim], rank, ranks)
        return F.pad(x.narrow(dim, start, length), (0, 0) * (x.dim() - 1 - dim) + (0, size - length))
    x = F.pad(x, (0, 0) * (x.dim() - 1 - dim) + (0, size * blocks - x.shape[dim]))
    if kind == "interleave":
        return _unflatten(x, dim, size, blocks).select(dim + 1, rank)
    # Slices, not views of blocks: a view's strides are looked up with a guard on blocks of one row.
    own = x.narrow(dim, rank * size, size)
    return own if kind == "contiguous" else torch.cat([own, x.narrow(dim, (blocks - 1 - rank) * size, size)], dim)


def restore_rows(gathered: Tensor, dim: int, ranks: int, kind: str, tokens: int) -> Tensor:
    """What ``split_rows`` split, from all ranks' rows in rank order: ``ranks * m`` rows of ``dim`` -> ``tokens`` rows.

    Built from view, transpose, cat and slice; contiguous is a slice alone.

    Raises:
        LayoutError: the kind is unknown, or ranks is out of range.
    """
    check_kind(kind, ranks)
    dim %= gathered.dim()
    local = gathered.shape[dim] // ranks
    if kind == "sp":
        held = [(rank * local, _piece(tokens, rank, ranks)[1]) for rank in range(ranks)]
        return torch.cat([gathered.narrow(dim, first, length) for first, length in held], dim)
    if kind == "interleave":
        # A clone, not reshape's choice between view and copy: that would guard on local != 1.
        mixed = _unflatten(gathered, dim, ranks, local).transpose(dim, dim + 1)
        gathered = mixed.clone(memory_format=torch.contiguous_format).flatten(dim, dim + 1)
    if kind == "zigzag":
        blocks = [2 * rank for rank in range(ranks)] + [2 * rank + 1 for rank in reversed(range(ranks))]
        gathered = torch.cat([gathered.narrow(dim, block * (local // 2), local // 2) for block in blocks], dim)
    return gathered.narrow(dim, 0, tokens)


def _unflatten(x: Tensor, dim: int, *sizes: int) -> Tensor:
    return x.reshape((*x.shape[:dim], *sizes, *x.shape[dim + 1 :]))


def _piece(tokens: int, rank: int, ranks: int) -> tuple[int, int]:
    """First token and length of piece ``rank`` of ``ranks``; the first ones are longer by a token."""
    # No minimum of rank and remainder: compilers guard on which it is.
    lengths = [(tokens + ranks - 1 - piece) // ranks for piece in range(rank + 1)]
    return sum(lengths[:-1]), lengths[-1]


def index_tensors(query_lengths: Tensor, tokens: int, ranks: int, kind: str, rows: int | None = None) -> IndexTensors:
    """Index maps of a batch on the device of ``query_lengths``; the values of ``TokenLayout`` without padded requests.

    Args:
        query_lengths: new tokens of each request, integers [N], N >= 1.
        tokens: their sum T, or a bound on it (a batch padded at its end for graph replay). contiguous splits the bound.
        ranks: how many ranks share the batch.
        kind: one of ``KINDS``.
        rows: m, if the caller knows it. By default what the shapes promise: ``ceil(tokens/ranks)``, and where every
            request is cut (sp, zigzag) ``(tokens + N*(ranks-1)) // ranks``. A token that has no row because ``rows`` is
            too small gets the restore index ``ranks * m``, which no indexing accepts.

    Raises:
        LayoutError: the kind is unknown, ranks is out of range, or the lengths are not an integer vector.
    """
    check_kind(kind, ranks)
    if query_lengths.dim() != 1 or query_lengths.is_floating_point() or query_lengths.shape[0] < 1:
        found = f"{query_lengths.dtype} {list(query_lengths.shape)}"
        raise LayoutError(f"expected query lengths as integers [N], N >= 1; found {found}: pass one length per request")
    lengths = query_lengths.long()
    spread = (lengths.shape[0] if kind in ("sp", "zigzag") else 1) * (ranks - 1)
    m = (tokens + spread) // ranks if rows is None else rows
    start, length = _segments(lengths, tokens, ranks, kind)
    ends = length.cumsum(1)
    row = torch.arange(m, device=lengths.device).repeat(ranks, 1)
    segment = torch.searchsorted(ends, row, right=True).clamp(max=ends.shape[1] - 1)
    step = ranks if kind == "interleave" else 1
    token = start.gather(1, segment) + step * (row - (ends - length).gather(1, segment))
    valid = row < ends[:, -1:]
    return IndexTensors(torch.where(valid, token, 0), valid, _restore(token, valid, lengths.sum(), tokens))


def _segments(lengths: Tensor, tokens: int, ranks: int, kind: str) -> tuple[Tensor, Tensor]:
    """First token and length of each rank's segments in local order, int64 [ranks, segments]."""
    rank = torch.arange(ranks, device=lengths.device).unsqueeze(1)
    if kind == "contiguous":
        m = (tokens + ranks - 1) // ranks
        return rank * m, (lengths.sum() - rank * m).clamp(0, m)
    if kind == "interleave":
        return rank, (lengths.sum() - rank + ranks - 1) // ranks
    blocks = [(rank, ranks)] if kind == "sp" else [(rank, 2 * ranks), (2 * ranks - 1 - rank, 2 * ranks)]
    cuts = [_cut(lengths, index, count) for index, count in blocks]
    return torch.cat([start for start, _ in cuts], 1), torch.cat([length for _, length in cuts], 1)


def _cut(lengths: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Block ``index`` [ranks, 1] of ``count`` of every request [N]; the first ones are longer by one token."""
    base, extra = lengths // count, lengths % count
    first = lengths.cumsum(0) - lengths
    return first + index * base + torch.minimum(index, extra), base + (index < extra)


def _restore(token: Tensor, valid: Tensor, total: Tensor, tokens: int) -> Tensor:
    """Row of each token. Pad rows write to a slot of their own, past the last token, which is dropped."""
    count = token.numel()
    slot = torch.where(valid, token, tokens).flatten()
    row = torch.arange(count, device=token.device)
    found = torch.full((tokens + 1,), count, dtype=torch.int64, device=token.device).scatter(0, slot, row)[:tokens]
    return torch.where(torch.arange(tokens, device=token.device) < total, found, 0)
