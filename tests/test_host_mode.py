"""Host mode: libraries that compute nothing, an installation that says what is wrong, and never a device."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from ascend_process import AscendProcess
from typer.testing import CliRunner

from cpcompile.cli import app
from cpcompile.errors import AscendError
from cpcompile.lowering.ascend import cuda_builds, installation
from cpcompile.lowering.ascend.host_libraries import build, missing_libraries, source_code
from cpcompile.lowering.ascend.installation import Installation, import_torchair

GOOD = Installation("2.13.0", "2.13.0+cpu", "7.36.2", cann=False, npus=0, compiler="/usr/bin/cc")


def test_what_would_reach_a_device_fails_and_the_rest_returns_nothing() -> None:
    assert source_code(["aclInit", "aclrtGetSocName", "_ZN2ge10GEFinalizeEv", "aclrtMalloc"]) == (
        "long _ZN2ge10GEFinalizeEv() { return 0; }\n"
        "long aclInit() { return 507899; }\n"
        "long aclrtGetSocName() { return 0; }\n"
        "long aclrtMalloc() { return 507899; }\n"
    )


def test_libraries_for_a_module_that_needs_one(tmp_path: Path) -> None:
    source, absent = tmp_path / "module.c", tmp_path / "libabsent.so"
    absent_source = tmp_path / "absent.c"
    absent_source.write_text("int aclrtFoo(void) { return 0; }")
    source.write_text("int aclrtFoo(void); int call(void) { return aclrtFoo(); }")
    module = tmp_path / "module.so"
    subprocess.run(["cc", "-shared", "-fPIC", absent_source, "-o", absent, "-Wl,-soname,libabsent.so"], check=True)
    subprocess.run(["cc", "-shared", "-fPIC", source, absent, "-o", module], check=True)
    absent.unlink()
    assert missing_libraries([module]) == ["libabsent.so"]
    build([module], [], tmp_path / "made")
    ctypes.CDLL(str(tmp_path / "made" / "libabsent.so"), mode=ctypes.RTLD_GLOBAL)
    assert ctypes.CDLL(str(module)).call() == 507899


def test_no_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AscendError, match=r"there is no C compiler to make them: install gcc \(with binutils\)$"):
        build([], [], tmp_path / "made")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"torch_npu": ""}, "torch_npu is not installed: pip install 'cpcompile[ascend]'"),
        (
            {"torch_npu": "2.10.0"},
            "torch_npu 2.10.0 is not known to this version of cpcompile: install one of 2.11 to 2.14",
        ),
        (
            {"torch_npu": "2.12.0"},
            "torch_npu 2.12.0 is not for torch 2.13.0+cpu: install the release of the same number",
        ),
        (
            {"protobuf": ""},
            "torchair needs protobuf, which torch_npu does not install: pip install 'cpcompile[ascend]'",
        ),
        ({"cuda": "13.0"}, ""),
        (
            {"cuda": "13.0", "cann": True},
            "torch 2.13.0+cpu is a build for CUDA, beside which torch_npu ends the process: "
            "install PyTorch's CPU build of this release",
        ),
    ],
)
def test_problems_are_one_line(change: dict[str, Any], problem: str) -> None:
    assert replace(GOOD, **change).problem() == problem


def test_a_missing_npu_is_one_line() -> None:
    assert "libascendcl.so cannot be loaded" in GOOD.no_device()
    assert replace(GOOD, cann=True).no_device() == "torch_npu sees no NPU: run npu-smi info"
    assert GOOD.no_host_mode() == ""
    assert replace(GOOD, compiler="").no_host_mode().endswith("install gcc")


def test_no_room_beside_cuda_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "find", lambda: replace(GOOD, cuda="13.0"))
    monkeypatch.setattr(installation, "load_host_libraries", lambda: None)
    monkeypatch.setattr(installation, "forget_allocator_settings", lambda: False)
    with pytest.raises(AscendError, match=r"^target 'ge-export': torch 2.13.0\+cpu is a build for CUDA, .* CPU build"):
        import_torchair("ge-export", device=False)


def names_of_allocator_settings() -> tuple[int, bool, int]:
    before = cuda_builds.settings()
    assert before is not None
    return int(before.size), cuda_builds.forget_allocator_settings(), int(before.size)


def test_room_for_torch_npu_beside_cuda(ascend: AscendProcess) -> None:
    """The names that torch itself registers are found in this build, and gone afterwards."""
    before, found, after = ascend(names_of_allocator_settings)
    assert before >= 5 and found and after == 0


def device_of_host_mode() -> tuple[int, bool, str]:
    import torch_npu  # noqa: F401

    try:
        torch.ones(2).to("npu")
    except RuntimeError as error:
        return torch.npu.device_count(), torch.npu.is_available(), str(error)  # type: ignore[attr-defined]
    return 1, True, ""


def test_host_mode_has_no_device(ascend: AscendProcess) -> None:
    count, available, error = ascend(device_of_host_mode)
    assert (count, available) == (0, False)
    assert "error code is 507899" in error


@pytest.mark.parametrize("target", ["torchair", "npugraph_ex"])
def test_targets_that_need_an_npu_say_so(ascend: AscendProcess, target: str) -> None:
    with pytest.raises(AscendError, match=f"^target '{target}': CANN is not installed"):
        ascend(import_torchair, target, True)


def doctor() -> str:
    return CliRunner().invoke(app, ["doctor"]).output


def test_doctor(ascend: AscendProcess) -> None:
    lines = [line.split(maxsplit=1) for line in ascend(doctor).splitlines() if line.strip()]
    found = {line[0]: line[-1] for line in lines}
    assert found["torch_npu"] == ascend(version, "torch_npu")
    assert found["ge-export"] == "works"
    assert found["torchair"].startswith("does not work: CANN is not installed")
