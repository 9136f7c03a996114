"""A one-layer model in plain torch whose modules have biases, halves side by side, and quantised weights."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from cpcompile.capture import Trace, capture

VOCAB, HIDDEN, HEADS, DIM, INNER = 24, 32, 4, 8, 48


class QuantisedLinear(nn.Module):
    """int8 weights ``[N, K]`` with a scale per output; with ``dynamic``, int8 activations with a scale per token."""

    def __init__(self, inner: int, outer: int, dynamic: bool, generator: torch.Generator) -> None:
        super().__init__()
        self.dynamic = dynamic
        self.register_buffer("weight", torch.randint(-127, 128, (outer, inner), generator=generator).to(torch.int8))
        self.register_buffer("scale", torch.rand((outer, 1), generator=generator) * 0.01 + 0.001)

    def forward(self, x: Tensor) -> Tensor:
        if not self.dynamic:
            return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)
        rows = x.reshape(-1, x.shape[-1])
        step = rows.abs().amax(-1, keepdim=True) / 127.0 + 1e-6
        narrow = torch.clamp(torch.round(rows / step), -127, 127).to(torch.int8)
        product = torch._int_mm(narrow, self.weight.t()).to(x.dtype)
        return (product * step * self.scale.t()).reshape(*x.shape[:-1], -1)


class Small(nn.Module):
    """Embedding, attention, o_proj with a bias, gate and up in one product, lm_head.

    ``quantised``: "" for none, "weights" (cast and scaled before the product) or "both" (activations too, of o_proj).
    """

    def __init__(self, quantised: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HEADS * DIM, bias=False)
        self.o_proj: nn.Module = nn.Linear(HEADS * DIM, HIDDEN, bias=True)
        self.gate_up = nn.Linear(HIDDEN, 2 * INNER, bias=True)
        self.down = nn.Linear(INNER, HIDDEN, bias=True)
        self.lm_head: nn.Module = nn.Linear(HIDDEN, VOCAB, bias=True)
        if quantised:
            self.o_proj = QuantisedLinear(HEADS * DIM, HIDDEN, quantised == "both", generator)
            self.lm_head = QuantisedLinear(HIDDEN, VOCAB, False, generator)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(_norm(x)).chunk(3, -1))
        scores = (q @ k.transpose(-1, -2)).softmax(-1)
        x = x + self.o_proj((scores @ v).transpose(1, 2).flatten(2))
        gate, up = self.gate_up(_norm(x)).chunk(2, -1)
        x = x + self.down(nn.functional.silu(gate) * up)
        return self.lm_head(_norm(x))  # type: ignore[no-any-return]


def _norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@functools.cache
def small(quantised: str = "") -> Any:
    return Small(quantised).eval()


@functools.cache
def trace_of_small(quantised: str = "") -> Trace:
    return capture(small(quantised), torch.zeros((1, 20), dtype=torch.long))
