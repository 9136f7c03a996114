"""Models that dynamo breaks into several graphs, on two real gloo ranks: right numbers, and told so once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
import torch.multiprocessing as mp
from gloo_ranks import in_turn, joined
from heard import Heard, hear
from test_weights_gloo import WORLD, Layer, close, rows_of
from torch import Tensor, nn


class Deep(nn.Module):
    """Four layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(seed) for seed in range(4)])

    def some(self, x: Tensor, first: int, last: int) -> Tensor:
        for layer in self.layers[first:last]:
            x = layer(x)
        return x


class Whole(Deep):
    def forward(self, x: Tensor) -> Tensor:
        return self.some(x, 0, 4)


class Between(Deep):
    """Two graphs of two layers, and one without any: what comes after the second break."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.some(x, 0, 2)
        torch._dynamo.graph_break()
        x = self.some(x, 2, 4)
        torch._dynamo.graph_break()
        return x * 2


class InALoop(Deep):
    """Dynamo leaves ``forward`` to Python and compiles the layers, which share graphs."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
            torch._dynamo.graph_break()
        return x


class OverOtherGroup(Deep):
    """Its first graph reduces over a group of one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.alone = dist.new_subgroups(1)[0]

    def forward(self, x: Tensor) -> Tensor:
        x = fc.all_reduce(x, "sum", self.alone)
        torch._dynamo.graph_break()
        return self.some(x, 0, 4)


def compiled(kind: type[Deep], tokens: tuple[int, ...] = (6, 9, 4), **options: Any) -> Heard:
    """Compile a model and run it at every number of tokens; what is said."""
    torch._dynamo.reset()
    model = kind()
    call = torch.compile(model, backend="cpcompile", options={"strategy": "tp", **options})
    with hear() as said:
        for count in tokens:
            close(call(rows_of(count)), model(rows_of(count)))
    return said


def at(kind: type[Deep], what: str) -> str:
    """Where the first line of ``kind.forward`` with ``what`` is."""
    source, first = inspect.getsourcelines(kind.forward)
    return f"{__file__}:{first + next(i for i, line in enumerate(source) if what in line)} in forward"


def one_graph_is_not_told() -> None:
    said = compiled(Whole)
    assert said.warnings() == []
    assert set(said.rewritten()) == {"4 of 4"}


def breaks_between_layers() -> None:
    """Each graph is rewritten; that there are several is told once for all graphs and calls."""
    said = compiled(Between)
    (line,) = said.warnings()
    assert (
        f"dynamo breaks the model: 2 graphs of it so far, each compiled alone ({at(Between, 'graph_break')}: " in line
    )
    assert "needs one graph: TORCH_LOGS=graph_breaks" in line
    assert set(said.rewritten()) == {"2 of 2"}


def breaks_in_a_loop() -> None:
    said = compiled(InALoop)
    (line,) = said.warnings()
    assert f"({at(InALoop, 'layer(x)')} runs in Python)" in line
    assert set(said.rewritten()) == {"1 of 1"}


def each_model_is_told() -> None:
    """Another model of the same class is told too; the same one is not again, after a reset."""
    model = Between()
    first, second = (torch.compile(m, backend="cpcompile") for m in (model, copy.deepcopy(model)))
    told = []
    for call in (first, first, second):
        torch._dynamo.reset()
        with hear() as said:
            close(call(rows_of(6)), model(rows_of(6)))
        told.append(len(said.warnings()))
    assert told == [1, 0, 1]


def a_graph_without_use_of_the_axis() -> None:
    """It is left alone and says where the model broke; a whole model would have been given the wrong axis."""
    tp = dist.group.WORLD
    for kind, reason in ((Between, "no sum all-reduce of axis 'tp'"), (OverOtherGroup, "no all-reduce of the graph")):
        said = compiled(kind, (6,), axes={"tp": tp})
        _several, refused = sorted(said.warnings(), key=lambda line: "left alone" in line)
        assert "axis tp is left alone: " in refused and reason in refused
        assert f"; the model comes in several graphs: {at(kind, 'graph_break')}: " in refused


SCENARIOS: list[Callable[[], None]] = [
    one_graph_is_not_told,
    breaks_between_layers,
    breaks_in_a_loop,
    each_model_is_told,
    a_graph_without_use_of_the_axis,
]


def run_rank(rank: int, folder: str) -> None:
    with joined(rank, WORLD, folder), torch.no_grad():
        in_turn(SCENARIOS)


@pytest.mark.ranks
def test_two_ranks(tmp_path: Any) -> None:
    """One spawn for all scenarios."""
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
