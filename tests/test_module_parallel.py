"""Modules that are tensor-parallel over ranks with tokens of their own: the answers, idle ranks, what is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared_modules import group_of, ids_of, model, run, shared, trace_of

from cpcompile.passes.module_parallel import share_modules
from cpcompile.passes.weight_cuts import CutRefused

TOLERANCE = 2e-5


def close(found: Any, kind: str, tokens: int) -> None:
    with torch.no_grad():
        expected = model(kind)(input_ids=ids_of(tokens), use_cache=False).logits
    assert found.shape == expected.shape
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{tokens} tokens: {error:.1e}"


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize(
    ("counts", "group_tokens"),
    [
        ([0, 1, 7, 8], "exchange"),
        ([5, 2], "exchange"),
        ([3, 0, 9], "exchange"),
        ([0, 1, 7, 8], 12),
        ([8, 1], 8),
        ([5, 5], "equal"),
    ],
)
def test_every_rank_equals_the_model(kind: str, counts: list[int], group_tokens: str | int) -> None:
    for tokens, found in zip(counts, run(trace_of(kind), counts, group_tokens), strict=True):
        if tokens:
            close(found, kind, tokens)


@pytest.mark.parametrize("role", ["embedding", "o_proj", "mlp", "lm_head"])
def test_one_role_alone(role: str) -> None:
    for tokens, found in zip([4, 0, 3, 6], run(trace_of("v3"), [4, 0, 3, 6], "exchange", roles=[role]), strict=True):
        if tokens:
            close(found, "v3", tokens)


def test_weights_fall_by_what_the_formula_says() -> None:
    """Each rank keeps 1/P of embedding, o_proj, the dense layer's MLP and lm_head."""
    trace, size = trace_of("v3"), 4
    graph = share_modules(trace.gm, shared(trace, group_of(size, 1)), "exchange")
    before = {
        n.name: n.meta["val"].numel() for n in trace.gm.graph.find_nodes(op="placeholder") if n.name in graph.cuts
    }
    after = {n.name: n.meta["val"].numel() for n in graph.gm.graph.find_nodes(op="placeholder") if n.name in graph.cuts}
    config = model("v3").config
    heads = config.num_attention_heads * config.v_head_dim
    whole = 2 * config.vocab_size * config.hidden_size + 3 * heads * config.hidden_size
    whole += 3 * config.intermediate_size * config.hidden_size
    assert sum(before.values()) == whole and sum(after.values()) * size == whole


def test_more_rows_than_the_group_takes() -> None:
    trace = trace_of("v3")
    graph = share_modules(trace.gm, shared(trace, group_of(2, 0)), 8)
    assert [str(rows) for rows in graph.most_rows] and len(graph.most_rows) == 1


def test_a_vocabulary_that_does_not_divide() -> None:
    trace = trace_of("v3")
    with pytest.raises(CutRefused, match="has 96 elements, which 5 does not divide"):
        share_modules(trace.gm, shared(trace, group_of(5, 0), roles=["embedding"]))
