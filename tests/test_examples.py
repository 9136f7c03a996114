"""The examples do what they say. ``examples/demo.py`` is `make demo`, which CI runs by itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from cpcompile.cli import app

ROOT = Path(__file__).parents[1]


def test_own_model_is_explained() -> None:
    target = f"{ROOT / 'examples' / 'own_model.py'}:build"
    arguments = ["explain", target, "--axis", "tp=4", "--tokens", "8192", "--profile", "h100-nvlink", "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    rows = [(c["module"], c["decision"], c["elements_after_in_t"]) for c in report["collectives"]]
    sent, logits = "768*T", "384*T"  # (n-1)/n of 1024 and of 512
    assert rows == [
        ("blocks.0", "scatter", sent),
        ("blocks.1", "gather", sent),
        ("blocks.1", "scatter", sent),
        ("blocks.2", "gather", sent),
        ("blocks.2", "scatter", sent),
        ("", "gather", logits),
    ]
    assert report["verify"]["holds"] and report["verify"]["proofs"]


def test_context_parallelism_on_two_ranks() -> None:
    script = str(ROOT / "examples" / "context_parallel.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "T = 17: rank 0 computes tokens 0 to 8, rank 1 computes tokens 9 to 16" in result.stdout
    assert "proofs: 1 of 1 rewritten graphs proven equal to the original" in result.stdout
    assert result.stdout.count("largest relative error") == 2


def test_shared_modules_on_two_ranks() -> None:
    script = str(ROOT / "examples" / "module_tp.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count(" share ") == 6 and result.stdout.count("largest relative error") == 2
