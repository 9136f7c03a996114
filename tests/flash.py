"""FlashComm 2 and layer sharding on simulated ranks, for tests: groups by their formula, real tensors by recipes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from conftest import Case, case
from simulate import fake_rank, real_inputs
from torch import nn

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.flash_sites import FlashGroups
from cpcompile.passes.flashcomm2 import FlashGraph, use_flashcomm2
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.module_roles import find_modules
from cpcompile.passes.weight_recipes import Recipe, carry_out
from cpcompile.pipeline import copy_graph

SCATTERED, REDUCED = "scattered", "reduced"
TOLERANCE = 2e-5


def groups_of(tp: Axis, otp: int) -> FlashGroups:
    """The groups of ``tp``'s rank as ``cpcompile.mesh`` says them."""
    kinds = rank_groups(Sizes(world=tp.size, tp=tp.size, flashcomm2_otp=otp))

    def axis(kind: str) -> Axis:
        ranks = kinds[kind].of(tp.rank)
        return Axis(kind, kind, len(ranks), ranks.index(tp.rank), ranks)

    return FlashGroups(tp, axis("flashcomm2_otp"), axis("flashcomm2_odp"))


@functools.cache
def graphs(kind: str, size: int, form: str, batch: int = 1) -> list[fx.GraphModule]:
    """Every rank's graph of a tiny model: tokens placed with reduce-scatters, or all-reduces as they were."""
    ranks = case(kind, size, batch).ranks
    if form == SCATTERED:
        return [c.variants[0].gm for c in ranks.compile(profile="ascend-a3", strategy="tp", verify="off")]
    found = [fx.GraphModule(trace.gm, copy_graph(trace.gm.graph)) for trace in ranks.traces]
    for gm in found:
        Canonicalise()(gm)
    return found


def projections(gm: fx.GraphModule) -> list[str]:
    """Names of the o_proj products of ``gm``, in order."""
    return [node.name for module in find_modules(gm, ["o_proj"])[0] for node in module.nodes]


@functools.cache
def flash(kind: str, size: int, otp: int, form: str, batch: int = 1) -> list[FlashGraph]:
    """Every rank's graph with FlashComm 2."""
    axes = case(kind, size, batch).ranks.axes
    every = graphs(kind, size, form, batch)
    return [use_flashcomm2(gm, projections(gm), groups_of(a, otp)) for gm, a in zip(every, axes, strict=True)]


def inputs(
    cases: Case, graphs_: Sequence[fx.GraphModule], recipes: Sequence[Mapping[str, Recipe]], ids: torch.Tensor
) -> list[list[Any]]:
    """Every rank's inputs for ``ids``, with every rank's recipes carried out on real tensors."""
    named = [
        dict(zip([n.name for n in gm.graph.find_nodes(op="placeholder")], real_inputs(t, ids), strict=True))
        for gm, t in zip(graphs_, cases.ranks.traces, strict=True)
    ]
    return [list(values.values()) for values in carried_out(named, recipes)]


def carried_out(named: Sequence[Mapping[str, Any]], recipes: Sequence[Mapping[str, Recipe]]) -> list[dict[str, Any]]:
    """Every rank's tensors by name, after the recipes."""

    def collect(name: str) -> Callable[[torch.Tensor, Axis], list[torch.Tensor]]:
        return lambda _, axis: [named[r][name] for r in axis.ranks]

    return [
        {n: carry_out(v, of[n], collect(n)) if n in of else v for n, v in values.items()}
        for values, of in zip(named, recipes, strict=True)
    ]


def run(kind: str, size: int, otp: int, form: str, ids: torch.Tensor, graphs_: Sequence[FlashGraph]) -> list[Any]:
    """What every rank's graph returns for ``ids``."""
    cases = case(kind, size, ids.shape[0])
    values = inputs(cases, [g.gm for g in graphs_], [g.recipes for g in graphs_], ids)
    programs = []
    for graph, axis, mine in zip(graphs_, cases.ranks.axes, values, strict=True):
        groups = groups_of(axis, otp)
        names = {a.group_name: a.ranks for a in (axis, groups.otp, groups.odp)}
        programs.append(RankProgram(graph.gm, mine, names))
    return [output[0] for output in run_lockstep(programs)]  # type: ignore[index]


def close(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert found.shape == expected.shape
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


class Rows(nn.Module):
    """``sum over ranks (table[ids] @ (weight * scale * scale_in).T + bias)``: rows and weight differ between ranks."""

    def __init__(self, rank: int, size: int, group: Any, quantised: bool, bias: bool) -> None:
        super().__init__()
        self.group, self.quantised = group, quantised
        generator = torch.Generator().manual_seed(rank)

        def parameter(*shape: int, seeded: torch.Generator = generator) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=seeded), requires_grad=False)

        self.table, self.weight = parameter(32, 12), parameter(8, 12)
        if quantised:
            self.weight = nn.Parameter((self.weight * 20).to(torch.int8), requires_grad=False)
            self.scale = parameter(8, 1, seeded=torch.Generator().manual_seed(size))
            self.scale_in = parameter(1, 12)
        self.bias = parameter(8) if bias else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        weight = self.weight.float() * self.scale * self.scale_in if self.quantised else self.weight
        out = nn.functional.linear(self.table[ids], weight, self.bias)
        return out if self.group is None else funcol.all_reduce(out, "sum", self.group).relu()


@dataclass
class Projection:
    """Every rank's trace of ``Rows``."""

    modules: list[Rows]
    traces: list[Trace]
    axes: list[Axis]

    def copy(self, rank: int) -> fx.GraphModule:
        return fx.GraphModule(self.traces[rank].gm, copy_graph(self.traces[rank].gm.graph))

    def products(self, gm: fx.GraphModule) -> list[str]:
        forms = ("aten.mm.default", "aten.addmm.default", "aten._scaled_mm.default")
        return [n.name for n in gm.graph.nodes if str(n.target) in forms]

    def names(self, *parameters: str) -> set[str]:
        """Names in the graph of ``parameters``."""
        nodes = self.traces[0].gm.graph.find_nodes(op="placeholder")
        return {n.name for n, i in zip(nodes, self.traces[0].inputs, strict=True) if i.name in parameters}

    def inputs(self, rank: int, ids: torch.Tensor) -> dict[str, Any]:
        nodes = self.traces[rank].gm.graph.find_nodes(op="placeholder")
        return dict(zip([n.name for n in nodes], real_inputs(self.traces[rank], ids), strict=True))


@functools.cache
def projection(size: int, quantised: bool = False, bias: bool = False) -> Projection:
    found = Projection([], [], [])
    for rank in range(size):
        with fake_rank(rank, size) as mesh:
            module = Rows(rank, size, mesh.get_group(), quantised, bias)
            trace = capture(module, torch.zeros(10, dtype=torch.long))
            Canonicalise()(trace.gm)
            found.axes.append(axis_of("tp", mesh))
        found.modules.append(module)
        found.traces.append(trace)
    return found


def project(
    made: Projection, otp: int, tokens: int, same: Collection[str]
) -> tuple[list[FlashGraph], list[torch.Tensor], torch.Tensor]:
    """``made`` with FlashComm 2: the graphs, what ranks return for ``tokens`` rows, and what they should."""
    ids = torch.randint(0, 32, (tokens,), generator=torch.Generator().manual_seed(tokens))
    groups = [groups_of(axis, otp) for axis in made.axes]
    same = made.names(*same)
    every = [use_flashcomm2(t.gm, made.products(t.gm), g, same) for t, g in zip(made.traces, groups, strict=True)]
    named = carried_out([made.inputs(r, ids) for r in range(len(every))], [g.recipes for g in every])
    programs = [
        RankProgram(graph.gm, list(values.values()), {a.group_name: a.ranks for a in (g.tp, g.otp, g.odp)})
        for graph, values, g in zip(every, named, groups, strict=True)
    ]
    whole = []
    for module in made.modules:
        module.group = None
        whole.append(module(ids))
    expected = torch.stack(whole).sum(0).relu()
    return every, [output[0] for output in run_lockstep(programs)], expected  # type: ignore[index]
