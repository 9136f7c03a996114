"""The runner: what raises is left out with its reason, mistakes of a user are raised, a graph is whole or as it was."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.fx as fx

from cpcompile.errors import LayoutError, OptionError, RanksDifferError
from cpcompile.passes.base import PassResult
from cpcompile.runner import Runner


def raises(error: Exception) -> None:
    raise error


def test_an_exception_is_the_reason_and_is_told_in_one_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    runner = Runner()
    with caplog.at_level(logging.WARNING, "cpcompile"):
        made = runner.attempt("axis tp", runner.run, "place", raises, KeyError("a\nb"))
    assert made.result is None and made.reason.startswith("place: KeyError: 'a\\nb' (test_runner.py:")
    (line,) = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"cpcompile: axis tp is left out, the rest goes on: {made.reason}; ") and "\n" not in line
    assert "report it" in line and "dump_dir" in line
    runner.save(tmp_path / "failures.txt")
    assert "in raises" in (tmp_path / "failures.txt").read_text()


def test_what_does_not_raise_has_no_reason(tmp_path: Path) -> None:
    runner = Runner()
    made = runner.attempt("axis tp", runner.run, "place", lambda a, b: a - b, 5, b=3)
    assert (made.result, made.reason, made.error) == (2, "", None)
    assert [run.name for run in runner.runs] == ["place"]
    runner.save(tmp_path / "failures.txt")
    assert not list(tmp_path.iterdir())


def test_a_mistake_of_the_users_is_raised_and_a_refusal_of_ours_is_not(caplog: pytest.LogCaptureFixture) -> None:
    runner = Runner()
    with pytest.raises(OptionError, match="no such option"):
        runner.attempt("axis tp", raises, OptionError("no such option"))
    for error in (RanksDifferError("other graphs"), LayoutError("no such layout")):
        assert runner.attempt("axis tp", raises, error).reason == str(error)
    assert not caplog.records and not runner.failures


def test_a_pass_that_raises_midway_leaves_the_graph_as_it_was() -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    before, meta = str(gm.graph), object()
    next(iter(gm.graph.nodes)).meta["val"] = meta

    def halfway(graph: fx.GraphModule) -> PassResult:
        graph.graph.output_node().replace_input_with(*[n for n in graph.graph.nodes if n.op != "output"][::-1][:2])
        graph.recompile()
        raise RuntimeError("halfway")

    runner = Runner()
    runner.change("halfway", halfway, gm)
    assert str(gm.graph) == before and gm(torch.tensor(-2.0)) == 1
    assert next(iter(gm.graph.nodes)).meta["val"] is meta
    (run,) = runner.runs
    assert run.name == "halfway" and "RuntimeError: halfway" in run.refusals[0][1]


def test_a_pass_that_works_changes_the_graph() -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    runner = Runner()

    def without_one(graph: fx.GraphModule) -> PassResult:
        relu, add = (n for n in graph.graph.nodes if n.op == "call_function")
        add.replace_all_uses_with(relu)
        return PassResult(1).finish(graph)

    runner.change("without-one", without_one, gm)
    assert gm(torch.tensor(-2.0)) == 0 and runner.runs[0].rewrites == 1
