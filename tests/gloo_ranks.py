"""Real ranks of a test: processes that meet over gloo."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._inductor import config as inductor
from torch.distributed import distributed_c10d

# In a collective of any group: the half an hour that PyTorch waits would outlast a whole run of the tests.
WAIT_FOR_OTHERS = timedelta(minutes=5)


@contextmanager
def joined(rank: int, world: int, folder: str, *, caches: bool = False) -> Iterator[None]:
    """This process as one of ``world`` ranks that meet in ``folder``; graphs that were compiled before are not taken.

    Kernels of the same source are, and inductor's headers are built once, but where the rank has ``caches`` of its own.
    """
    torch.set_num_threads(1)
    # Where another rank failed, this one is terminated: what it did then shows why. Not at a time: reading the frames
    # of a rank that runs can crash it.
    faulthandler.register(signal.SIGTERM, chain=True)
    if caches:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor_{rank}"
    else:
        inductor.force_disable_caches = True
    distributed_c10d.default_pg_timeout = WAIT_FOR_OTHERS  # new groups do not take it from the first one
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    yield
    dist.destroy_process_group()


def in_turn(scenarios: Sequence[Callable[..., None]], *args: Any) -> None:
    """Call each with ``args``, and print what it took."""
    for scenario in scenarios:
        began = time.perf_counter()
        scenario(*args)
        print(f"rank {dist.get_rank()}: {scenario.__name__} {time.perf_counter() - began:.1f} s", flush=True)
