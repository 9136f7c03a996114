"""Small MLPs in every form that gate, up and down come in, between an embedding and an lm_head, for tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB, HIDDEN, INNER = 64, 32, 24

Middle = Callable[..., Tensor]


@dataclass(frozen=True)
class Form:
    """First products of these widths, each with a bias or not, what makes inner columns of them, and what is right.

    ``shared``: the MLP is shared; else it alone stays whole.
    """

    widths: tuple[int, ...]
    middle: Middle
    shared: bool = True
    bias: bool = False


def _interleaved(z: Tensor) -> Tensor:
    """As gpt-oss has it: clamped, a sigmoid with a factor, up plus one."""
    gate, up = z[..., ::2].clamp(max=7.0), z[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _overlapping(z: Tensor) -> Tensor:
    return F.silu(z[..., :INNER]) * z[..., INNER // 2 : INNER // 2 + INNER]


FORMS = {
    "two weights": Form((INNER, INNER), lambda gate, up: F.silu(gate) * up),
    "two weights, biases": Form((INNER, INNER), lambda gate, up: F.silu(gate) * up, bias=True),
    "three products": Form((INNER, INNER, INNER), lambda a, b, c: F.silu(a) * torch.sigmoid(b) * c),
    "chunk": Form((2 * INNER,), lambda z: F.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1]),
    "chunk, biases": Form((2 * INNER,), lambda z: F.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1], bias=True),
    "up first": Form((2 * INNER,), lambda z: z[..., :INNER] * F.gelu(z[..., INNER:])),
    "slice from the end": Form((2 * INNER,), lambda z: F.silu(z[..., :-INNER]) * z[..., -INNER:]),
    "split of three": Form((3 * INNER,), lambda z: F.silu(z.split(INNER, -1)[2]) * z.split(INNER, -1)[0]),
    "interleaved": Form((2 * INNER,), _interleaved),
    "interleaved, biases": Form((2 * INNER,), _interleaved, bias=True),
    "ungated": Form((INNER,), F.gelu),
    "ungated, bias": Form((INNER,), F.gelu, bias=True),
    "relu squared": Form((INNER,), lambda z: F.relu(z).square()),
    "halves of every other": Form((4 * INNER,), lambda z: F.silu(z[..., ::2][..., :INNER]) * z[..., 1::2][..., INNER:]),
    "overlapping": Form((2 * INNER,), _overlapping, shared=False),
    "reversed": Form((INNER,), lambda z: F.gelu(z).flip(-1), shared=False),
    "regrouped": Form((INNER,), lambda z: F.gelu(z).unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2), shared=False),
    "normed": Form((INNER,), lambda z: F.rms_norm(F.gelu(z), (INNER,)), shared=False),
    "a column for all": Form((INNER + 1,), lambda z: F.silu(z[..., :1]) * z[..., 1:], shared=False),
    "whole and half": Form((INNER,), lambda z: F.silu(z) * torch.cat(z.chunk(2, -1)[::-1], -1), shared=False),
    "a row for all": Form((INNER, INNER), lambda gate, up: F.silu(gate) * up[:1], shared=False),
}  # fmt: skip


class Mlp(nn.Module):
    def __init__(self, form: Form) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(HIDDEN, width, bias=form.bias) for width in form.widths)
        self.down, self.middle = nn.Linear(INNER, HIDDEN, bias=form.bias), form.middle

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(*(product(x) for product in self.first)))  # type: ignore[no-any-return]


class Model(nn.Module):
    """Ids ``[T]`` to logits ``[T, VOCAB]``."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens, self.lm_head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.mlp = Mlp(form)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        return self.lm_head(F.rms_norm(x + self.mlp(F.rms_norm(x, (HIDDEN,))), (HIDDEN,)))  # type: ignore[no-any-return]


def build(form: Form) -> nn.Module:
    return Model(form).eval()
