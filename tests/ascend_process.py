"""A process with torch_npu in host mode: importing it changes torch, which is not for the other tests' process."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

# Where `make test` installs torch_npu: apart, as the transformers library imports it wherever it is installed.
FOLDER = Path(sys.prefix) / "ascend"


def torch_npu_folder() -> list[str]:
    """What to put on the path for torch_npu, if it is not there already."""
    return [] if any(d.metadata["Name"] == "torch_npu" for d in distributions()) else [str(FOLDER)]


def missing(folder: Path = FOLDER) -> str:
    """How to install torch_npu where it is not, in one line; else ``""``."""
    if any(d.metadata["Name"] == "torch_npu" for d in distributions()) or (folder / "torch_npu").is_dir():
        return ""
    install = f"{sys.executable} -m pip install --no-deps -c constraints.txt --target {folder} torch_npu protobuf"
    return f"torch_npu is not installed, which the tests of the targets on Ascend need: run `make test`, or {install}"


class AscendProcess:
    """Runs functions of test modules in host mode, one after another.

    Raises:
        AscendError: torch_npu cannot be imported.
    """

    def __init__(self) -> None:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self(_start, torch_npu_folder())  # not the pool's initializer, whose error would be lost

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        """What ``function(*args)`` gives or raises there."""
        return self.pool.submit(_alone, function, *args).result()


def _alone(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, of which no process group is left to the next one, even where it fails."""
    import torch

    try:
        return function(*args)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        torch._dynamo.reset()


def _start(folder: list[str]) -> None:
    sys.path += folder
    from cpcompile.lowering.targets import prepare

    prepare("ge-export")
    import torch

    torch.set_num_threads(1)
