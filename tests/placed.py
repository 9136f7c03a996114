"""One layer of plain torch on simulated ranks, step by step: traced, annotated, made a placement graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from canonical_traces import text
from simulate import fake_rank
from torch import Tensor, nn

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.costs import profile
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.placement_problem import PlacementGraph, build
from cpcompile.passes.token_dims import Annotation, annotate

HIDDEN, INNER, VOCAB, PARTS = 8, 24, 32, 12


class Layer(nn.Module):
    """``h = x + sum(x @ first)``, then ``h + sum(relu(norm(h) @ up) @ down)``, from token ids ``[..., T]``.

    ``up`` is split by columns over ``size`` ranks, ``down`` by rows; each rank's ``first`` is a part of a sum.
    """

    def __init__(self, group: Any = None, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        self.group = group
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def own(whole: Tensor, dim: int) -> nn.Parameter:
            return nn.Parameter(whole.chunk(size, dim)[rank].clone(), requires_grad=False)

        self.table = nn.Parameter(weight(VOCAB, HIDDEN), requires_grad=False)
        self.weight = nn.Parameter(weight(HIDDEN), requires_grad=False)
        parts = weight(PARTS, HIDDEN, HIDDEN)
        self.first = nn.Parameter(parts.chunk(size)[rank].sum(0), requires_grad=False)
        self.up, self.down = own(weight(HIDDEN, INNER), 1), own(weight(INNER, HIDDEN), 0)

    def sum(self, x: Tensor) -> Tensor:
        return x if self.group is None else funcol.all_reduce(x, "sum", self.group)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.embedding(ids, self.table)
        h = x + self.sum(x @ self.first)
        normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        return h + self.sum(torch.relu(normed @ self.up) @ self.down)


SHARDS = ("first", "up", "down")


@dataclass
class Annotated:
    """A canonical graph and what is known of it."""

    trace: Trace
    axis: Axis
    known: Annotation

    @property
    def gm(self) -> fx.GraphModule:
        return self.trace.gm

    @property
    def text(self) -> str:
        return text(self.gm)

    def node(self, name: str) -> fx.Node:
        return next(n for n in self.gm.graph.nodes if n.name == name)

    def graph(self, hardware: str = "ascend-a3") -> PlacementGraph:
        return build(self.known, profile(hardware))


def traced(model: Any, size: int, shape: Sequence[int], rank: int = 0) -> tuple[Trace, Axis]:
    """``model(mesh)`` traced on one rank with token ids of ``shape``; every dim that is longer than 1 is symbolic."""
    with fake_rank(rank, size) as mesh:
        return capture(model(mesh), torch.zeros(tuple(shape), dtype=torch.int64)), axis_of("tp", mesh)


@functools.cache
def layer(size: int = 4, shape: tuple[int, ...] = (12,), rank: int = 0, **facts: bool) -> Annotated:
    """The layer, annotated, to be read only; ``facts`` says of inputs, by their names, what is otherwise."""
    return annotated(*traced(lambda mesh: Layer(mesh, rank, size), size, shape, rank), **facts)


def annotated(trace: Trace, axis: Axis, **facts: bool) -> Annotated:
    Canonicalise()(trace.gm)
    nodes = trace.gm.graph.find_nodes(op="placeholder")
    same = {n.name: facts.get(i.name, i.name not in SHARDS) for n, i in zip(nodes, trace.inputs, strict=True)}
    return Annotated(trace, axis, annotate(trace.gm, axis, same))
