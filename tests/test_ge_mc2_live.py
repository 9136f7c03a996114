"""MC2 end to end: every rank's GE graph with fused products and collectives, interpreted: the unsharded eager model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ascend_process import AscendProcess
from ge_exports import export, model_of
from test_ge_live import ids_of, run

from cpcompile.lowering.ge import load

TOKENS = (1, 7, 16, 33)
# Summed dims of 256 and more on each of four ranks: what the kernels take.
WIDE = {"hidden_size": 256, "intermediate_size": 1024, "v_head_dim": 64}


@pytest.mark.parametrize("size", [2])
def test_fused_graphs_are_as_near_as_the_uncompiled_ranks(ascend: AscendProcess, tmp_path: Path, size: int) -> None:
    """To the same weights in float32, over all token counts; the ops are of half precision alone."""
    common = ("v3", size, 1, torch.bfloat16)
    assert ascend(export, tmp_path / "mc2", *common, "tp", WIDE, {"mc2": True}) == [[]] * size
    assert ascend(export, tmp_path / "off", *common, "off", WIDE) == [[]] * size
    for rank in range(size):
        graph = load(tmp_path / f"mc2/rank_{rank}/model.pb")
        # Of attention and of the MLP; the MLP's rows, and those of the head.
        assert [len(graph.of_type(op)) for op in ("MatmulReduceScatter", "AllGatherMatmul")] == [2, 2]
    model = model_of("v3", 1, torch.bfloat16, **WIDE).float()
    errors = {"mc2": 0.0, "off": 0.0}
    for tokens in TOKENS:
        with torch.no_grad():
            expected = model(input_ids=ids_of(tokens), use_cache=False).logits
        for folder in errors:
            first, *others = run(tmp_path / folder, size, [tokens] * size)
            assert all(torch.equal(first, other) for other in others)
            errors[folder] += (first.float() - expected).square().sum().item()
    assert 0 < errors["mc2"] <= 1.1**2 * errors["off"]
