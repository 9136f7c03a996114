"""What of torch_npu, torchair and CANN is installed, and importing them: never before a target asks for them."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest.mock import patch

import torch

from cpcompile.errors import AscendError
from cpcompile.lowering.ascend.cuda_builds import forget_allocator_settings
from cpcompile.lowering.ascend.host_libraries import cann_installed, compiler, load_host_libraries, loaded

OLDEST, NEWEST = (2, 11), (2, 14)
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
INSTALL = "pip install 'cpcompile[ascend]'"
CPU_BUILD = "install PyTorch's CPU build of this release"


@dataclass(frozen=True)
class Installation:
    """What is here.

    Args:
        torch_npu: its version, ``""`` where it is not installed.
        torch: PyTorch's version.
        protobuf: its version, ``""`` where it is not installed; torchair needs it and does not say so.
        cann: whether CANN's runtime library can be loaded.
        npus: how many NPUs torch_npu sees; 0 while it is not imported.
        compiler: path of a C compiler with its binutils, ``""`` where there is none.
        cuda: the version of CUDA that PyTorch is a build for, ``""`` for another build.
    """

    torch_npu: str
    torch: str
    protobuf: str
    cann: bool
    npus: int
    compiler: str
    cuda: str = ""

    def problem(self) -> str:
        """Why torch_npu cannot be used at all, in one line; ``""`` where it can."""
        if not self.torch_npu:
            return f"torch_npu is not installed: {INSTALL}"
        found = _release(self.torch_npu)
        if not OLDEST <= found <= NEWEST:
            return (
                f"torch_npu {self.torch_npu} is not known to this version of cpcompile: install one of "
                f"{_text(OLDEST)} to {_text(NEWEST)}"
            )
        if found != _release(self.torch):
            return f"torch_npu {self.torch_npu} is not for torch {self.torch}: install the release of the same number"
        if not self.protobuf:
            return f"torchair needs protobuf, which torch_npu does not install: {INSTALL}"
        if self.cann and self.cuda:
            return self.beside_cuda()
        return ""

    def beside_cuda(self) -> str:
        """Why torch_npu is not imported beside a CUDA build of PyTorch where we cannot make room for it."""
        return f"torch {self.torch} is a build for CUDA, beside which torch_npu ends the process: {CPU_BUILD}"

    def no_device(self) -> str:
        """Why nothing can run on an NPU here; ``""`` where it can."""
        if not self.cann:
            return "CANN is not installed (its libascendcl.so cannot be loaded): install it and source its set_env.sh"
        return "" if self.npus else "torch_npu sees no NPU: run npu-smi info"

    def no_host_mode(self) -> str:
        """Why GE graphs cannot be made without CANN here; ``""`` where they can."""
        if self.cann or self.compiler:
            return ""
        return "without CANN, stand-ins for its libraries must be built: install gcc"


def find() -> Installation:
    """Look, importing nothing."""
    here = sys.modules.get("torch_npu")
    npus = here.npu.device_count() if here is not None and not loaded() else 0
    return Installation(
        _version("torch_npu"),
        torch.__version__,
        _version("protobuf"),
        cann_installed(),
        npus,
        compiler(),
        torch.version.cuda or "",
    )


def import_torchair(target: str, device: bool) -> Any:
    """Import torch_npu and return its torchair.

    Args:
        target: the target that asks, for messages.
        device: whether an NPU is needed. Else, where CANN is missing, inert libraries stand in for it.

    Raises:
        AscendError: something is missing or does not fit.
    """
    found = find()
    problem = found.problem() or (found.no_device() if device and not found.cann else "") or found.no_host_mode()
    if problem:
        raise AscendError(f"target {target!r}: {problem}")
    if not found.cann:
        load_host_libraries()
        if found.cuda and "torch_npu" not in sys.modules and not forget_allocator_settings():
            raise AscendError(f"target {target!r}: {found.beside_cuda()}")
    try:
        # What torch_npu prints on a machine without CANN is true and no news.
        quiet = contextlib.nullcontext() if found.cann else contextlib.redirect_stdout(io.StringIO())
        with quiet, _signal_handlers():
            importlib.import_module("torch_npu")
            torchair = importlib.import_module("torchair")
            torchair.get_compiler  # noqa: B018  torchair is loaded by its first use
            with contextlib.suppress(ModuleNotFoundError):  # a release may keep its op air::... elsewhere
                importlib.import_module("torchair.ops._npu_fused_infer_attention_score")
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AscendError(f"target {target!r}: torch_npu {found.torch_npu} cannot be imported: {line}") from error
    if device and (problem := find().no_device()):
        raise AscendError(f"target {target!r}: {problem}")
    return torchair


def autoload_fails() -> bool:
    """Whether a plain ``import torch`` fails here: PyTorch imports torch_npu by itself, and CANN is missing."""
    return bool(_version("torch_npu")) and not cann_installed() and os.environ.get(AUTOLOAD, "1") != "0"


def keep_transformers_off() -> None:
    """Let the transformers library do without torch_npu where importing it fails, for want of CANN.

    It imports torch_npu wherever that is installed, asks once, and remembers.
    """
    if not (_version("torch_npu") and _version("transformers")) or "torch_npu" in sys.modules or cann_installed():
        return
    from transformers.utils import import_utils

    original = import_utils._is_package_available

    def available(name: str, *args: Any, **kwargs: Any) -> Any:
        return (False, "N/A") if name == "torch_npu" else original(name, *args, **kwargs)

    with patch.object(import_utils, "_is_package_available", available):
        import_utils.is_torch_npu_available()
        import_utils.is_torch_npu_available(check_device=True)


@contextmanager
def _signal_handlers() -> Iterator[None]:
    """Torchair takes over SIGINT and SIGTERM when it is imported: give them back."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _release(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".")[:2])


def _text(release: tuple[int, ...]) -> str:
    return ".".join(map(str, release))
