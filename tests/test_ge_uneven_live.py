"""Uneven collectives end to end: every rank's GE graph, interpreted, for rows that ranks do not divide: the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ascend_process import AscendProcess
from ge_exports import export
from test_ge_live import TOLERANCE, eager, run

from cpcompile.lowering.ge import load


@pytest.mark.parametrize("size", [2, 4])
def test_rows_without_pads_are_the_unsharded_model(ascend: AscendProcess, tmp_path: Path, size: int) -> None:
    settings = {"uneven_collectives": True}
    assert ascend(export, tmp_path, "v3", size, 1, torch.float32, "tp", {}, settings) == [[]] * size
    for rank in range(size):
        ops = {op.type for op in load(tmp_path / f"rank_{rank}/model.pb").ops}
        assert {"HcomReduceScatterV", "HcomAllGatherV"} <= ops and "HcomReduceScatter" not in ops
    for tokens in (1, 7, 16, 33):
        for found in run(tmp_path, size, [tokens] * size):
            torch.testing.assert_close(found, eager("v3", 1, tokens), rtol=0, atol=TOLERANCE)
