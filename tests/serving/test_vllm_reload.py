"""vLLM's real decorator on two gloo ranks, around a module of one layer: which code it takes again, and which not."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from expected import rewritten
from model_folder import make_folder
from processes import COMPILED, free_port
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import set_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    init_distributed_environment,
    initialize_model_parallel,
    tensor_model_parallel_all_reduce,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from cpcompile.errors import ReloadError
from cpcompile.serving.vllm_entry import Entry

WORLD, VOCAB, HIDDEN, INNER = 2, 32, 512, 24
SMALL, LARGE = (2, 9), (2000, 2001)  # tokens of steps: without an option the all-reduce is kept, and rewritten


@support_torch_compile(dynamic_arg_dims={"ids": 0})
class Layer(nn.Module):
    """An embedding, a gated MLP split over the ranks, its all-reduce, a norm."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, split: int | None = None) -> nn.Parameter:
            full = torch.randn(shape, generator=generator)
            part = full if split is None else full.chunk(WORLD, split)[get_tensor_model_parallel_rank()].clone()
            return nn.Parameter(part, requires_grad=False)

        self.table, self.norm = weight(VOCAB, HIDDEN), weight(HIDDEN)
        self.up, self.down = weight(INNER, HIDDEN, split=0), weight(HIDDEN, INNER, split=1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = nn.functional.embedding(ids, self.table)
        inner = nn.functional.silu(nn.functional.linear(x, self.up))
        x = x + tensor_model_parallel_all_reduce(nn.functional.linear(inner, self.down))
        return nn.functional.rms_norm(x, (HIDDEN,), self.norm, 1e-6)


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Rank:
    """One rank, which starts the model again and again."""

    def __init__(self, rank: int, folder: Path) -> None:
        self.rank, self.folder = rank, folder

    def configure(self, **options: Any) -> Any:
        given = {"tensor_parallel_size": WORLD, "distributed_executor_backend": "external_launcher"}
        return EngineArgs(
            str(self.folder / "model"),
            dtype="float32",
            max_model_len=256,
            compilation_config=dict(COMPILED),
            additional_config={"cpcompile": options},
            **given,
        ).create_engine_config()

    def start(self, config: Any, change: Callable[[Layer], Any] = lambda model: None) -> list[str]:
        """Start, compare with the module uncompiled, and tell what was logged of saved code."""
        torch._dynamo.reset()
        config.parallel_config.rank = self.rank
        with set_current_vllm_config(config), heard() as lines, torch.no_grad():
            model = Layer(vllm_config=config)
            change(model)
            for tokens in (LARGE[1], *SMALL, LARGE[0]):
                ids = torch.arange(tokens) * 5 % VOCAB
                torch.testing.assert_close(model(ids), model.forward(ids), rtol=1e-5, atol=1e-5)
        torch.distributed.barrier()
        (said,) = [line for line in lines if "took the code" in line or "compiles anew" in line]
        counts = rewritten("\n".join(lines), self.rank)
        assert [count[1:] for count in counts] == [(0, 1), (1, 1)] and max(SMALL) < counts[1][0] <= min(LARGE), counts
        return said.removeprefix(f"cpcompile: rank {self.rank}, axis tp: ")

    def saved(self, config: Any) -> Path:
        return Path(config.compilation_config.local_cache_dir, f"rank_{self.rank}_0", "model")


@contextmanager
def heard() -> Iterator[list[str]]:
    handler, logger = Heard(), logging.getLogger("cpcompile")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)


def starts(rank: Rank) -> None:
    config, calls = rank.configure(), Entry.calls
    assert rank.start(config) == "compiles anew: no saved code"
    assert rank.start(config) == f"took the code of an earlier start from {rank.saved(config)}"
    assert Entry.calls == calls + 2  # one was compiled, one is known to be ours
    if rank.rank == 1:
        rank.saved(config).unlink()
    assert rank.start(config) == "compiles anew: rank 1 of axis tp: no saved code"
    assert rank.start(config).startswith("took the code")
    if rank.rank == 0:
        rank.saved(config).write_bytes(b"")
    assert rank.start(config) == "compiles anew: rank 0 of axis tp: saved code cannot be read (vLLM says why)"
    assert rank.start(config, lambda model: model.norm.add_(1)).startswith("took the code")
    changed = rank.start(config, lambda model: model.norm.add_(rank.rank))
    assert changed == "compiles anew: weight norm is no longer the same on all ranks of axis tp"


def of_other_options(rank: Rank) -> None:
    """Vllm's key tells them apart: a file that was put there by hand is told apart all the same."""
    first, second = rank.configure(), rank.configure(profile="pcie")
    rank.start(first)
    assert rank.start(second) == "compiles anew: no saved code"
    assert rank.saved(first) != rank.saved(second)
    shutil.copy(rank.saved(first), rank.saved(second))
    words = "saved code is of other options or versions: option profile was '' and is 'pcie'"
    assert rank.start(second) == f"compiles anew: rank 0 of axis tp: {words}"


def forced(rank: Rank) -> None:
    config = rank.configure(timeout_s=60)
    os.environ["VLLM_FORCE_AOT_LOAD"] = "1"
    with pytest.raises(ReloadError, match=r"cannot be taken: .*No such file"):
        rank.start(config)
    del os.environ["VLLM_FORCE_AOT_LOAD"]


def run_rank(number: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ["VLLM_CACHE_ROOT"] = f"{folder}/cache"
    os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(number)
    os.environ["WORLD_SIZE"], os.environ["VLLM_DIST_IDENT"] = str(WORLD), str(port)
    load_general_plugins()
    rank = Rank(number, Path(folder))
    with set_current_vllm_config(rank.configure()):
        init_distributed_environment(WORLD, number, f"tcp://127.0.0.1:{port}", number, "gloo")
        initialize_model_parallel(WORLD)
    for scenario in (starts, of_other_options, forced):
        scenario(rank)


def test_two_ranks(tmp_path: Path) -> None:
    """One spawn for all starts."""
    make_folder(tmp_path / "model", "v3")
    mp.spawn(run_rank, (str(tmp_path), free_port()), nprocs=WORLD)
