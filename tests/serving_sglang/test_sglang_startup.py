"""What an SGLang user gets wrong is one line before anything is loaded; a model that is not compiled is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folder import make_folder
from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import ServerArgs

from cpcompile.errors import OptionError, PlanError
from cpcompile.plan import AxisPlan, Plan
from cpcompile.serving import sglang_entry, sglang_hooks, sglang_plugin
from cpcompile.serving.sglang_settings import read_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    load_plugins()
    return str(make_folder(tmp_path_factory.mktemp("models"), "v3"))


def arguments(folder: str, options: Any, **more: Any) -> Any:
    return ServerArgs(model_path=folder, json_model_override_args=json.dumps({"cpcompile": options}), **more)


def saved(path: Path, axis: str, size: int) -> str:
    Plan((AxisPlan(axis, size, "s0", "graph", "tp", "gloo", ()),)).save(path)
    return str(path)


WHERE = "--json-model-override-args['cpcompile']"


@pytest.mark.parametrize(
    ("options", "more", "message"),
    [
        ({"stratgy": "tp"}, {}, "unknown option 'stratgy' (did you mean 'strategy'?)"),
        ({"axes": {}}, {}, f"{WHERE}: axes is decided by SGLang's --tp-size: leave it out"),
        (
            {"verify": "numeric"},
            {},
            "verify='numeric' runs graphs on random data, without SGLang's caches: use 'static'",
        ),
        ("tp", {}, f"{WHERE} is 'tp': give a dict of options"),
        (
            {},
            {"enable_dp_attention": True},
            f"--enable-dp-attention is not known to cpcompile: leave it or {WHERE} out",
        ),
        ({}, {"pp_size": 2}, f"--pp-size is not known to cpcompile: leave it or {WHERE} out"),
    ],
)
def test_a_mistaken_option_is_one_line(folder: str, options: Any, more: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as raised:
        arguments(folder, options, **more).resolve_once()
    assert str(raised.value) == message


def test_a_plan_of_other_ranks_is_one_line(folder: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        arguments(folder, {"plan": saved(tmp_path / "plan.json", "tp", 4)}).resolve_once()
    assert str(raised.value).endswith("is for --tp-size 4, found 1: make a new plan")


def test_turned_off_it_is_as_though_it_were_not_named(folder: str) -> None:
    assert read_options(arguments(folder, {"strategy": "off"})) is None
    assert read_options(ServerArgs(model_path=folder)) is None
    assert read_options(arguments(folder, {})) == {}
    assert not set(sglang_hooks.AROUND) & HookRegistry._hooks.keys()


def test_a_model_that_is_not_compiled_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "cpcompile"):
        sglang_entry.compile_model(torch.nn.Linear(1, 1), {})
        assert "cpcompile will NOT be called: Linear" in caplog.text
        caplog.clear()
        forward = sglang_entry.with_batch(lambda ids, positions, batch: ids, print)
        forward(1, 2, 3), forward(1, 2, 3)
    assert caplog.text.count("cpcompile was NEVER called") == 1


@pytest.mark.parametrize(("own", "warnings"), [(True, 0), (False, 1)])
def test_sglangs_own_compilation_is_warned_of_where_it_does_not_pass_ours(
    folder: str, own: bool, warnings: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if not own:
        monkeypatch.delattr(type(current_platform), "get_compile_backend")
    with caplog.at_level(logging.WARNING, "cpcompile"):
        sglang_plugin._resolve(arguments(folder, {}, enable_torch_compile=True))
    assert caplog.text.count("--enable-torch-compile would compile decode steps") == warnings
