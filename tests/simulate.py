"""n simulated ranks in one process: real models on a fake process group, traced, compiled, run in lockstep."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpcompile.axes import Axis
from cpcompile.capture import Trace
from cpcompile.passes.lockstep import RankProgram, run_lockstep


@contextmanager
def fake_rank(rank: int, size: int) -> Iterator[DeviceMesh]:
    """This process as rank ``rank`` of ``size``, with a mesh over one axis ``tp``; collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


@dataclass
class Ranks:
    """Every rank's trace of one model."""

    traces: list[Trace]
    axes: list[Axis]

    @property
    def size(self) -> int:
        return len(self.axes)

    def run(self, graphs: Sequence[torch.fx.GraphModule], ids: torch.Tensor) -> list[Any]:
        """Run one graph per rank in lockstep on token ids ``[B, T]``."""
        programs = [
            RankProgram(gm, real_inputs(trace, ids), {axis.group_name: axis.ranks})
            for gm, trace, axis in zip(graphs, self.traces, self.axes, strict=True)
        ]
        return run_lockstep(programs)


def in_threads(work: Callable[[int], Any], ranks: int) -> list[Any]:
    """What ``work(rank)`` gives or raises, each rank in a thread of its own: ranks wait for each other's exchanges."""
    results: list[Any] = [None] * ranks

    def attempt(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=attempt, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def none_failed(results: Sequence[Any]) -> list[Any]:
    """``results``, of which the first error is raised."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return list(results)


def real_inputs(trace: Trace, ids: torch.Tensor) -> list[Any]:
    """Inputs of the traced graph for other token ids: local shards, sizes, the ids themselves."""
    nodes = trace.gm.graph.find_nodes(op="placeholder")
    sizes: dict[Any, int] = {}
    for node, given in zip(nodes, trace.inputs, strict=True):
        if given.kind == "input":
            for size, real in zip(node.meta["val"].shape, ids.shape, strict=True):
                if isinstance(size, torch.SymInt):
                    sizes[size.node.expr] = real
    values: list[Any] = []
    for node, given in zip(nodes, trace.inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            values.append(sizes[value.node.expr])
        elif not isinstance(value, torch.Tensor):
            values.append(None)
        elif given.kind == "input":
            values.append(ids)
        else:
            assert isinstance(given.value, torch.Tensor)
            values.append((given.value._local_tensor if isinstance(given.value, DTensor) else given.value).detach())
    return values
