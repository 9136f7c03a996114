"""Models whose graphs have several token counts: micro-batches, a prefix, decode rows beside a prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as fc
from torch import Tensor, nn

WORLD, HIDDEN, INNER, VOCAB, LAYERS, PREFIX = 2, 64, 96, 50, 2, 3


class Model(nn.Module):
    """Tensor-parallel layers ``x + sum(relu(norm(x) @ up) @ down)``, one rank's part."""

    def __init__(self, group: Any, rank: int) -> None:
        super().__init__()
        generator, self.group = torch.Generator().manual_seed(0), group

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) / 8, requires_grad=False)

        def own(whole: Tensor, dim: int) -> nn.Parameter:
            return nn.Parameter(whole.chunk(WORLD, dim)[rank].clone(), requires_grad=False)

        self.table, self.prefix, self.norm = weight(VOCAB, HIDDEN), weight(PREFIX, HIDDEN), weight(HIDDEN)
        self.up = nn.ParameterList([own(weight(INNER, HIDDEN), 0) for _ in range(LAYERS)])
        self.down = nn.ParameterList([own(weight(HIDDEN, INNER), 1) for _ in range(LAYERS)])

    def embed(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.table)

    def layer(self, x: Tensor, number: int) -> Tensor:
        inner = (torch.rms_norm(x, (HIDDEN,), self.norm) @ self.up[number].T).relu()
        return x + fc.all_reduce(inner @ self.down[number].T, "sum", self.group)

    def hidden(self, x: Tensor) -> Tensor:
        for number in range(LAYERS):
            x = self.layer(x, number)
        return x


class Batches(Model):
    """Micro-batches of ids ``[1, T]``, each with a count of its own."""

    def forward(self, *ids: Tensor) -> list[Tensor]:
        return [self.hidden(self.embed(one)) for one in ids]


class Chained(Model):
    """Micro-batches, each of which starts from what those before it give on average, and attends to their rows."""

    def forward(self, *ids: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        for one in ids:
            x = self.embed(one)
            for before in found:
                x = x + torch.softmax(x @ before.transpose(-1, -2), -1) @ before + before.mean(1, keepdim=True)
            found.append(self.hidden(x))
        return found


class LearnedPrefix(Model):
    """``[3 + T]`` rows, of which 3 are the model's own, after layers of the ``[T]`` tokens alone."""

    def forward(self, ids: Tensor) -> list[Tensor]:
        return [self.hidden(torch.cat([self.prefix, self.hidden(self.embed(ids))]))]


class GivenPrefix(Model):
    """``[P + T]`` rows: ids of a prefix come with each call."""

    def forward(self, ids: Tensor, prefix: Tensor) -> list[Tensor]:
        return [self.hidden(torch.cat([self.embed(prefix), self.hidden(self.embed(ids))]))]


class Mixed(Model):
    """A prefill ``[1, T]`` and decode rows ``[D, 1]``: a layer of each on its own, then one of all T + D rows."""

    def forward(self, prefill: Tensor, decode: Tensor) -> list[Tensor]:
        x, y = (self.layer(self.embed(ids), 0).flatten(0, 1) for ids in (prefill, decode))
        both = self.layer(torch.cat([x, y]), 1)
        return [both[: x.shape[0]], both[x.shape[0] :]]


@dataclass(frozen=True)
class Case:
    """A model, shapes of its ids in each of several calls, the dims that change, and its all-reduces."""

    model: Callable[[Any, int], Model]
    calls: Sequence[Sequence[tuple[int, ...]]]
    dims: Sequence[int]
    all_reduces: int


CASES = {
    "two micro-batches": Case(Batches, [[(1, 4096), (1, 3500)], [(1, 4095), (1, 2)]], [1, 1], 4),
    "three, chained": Case(Chained, [[(1, 4096), (1, 31), (1, 250)], [(1, 4093), (1, 33), (1, 251)]], [1, 1, 1], 6),
    "a learned prefix": Case(LearnedPrefix, [[(4096,)], [(4001,)]], [0], 4),
    "a given prefix": Case(GivenPrefix, [[(4096,), (7,)], [(4001,), (10,)]], [0, 0], 4),
    "prefill and decode": Case(Mixed, [[(1, 4096), (33, 1)], [(1, 4001), (8, 1)]], [1, 0], 3),
}


def ids_of(shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(map(sum, shapes)))
    return [torch.randint(0, VOCAB, shape, generator=generator) for shape in shapes]
