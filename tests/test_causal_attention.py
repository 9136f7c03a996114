"""Attention under a causal mask runs by CUDA's kernel without it: real models, as CUDA's dispatch spells them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from cached_models import Cached, Packed, mark_prefix, positions_of
from conftest import SharedRanks, as_rank
from cousins import config_of
from cuda_attention import HIDDEN, as_on_cpu, calls_in, on_cuda
from models import TINY, build, shard, tiny_config
from simulate import fake_rank, real_inputs
from torch import Tensor, nn

from cpcompile.capture import Trace, capture
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.causal_attention import CausalAttention, find_masked
from cpcompile.passes.token_layout import value_shapes

aten = torch.ops.aten
TOLERANCE = 2e-5


def ids_of(batch: int, tokens: int, vocab: int = TINY["vocab_size"]) -> Tensor:
    return torch.randint(0, vocab, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def model_of(kind: str) -> Any:
    model = build(tiny_config(kind, 1) if kind == "v3" else config_of(kind))
    model.set_attn_implementation("sdpa")
    return model


@functools.cache
def traced(kind: str, kernel: str, batch: int = 1) -> tuple[Any, Trace]:
    model = model_of(kind)
    with on_cuda(kernel):
        trace = capture(model, input_ids=torch.zeros((batch, 10), dtype=torch.long), use_cache=False)
    Canonicalise()(trace.gm)
    return model, trace


def squares(gm: fx.GraphModule) -> list[fx.Node]:
    """Values of tokens by tokens."""
    (tokens,) = value_shapes(next(n for n in gm.graph.nodes if n.target is aten.embedding.default))[0][1:2]
    return [n for n in gm.graph.nodes for shape in value_shapes(n) if shape.count(tokens) > 1]


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape and (found - expected).norm() <= TOLERANCE * expected.norm()


@pytest.mark.parametrize("kernel", HIDDEN)
@pytest.mark.parametrize(("kind", "batch"), [("v3", 2), ("llama", 1)])
def test_a_causal_mask_is_not_made(kind: str, batch: int, kernel: str) -> None:
    model, trace = traced(kind, kernel, batch)
    gm = fx.GraphModule(trace.gm, fx.Graph())
    gm.graph.output(gm.graph.graph_copy(trace.gm.graph, {}))
    layers = len(calls_in(gm))
    assert layers and len(squares(gm)) > 3 and all(c["attn_bias"] is not None for c in calls_in(gm))
    result = CausalAttention()(gm)
    assert (result.rewrites, result.refusals) == (layers, [])
    assert all(c["attn_bias"] is None and c["is_causal"] for c in calls_in(gm)) and squares(gm) == []
    for tokens in (1, 2, 9, 17):
        ids = ids_of(batch, tokens, model.config.vocab_size)
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits
        close(as_on_cpu(gm)(*real_inputs(trace, ids))[0], expected)
    assert CausalAttention()(gm).rewrites == 0


class Masked(nn.Module):
    """Attention of ``[3, 1, T, 8]`` over itself, under what ``shown`` says of a query's and a key's number."""

    def __init__(self, shown: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.shown = shown

    def forward(self, x: Tensor) -> Tensor:
        numbers = torch.arange(x.shape[2])
        return nn.functional.scaled_dot_product_attention(x, x, x, self.shown(numbers[:, None], numbers[None, :]))


@pytest.mark.parametrize(
    ("shown", "causal"),
    [
        (lambda i, j: i >= j, True),
        (lambda i, j: j < i + 1, True),
        (lambda i, j: torch.ones((i.shape[0], j.shape[1]), dtype=torch.bool), False),  # everything: no mask at all
        (lambda i, j: j >= i, "its mask is not causal alone"),
        *((lambda i, j, w=w: (i >= j) & (i - j < w), "its mask is not causal alone") for w in range(2, 8)),
        (lambda i, j: torch.arange(3)[:, None, None, None] + i >= j, "its mask is not causal alone"),
        (lambda i, j: j <= 3 + 0 * i, "its mask is not known to be causal"),
        (lambda i, j: i > j, "causal attention of "),
        (lambda i, j: i + 1 >= j, "causal attention of "),
        (lambda i, j: i + j >= 5, "its mask is not causal alone"),
        (lambda i, j: j <= 5, "its mask is not causal alone"),
    ],
)
def test_what_a_mask_shows(shown: Callable[[Tensor, Tensor], Tensor], causal: bool | str) -> None:
    x = torch.randn(3, 1, 9, 8, generator=torch.Generator().manual_seed(0))
    torch._dynamo.mark_dynamic(x, 2)
    with on_cuda("cudnn"):
        trace = capture(Masked(shown), x)
    gm = trace.gm
    (before,) = calls_in(gm)
    result = CausalAttention()(gm)
    (call,) = calls_in(gm)
    if isinstance(causal, str):
        assert result.rewrites == 0 and result.refusals[0].reason.startswith(causal), result.refusals
        assert call["attn_bias"] is before["attn_bias"] is not None and not call["is_causal"]
        return
    assert result.rewrites == 1 and call["attn_bias"] is None and call["is_causal"] is causal
    inputs = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    found = as_on_cpu(gm)(*[9 if isinstance(i, torch.SymInt) else x for i in inputs])
    close(found[0], Masked(shown)(x))


def refusals(model: Any, *args: Any, **kwargs: Any) -> list[str]:
    with on_cuda("cudnn"):
        gm = capture(model, *args, **kwargs).gm
    Canonicalise()(gm)
    result = CausalAttention()(gm)
    assert result.rewrites == 0 and len(find_masked(gm)) == len(result.refusals) > 0
    return [refusal.reason for refusal in result.refusals]


def test_a_padding_mask_stays() -> None:
    ids = ids_of(2, 10)
    padded = refusals(model_of("v3"), input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert padded == ["its mask is not known to be causal"]


def test_several_requests_in_a_row_stay() -> None:
    assert refusals(Packed(model_of("v3")), ids_of(1, 10), positions_of([4, 6])) == [
        "its mask is not known to be causal"
    ]


def test_keys_before_the_tokens_stay() -> None:
    model = Cached(model_of("v3"))
    with torch.no_grad():
        _, *caches = model(ids_of(1, 6))
    (reason,) = refusals(model, ids_of(1, 10), *mark_prefix(caches))
    assert reason.startswith("causal attention of ") and reason.endswith("its kernels begin where as many are")


@functools.cache
def ranks() -> SharedRanks:
    def make_sharded(mesh: Any) -> Any:
        return shard(model_of("v3"), mesh)

    with fake_rank(0, 2) as mesh, on_cuda("cudnn"):
        first = capture(make_sharded(mesh), input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)
    every = [as_rank(first, rank, 2, make_sharded) for rank in range(2)]
    return SharedRanks([trace for trace, _ in every], [axis for _, axis in every])


@pytest.mark.parametrize(
    ("options", "masked"),
    [({}, False), ({"strategy": "off"}, False), ({"strategy": "tp"}, False), ({"deterministic": True}, True)],
)
def test_what_users_compile(options: dict[str, Any], masked: bool) -> None:
    compiled = ranks().compile(**options)
    for number in range(len(compiled[0].variants)):
        graphs = [c.variants[number].gm for c in compiled]
        assert all((c["attn_bias"] is not None) == masked for gm in graphs for c in calls_in(gm))
        assert [len(calls_in(gm)) for gm in graphs] == [1, 1]
        ids = ids_of(1, 9)
        with torch.no_grad():
            expected = model_of("v3")(input_ids=ids, use_cache=False).logits
        for logits, *_ in ranks().run([as_on_cpu(gm) for gm in graphs], ids):
            close(logits, expected)
    assert all(c["attn_bias"] is not None for c in calls_in(compiled[0].original))  # what runs as it came
