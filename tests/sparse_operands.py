"""Operands of the ops of sparse attention, and what the ops should make of them, by dense arithmetic in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def indexer_inputs(
    batch: int,
    rows: int,
    keys: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    heads: int = 3,
    width: int = 8,
) -> list[Any]:
    """Small integers as queries, keys and weights: every sum is exact in float32, whatever its order."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randint(-4, 5, (batch, rows, heads, width), generator=g).to(dtype)
    key = torch.randint(-4, 5, (batch, keys, 1, width), generator=g).to(dtype)
    weights = torch.randint(-4, 5, (batch, rows, heads), generator=g).to(dtype)
    return [query, key, weights, lengths(batch, rows, keys, g)]


def attention_inputs(
    batch: int,
    rows: int,
    keys: int,
    count: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    heads: int = 3,
    widths: tuple[int, int] = (10, 4),
) -> list[Any]:
    """Distinct keys for each row, in any order, -1 among them."""
    g = torch.Generator().manual_seed(seed)
    latent, rope = widths
    made = [torch.randn(*s, generator=g) for s in ((batch, rows, heads, latent), (batch, keys, 1, latent))]
    ropes = [torch.randn(*s, generator=g) for s in ((batch, rows, heads, rope), (batch, keys, 1, rope))]
    order = torch.rand(batch, rows, 1, max(keys, count), generator=g).argsort(-1)[..., :count]
    order[(order >= keys) | (torch.rand(order.shape, generator=g) < 0.2)] = -1
    query, key, query_rope, key_rope = (t.to(dtype) for t in (*made, *ropes))
    return [query, key, order.int(), query_rope, key_rope, lengths(batch, rows, keys, g), 0.3]


def lengths(batch: int, rows: int, keys: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, keys + 1, (batch, rows), generator=g, dtype=torch.int32)


def dense_scores(query: Tensor, key: Tensor, weights: Tensor, key_lengths: Tensor) -> Tensor:
    scores = torch.einsum("bshd,bkd->bshk", query.double(), key[:, :, 0].double()).relu()
    total = torch.einsum("bsh,bshk->bsk", weights.double(), scores)
    return total.masked_fill(torch.arange(key.shape[1]) >= key_lengths[..., None], -torch.inf)


def check_choice(inputs: list[Any], count: int, found: Tensor, best_first: bool = True) -> None:
    """Visible keys only, each once, as many as there are, then -1, and none better left out."""
    scores, key_lengths = dense_scores(*inputs), inputs[3]
    assert found.shape == (*scores.shape[:2], 1, count) and found.dtype == torch.int32
    for b in range(scores.shape[0]):
        for s in range(scores.shape[1]):
            row, length = found[b, s, 0], int(key_lengths[b, s])
            chosen = row[: min(count, length)].long()
            assert (row[len(chosen) :] == -1).all()
            assert ((chosen >= 0) & (chosen < length)).all() and len(set(chosen.tolist())) == len(chosen)
            best = scores[b, s].topk(len(chosen)).values
            taken = scores[b, s][chosen]
            taken = taken if best_first else taken.sort(descending=True).values
            torch.testing.assert_close(taken, best, rtol=0, atol=0)


def dense_attention(inputs: list[Any]) -> Tensor:
    query, key, indices, query_rope, key_rope, key_lengths, scale = inputs
    keys = key.shape[1]
    visible = torch.zeros(*query.shape[:2], keys + 1, dtype=torch.bool)
    visible.scatter_(-1, indices[:, :, 0].long().masked_fill(indices[:, :, 0] < 0, keys), True)
    visible = visible[..., :keys] & (torch.arange(keys) < key_lengths[..., None])
    q, k = torch.cat([query, query_rope], -1).double(), torch.cat([key, key_rope], -1)[:, :, 0].double()
    scores = torch.einsum("bshd,bkd->bshk", q, k) * scale
    weights = scores.masked_fill(~visible[:, :, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("bshk,bkl->bshl", weights, key[:, :, 0].double())
