"""Simulated ranks that share modules, for tests: each rank's graph, its parts of the weights, all run in lockstep."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import models
import torch
import torch.fx as fx
from simulate import real_inputs

from cpcompile.axes import Axis
from cpcompile.capture import Trace, capture
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.module_cuts import SharedModule
from cpcompile.passes.module_parallel import idle_graph, share_modules
from cpcompile.passes.module_roles import ROLES, find_modules
from cpcompile.passes.weight_cuts import cut_tensor

GROUP = "module group"


def group_of(size: int, rank: int) -> Axis:
    return Axis("dp", GROUP, size, rank, tuple(range(size)))


def shared(trace: Trace, axis: Axis, unequal: bool = True, roles: Sequence[str] = ROLES) -> list[SharedModule]:
    found, _ = find_modules(trace.gm, roles)
    return [SharedModule(m.role, m.name, tuple(n.name for n in m.nodes), axis, unequal) for m in found]


@functools.cache
def model(kind: str, layers: int = 3) -> Any:
    return models.build(models.tiny_config(kind, layers=layers))


@functools.cache
def trace_of(kind: str, layers: int = 3) -> Trace:
    return capture(model(kind, layers), input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)


def ids_of(tokens: int, vocabulary: int = models.TINY["vocab_size"]) -> torch.Tensor:
    return torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def run(
    trace: Trace,
    counts: Sequence[int],
    group_tokens: str | int,
    change: Callable[[int, Any], Any] = lambda rank, gm: gm,
    roles: Sequence[str] = ROLES,
    vocabulary: int = models.TINY["vocab_size"],
) -> list[Any]:
    """What every rank returns for its own number of tokens; None on those that have none. ``change`` seeds faults."""
    programs = []
    names = [n.name for n in placeholders(trace.gm)]
    for rank, tokens in enumerate(counts):
        axis = group_of(len(counts), rank)
        modules = shared(trace, axis, group_tokens != "equal", roles)
        graph = share_modules(trace.gm, modules, group_tokens)
        values = dict(zip(names, real_inputs(trace, ids_of(tokens, vocabulary)), strict=True))
        values.update({n: cut_tensor(values[n], cut, rank) for n, cut in graph.cuts.items()})
        gm = graph.gm if tokens else idle_graph(trace.gm, modules, group_tokens)
        inputs = [values[n.name] for n in placeholders(gm)]
        programs.append(RankProgram(change(rank, gm), inputs, {GROUP: axis.ranks}))
    outputs: list[Any] = run_lockstep(programs)
    return [output[0] if tokens else None for output, tokens in zip(outputs, counts, strict=True)]
