"""What random modules are made of: each step reads some values of a program and makes the next one."""

from __future__ import annotations

import torch

from fuzzing.programs import C10D, HIDDEN, Maker, Step, Value
from fuzzing.step_forms import F, padded, push_like, rows_last
from fuzzing.step_tokens import (
    attention,
    batch_moved,
    cumulated,
    fused_attention,
    last_token,
    merged,
    positions,
    reduction_over_tokens,
    reordered,
    reversed_tokens,
    shifted,
    softmax_tokens,
    transposed,
)

POINTWISE = (torch.tanh, torch.relu, torch.sigmoid, torch.neg, torch.square, torch.sin, F.silu, F.gelu, torch.abs)
PAIRS = (torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum)
REDUCTIONS = ("sum", "avg", "max", "min", "product")


def begin(m: Maker, dims: str) -> None:
    """Token ids through a vocabulary."""
    ids = m.inputs["ids"]
    x = F.embedding(ids, m.inputs["table"])
    if dims == "TB":
        x = x.transpose(0, 1)
        x = x.contiguous() if m.rng.random() < 0.5 else x
    m.values.append(Value(x, dims + "H"))
    if m.rng.random() < 0.85:
        residual_sum(m)


# Row-wise.


def pointwise(m: Maker) -> None:
    m.push(m.rng.choice(POINTWISE)(m.last.tensor))


def pair(m: Maker) -> None:
    m.push(m.rng.choice(PAIRS)(m.last.tensor, m.pick().tensor))


def choose(m: Maker) -> None:
    x = m.last.tensor
    m.push(torch.where(x > m.rng.choice((0, 0.1)), m.pick().tensor, x * 0.5))


def shared_linear(m: Maker) -> None:
    push_like(m, torch.tanh(rows_last(m) @ m.shared()))


def norm(m: Maker) -> None:
    x = m.last.tensor
    m.push(x * torch.rsqrt(x.square().mean(m.last.feature, keepdim=True) + 1e-3))


def layer_norm(m: Maker) -> None:
    gain = m.inputs["gain"] if m.rng.random() < 0.7 else m.inputs["own_gain"]
    x = rows_last(m)
    push_like(m, F.layer_norm(x, (HIDDEN,), gain, None, 1e-3))


def softmax_features(m: Maker) -> None:
    m.push(m.last.tensor.softmax(m.last.feature))


def features_viewed(m: Maker) -> None:
    x = rows_last(m)
    heads = x.unflatten(-1, (2, HIDDEN // 2))
    heads = heads.softmax(-1) if m.rng.random() < 0.5 else heads.flip(-2)
    push_like(m, heads.flatten(-2))


def features_cut(m: Maker) -> None:
    x, dim = m.last.tensor, m.last.feature
    first, second = x.split(HIDDEN // 2, dim)
    m.push(torch.cat([second, torch.tanh(first)], dim))


def features_padded(m: Maker) -> None:
    x = rows_last(m)[..., 1:]
    push_like(m, padded(x, [0, 1], m.rng.choice((0.0, 0.5))))


def features_sorted(m: Maker) -> None:
    x = m.last.tensor
    m.push(x.sort(m.last.feature)[0] if m.rng.random() < 0.5 else x.cumsum(m.last.feature) * 0.3)


def greatest(m: Maker) -> None:
    x = m.last.tensor
    values, _ = x.topk(1, m.last.feature)
    m.push(x - values)


def picked_by_greatest(m: Maker) -> None:
    push_like(m, F.embedding(rows_last(m).argmax(-1), m.shared()))


def both_features(m: Maker) -> None:
    x = torch.cat([rows_last(m), torch.tanh(rows_last(m))], -1)
    push_like(m, x @ torch.cat([m.shared(), m.shared()]))


# All-reduces.


def residual_sum(m: Maker) -> None:
    x = rows_last(m)
    push_like(m, torch.tanh(x + m.all_reduce(x @ m.own())))


def mlp(m: Maker) -> None:
    x = rows_last(m)
    inner = torch.relu(x @ m.own()) @ m.own()
    push_like(m, x + torch.tanh(m.all_reduce(inner)))


def product_transposed(m: Maker) -> None:
    """``[H, T]`` by a product of weights' transposes."""
    if m.last.dims not in ("TH", "HT"):
        return
    x = rows_last(m).t()
    y = torch.tanh(m.all_reduce(m.own().t() @ x))
    m.push(y, "HT")


def reduced(m: Maker) -> None:
    """Any reduction over any group, of the main stream or of a product with own weights."""
    op = m.rng.choice(REDUCTIONS) if m.switches.reductions else "sum"
    x = rows_last(m)
    x = torch.tanh(x @ m.own()) if m.rng.random() < 0.6 else x
    y = m.all_reduce(x, op, m.group())
    push_like(m, torch.tanh(y) if m.rng.random() < 0.5 else y)


def greatest_of_ranks(m: Maker) -> None:
    """A scale that ranks agree on."""
    op = m.rng.choice(("max", "min", "avg")) if m.switches.reductions else "sum"
    x = m.last.tensor
    scale = x.abs().amax(m.last.feature, keepdim=True)
    m.push(x / (m.all_reduce(scale, op, m.group()) + 1))


def reduced_transposed(m: Maker) -> None:
    x = m.last.tensor.transpose(0, 1)
    m.push(torch.tanh(m.all_reduce(x * m.inputs["own_gain"][0], "sum", m.group()).transpose(0, 1)))


def two_sums(m: Maker) -> None:
    x = rows_last(m)
    push_like(m, torch.tanh(m.all_reduce(x @ m.own()) + m.all_reduce(torch.sin(x) @ m.own())))


def dead_reduction(m: Maker) -> None:
    op = m.rng.choice(REDUCTIONS) if m.switches.reductions else "sum"
    m.all_reduce(torch.sin(m.last.tensor), op, m.group())


def gathered(m: Maker) -> None:
    """Every rank's values side by side, then their mean or greatest."""
    group = m.group()
    n = m.world.width(group)
    x = rows_last(m)
    whole = C10D.wait_tensor(C10D.all_gather_into_tensor(torch.tanh(x @ m.own()), n, group))
    parts = whole.unflatten(0, (n, x.shape[0]))
    push_like(m, parts.mean(0) if m.rng.random() < 0.5 else parts.amax(0))


def broadcast(m: Maker) -> None:
    group = m.group()
    x = torch.tanh(rows_last(m) @ m.own())
    push_like(m, C10D.wait_tensor(C10D.broadcast(x, m.rng.randrange(m.world.width(group)), group)))


# What differs by rank.


def own_constant(m: Maker) -> None:
    m.push(torch.sin(m.last.tensor * m.rank_constant()))


def own_int(m: Maker) -> None:
    k = m.inputs.get("own_int", 2)
    m.push(torch.sin(m.last.tensor * k))


def own_rows(m: Maker) -> None:
    rows = m.inputs["own_rows"]
    if m.last.dims != m.values[0].dims:  # turned since
        rows = rows.transpose(0, 1)
    m.push(m.last.tensor + torch.sin(rows))


def own_features(m: Maker) -> None:
    push_like(m, rows_last(m) * m.inputs["own_gain"])


def shared_features(m: Maker) -> None:
    push_like(m, rows_last(m) + m.inputs["gain"])


def own_vocabulary(m: Maker) -> None:
    """Rows of a vocabulary over the ranks, summed."""
    ids = m.inputs["ids"]
    if m.last.dims in ("TBH", "HT"):
        return
    first = m.rank_constant()
    other = (ids < first) | (ids >= first + 3) if first < 100 else ids < first
    x = F.embedding(ids.masked_fill(other, 0), m.inputs["own_table"])
    m.push(m.last.tensor + m.all_reduce(x.masked_fill(other.unsqueeze(-1), 0)))


# In place.


def written(m: Maker) -> None:
    x = m.last.tensor.clone()
    x.mul_(0.5).add_(m.pick().tensor)
    m.push(x)


def row_written(m: Maker) -> None:
    x = m.last.tensor.clone()
    x.select(m.last.token, 0).mul_(2)
    m.push(x)


def feature_written(m: Maker) -> None:
    x = m.last.tensor.clone()
    x.narrow(m.last.feature, 1, 1).zero_()
    m.push(x)


for _step in (written, row_written, feature_written):
    _step.writes = True  # type: ignore[attr-defined]

STEPS: list[tuple[Step, int]] = [
    *[(s, 3) for s in (pointwise, pair, shared_linear, norm, layer_norm, residual_sum, mlp)],
    *[(s, 1) for s in (choose, softmax_features, features_viewed, features_cut, features_padded, features_sorted)],
    *[(s, 1) for s in (greatest, picked_by_greatest, both_features, product_transposed, two_sums, dead_reduction)],
    *[(s, 2) for s in (reduced, greatest_of_ranks)],
    *[(s, 1) for s in (reduced_transposed, gathered, broadcast, own_constant, own_int, own_rows, own_features)],
    *[(s, 1) for s in (shared_features, own_vocabulary, reduction_over_tokens, softmax_tokens, cumulated, shifted)],
    *[(s, 1) for s in (last_token, reversed_tokens, reordered, positions, attention, fused_attention, transposed)],
    *[(s, 1) for s in (batch_moved, merged)],
    *[(s, 3) for s in (written, row_written, feature_written)],
]
