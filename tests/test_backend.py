"""``torch.compile(model, backend="cpcompile")`` in one process; two real ranks are in ``run/test_backend_gloo``."""

from __future__ import annotations

import json
import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from placed import Layer
from simulate import fake_rank
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from versions import needs_torch

from cpcompile.axes import axis_of
from cpcompile.backend import cpcompile_backend, exchange_for
from cpcompile.exchange import GroupExchange, OfflineExchange
from cpcompile.plan import Plan

REPLICATED = ["table", "weight"]


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def ids_of(tokens: int) -> torch.Tensor:
    ids = torch.arange(tokens) % 32
    if tokens > 1:
        torch._dynamo.mark_dynamic(ids, 0)
    return ids


@torch.no_grad()
def run(model: Any, *args: torch.Tensor, **options: Any) -> Any:
    return torch.compile(model, backend="cpcompile", options=options, fullgraph=True)(*args)


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [f"{r.levelname} {r.getMessage()}" for r in caplog.records if r.name == "cpcompile"]


def test_torch_compile_finds_the_entry_point() -> None:
    assert lookup_backend("cpcompile") is cpcompile_backend


def test_a_mistyped_option_reaches_the_user_with_the_nearest_name() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"OptionError: unknown option 'stratgy' \(did you mean 'strategy'"):
        run(Layer(), ids_of(5), stratgy="tp")


def test_a_graph_without_collectives_passes_through_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    layer = Layer()
    with caplog.at_level(logging.INFO, "cpcompile"):
        found = run(layer, ids_of(5))
    assert torch.equal(found, layer(ids_of(5)))
    assert told(caplog) == ["INFO cpcompile: T >= 0: no collectives: unchanged"]


def test_a_rewritten_graph_and_what_was_left_alone_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with fake_rank(0, 4) as mesh, caplog.at_level(logging.INFO, "cpcompile"):
        run(Layer(mesh, 0, 4), ids_of(5), strategy="tp", replicated=REPLICATED)
        run(Layer(mesh, 0, 4), ids_of(5), strategy="off", axes={"tp": mesh})
    assert told(caplog) == [
        "INFO cpcompile: T >= 0: 2 gather, 2 scatter",
        "INFO cpcompile: T >= 0, rank 0 of 4 of axis 0: 2 of 2 all-reduces rewritten",
        "INFO cpcompile: T >= 0: 2 keep",
        "INFO cpcompile: T >= 0, rank 0 of 4 of axis tp: 0 of 2 all-reduces rewritten",
        "WARNING cpcompile: axis tp is left alone: strategy='off'",
    ]


def test_a_training_graph_runs_unmodified_with_a_warning() -> None:
    layer = Layer()
    layer.first.requires_grad_(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = torch.compile(layer, backend="cpcompile", fullgraph=True)(ids_of(5))
    lines = [str(w.message) for w in caught if "cpcompile" in str(w.message)]
    assert lines and all("it runs unmodified; call the model under torch.no_grad()" in line for line in lines)
    found.sum().backward()
    mine = layer.first.grad
    layer.first.grad = None
    layer(ids_of(5)).sum().backward()
    torch.testing.assert_close(mine, layer.first.grad)


@pytest.mark.parametrize("mode", [None, "default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"])
def test_mode_reaches_inductor(mode: str | None) -> None:
    """What inductor's configuration says while it compiles is what it says under PyTorch's own backend."""
    layer, seen = Layer(), []
    for backend in ("inductor", cpcompile_on_inductor):
        torch._dynamo.reset()
        with torch.no_grad(), torch._inductor.config.patch(post_grad_custom_post_pass=lambda _: seen.append(config())):
            found = torch.compile(layer, backend=backend, mode=mode)(ids_of(5))
        torch.testing.assert_close(found, layer(ids_of(5)))
    wide = bool(mode) and "autotune" in str(mode)
    graphs = mode in ("max-autotune", "reduce-overhead")
    assert seen == [(wide, wide, graphs)] * 2


def config() -> tuple[bool, bool, bool]:
    now = torch._inductor.config
    return now.max_autotune, now.coordinate_descent_tuning, now.triton.cudagraphs


def cpcompile_on_inductor(gm: Any, example_inputs: Any, *, mode: str | None = None, options: Any = None) -> Any:
    return cpcompile_backend(gm, example_inputs, options={"target": "inductor"}, mode=mode)


def test_a_mode_that_the_target_has_not_is_said_and_an_unknown_one_refused(caplog: pytest.LogCaptureFixture) -> None:
    layer = Layer()
    with torch.no_grad(), caplog.at_level(logging.WARNING, "cpcompile"):
        for mode, said in (("default", 0), ("max-autotune", 1)):
            torch._dynamo.reset()
            found = torch.compile(layer, backend="cpcompile", mode=mode)(ids_of(5))
            assert torch.equal(found, layer(ids_of(5)))
            assert len(caplog.records) == said
        line = caplog.records[0].getMessage()
        assert "mode='max-autotune' is inductor's: target 'eager' has no modes (it runs op by op; give target=" in line
        with pytest.raises(Exception, match=r"mode='max-autotun' is not known .did you mean 'max-autotune'"):
            torch.compile(layer, backend="cpcompile", mode="max-autotun")(ids_of(7))


def test_a_plan_that_is_missing_is_refused_where_no_graph_needs_it(tmp_path: Path) -> None:
    layer = Layer()
    for name, contents, why in (("absent", None, "cannot read the plan"), ("other", "{}", "not a plan")):
        path = tmp_path / name
        if contents is not None:
            path.write_text(contents)
        with pytest.raises(Exception, match=why):
            run(layer, ids_of(5), plan=str(path))


def test_one_graph_serves_every_token_count() -> None:
    layer = Layer()
    compiled = torch.compile(layer, backend="cpcompile", fullgraph=True)
    with torch.no_grad():
        for tokens in (5, 2, 3, 31):
            assert torch.equal(compiled(ids_of(tokens)), layer(ids_of(tokens)))
    assert counters["stats"]["unique_graphs"] == 1


def test_the_variant_is_chosen_by_the_calls_token_count(tmp_path: Path) -> None:
    """In a fake group collectives do nothing but keep shapes: the two variants give different numbers."""
    options = {"profile": "ascend-a3", "replicated": REPLICATED, "dump_dir": str(tmp_path)}
    with fake_rank(0, 4) as mesh, torch.no_grad():
        compiled = torch.compile(Layer(mesh, 0, 4), backend="cpcompile", options=options, fullgraph=True)
        plain = Layer(mesh, 0, 4)
        compiled(ids_of(8))
        (axis,) = Plan.load(tmp_path / "rank_0" / "graph_0" / "plan.json").axes
        first = axis.intervals[1].first
        assert [i.unchanged for i in axis.intervals] == [True, False]
        for tokens, same in ((first - 1, True), (first, False)):
            assert torch.equal(compiled(ids_of(tokens)), plain(ids_of(tokens))) == same
    assert counters["stats"]["unique_graphs"] == 1


def test_dump_dir_has_each_graphs_report_plan_and_code(tmp_path: Path) -> None:
    options = {"strategy": "tp", "replicated": REPLICATED, "dump_dir": tmp_path}
    with fake_rank(2, 4) as mesh:
        for tokens in (8, 1):
            run(Layer(mesh, 2, 4), ids_of(tokens), **options)
    folders = sorted((tmp_path / "rank_2").iterdir())
    assert [f.name for f in folders] == ["graph_0", "graph_1"]
    names = {"report.json", "plan.json", "original.py", "from_0.py"}
    assert all({f.name for f in folder.iterdir()} == names for folder in folders)
    report = json.loads((folders[0] / "report.json").read_text())
    assert sorted(c["decision"] for c in report["0"]["collectives"]) == ["gather", "gather", "scatter", "scatter"]
    before, after = ((folders[0] / name).read_text() for name in ("original.py", "from_0.py"))
    assert "reduce_scatter" in after and "reduce_scatter" not in before and "all_reduce" in before
    assert Plan.load(folders[0] / "plan.json").axes[0].strategy == "tp"


def test_sizes_that_change_beside_a_fixed_count_keep_their_names_in_the_report(tmp_path: Path) -> None:
    """Ids ``[B, 8]``: elements of the traced batch, and in terms of B."""
    ids = torch.arange(24).view(3, 8)
    torch._dynamo.mark_dynamic(ids, 0)
    with fake_rank(0, 4) as mesh:
        run(Layer(mesh, 0, 4), ids, strategy="tp", replicated=REPLICATED, dump_dir=tmp_path)
    (report,) = json.loads((tmp_path / "rank_0" / "graph_0" / "report.json").read_text()).values()
    reduced = [c for c in report["collectives"] if c["kind"] == "all_reduce"]
    assert [(c["decision"], c["elements_before"]) for c in reduced] == [("scatter", 3 * 8 * 8 * 2 * 3 // 4)] * 2
    assert all(re.fullmatch(r"96\*s\d+", c["elements_before_in_t"]) for c in reduced)


def test_an_exchange_in_a_fake_group_asks_no_one() -> None:
    with fake_rank(1, 4) as mesh:
        assert exchange_for(axis_of("tp", mesh), 1.0) == OfflineExchange(4, 1)


def test_an_exchange_in_a_real_group_asks_its_ranks(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        found = exchange_for(axis_of("tp", torch.distributed.group.WORLD), 1.0)
    finally:
        torch.distributed.destroy_process_group()
    assert isinstance(found, GroupExchange)


UNWRITTEN = needs_torch("2.13", "its fake group leaves the results of collectives unwritten")


@pytest.mark.parametrize("options", [{}, pytest.param({"strategy": "tp"}, marks=UNWRITTEN)])
def test_a_group_of_one_rank_computes_what_the_model_does(options: dict[str, Any]) -> None:
    """The script for many ranks, started on one."""
    with fake_rank(0, 1) as mesh:
        layer = Layer(mesh, 0, 1)
        found = run(layer, ids_of(5), replicated=REPLICATED, axes={"tp": mesh}, **options)
        torch.testing.assert_close(found, Layer()(ids_of(5)))
