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

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.exchange import LocalExchange
from cpcompile.options import Options
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.pipeline import compile_graph


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

    def compile(self, **options: Any) -> list[Compiled]:
        """Compile every rank's graph, each in a thread, with real exchanges between them."""
        exchanges = LocalExchange.ring(self.size)
        results: list[Any] = [None] * self.size

        def work(rank: int) -> None:
            trace, axis = self.traces[rank], self.axes[rank]
            gm = torch.fx.GraphModule(trace.gm, _copy(trace.gm))
            try:
                results[rank] = compile_graph(
                    gm, trace.inputs, Options.parse(options), lambda _: exchanges[rank], [axis]
                )
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def run(self, graphs: Sequence[torch.fx.GraphModule], ids: torch.Tensor) -> list[Any]:
        """Run one graph per rank in lockstep on token ids ``[B, T]``."""
        programs = [
            RankProgram(gm, real_inputs(trace, ids), {axis.group_name: axis.ranks})
            for gm, trace, axis in zip(graphs, self.traces, self.axes, strict=True)
        ]
        return run_lockstep(programs)


def _copy(gm: torch.fx.GraphModule) -> torch.fx.Graph:
    from cpcompile.pipeline import copy_graph

    return copy_graph(gm.graph)


def trace_ranks(make: Callable[[DeviceMesh], Any], size: int, example: torch.Tensor) -> Ranks:
    """Trace ``make(mesh)`` on every rank of a fake group of ``size`` with example token ids."""
    traces, axes = [], []
    for rank in range(size):
        with fake_rank(rank, size) as mesh:
            model = make(mesh)
            traces.append(capture(model, input_ids=example, use_cache=False))
            axes.append(axis_of("tp", mesh))
    return Ranks(traces, axes)


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
