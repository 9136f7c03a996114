"""A small DeepSeek model in the forms of a hand-written inference script: buffers for caches, in-place collectives.

With experts its second layer routes tokens in Python: dynamo breaks there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Sizes:
    """Of the model, whole; Its ranks split heads, inner columns and the vocabulary.

    Args:
        absorb: attention on cached latents, else on cached keys and values.
        indexer: each query attends to ``picked`` keys that an indexer chooses.
        experts: routed experts of the second layer, ``active`` for a token, in ``groups`` of which half may be chosen.
    """

    absorb: bool = True
    indexer: bool = False
    experts: int = 0
    groups: int = 4
    active: int = 2
    vocab: int = 64
    dim: int = 32
    inner: int = 48
    heads: int = 4
    q_latent: int = 16
    latent: int = 24
    nope: int = 8
    rope: int = 8
    value: int = 8
    index_heads: int = 2
    index_dim: int = 16
    picked: int = 5
    batch: int = 2
    length: int = 16


class Weights:
    """The same random numbers on every rank, and this rank's part of them."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int, split: int | None = None) -> nn.Parameter:
        whole = torch.randn(shape, generator=self.generator) * shape[-1] ** -0.5
        mine = whole if split is None else whole.chunk(self.world, split)[self.rank]
        return nn.Parameter(mine.clone(), requires_grad=False)


def summed(x: Tensor, world: int) -> Tensor:
    if world > 1:
        dist.all_reduce(x)
    return x


def normed(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-6)


def rotated(x: Tensor, rotations: Tensor) -> Tensor:
    """``x [B, T, heads, D]`` as complex pairs times ``rotations [T, D / 2]``."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], -1, 2))
    turned = pairs * rotations.view(1, pairs.size(1), 1, pairs.size(-1))
    return torch.view_as_real(turned).flatten(3).to(x.dtype)


class Embedding(nn.Module):
    def __init__(self, sizes: Sizes, weights: Weights) -> None:
        super().__init__()
        self.rows, self.world = sizes.vocab // weights.world, weights.world
        self.first = weights.rank * self.rows
        self.weight = weights(sizes.vocab, sizes.dim, split=0)

    def forward(self, ids: Tensor) -> Tensor:
        if self.world > 1:
            elsewhere = (ids < self.first) | (ids >= self.first + self.rows)
            ids = ids - self.first
            ids[elsewhere] = 0
        x = F.embedding(ids, self.weight)
        if self.world > 1:
            x[elsewhere] = 0
            dist.all_reduce(x)
        return x


class Indexer(nn.Module):
    def __init__(self, sizes: Sizes, weights: Weights) -> None:
        super().__init__()
        self.sizes = s = sizes
        self.wq = weights(s.index_heads * s.index_dim, s.q_latent)
        self.wk, self.norm = weights(s.index_dim, s.dim), weights(s.index_dim)
        self.head_weights = weights(s.index_heads, s.dim)
        self.register_buffer("keys", torch.zeros(s.batch, s.length, s.index_dim), persistent=False)

    def forward(self, x: Tensor, query: Tensor, start: int, rotations: Tensor, mask: Tensor | None) -> Tensor:
        s, (batch, tokens, _) = self.sizes, x.shape
        end = start + tokens
        q = F.linear(query, self.wq).view(batch, tokens, s.index_heads, s.index_dim)
        q_rope, q_nope = q.split([s.rope, s.index_dim - s.rope], -1)
        q = torch.cat([rotated(q_rope, rotations), q_nope], -1)
        k = F.layer_norm(F.linear(x, self.wk), (s.index_dim,), self.norm)
        k_rope, k_nope = k.split([s.rope, s.index_dim - s.rope], -1)
        self.keys[:batch, start:end] = torch.cat([rotated(k_rope.unsqueeze(2), rotations).squeeze(2), k_nope], -1)
        weights = F.linear(x, self.head_weights) * s.index_heads**-0.5
        scores = torch.einsum("bshd,btd->bsht", q, self.keys[:batch, :end]).relu()
        scores = (scores * weights.unsqueeze(-1)).sum(2)
        if mask is not None:
            scores += mask
        return scores.topk(min(s.picked, end), -1)[1]


class Attention(nn.Module):
    def __init__(self, sizes: Sizes, weights: Weights) -> None:
        super().__init__()
        self.sizes, self.world, s = sizes, weights.world, sizes
        self.heads = s.heads // weights.world
        self.q_down, self.q_norm = weights(s.q_latent, s.dim), weights(s.q_latent)
        self.q_up = weights(s.heads * (s.nope + s.rope), s.q_latent, split=0)
        self.kv_down, self.kv_norm = weights(s.latent + s.rope, s.dim), weights(s.latent)
        self.kv_up = weights(s.heads * (s.nope + s.value), s.latent, split=0)
        self.out = weights(s.dim, s.heads * s.value, split=1)
        self.indexer = Indexer(s, weights) if s.indexer else None
        room = (s.batch, s.length)
        if s.absorb:
            self.register_buffer("latents", torch.zeros(*room, s.latent), persistent=False)
            self.register_buffer("positions", torch.zeros(*room, s.rope), persistent=False)
        else:
            self.register_buffer("keys", torch.zeros(*room, self.heads, s.nope + s.rope), persistent=False)
            self.register_buffer("values", torch.zeros(*room, self.heads, s.value), persistent=False)

    def forward(self, x: Tensor, start: int, rotations: Tensor, mask: Tensor | None) -> Tensor:
        s, (batch, tokens, _) = self.sizes, x.shape
        end = start + tokens
        query = normed(F.linear(x, self.q_down), self.q_norm)
        q = F.linear(query, self.q_up).view(batch, tokens, self.heads, s.nope + s.rope)
        q_nope, q_rope = q.split([s.nope, s.rope], -1)
        q_rope = rotated(q_rope, rotations)
        kv, k_rope = F.linear(x, self.kv_down).split([s.latent, s.rope], -1)
        kv, k_rope = normed(kv, self.kv_norm), rotated(k_rope.unsqueeze(2), rotations)
        scale = (s.nope + s.rope) ** -0.5
        if s.absorb:
            up = self.kv_up.view(self.heads, -1, s.latent)
            q_nope = torch.einsum("bshd,hdc->bshc", q_nope, up[:, : s.nope])
            self.latents[:batch, start:end] = kv
            self.positions[:batch, start:end] = k_rope.squeeze(2)
            latents, positions = self.latents[:batch, :end], self.positions[:batch, :end]
            scores = torch.einsum("bshc,btc->bsht", q_nope, latents) + torch.einsum("bshr,btr->bsht", q_rope, positions)
        else:
            k_nope, v = F.linear(kv, self.kv_up).view(batch, tokens, self.heads, -1).split([s.nope, s.value], -1)
            k = torch.cat([k_nope, k_rope.expand(-1, -1, self.heads, -1)], -1)
            self.keys[:batch, start:end], self.values[:batch, start:end] = k, v
            q = torch.cat([q_nope, q_rope], -1)
            scores = torch.einsum("bshd,bthd->bsht", q, self.keys[:batch, :end])
        scores = scores * scale
        if self.indexer is not None:
            picked = self.indexer(x, query, start, rotations, mask)
            chosen = torch.full((batch, tokens, end), float("-inf"), device=x.device).scatter_(-1, picked, 0)
            mask = chosen if mask is None else chosen + mask
            scores += mask.unsqueeze(2)
        elif mask is not None:
            scores += mask.unsqueeze(1)
        scores = scores.softmax(-1, dtype=torch.float32).type_as(x)
        if s.absorb:
            mixed = torch.einsum("bsht,btc->bshc", scores, self.latents[:batch, :end])
            mixed = torch.einsum("bshc,hdc->bshd", mixed, up[:, -s.value :])
        else:
            mixed = torch.einsum("bsht,bthd->bshd", scores, self.values[:batch, :end])
        return summed(F.linear(mixed.flatten(2), self.out), self.world)


class Mlp(nn.Module):
    """Split over the ranks, or a routed expert, which one rank has whole."""

    def __init__(self, sizes: Sizes, weights: Weights, split: bool = True, reduced: bool = True) -> None:
        super().__init__()
        self.world = weights.world if reduced else 1
        self.gate, self.up = (weights(sizes.inner, sizes.dim, split=0 if split else None) for _ in range(2))
        self.down = weights(sizes.dim, sizes.inner, split=1 if split else None)

    def forward(self, x: Tensor) -> Tensor:
        return summed(F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down), self.world)


class Gate(nn.Module):
    def __init__(self, sizes: Sizes, weights: Weights) -> None:
        super().__init__()
        self.sizes = sizes
        self.weight, self.bias = weights(sizes.experts, sizes.dim), weights(sizes.experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x [T, dim]`` → weights and numbers of its experts ``[T, active]``."""
        s, given = self.sizes, F.linear(x, self.weight).sigmoid()
        scores = (given + self.bias).view(x.size(0), s.groups, -1)
        best = scores.topk(2, -1)[0].sum(-1).topk(s.groups // 2, -1)[1]
        outside = scores.new_ones(x.size(0), s.groups, dtype=torch.bool).scatter_(1, best, False)
        picked = scores.masked_fill_(outside.unsqueeze(-1), float("-inf")).flatten(1).topk(s.active, -1)[1]
        weights = given.gather(1, picked)
        weights /= weights.sum(-1, keepdim=True)
        return weights, picked


class Experts(nn.Module):
    """Routed experts ``[first, last)`` are this rank's own; the shared one is split over the ranks."""

    def __init__(self, sizes: Sizes, weights: Weights) -> None:
        super().__init__()
        self.sizes, self.world = sizes, weights.world
        mine = sizes.experts // weights.world
        self.first, self.last = weights.rank * mine, (weights.rank + 1) * mine
        self.gate = Gate(sizes, weights)
        every = [Mlp(sizes, weights, split=False, reduced=False) for _ in range(sizes.experts)]
        self.experts = nn.ModuleList([e if self.first <= i < self.last else None for i, e in enumerate(every)])
        self.shared = Mlp(sizes, weights, reduced=False)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.view(-1, x.size(-1))
        weights, picked = self.gate(rows)
        y = torch.zeros_like(rows, dtype=torch.float32)
        counts = torch.bincount(picked.flatten(), minlength=self.sizes.experts).tolist()
        for number in range(self.first, self.last):
            if counts[number] == 0:
                continue
            at, place = torch.where(picked == number)
            y[at] += self.experts[number](rows[at]) * weights[at, place, None]
        y += self.shared(rows)
        return summed(y, self.world).type_as(x).view(x.shape)


class Layer(nn.Module):
    def __init__(self, sizes: Sizes, weights: Weights, routed: bool = False) -> None:
        super().__init__()
        self.attention = Attention(sizes, weights)
        self.mlp = Experts(sizes, weights) if routed else Mlp(sizes, weights)
        self.before, self.after = weights(sizes.dim), weights(sizes.dim)

    def forward(self, x: Tensor, start: int, rotations: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(normed(x, self.before), start, rotations, mask)
        return x + self.mlp(normed(x, self.after))


class Model(nn.Module):
    """``forward(ids [B, T], start)`` → logits ``[B, vocab]`` of the last token; caches hold tokens before ``start``."""

    rotations: Tensor

    def __init__(self, sizes: Sizes, rank: int = 0, world: int = 1) -> None:
        super().__init__()
        weights = Weights(rank, world)
        self.world = world
        self.embed = Embedding(sizes, weights)
        routed = [False, True] if sizes.experts else [False]
        self.layers = nn.ModuleList([Layer(sizes, weights, r) for r in routed])
        self.norm, self.head = weights(sizes.dim), weights(sizes.vocab, sizes.dim, split=0)
        angles = torch.outer(torch.arange(sizes.length).float(), 10000.0 ** -torch.arange(0, 1, 2 / sizes.rope))
        self.register_buffer("rotations", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        tokens = ids.size(1)
        x = self.embed(ids)
        rotations = self.rotations[start : start + tokens]
        mask = None
        if tokens > 1:
            mask = torch.full((tokens, tokens), float("-inf"), device=ids.device).triu_(1)
        for layer in self.layers:
            x = layer(x, start, rotations, mask)
        logits = F.linear(normed(x, self.norm)[:, -1], self.head)
        if self.world > 1:
            every = [torch.empty_like(logits) for _ in range(self.world)]
            dist.all_gather(every, logits)
            logits = torch.cat(every, -1)
        return logits
