"""Sparse attention of a model as a user compiles it: no option, the attention that it comes with, called again."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from cousins import config_of
from models import CACHES_LATENTS, TINY_INDEXER, build, tiny_config

import cpcompile.backend
from cpcompile.compiled import Compiled
from cpcompile.pipeline import compile_graph

TOLERANCE = 2e-5
OURS = {torch.ops.cpcompile.lightning_indexer.default, torch.ops.cpcompile.sparse_attention.default}
DENSE = {torch.ops.aten._safe_softmax.default, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What the backend made of each graph."""
    outcomes: list[Compiled] = []
    torch._dynamo.reset()

    def record(*args: Any, **kwargs: Any) -> Compiled:
        outcomes.append(compile_graph(*args, **kwargs))
        return outcomes[-1]

    monkeypatch.setattr(cpcompile.backend, "compile_graph", record)
    return outcomes


def model_of(kind: str, attention: str | None = None) -> Any:
    config = tiny_config("v32", layers=1) if kind == "v32" else config_of(kind)
    if attention is not None:
        config._attn_implementation = attention
    return build(config)


def ids_of(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 90, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def runs(outcome: Compiled) -> set[object]:
    """Of the attention's ops, those that the graph of any T runs."""
    return {node.target for v in outcome.variants for node in v.gm.graph.nodes} & (OURS | DENSE)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("kind", "attention", "dynamic"),
    [("v32", None, None), ("v32", "eager", True), ("glm_moe_dsa", None, None)],
)
def test_is_recognised(
    kind: str, attention: str | None, dynamic: bool | None, made: list[Compiled], caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of(kind, attention)
    compiled = torch.compile(model, backend="cpcompile", dynamic=dynamic)
    with torch.no_grad(), caplog.at_level(logging.WARNING, "cpcompile"):
        for batch, tokens in [(1, 19), (2, 12), (1, 1), (3, TINY_INDEXER["index_topk"])]:
            ids = ids_of(batch, tokens)
            logits = compiled(input_ids=ids, use_cache=False).logits
            assert error(logits, model(input_ids=ids, use_cache=False).logits) < TOLERANCE, (batch, tokens)
    assert made and all(runs(outcome) == OURS for outcome in made)
    assert "runs dense" not in caplog.text


@pytest.mark.parametrize("attention", [None, "eager"])
def test_is_recognised_behind_a_cache(
    attention: str | None, made: list[Compiled], caplog: pytest.LogCaptureFixture
) -> None:
    """A prompt, then tokens one by one, then a few at once."""
    model = model_of("v32", attention)
    compiled = torch.compile(model, backend="cpcompile")
    with torch.no_grad(), caplog.at_level(logging.WARNING, "cpcompile"):
        first = ids_of(1, 17)
        got, expected = compiled(input_ids=first, use_cache=True), model(input_ids=first, use_cache=True)
        for tokens in (1, 1, 1, 4):
            assert error(got.logits, expected.logits) < TOLERANCE
            kept, ids = copy.deepcopy(expected.past_key_values), ids_of(1, tokens)
            got = compiled(input_ids=ids, past_key_values=got.past_key_values, use_cache=True)
            expected = model(input_ids=ids, past_key_values=kept, use_cache=True)
        assert error(got.logits, expected.logits) < TOLERANCE
    assert runs(made[0]) == OURS and len(made) > 1
    assert all((runs(outcome) == OURS) == CACHES_LATENTS for outcome in made[1:])
    assert ("its cache holds each head's keys and not latents" in caplog.text) != CACHES_LATENTS
    assert ("runs dense" in caplog.text) != CACHES_LATENTS


def test_deterministic_leaves_it_dense(made: list[Compiled]) -> None:
    model, ids = model_of("v32"), ids_of(1, 19)
    compiled = torch.compile(model, backend="cpcompile", options={"deterministic": True})
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(compiled(input_ids=ids, use_cache=False).logits, expected)
    assert made and not any(runs(outcome) & OURS for outcome in made) and runs(made[0])


def test_what_stays_dense_is_told(made: list[Compiled], caplog: pytest.LogCaptureFixture) -> None:
    """A padding mask is no causal mask."""
    model, ids = model_of("v32"), ids_of(2, 9)
    padded = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    with torch.no_grad(), caplog.at_level(logging.WARNING, "cpcompile"):
        logits = torch.compile(model, backend="cpcompile")(input_ids=ids, attention_mask=padded, use_cache=False).logits
        assert error(logits, model(input_ids=ids, attention_mask=padded, use_cache=False).logits) < TOLERANCE
    assert made and not any(runs(outcome) & OURS for outcome in made)
    (line,) = [record.getMessage() for record in caplog.records if "runs dense" in record.getMessage()]
    assert line.startswith("cpcompile: sparse attention runs dense in 1 of 1 attentions: ") and "its mask is" in line
