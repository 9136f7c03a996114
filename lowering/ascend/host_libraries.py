"""Inert stand-ins for CANN's shared libraries, so that torch_npu loads on a machine that has neither CANN nor an NPU.

torch_npu's and torchair's extension modules refer to functions of CANN that nothing else defines. One C file defines
each; the libraries made of it have CANN's names. They compute nothing: whatever would reach a device (initialising it,
allocating, launching, running a session) returns an error, so that no device is ever seen.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from cpcompile.errors import AscendError

# The library in CANN that the device's own functions are in: where it can be loaded, CANN is installed.
CANN_LIBRARY = "libascendcl.so"

# Functions that return a status, of which 0 is success: these fail. All others do nothing and return 0, a null pointer
# or "no" where they return anything.
FAILING = ("aclInit", "aclrt", "aclmdl", "aclop", "Hccl", "rt", "_ZN2ge12GEInitialize", "_ZN2ge7Session", "_ZN3atb")
POINTERS = ("aclrtGetSocName", "aclopCreateAttr", "_ZN2ge7SessionC", "_ZN2ge7SessionD")
_FAILURE = 507899  # ACL_ERROR_RT_DRV_INTERNAL_ERROR: no driver

_FORMAT = "1"  # part of the cache's key: a change of what is generated makes new libraries


def cann_installed() -> bool:
    """Whether CANN's own libraries are here: its runtime can be loaded, and not from our cache."""
    try:
        ctypes.CDLL(CANN_LIBRARY)
    except OSError:
        return False
    return not _loaded


_loaded: list[ctypes.CDLL] = []


def loaded() -> bool:
    """Whether this process runs with the inert libraries in place of CANN."""
    return bool(_loaded)


def load_host_libraries() -> Path:
    """Build the inert libraries, or find them in the cache, and load them ahead of torch_npu; returns their folder.

    Raises:
        AscendError: there is no C compiler, or it fails.
    """
    folder = _cached()
    if not _loaded:
        for library in sorted(folder.glob("*.so")):
            _loaded.append(ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL))
    return folder


def _cached() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cpcompile"
    folder = root / f"cann-stand-in-{_FORMAT}-torch_npu-{version('torch_npu')}-{os.uname().machine}"
    if not folder.is_dir():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as made:
            libraries = Path(made) / "libraries"
            build(_extension_modules(), _torch_libraries(), libraries)
            try:
                libraries.rename(folder)
            except OSError:  # another process was faster
                assert folder.is_dir()
    return folder


def build(modules: Sequence[Path], providers: Sequence[Path], folder: Path) -> None:
    """Write to ``folder`` a library for each that ``modules`` need and that is not here.

    Args:
        modules: shared libraries of the wheel.
        providers: further libraries that are loaded when these are: torch's.
        folder: where to, made by this.

    Raises:
        AscendError: there is no C compiler, or it fails.
    """
    if not compiler():
        raise AscendError(
            "without CANN, torch_npu needs stand-ins for its libraries, and there is no C compiler to make them: "
            "install gcc (with binutils)"
        )
    folder.mkdir(parents=True)
    source = folder / "cann.c"
    source.write_text(source_code(undefined_symbols(modules, providers)), encoding="utf-8")
    names = missing_libraries(modules)
    for name in names:
        # The first has the functions, and the others just its company: all are loaded globally.
        text = ["-x", "c", str(source if name == names[0] else os.devnull)]
        command = [compiler(), "-shared", "-fPIC", "-O1", "-w", f"-Wl,-soname,{name}", *text, "-o", str(folder / name)]
        _run(command)


def compiler() -> str:
    """Path of a C compiler, if binutils are here with it; else ``""``."""
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), "")
    return found if shutil.which("nm") and shutil.which("readelf") else ""


def source_code(symbols: Iterable[str]) -> str:
    """C that defines each of ``symbols``."""
    return "".join(f"long {name}() {{ return {_result(name)}; }}\n" for name in sorted(symbols))


def _result(name: str) -> int:
    return _FAILURE if name.startswith(FAILING) and not name.startswith(POINTERS) else 0


def undefined_symbols(modules: Sequence[Path], providers: Sequence[Path]) -> list[str]:
    """Functions that ``modules`` need and neither they, nor ``providers``, nor this process define."""
    wanted = {
        fields[-1]
        for line in _nm("--undefined-only", modules)
        if (fields := line.split())[-2:-1] == ["U"] and "@" not in fields[-1]  # those of libc have versions
    }
    defined = {line.split()[-1].partition("@")[0] for line in _nm("--defined-only", [*modules, *providers]) if line}
    process = ctypes.CDLL(None)
    return sorted(name for name in wanted - defined if not hasattr(process, name))


def missing_libraries(modules: Sequence[Path]) -> list[str]:
    """Names of libraries that ``modules`` are linked with and that are neither among them nor can be loaded."""
    lines = _run(["readelf", "-d", *map(str, modules)]).splitlines()
    needed = {line.partition("[")[2].rstrip("]") for line in lines if "(NEEDED)" in line}
    here = {module.name for module in modules} | {library.name for library in _torch_libraries()}
    return sorted(name for name in needed - here if not _can_load(name))


def _can_load(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _nm(which: str, files: Sequence[Path]) -> list[str]:
    lines = _run(["nm", "-D", which, *map(str, files)]).splitlines()
    return [line for line in lines if line.strip() and not line.endswith(":")]


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise AscendError(f"{Path(command[0]).name} failed to make stand-ins for CANN's libraries: {last}")
    return done.stdout


def _extension_modules() -> list[Path]:
    spec = find_spec("torch_npu")
    assert spec is not None and spec.submodule_search_locations
    return sorted(Path(spec.submodule_search_locations[0]).rglob("*.so"))


def _torch_libraries() -> list[Path]:
    import torch

    return sorted((Path(torch.__file__).parent / "lib").glob("*.so"))
