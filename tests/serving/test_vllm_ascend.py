"""vllm-ascend as published, on a host without an NPU: its platform, its pass manager and its compiler take our pass.

Of release 0.26.0rc1, the newest that has a wheel, with the vLLM that it is for; neither is on the path of the other
tests. Nothing runs on an NPU: torch_npu is loaded over stand-ins for CANN, and what was compiled runs on gloo.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_folder import make_folder
from processes import command, environment

PACKAGES = Path(sys.prefix) / "ascend"
PIECES = {"mode": "VLLM_COMPILE", "cudagraph_mode": "PIECEWISE"}
# Its fusions make examples on an NPU.
QUIET = {"fuse_norm_quant": False, "fuse_qknorm_rope": False, "fuse_muls_add": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("models"), "v3"))


def on_ascend(work: Path, folder: str, compilation: Any, ranks: int = 1, compile: bool = False) -> list[Any]:
    """What each rank tells of vLLM's configuration."""
    vllm = work / "vllm_alone"
    vllm.mkdir()
    for package in ("vllm", "vllm_ascend", "torch_npu", "torchnpugen"):
        assert (PACKAGES / package).is_dir(), f"{PACKAGES} has no {package}: run make test-vllm"
    for each in PACKAGES.glob("vllm*"):
        if "ascend" not in each.name:
            (vllm / each.name).symlink_to(each)
    arguments = {
        "model": folder, "tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher",
        "compilation_config": compilation,
        "additional_config": {"cpcompile": {}, "ascend_compilation_config": QUIET},
    }  # fmt: skip
    job = {"path": str(PACKAGES), "arguments": arguments, "out": str(work / "out"), "compile": compile}
    (work / "job.json").write_text(json.dumps(job))
    given = environment(VLLM_PLUGINS="ascend,cpcompile", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    given["PYTHONPATH"] = os.pathsep.join([str(vllm), given["PYTHONPATH"]])
    done = subprocess.run(
        command("on_ascend.py", str(work / "job.json"), ranks=ranks), env=given, capture_output=True, text=True,
        cwd=work, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return [json.loads((work / f"out.{rank}").read_text()) for rank in range(ranks)]


def test_its_compiler_runs_our_pass(folder: str, tmp_path: Path) -> None:
    for told in on_ascend(tmp_path, folder, PIECES, ranks=2, compile=True):
        assert told["platform"] == "NPUPlatform" and told["mode"] == "VLLM_COMPILE"
        assert told["backend"].endswith("AscendCompiler")
        assert told["passes"] == {"graph_fusion_manager": "PiecePass"}
        assert {"cpcompile", "cpcompile_identity"} < set(told["additional"])
        assert any("1 of 1 all-reduces rewritten" in line for line in told["heard"])
        assert not [line for line in told["heard"] if line.startswith("WARNING")]
        assert len(told["errors"]) == 4 and max(told["errors"].values()) < 1e-5


@pytest.mark.parametrize(
    ("compilation", "message"),
    [
        ({"mode": "DYNAMO_TRACE_ONCE", "backend": "cpcompile"}, "mode NONE with backend"),
        ({"mode": "VLLM_COMPILE", "cudagraph_mode": "FULL"}, "hands graphs to npugraph_ex past all passes"),
    ],
)
def test_modes_that_do_not_call_it_are_told(folder: str, tmp_path: Path, compilation: Any, message: str) -> None:
    (told,) = on_ascend(tmp_path, folder, compilation)
    (line,) = [line for line in told["heard"] if line.startswith("WARNING")]
    assert "cpcompile will NOT be called" in line and message in line
    assert line.endswith("give mode VLLM_COMPILE with cudagraph_mode PIECEWISE and no backend")
