"""What a vLLM user gets wrong is said in one line before anything is loaded, and so is a backend that is not called."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_folder import make_folder
from processes import COMPILED, IN_PIECES
from torch import nn
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from cpcompile.errors import GroupError, OptionError, PlanError
from cpcompile.plan import AxisPlan, Plan
from cpcompile.serving.vllm_entry import Entry
from cpcompile.serving.vllm_modules import check_modules, keep_what_others_read
from cpcompile.serving.vllm_settings import IDENTITY
from cpcompile.weights import release, why_kept

SET = ("VLLM_USE_BREAKABLE_CUDAGRAPH", "VLLM_USE_AOT_COMPILE", "VLLM_DISABLE_COMPILE_CACHE")


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What cpcompile logs; the plugin's settings of the environment end with the test."""
    for name in SET:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    load_general_plugins()
    handler, logger = Heard(), logging.getLogger("cpcompile")
    logger.addHandler(handler)
    yield handler.lines
    logger.removeHandler(handler)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("models"), "v3"))


def configure(folder: str, options: Any = None, **arguments: Any) -> Any:
    given = {"compilation_config": COMPILED, "additional_config": {"cpcompile": options or {}}, **arguments}
    return EngineArgs(model=folder, dtype="float32", max_model_len=256, **given).create_engine_config()


def saved(path: Path, axis: str, size: int) -> str:
    Plan((AxisPlan(axis, size, "s0", "graph", "tp", "gloo", ()),)).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stratgy": "tp"}, "unknown option 'stratgy' (did you mean 'strategy'?)"),
        ({"strategy": "hybrd"}, "strategy='hybrd' is not known (did you mean 'hybrid'?)"),
        ({"axes": {}}, "additional_config['cpcompile']: axes is decided by vLLM's tensor_parallel_size: leave it out"),
        ({"verify": "numeric"}, "verify='numeric' runs graphs on random data, without vLLM's caches: use 'static'"),
        ("tp", "additional_config['cpcompile'] is 'tp': give a dict of options"),
    ],
)
def test_a_mistaken_option_is_one_line(folder: str, options: Any, message: str, heard: list[str]) -> None:
    with pytest.raises(OptionError) as raised:
        configure(folder, options)
    assert str(raised.value) == message


OVER_DP = {"finegrained_tp_config": {"oproj_tensor_parallel_size": 2}}


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (
            {"finegrained_tp_config": {"oproj_tensor_parallel_size": 3}},
            {},
            "rank groups (vllm): expected dp % o_proj = 0, found 2 % 3 = 2; nearest that work: ",
        ),
        (OVER_DP, {"data_parallel_size": 1}, "rank groups (vllm): expected dp % o_proj = 0, found 1 % 2 = 1; nearest"),
        (
            {"flashcomm2_oproj_tensor_parallel_size": 2},
            {},
            "rank groups (vllm): expected attn_tp % flashcomm2_otp = 0, found 1 % 2 = 1; nearest that work: ",
        ),
        (
            {"finegrained_tp_config": {"lmhead_tensor_parallel_size": 2}},
            {},
            "lmhead_tensor_parallel_size: vLLM computes logits outside of the graph that it has compiled: leave it out",
        ),
        (
            {**OVER_DP, "group_tokens": "equal"},
            {},
            "group_tokens='equal': vLLM's data-parallel ranks have tokens of their own: use 'exchange'",
        ),
        (
            # As many as vLLM takes at least for MLA on a processor without AMX.
            {**OVER_DP, "group_tokens": 2047},
            {"max_num_batched_tokens": 2048},
            "group_tokens=2047, and a step may have max_num_batched_tokens=2048: give at least that, or 'exchange'",
        ),
        (
            OVER_DP,
            {"hf_overrides": {"n_routed_experts": 0}},
            "modules cannot be shared over data parallelism without experts: vLLM then runs each rank at its own pace",
        ),
        (
            OVER_DP,
            {"compilation_config": IN_PIECES},
            "modules are shared in mode DYNAMO_TRACE_ONCE alone: vLLM compiles pieces without the model's weights",
        ),
    ],
)
def test_modules_that_cannot_be_shared_are_one_line(
    folder: str, options: Any, arguments: dict[str, Any], message: str, heard: list[str]
) -> None:
    with pytest.raises((OptionError, GroupError)) as raised:
        configure(folder, options, **{"data_parallel_size": 2, **arguments})
    assert str(raised.value).startswith(message) and "\n" not in str(raised.value)


def test_what_a_cpu_does_not_have_beside_shared_modules_is_one_line(folder: str, heard: list[str]) -> None:
    """vLLM turns these flags off there."""
    config = configure(folder, OVER_DP, data_parallel_size=2)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    most = config.scheduler_config.max_num_batched_tokens
    with pytest.raises(OptionError, match=rf"^group_tokens='exchange' reads .*, or group_tokens={most} "):
        check_modules(OVER_DP, config)
    counted = {**OVER_DP, "group_tokens": most}
    check_modules(counted, config)
    config.model_config.enable_sleep_mode = True
    with pytest.raises(OptionError, match=r"^release_weights=True cannot go with enable_sleep_mode: leave "):
        check_modules({**counted, "release_weights": True}, config)
    config.parallel_config.enable_dbo = True
    with pytest.raises(OptionError, match=r"^modules cannot be shared with microbatches"):
        check_modules(counted, config)


def test_a_weight_of_two_modules_keeps_its_memory() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(4, 2), "again": nn.Linear(2, 4, bias=False), "own": nn.Linear(2, 4)})
    model["other"] = nn.ModuleDict({"name": model["own"]})
    model["again"].weight = nn.Parameter(model["embed"].weight.detach()[1:])
    keep_what_others_read({"release_weights": True}, model)
    assert why_kept(model["embed"].weight) == "it is again.weight, too"
    assert why_kept(model["again"].weight) == "it is embed.weight, too"
    assert not why_kept(model["own"].weight)
    assert [release(model[name].weight, str) for name in ("embed", "again", "own")] == [0, 0, 32]
    assert model["embed"].weight.isfinite().all()


def test_a_plan_of_other_ranks_is_one_line(folder: str, tmp_path: Path, heard: list[str]) -> None:
    for axis, size, words in (
        ("tp", 4, "is for tensor_parallel_size 4, found 1: make a new plan"),
        ("ep", 1, "no axis 'tp'"),
    ):
        with pytest.raises(PlanError) as raised:
            configure(folder, {"plan": saved(tmp_path / "plan.json", axis, size)})
        assert words in str(raised.value) and "\n" not in str(raised.value)
    with pytest.raises(PlanError, match=r"^cannot read the plan"):
        configure(folder, {"plan": str(tmp_path / "absent.json")})


def test_flags_alone_set_what_the_backend_needs(folder: str, heard: list[str]) -> None:
    config = configure(folder, compilation_config={"backend": "cpcompile"})
    assert config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
    assert config.compilation_config.ir_enable_torch_wrap
    assert [os.environ.get(name) for name in SET] == ["0", None, None]
    assert isinstance(config.compilation_config.init_backend(config), Entry)
    assert not [line for line in heard if line.startswith("WARNING")]


@pytest.mark.parametrize(
    ("arguments", "cache"), [({"options": {"target": "inductor"}}, None), ({"compilation_config": IN_PIECES}, "1")]
)
def test_code_that_cannot_be_taken_again_is_not_saved(
    folder: str, arguments: dict[str, Any], cache: str | None, heard: list[str]
) -> None:
    configure(folder, **arguments)
    assert [os.environ.get(name) for name in SET] == ["0", "0", cache]
    assert any("set VLLM_USE_AOT_COMPILE=0: only a whole graph that runs op by op" in line for line in heard)


def test_options_version_and_plan_are_in_the_key_of_the_compile_cache(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    plan = saved(tmp_path / "plan.json", "tp", 1)
    first = configure(folder, {"plan": plan})
    assert first.additional_config[IDENTITY]["version"]
    hashes = {first.compute_hash(), configure(folder, {"plan": plan, "strategy": "tp"}).compute_hash()}
    Path(plan).write_text(Path(plan).read_text() + " ")
    hashes.add(configure(folder, {"plan": plan}).compute_hash())
    monkeypatch.setattr("cpcompile.serving.settings.our_version", lambda: "another")
    hashes.add(configure(folder, {"plan": plan}).compute_hash())
    assert len(hashes) == 4


@pytest.mark.parametrize("why", ["enforce_eager", "VLLM_USE_BREAKABLE_CUDAGRAPH", "TORCH_COMPILE_DISABLE"])
def test_a_configuration_that_vllm_rewrites_is_told(
    folder: str, why: str, monkeypatch: pytest.MonkeyPatch, heard: list[str]
) -> None:
    if why == "enforce_eager":
        configure(folder, enforce_eager=True)
    else:
        monkeypatch.setenv(why, "1")
        configure(folder)
    (line,) = [line for line in heard if line.startswith("WARNING")]
    assert "cpcompile will NOT be called" in line and "mode NONE" in line and why in line


def test_pieces_that_the_platform_does_not_compile_are_told(folder: str, heard: list[str]) -> None:
    """A CPU: vLLM traces the model once instead, and calls no pass."""
    configure(folder, compilation_config=IN_PIECES)
    (line,) = [line for line in heard if line.startswith("WARNING")]
    assert "cpcompile will NOT be called" in line and "mode DYNAMO_TRACE_ONCE with backend" in line


def test_a_pass_in_our_place_is_one_line(folder: str, heard: list[str]) -> None:
    taken = {**IN_PIECES, "inductor_compile_config": {"post_grad_custom_post_pass": lambda graph: None}}
    with pytest.raises(OptionError, match=r"^inductor_passes has a post_grad_custom_post_pass already"):
        configure(folder, compilation_config=taken)


def test_a_backend_that_was_not_called_is_told(heard: list[str]) -> None:
    Entry.tell_if_not_called_since(Entry.calls)
    Entry.tell_if_not_called_since(Entry.calls - 1)
    (line,) = heard
    assert line.startswith("WARNING cpcompile was NEVER called")


def test_other_backends_are_left_alone(folder: str, heard: list[str]) -> None:
    config = configure(folder, {"stratgy": 1}, compilation_config={"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"})
    assert config.compilation_config.backend == "eager" and IDENTITY not in config.additional_config
    assert config.compilation_config.init_backend(config) == "eager"
    assert not heard and not set(SET) & os.environ.keys()
    assert json.dumps(config.additional_config) == '{"cpcompile": {"stratgy": 1}}'
