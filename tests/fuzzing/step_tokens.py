"""Steps in which tokens meet each other, and those that move them."""

from __future__ import annotations

import torch

from fuzzing.programs import HIDDEN, Maker
from fuzzing.step_forms import F, padded, push_like, rows_last


def reduction_over_tokens(m: Maker) -> None:
    x, dim = m.last.tensor, m.last.token
    how = m.rng.choice((torch.mean, torch.amax, torch.sum))
    m.push(torch.tanh(x - how(x, dim, keepdim=True)))


def softmax_tokens(m: Maker) -> None:
    m.push(m.last.tensor.softmax(m.last.token) + 0.1 * m.last.tensor)


def cumulated(m: Maker) -> None:
    m.push(torch.tanh(m.last.tensor.cumsum(m.last.token)))


def shifted(m: Maker) -> None:
    """Each token takes its neighbour: by slice and pad, or slice and cat."""
    x, dim = m.last.tensor, m.last.token
    count = x.shape[dim]
    if m.rng.random() < 0.5:
        pad = [0] * (2 * (x.dim() - dim))
        pad[-2] = 1
        shorter = x.narrow(dim, 0, count - 1)
        m.push(padded(shorter, pad, 0.0))
    else:
        m.push(torch.cat([x.narrow(dim, 1, count - 1), x.narrow(dim, 0, 1)], dim))


def last_token(m: Maker) -> None:
    """One token for all."""
    x, dim = m.last.tensor, m.last.token
    one = x.narrow(dim, m.rng.choice((0, x.shape[dim] - 1)), 1)
    m.push(torch.tanh(x + (one.expand_as(x) if m.rng.random() < 0.5 else one)))


def reversed_tokens(m: Maker) -> None:
    m.push(m.last.tensor.flip(m.last.token) if m.rng.random() < 0.6 else torch.roll(m.last.tensor, 1, m.last.token))


def reordered(m: Maker) -> None:
    m.push(m.last.tensor.index_select(m.last.token, m.inputs["order"]))


def positions(m: Maker) -> None:
    x, dim = m.last.tensor, m.last.token
    shape = [1] * x.dim()
    shape[dim] = x.shape[dim]
    m.push(x * torch.cos(torch.arange(x.shape[dim], dtype=x.dtype) * 0.3).reshape(shape))


def attention(m: Maker) -> None:
    """Tokens attend to tokens, causally or not, with weights of all or of each rank."""
    if "B" in m.last.dims and m.last.token == 0:
        return
    x = rows_last(m)
    own = m.rng.random() < 0.5
    q, k, v = (x @ (m.own() if own else m.shared()) for _ in range(3))
    scores = q @ k.transpose(-1, -2)
    if m.rng.random() < 0.6:
        at = torch.arange(x.shape[-2])
        scores = scores.masked_fill(at[None, :] > at[:, None], float("-inf"))
    y = scores.softmax(-1) @ v
    push_like(m, torch.tanh(x + (m.all_reduce(y @ m.own()) if own else y)))


def fused_attention(m: Maker) -> None:
    if "B" in m.last.dims and m.last.token == 0:
        return
    x = rows_last(m)
    own = m.rng.random() < 0.5
    q, k, v = ((x @ (m.own() if own else m.shared())).unsqueeze(-3) for _ in range(3))
    if x.dim() == 2:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=m.rng.random() < 0.5).reshape(x.shape)
    push_like(m, torch.tanh(x + (m.all_reduce(y @ m.own()) if own else y)))


def transposed(m: Maker) -> None:
    if m.last.dims in ("TH", "HT"):
        x = m.last.tensor.t()
        m.push(x.contiguous() if m.rng.random() < 0.5 else x, m.last.dims[::-1])


def batch_moved(m: Maker) -> None:
    if "B" in m.last.dims:
        x = m.last.tensor.transpose(0, 1)
        m.push(x.contiguous() if m.rng.random() < 0.5 else x, m.last.dims[1::-1] + "H")


def merged(m: Maker) -> None:
    """All rows of a batch as one dim, through a product, and back."""
    if "B" in m.last.dims:
        x = m.last.tensor
        y = x.reshape(x.shape[0] * x.shape[1], HIDDEN)
        y = y + torch.tanh(m.all_reduce(y @ m.own())) if m.rng.random() < 0.5 else torch.tanh(y @ m.shared())
        m.push(y.view(x.shape[0], x.shape[1], HIDDEN))
