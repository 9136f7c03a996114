"""End to end: the pipeline, torchair's own converters, every rank's GE graph interpreted: the unsharded eager model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import models
import pytest
import shared_modules
import torch
from ascend_process import AscendProcess
from ge_exports import export, export_shared, model_of, token_inputs
from torch import Tensor

from cpcompile.errors import AscendError
from cpcompile.lowering.ascend.bound_inputs import RankGraph
from cpcompile.lowering.ge import interpret

TOLERANCE = 2e-5
TOKENS = (1, 7, 16, 33)


def ids_of(tokens: int) -> Tensor:
    return torch.randint(0, models.TINY["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(tokens))


@functools.cache
@torch.no_grad()
def eager(kind: str, layers: int, tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return model_of(kind, layers, dtype).float()(input_ids=ids_of(tokens), use_cache=False).logits  # type: ignore[no-any-return]


@functools.cache
def rank_of(folder: Path) -> tuple[RankGraph, dict[str, Tensor]]:
    """What ``export`` wrote for one rank: read once for all token counts."""
    return RankGraph.read(folder), torch.load(folder / "weights.pt")


def run(folder: Path, size: int, tokens: list[int]) -> list[Tensor]:
    """What every rank's graph returns for its own number of tokens."""
    programs = []
    for rank, count in zip(range(size), tokens, strict=True):
        graph, weights = rank_of(folder / f"rank_{rank}")
        programs.append(graph.program({**weights, **token_inputs(ids_of(count))}))
    return [outputs[0] for outputs in interpret(programs)]


@pytest.mark.parametrize(
    ("kind", "size", "layers"),
    [("v3", 2, 1), ("v3", 4, 3), ("v32", 2, 3), ("v32", 4, 1)],
)
def test_graphs_are_the_unsharded_model(
    ascend: AscendProcess, tmp_path: Path, kind: str, size: int, layers: int
) -> None:
    assert ascend(export, tmp_path, kind, size, layers, torch.float32) == [[]] * size
    for tokens in TOKENS:
        for found in run(tmp_path, size, [tokens] * size):
            torch.testing.assert_close(found, eager(kind, layers, tokens), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["v3", "v32"])
def test_bfloat16_graphs_are_as_near_as_the_uncompiled_ranks(ascend: AscendProcess, tmp_path: Path, kind: str) -> None:
    """To the same weights in float32, over all token counts: see the pipeline's test of that name."""
    assert ascend(export, tmp_path / "tp", kind, 2, 1, torch.bfloat16) == [[], []]
    assert ascend(export, tmp_path / "off", kind, 2, 1, torch.bfloat16, "off") == [[], []]
    errors = dict[str, Any](tp=0.0, off=0.0)
    for tokens in TOKENS:
        for strategy in errors:
            first, second = run(tmp_path / strategy, 2, [tokens] * 2)
            assert first.dtype == torch.bfloat16 and torch.equal(first, second)
            error = first.float() - eager(kind, 1, tokens, torch.bfloat16)
            errors[strategy] += error.square().sum().item()
    assert 0 < errors["tp"] <= 1.1**2 * errors["off"]


OF_ROLE = {
    "embedding": ["HcomAllGather", "HcomReduceScatter"],
    "o_proj": ["HcomAllToAllV", "HcomReduceScatter"],
    "mlp": ["HcomAllGather", "HcomReduceScatter"],
    "lm_head": ["HcomAllGather", "HcomAllToAllV"],
}


@pytest.mark.parametrize(
    ("kind", "roles", "group_tokens"),
    [("v3", ["o_proj"], "equal"), ("v3", list(OF_ROLE), 34), ("v32", list(OF_ROLE), 34)],
)
def test_modules_that_two_ranks_share(
    ascend: AscendProcess, tmp_path: Path, kind: str, roles: list[str], group_tokens: str | int
) -> None:
    """Each of two groups of two, neither of them all ranks or ranks that are neighbours."""
    summaries = ascend(export_shared, tmp_path, kind, roles, group_tokens)
    for rank, summary in enumerate(summaries):
        assert not summary["unsupported"]
        rows = [(row["op"], row["ranks"]) for row in summary["collectives"]]
        assert rows == [(op, [rank % 2, rank % 2 + 2]) for role in roles for op in OF_ROLE[role]]
    for counts in [[7] * 4, [16, 1, 16, 1]] if group_tokens == "equal" else [[7, 33, 16, 1], [34, 2, 1, 2]]:
        for tokens, found in zip(counts, run(tmp_path, 4, counts), strict=True):
            expected = shared_eager(kind, tokens)
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@torch.no_grad()
def shared_eager(kind: str, tokens: int) -> Tensor:
    return shared_modules.model(kind, 1)(input_ids=ids_of(tokens), use_cache=False).logits  # type: ignore[no-any-return]


def test_numbers_without_a_converter_are_refused(ascend: AscendProcess, tmp_path: Path) -> None:
    """Row counts that ranks exchange."""
    with pytest.raises(AscendError, match=r"computes a number by .*_local_scalar_dense.*torchair has no converter"):
        ascend(export_shared, tmp_path, "v3", ["o_proj"], "exchange")
