"""Traces and plans that are damaged or hostile: one line, no code of theirs, no more memory than an honest one takes.

A share with a fixed seed; ``python -m bench.fuzz_files`` takes thousands with new ones.
"""

from pathlib import Path

import pytest
from corrupted import trial
from test_plan import PLAN
from toy_models import toy

from cpcompile.axes import axis_of
from cpcompile.capture import capture
from cpcompile.model_spec import fake_mesh
from cpcompile.trace_file import save_trace


def check(outcomes):
    honest, *others = outcomes
    assert honest.status == 0, honest
    faults = [outcome for outcome in others if outcome.fault]
    assert not faults, faults
    refused = [outcome for outcome in others if outcome.status == 2]
    assert len(refused) > len(others) // 4 and all(o.told.startswith("cpcompile: error: ") for o in refused)


def test_traces(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with fake_mesh({"tp": 4}, 2) as mesh:
        model, args = toy(mesh)
        save_trace(tmp_path / "toy.pt2", capture(model, *args), [axis_of("tp", mesh["tp"])])
    data = (tmp_path / "toy.pt2").read_bytes()
    check(trial(tmp_path, data, ".pt2", 30, 0, lambda path: ["explain", str(path), "--profile", "ascend-a3"]))


def test_plans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PLAN.save(tmp_path / "plan.json")
    data = Path("plan.json").read_bytes()
    check(trial(tmp_path, data, ".json", 100, 0, lambda path: ["plan", "diff", str(tmp_path / "plan.json"), str(path)]))


@pytest.mark.parametrize("text", ["[" * 1_000_000, '{"a":' * 1_000_000, "9" * 1_000_000])
def test_files_that_are_nothing_but_depth(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    PLAN.save(tmp_path / "plan.json")
    outcomes = trial(tmp_path, text.encode(), ".json", 0, 0, lambda path: ["plan", "diff", "plan.json", str(path)])
    (honest,) = outcomes
    assert honest.status == 2 and not honest.fault
