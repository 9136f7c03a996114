"""Fronts of absorbed MLA, from tokens to queries and written keys: those that one op computes, and near misses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import npu_fused_ops  # noqa: F401  defines the ops
import torch
from test_npu_mc2 import gather
from torch import Tensor

from cpcompile.passes.npu_mla_prolog import LATENT, NOPE, Q_LORA, ROPE

npu = torch.ops.npu
HIDDEN, BLOCKS, SIZE = 6144, 3, 16
NAMES = ("x", "down", "gamma_q", "up", "absorb", "down_keys", "gamma_k", "cos", "sin", "places", "latents", "ropes")


@functools.cache
def values(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


def given(
    tokens: int = 5, hidden: int = HIDDEN, heads: int = 2, q_lora: int = Q_LORA, nope: int = NOPE, size: int = SIZE,
    latent: int = LATENT, **changes: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What the functions below take; ``changes`` by name."""
    angle = torch.rand((tokens, 1, 1, ROPE), generator=torch.Generator().manual_seed(7))
    made = {
        "x": values(tokens, hidden),
        "down": values(hidden, q_lora, seed=1, scale=hidden**-0.5),
        "gamma_q": values(q_lora, seed=2),
        "up": values(q_lora, heads * (nope + ROPE), seed=3, scale=q_lora**-0.5),
        "absorb": values(heads, nope, latent, seed=4, scale=nope**-0.5),
        "down_keys": values(hidden, LATENT + ROPE, seed=5, scale=hidden**-0.5),
        "gamma_k": values(LATENT, seed=6),
        "cos": angle.cos().bfloat16(),
        "sin": angle.sin().bfloat16(),
        "places": torch.randperm(BLOCKS * size, generator=torch.Generator().manual_seed(tokens))[:tokens].int(),
        "latents": values(BLOCKS, size, 1, LATENT, seed=8),
        "ropes": values(BLOCKS, size, 1, ROPE, seed=9),
    }
    return tuple({**made, **changes}[name] for name in NAMES)


def put(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    flat = cache.view(-1, cache.shape[-1])
    return npu.npu_scatter_nd_update(flat, places.unsqueeze(1), rows).view(cache.shape)


def keys(kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, places: Tensor, latents: Tensor, ropes: Tensor) -> Any:
    latent, rope = kv.split([LATENT, ROPE], -1)
    latents = put(latents, places, npu.npu_rms_norm(latent, gamma, 1e-6)[0])
    return latents, put(ropes, places, npu.npu_interleave_rope(rope[:, None, None], cos, sin)[:, 0, 0])


def heads(
    normed: Tensor, up: Tensor, absorb: Tensor, cos: Tensor, sin: Tensor, q: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    q = normed @ up if q is None else q
    nope, rope = q.view(-1, absorb.shape[0], absorb.shape[1] + ROPE).split([absorb.shape[1], ROPE], -1)
    absorbed = torch.bmm(nope.transpose(0, 1), absorb).transpose(0, 1)
    return absorbed, npu.npu_interleave_rope(rope.unsqueeze(2), cos, sin).squeeze(2)


def front(
    x: Tensor, down: Tensor, gamma_q: Tensor, up: Tensor, absorb: Tensor, down_keys: Tensor, gamma_k: Tensor,
    cos: Tensor, sin: Tensor, *places_and_caches: Tensor,
) -> Any:  # fmt: skip
    """As a serving model has it, with an indexer that reads the normed queries."""
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    queries = heads(normed, up, absorb, cos, sin)
    return *queries, normed * 2, *keys(x @ down_keys, gamma_k, cos, sin, *places_and_caches)


def unshared(*args: Tensor) -> Any:
    """No one else reads the normed queries."""
    query, rope, _, *caches = front(*args)
    return query, rope, *caches


def keys_first(*args: Tensor) -> Any:
    """Keys ahead of queries, the rotated ones first; whole places; the normed queries read ahead of their heads."""
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, places, latents, ropes = args
    kv, places = x @ down_keys, places.long()
    rotated = npu.npu_interleave_rope(kv[:, LATENT:].view(-1, 1, 1, ROPE), cos, sin).view(-1, ROPE)
    ropes = put(ropes, places, rotated)
    latents = put(latents, places, npu.npu_rms_norm(kv[:, :LATENT], gamma_k, 1e-6)[0])
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    indexed = normed.sum(-1)
    return indexed, *heads(normed, up, absorb, cos, sin), latents, ropes


def batched(*args: Tensor) -> Any:
    """Tokens of one request: products over three dims, whole heads by slices, a matmul of three dims."""
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x[None] @ down, gamma_q, 1e-5)[0]
    q = (normed @ up).view(1, x.shape[0], -1, NOPE + ROPE)
    absorbed = torch.matmul(q[0, ..., :NOPE].permute(1, 0, 2), absorb)  # heads stay first
    rotated = npu.npu_interleave_rope(q[..., NOPE:].squeeze(0).unsqueeze(-2), cos, sin)
    return absorbed, rotated, normed, *keys((x[None] @ down_keys)[0], gamma_k, cos, sin, *rest)


def read_early(*args: Tensor) -> Any:
    """The normed queries are read ahead of their heads, and keys come last."""
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    indexed = normed.sum(-1)
    return indexed, *heads(normed, up, absorb, cos, sin), *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def turned_otherwise(*args: Tensor) -> Any:
    """Absorbed queries are read with their columns first."""
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    nope, rope = (npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0] @ up).view(-1, 2, NOPE + ROPE).split([NOPE, ROPE], -1)
    absorbed = torch.bmm(nope.transpose(0, 1), absorb).permute(2, 0, 1)
    rotated = npu.npu_interleave_rope(rope.unsqueeze(2), cos, sin)
    return absorbed, rotated, *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def of_requests(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm((x @ down).view(2, -1, Q_LORA), gamma_q, 1e-5)[0]
    return normed, *heads(normed.view(-1, Q_LORA), up, absorb, cos, sin), *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def heads_left_out(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    q = (npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0] @ up)[:, : 2 * (NOPE + ROPE)]
    return *heads(q, up, absorb, cos, sin, q), *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def angles_of_heads(*args: Tensor) -> Any:
    """With as many tokens as heads: a head's number says its angle."""
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    nope, rope = (normed @ up).view(-1, 2, NOPE + ROPE).split([NOPE, ROPE], -1)
    rotated = npu.npu_interleave_rope(rope.transpose(0, 1).unsqueeze(2), cos, sin)
    return torch.bmm(nope.transpose(0, 1), absorb), rotated, *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def twice(*args: Tensor) -> Any:
    """Two layers, the second one's tokens made of the first one's queries, over the same angles and places."""
    x, *weights_and_caches = args
    query, rope, *others = front(*args)
    return *others, *front(x * query.sum((1, 2))[:, None].sign() + rope[:, 0, :1], *weights_and_caches)


def changed(**how: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """``front`` with arguments as functions make them."""

    def made(*args: Tensor) -> Any:
        return front(*(how.get(name, lambda v: v)(value) for name, value in zip(NAMES, args, strict=True)))

    return made


def wider(*args: Tensor) -> Any:
    """Queries and keys from one weight."""
    x, down, gamma_q, up, absorb, _, gamma_k, cos, sin, *rest = args
    q, kv = (x @ down).split([Q_LORA, LATENT + ROPE], -1)
    normed = npu.npu_rms_norm(q, gamma_q, 1e-5)[0]
    return *heads(normed, up, absorb, cos, sin), *keys(kv, gamma_k, cos, sin, *rest)


def other_tokens(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm((x * 2) @ down, gamma_q, 1e-5)[0]
    return *heads(normed, up, absorb, cos, sin), *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def keys_gathered(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    kv = gather(x @ down_keys, 2)[: x.shape[0]]
    return *heads(normed, up, absorb, cos, sin), *keys(kv, gamma_k, cos, sin, *rest)


def normed_keys_gathered(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, places, latents, ropes = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    latent, rope = (x @ down_keys).split([LATENT, ROPE], -1)
    rotated = npu.npu_interleave_rope(rope[:, None, None], cos, sin)[:, 0, 0]
    both = gather(torch.cat([npu.npu_rms_norm(latent, gamma_k, 1e-6)[0], rotated], -1), 2)[: x.shape[0]]
    caches = put(latents, places, both[:, :LATENT]), put(ropes, places, both[:, LATENT:])
    return *heads(normed, up, absorb, cos, sin), *caches


def queries_gathered(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = gather(npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0], 2)[: x.shape[0]]
    return *heads(normed, up, absorb, cos, sin), *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def biased(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    kv = torch.addmm(down_keys[0], x, down_keys)
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    return *heads(normed, up, absorb, cos, sin), *keys(kv, gamma_k, cos, sin, *rest)


def by_halves(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    nope, rope = (normed @ up).view(-1, absorb.shape[0], NOPE + ROPE).split([NOPE, ROPE], -1)
    rotated = npu.npu_rotary_mul(rope.unsqueeze(2), cos, sin)
    absorbed = torch.bmm(nope.transpose(0, 1), absorb)
    return absorbed, rotated, *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def whole_heads_read(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    q = normed @ up
    queries = heads(normed, up, absorb, cos, sin, q)
    return *queries, q.sum(), *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def absorbed_twice(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    nope, rope = (npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0] @ up).view(-1, 2, NOPE + ROPE).split([NOPE, ROPE], -1)
    every = [torch.bmm(nope.transpose(0, 1), weight) for weight in (absorb, absorb * 2)]
    rotated = npu.npu_interleave_rope(rope.unsqueeze(2), cos, sin)
    return *every, rotated, *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def rope_first(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    rope, nope = (normed @ up).view(-1, absorb.shape[0], NOPE + ROPE).split([ROPE, NOPE], -1)
    rotated = npu.npu_interleave_rope(rope.unsqueeze(2), cos, sin)
    absorbed = torch.bmm(nope.transpose(0, 1), absorb)
    return absorbed, rotated, *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def tokens_as_heads(*args: Tensor) -> Any:
    """With as many tokens as heads: each token's heads meet one weight."""
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    nope, rope = (normed @ up).view(-1, absorb.shape[0], NOPE + ROPE).split([NOPE, ROPE], -1)
    rotated = npu.npu_interleave_rope(rope.unsqueeze(2), cos, sin)
    return torch.bmm(nope, absorb), rotated, *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def angles_differ(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    return *heads(normed, up, absorb, cos * 2, sin), *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def root_read(*args: Tensor) -> Any:
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, *rest = args
    normed, root = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)
    return root, *heads(normed, up, absorb, cos, sin), *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def not_absorbed(*args: Tensor) -> Any:
    x, down, gamma_q, up, _, down_keys, gamma_k, cos, sin, *rest = args
    normed = npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0]
    return normed @ up, *keys(x @ down_keys, gamma_k, cos, sin, *rest)


def late(*args: Tensor) -> Any:
    """Where keys go is computed behind the queries."""
    x, down, gamma_q, up, absorb, down_keys, gamma_k, cos, sin, places, *caches = args
    queries = heads(npu.npu_rms_norm(x @ down, gamma_q, 1e-5)[0], up, absorb, cos, sin)
    return *queries, *keys(x @ down_keys, gamma_k, cos, sin, places + 0, *caches)
