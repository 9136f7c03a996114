"""Sparse attention of GE, and DSA's indexer: written densely, request by request, as a reference that can be read.

Prototypes: torchair's converters (``ge_converter/custom``). Semantics: torch_npu's documentation of
``npu_lightning_indexer`` and ``npu_sparse_flash_attention``.

Scores are in float32. Queries and weights may be float32 as well, which the hardware does not take, so that a float32
model can be checked to its own precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_shape import ints
from cpcompile.lowering.ge.signatures import expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"
_ALL = (1 << 63) - 1


@dataclass(frozen=True)
class Request:
    """Rows ``first`` to ``last`` of the flattened queries, and the first ``keys`` keys of request ``number``."""

    number: int
    first: int
    last: int
    keys: int

    @property
    def rows(self) -> slice:
        """The request's rows."""
        return slice(self.first, self.last)

    def visible(self, causal: bool) -> Tensor:
        """``[R, K]``: all keys, or right-down causal: the last row sees every key, each before it one less."""
        rows = torch.arange(self.last - self.first)
        lengths = self.keys - (len(rows) - 1 - rows) if causal else torch.full_like(rows, self.keys)
        return torch.arange(self.keys) < lengths[:, None]


def lengths_of(tensor: Tensor | None, name: str) -> list[int] | None:
    """The lengths that an optional input says, or None."""
    return None if tensor is None else ints(tensor, name)


def requests_of(query: Tensor, layout: str, query_lengths: list[int] | None, keys: list[int]) -> Iterator[Request]:
    """Requests over flattened queries: ``TND`` by the ends that ``query_lengths`` are, ``BSND`` of equal rows."""
    if layout == "TND":
        expect(query_lengths is not None, "layout TND: expected actual_seq_lengths_query, found none")
        ends = list(query_lengths or [])
        expect(
            ends == sorted(ends) and (ends or [0])[-1] == query.shape[0],
            f"expected ends of {query.shape[0]} rows, found {ends}",
        )
        starts, lasts = [0, *ends[:-1]], ends
    else:
        batch, rows = query.shape[:2]
        given = query_lengths or [rows] * batch
        expect(
            len(given) == batch and all(0 <= length <= rows for length in given),
            f"expected lengths of {batch} requests of {rows} rows, found {given}",
        )
        starts = [b * rows for b in range(batch)]
        lasts = [s + n for s, n in zip(starts, given, strict=True)]
    expect(len(keys) == len(lasts), f"expected a key length for each of {len(lasts)} requests, found {keys}")
    for number, (first, last, length) in enumerate(zip(starts, lasts, keys, strict=True)):
        expect(length >= 0, f"expected key lengths that are not negative, found {length}")
        yield Request(number, first, last, length)


def _keys_of(request: Request, cache: Tensor, layout: str, table: Tensor | None, starts: list[int]) -> Tensor:
    """The request's keys ``[K, D]``; caches have one head."""
    if layout == "PA_BSND":
        assert table is not None
        size = cache.shape[1]
        blocks = table[request.number, : -(-request.keys // size)].long()
        expect(
            bool(((blocks >= 0) & (blocks < cache.shape[0])).all()), f"block_table names blocks beyond {cache.shape[0]}"
        )
        return cache[blocks].flatten(0, 1)[: request.keys, 0]
    if layout == "TND":
        first = starts[request.number]
        return cache[first : first + request.keys, 0]
    return cache[request.number, : request.keys, 0]


def key_lengths(key: Tensor, layout: str, lengths: list[int] | None) -> tuple[list[int], list[int]]:
    """Each request's number of keys, and for ``TND``, whose lengths are ends, where they begin."""
    if layout == "TND":
        expect(lengths is not None, "layout TND: expected key lengths, found none")
        ends = list(lengths or [])
        starts = [0, *ends[:-1]]
        return [end - start for start, end in zip(starts, ends, strict=True)], starts
    if lengths is None:
        expect(layout == "BSND", f"layout {layout}: expected key lengths, found none")
        return [key.shape[1]] * key.shape[0], []
    return lengths, []


def _check_layouts(query: Tensor, key: Tensor, layout_query: str, layout_key: str, table: Tensor | None) -> None:
    expect(layout_query in ("TND", "BSND"), f"layout of queries: expected TND or BSND, found {layout_query!r}")
    expect(
        layout_key in ("PA_BSND", "TND", "BSND"), f"layout of keys: expected PA_BSND, TND or BSND, found {layout_key!r}"
    )
    expect(query.ndim == len(layout_query), f"queries: expected {layout_query}, found {list(query.shape)}")
    expect(key.ndim == (3 if layout_key == "TND" else 4), f"keys: expected {layout_key}, found {list(key.shape)}")
    expect(key.shape[-2] == 1, f"keys: expected one head, found {list(key.shape)}")
    expect(
        (table is not None) == (layout_key == "PA_BSND"), "expected a block_table for paged keys, and for those alone"
    )


@op("LightningIndexer", "T, T, W, int32, int32, int32 -> sparse_indices:int32, sparse_values:T", T=_FLOAT, W=_FLOAT)
def lightning_indexer(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None,
    block_table: Tensor | None = None,
    *,
    layout_query: str = "BSND",
    layout_key: str = "BSND",
    sparse_count: int = 2048,
    sparse_mode: int = 3,
    pre_tokens: int = _ALL,
    next_tokens: int = _ALL,
    return_values: bool = False,
) -> tuple[Tensor, Tensor]:
    """The ``sparse_count`` keys of each row with the largest ``sum_h weights_h * relu(query_h . key)``, then -1.

    ``query [T, N, D]`` or ``[B, S, N, D]``, ``weights`` without the last dim; indices ``[..., 1, sparse_count]``, best
    first, of equal scores the first key. ``sparse_mode`` 3 is right-down causal, 0 sees all keys. Query lengths of TND
    are ends, key lengths are each request's. Source: torch_npu.npu_lightning_indexer; DeepSeek-V3.2-Exp, equation 1.
    """
    _check_layouts(query, key, layout_query, layout_key, block_table)
    found = {
        "sparse_mode": sparse_mode,
        "pre_tokens": pre_tokens,
        "next_tokens": next_tokens,
        "return_values": return_values,
    }
    expect_default(found, sparse_mode=(0, 3), pre_tokens=_ALL, next_tokens=_ALL, return_values=False)
    expect(
        weights.shape == query.shape[:-1], f"weights: expected {list(query.shape[:-1])}, found {list(weights.shape)}"
    )
    lengths, starts = key_lengths(key, layout_key, lengths_of(actual_seq_lengths_key, "actual_seq_lengths_key"))
    ends = lengths_of(actual_seq_lengths_query, "actual_seq_lengths_query")
    flat = query.reshape(-1, *query.shape[-2:]).float()
    factors = weights.reshape(-1, weights.shape[-1]).float()
    indices = torch.full((len(flat), sparse_count), -1, dtype=torch.int32)
    for request in requests_of(query, layout_query, ends, lengths):
        keys = _keys_of(request, key, layout_key, block_table, starts).float()
        heads = torch.einsum("rhd,kd->rhk", flat[request.rows], keys).relu()
        scores = torch.einsum("rh,rhk->rk", factors[request.rows], heads)
        visible = request.visible(sparse_mode == 3)
        order = scores.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
        chosen = order[:, :sparse_count]
        seen = visible.sum(-1, keepdim=True)
        best = torch.where(torch.arange(chosen.shape[1]) < seen, chosen, -1)
        indices[request.rows, : chosen.shape[1]] = best.to(torch.int32)
    return indices.view(*query.shape[:-2], 1, sparse_count), query.new_empty(0)


@op(
    "SparseFlashAttention",
    "T, T, T, int32, int32, int32, int32, T, T, float32 -> attention_out:T, softmax_max:float32, softmax_sum:float32",
    T=_FLOAT,
)
def sparse_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sparse_indices: Tensor,
    block_table: Tensor | None = None,
    actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale_value: float,
    sparse_block_size: int = 1,
    layout_query: str = "BSND",
    layout_kv: str = "BSND",
    sparse_mode: int = 3,
    pre_tokens: int = _ALL,
    next_tokens: int = _ALL,
    attention_mode: int = 0,
    return_softmax_lse: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each row over the keys that ``sparse_indices [..., 1, C]`` name, in MLA's latent space.

    ``softmax(scale * (query . key + query_rope . key_rope)) value``, where ``value`` is ``key``; an index names
    ``sparse_block_size`` keys from its multiple on; negative ones, and keys that the mask hides, are left out; a row
    without keys is zero. ``attention_mode`` 2 alone, MLA absorbed. Source: torch_npu.npu_sparse_flash_attention.
    """
    _check_layouts(query, key, layout_query, layout_kv, block_table)
    expect_unfed(sinks=sinks)
    found = {"sparse_mode": sparse_mode, "pre_tokens": pre_tokens, "next_tokens": next_tokens}
    expect_default(found, sparse_mode=(0, 3), pre_tokens=_ALL, next_tokens=_ALL)
    modes = {"attention_mode": attention_mode, "return_softmax_lse": return_softmax_lse}
    expect_default(modes, attention_mode=2, return_softmax_lse=False)
    expect(query_rope is not None and key_rope is not None, "expected query_rope and key_rope in attention mode 2")
    assert query_rope is not None and key_rope is not None
    expect(sparse_indices.shape[:-1] == (*query.shape[:-2], 1), f"indices: found {list(sparse_indices.shape)}")
    lengths, starts = key_lengths(key, layout_kv, lengths_of(actual_seq_lengths_kv, "actual_seq_lengths_kv"))
    ends = lengths_of(actual_seq_lengths_query, "actual_seq_lengths_query")
    flat = torch.cat([query, query_rope], -1).reshape(-1, query.shape[-2], query.shape[-1] + query_rope.shape[-1])
    wanted = sparse_indices.reshape(-1, sparse_indices.shape[-1]).long()
    out = torch.full((len(flat), *query.shape[-2:]), torch.nan, dtype=query.dtype)
    for request in requests_of(query, layout_query, ends, lengths):
        parts = (_keys_of(request, cache, layout_kv, block_table, starts) for cache in (key, key_rope, value))
        latent, rope, values = parts
        chosen = _chosen(wanted[request.rows], sparse_block_size, request.keys)
        visible = chosen & request.visible(sparse_mode == 3)
        keys = torch.cat([latent, rope], -1)[:, None]
        out[request.rows] = attend(flat[request.rows], keys, values[:, None], visible, scale_value).to(query.dtype)
    nothing = torch.empty(0, dtype=torch.float32)
    return out.view(query.shape), nothing, nothing.clone()


def _chosen(indices: Tensor, block: int, keys: int) -> Tensor:
    """``[R, K]``: whether a row's indices, each of ``block`` keys, name the key."""
    places = (indices[..., None] * block + torch.arange(block)).flatten(1)
    inside = (indices >= 0).repeat_interleave(block, 1) & (places < keys)
    named = torch.zeros(len(indices), keys + 1, dtype=torch.bool)
    named.scatter_(1, torch.where(inside, places, keys), True)
    return named[:, :keys]


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """``[R, N, Dv]`` float32 of ``query [R, N, D]`` over ``keys [K, G, D]``, ``values [K, G, Dv]`` in groups of heads.

    A row that sees no key is zero.
    """
    times = query.shape[1] // keys.shape[1]
    k, v = (part.float().repeat_interleave(times, 1) for part in (keys, values))
    scores = torch.einsum("rhd,khd->rhk", query.float(), k) * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    weights = weights.masked_fill(~visible.any(-1)[:, None, None], 0)
    return torch.einsum("rhk,khd->rhd", weights, v)
