"""Weights and buffers between two calls, on two real gloo ranks: written, replaced, of another layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_ranks import in_turn, joined
from heard import hear
from torch import Tensor, nn
from torch._dynamo.utils import counters

from cpcompile.exchange import GroupExchange

WORLD, HIDDEN, INNER, TOLERANCE = 2, 64, 96, 2e-5


@contextmanager
def exchanges() -> Iterator[list[str]]:
    """What this rank exchanges with the other."""
    whats: list[str] = []
    gather = GroupExchange.all_gather

    def noted(self: GroupExchange, obj: object, what: str) -> list[object]:
        whats.append(what)
        return gather(self, obj, what)

    with mock.patch.object(GroupExchange, "all_gather", noted):
        yield whats


class Layer(nn.Module):
    """Norm, column and row linear, all-reduce: plain tensor parallelism over all ranks."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, split: int | None = None) -> nn.Parameter:
            full = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            mine = full if split is None else full.chunk(WORLD, split)[dist.get_rank()]
            return nn.Parameter(mine.clone(), requires_grad=False)

        self.norm = weight(HIDDEN)
        self.up, self.down = weight(INNER, HIDDEN, split=0), weight(HIDDEN, INNER, split=1)

    def forward(self, x: Tensor) -> Tensor:
        inner = nn.functional.rms_norm(x, (HIDDEN,), self.norm) @ self.up.T
        out = inner.relu() @ self.down.T
        dist.all_reduce(out)
        return nn.functional.rms_norm(x + out, (HIDDEN,), self.norm)


class Writing(Layer):
    """Counts its calls, keeps its rows, and scales by what this rank alone wrote at the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("rows", torch.zeros(128, HIDDEN))
        self.register_buffer("mine", torch.zeros(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = super().forward(x) * (1 + self.mine)
        y = super().forward(y)
        self.rows[: x.shape[0]] = y
        self.mine.copy_(self.up.mean(0))
        return self.rows[: x.shape[0]] + self.calls


def rows_of(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend="cpcompile", options=options, fullgraph=True)


def buffers_that_the_graph_writes() -> None:
    """Equal at first, they differ between the ranks from the second call on: no fact was made of the zeros."""
    for options, steps in (({}, (6, 6)), ({"strategy": "tp"}, (6, 6, 9, 4))):
        model = Writing()
        plain, call = copy.deepcopy(model), compiled(model, **options)
        with hear() as said, exchanges() as whats:
            for tokens in steps:
                close(call(rows_of(tokens)), plain(rows_of(tokens)))
            assert "fingerprints of weights" not in whats and said.warnings() == []
            assert set(said.rewritten()) == {"2 of 2" if options else "0 of 2"}
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(model.get_buffer(name), buffer)


def layers_that_share_a_graph() -> None:
    """One exchange for each layer at its first call, none later; a layer whose norm differs runs as it came."""
    layers = [Layer(seed) for seed in range(4)]
    layers[3].norm.mul_(1 + dist.get_rank())
    plain = copy.deepcopy(layers)
    torch._dynamo.reset()
    counters.clear()
    for layer in layers:
        layer.compile(backend="cpcompile", options={"strategy": "tp"})
    with hear() as said, exchanges() as whats:
        for tokens in (6, 6):
            mine = theirs = rows_of(tokens)
            for layer, other in zip(layers, plain, strict=True):
                mine, theirs = layer(mine), other(theirs)
                close(mine, theirs)
            assert counters["stats"]["unique_graphs"] == 1
        assert whats.count("fingerprints of weights") == 3
        (line,) = said.warnings()
        assert 'give replicated=["!' in line and "norm" in line


def weights_that_are_loaded_again() -> None:
    """In place or replaced, the same on both ranks or not: right numbers, without compiling again."""

    def written(layer: Layer, by: float) -> None:
        layer.norm.mul_(by)

    def replaced(layer: Layer, by: float) -> None:
        layer.norm = nn.Parameter(layer.norm * by, requires_grad=False)

    def assigned(layer: Layer, by: float) -> None:
        layer.load_state_dict({k: v * by for k, v in layer.state_dict().items()}, assign=True)

    changes: list[Callable[[Layer, float], None]] = [written, replaced, assigned]
    model = Layer()
    plain, call = copy.deepcopy(model), compiled(model, strategy="tp")
    x, own = rows_of(6), 0.5 + dist.get_rank()
    close(call(x), plain(x))
    with hear() as said, exchanges() as whats:
        for change in changes:
            for by in (2.0, own, 1 / own):
                for each in (model, plain):
                    change(each, by)
                close(call(x), plain(x))
                close(call(x), plain(x))
            assert len(said.warnings()) == 1  # said once for all
        assert whats == ["fingerprints of weights"] * 9
    assert counters["stats"]["unique_graphs"] == 1


SCENARIOS = [buffers_that_the_graph_writes, layers_that_share_a_graph, weights_that_are_loaded_again]


def run_rank(rank: int, folder: str) -> None:
    with joined(rank, WORLD, folder), torch.no_grad():
        in_turn(SCENARIOS)


@pytest.mark.ranks
def test_two_ranks(tmp_path: Any) -> None:
    """One spawn for all scenarios."""
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
