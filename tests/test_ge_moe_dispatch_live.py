"""Experts by dispatch end to end: every rank's GE graph, interpreted, for static token counts: the unsharded model."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from ascend_process import AscendProcess
from expert_ranks import export, model
from test_ge_live import ids_of, run
from torch import Tensor

TOKENS = (1, 7, 16, 33)


@functools.cache
@torch.no_grad()
def expected(tokens: int) -> Tensor:
    """Of the same weights in float32."""
    return model().float()(input_ids=ids_of(tokens), use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("how", "size"), [("cp", 2), ("tp", 4)])
def test_rows_by_dispatch_are_as_near_as_the_uncompiled_ranks(
    ascend: AscendProcess, tmp_path: Path, how: str, size: int
) -> None:
    """Attention whole or split; tokens that ranks do not divide, and fewer than ranks."""
    errors, whole = {"dispatch": 0.0, "off": 0.0}, 0.0
    ascend(export, tmp_path / "off", how, size, "off")
    for tokens in TOKENS:
        summaries = ascend(export, tmp_path / str(tokens), how, size, "cp" if how == "cp" else "tp", tokens)
        for summary in summaries:
            moe = [row for row in summary["collectives"] if row["op"].startswith("Moe")]
            assert [row["op"] for row in moe] == ["MoeDistributeDispatchV2", "MoeDistributeCombineV2"]
            others = {row["group"] for row in summary["collectives"] if row not in moe}
            assert len({row["group"] for row in moe}) == 1 and moe[0]["group"] not in others
            assert all(row["ranks"] == list(range(size)) for row in moe)
            assert all(row["sends"] == str(-(-tokens // size) * 2 * 1024 * 2) for row in moe)
        whole += expected(tokens).square().sum().item()
        for folder in errors:
            where = tmp_path / (str(tokens) if folder == "dispatch" else folder)
            first, *others = run(where, size, [tokens] * size)
            assert all(torch.equal(first, other) for other in others)
            errors[folder] += (first.float() - expected(tokens)).square().sum().item()
    assert 0 < errors["dispatch"] <= 1.1**2 * errors["off"] <= 0.02**2 * whole  # bfloat16 has 8 bits
