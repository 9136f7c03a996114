"""A hand-written two-layer tensor-parallel model in plain torch, in many spellings that mean the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from conftest import SharedRanks
from simulate import fake_rank
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture

VOCAB, HIDDEN, LATENT, HEADS, INNER, LAYERS = 32, 64, 16, 64, 96, 2


def functional(x: Tensor, group: Any) -> Tensor:
    return funcol.all_reduce(x, "sum", group)


def in_place(x: Tensor, group: Any) -> Tensor:
    dist.all_reduce(x, group=group.get_group())
    return x


def coalesced(x: Tensor, group: Any) -> Tensor:
    return funcol.all_reduce_coalesced([x], "sum", group)[0]


def dtensor(x: Tensor, group: Any) -> Tensor:
    return DTensor.from_local(x, group, [Partial()]).redistribute(group, [Replicate()]).to_local()


def vllm(x: Tensor, group: Any) -> Tensor:
    return torch.ops.vllm.all_reduce(x, group.get_group().group_name)  # type: ignore[no-any-return]


def fused_norm(x: Tensor, weight: Tensor) -> Tensor:
    return nn.functional.rms_norm(x, weight.shape, weight, 1e-6)


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def cast_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.float64)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def as_view(x: Tensor, width: int) -> Tensor:
    return x.contiguous().view(*x.shape[:-1], width // 8, 8).view(*x.shape[:-1], width)


def as_reshape(x: Tensor, width: int) -> Tensor:
    return x.reshape(-1, width).reshape(*x.shape[:-1], width)


def as_flatten(x: Tensor, width: int) -> Tensor:
    return x.unflatten(-1, (width // 8, 8)).flatten(-2)


def sliced(x: Tensor) -> Tensor:
    return x[..., : x.shape[-1]][: x.shape[0]]


def joined(x: Tensor) -> Tensor:
    return torch.cat([x], dim=-1)


def cloned(x: Tensor) -> Tensor:
    return x.clone().view_as(x)


@dataclass(frozen=True)
class Spelling:
    """One way of writing the model down."""

    all_reduce: Callable[[Tensor, Any], Tensor] = functional
    norm: Callable[[Tensor, Tensor], Tensor] = plain_norm
    shape: Callable[[Tensor, int], Tensor] = as_view
    after: Callable[[Tensor], Tensor] = lambda x: x
    residual_first: bool = True
    summed: str = "once"  # a second projection beside the MLP: "once" is AR(a + b), "twice" is AR(a) + AR(b)

    def add(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual + x if self.residual_first else x + residual


class Block(nn.Module):
    """Norm, latent projection, column linear, running sum over the tokens, row linear; norm, gated MLP.

    ``group`` is None for the whole model, else the mesh over which the model's second dims are split.
    """

    def __init__(self, spelling: Spelling = Spelling(), group: Any = None, rank: int = 0, size: int = 1) -> None:
        super().__init__()
        self.spelling, self.group = spelling, group
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int, split: int | None = None) -> nn.Parameter:
            full = torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            return nn.Parameter(full if split is None else full.chunk(size, split)[rank].clone(), requires_grad=False)

        self.table, self.final = weight(VOCAB, HIDDEN), weight(HIDDEN)
        self.layers = nn.ModuleList()
        for _ in range(LAYERS):
            layer = nn.Module()
            layer.norm1, layer.norm2, layer.norm3 = weight(HIDDEN), weight(LATENT), weight(HIDDEN)
            layer.down, layer.up, layer.out = (
                weight(LATENT, HIDDEN),
                weight(HEADS, LATENT, split=0),
                weight(HIDDEN, HEADS, split=1),
            )
            layer.gate, layer.wide, layer.narrow = (
                weight(INNER, HIDDEN, split=0),
                weight(INNER, HIDDEN, split=0),
                weight(HIDDEN, INNER, split=1),
            )
            layer.beside = weight(HIDDEN, INNER, split=1)
            self.layers.append(layer)

    def reduce(self, x: Tensor) -> Tensor:
        return x if self.group is None else self.spelling.after(self.spelling.all_reduce(x, self.group))

    def forward(self, ids: Tensor) -> Tensor:
        say = self.spelling
        x = nn.functional.embedding(ids, self.table)
        for layer in self.layers:
            latent = say.norm(nn.functional.linear(say.norm(x, layer.norm1), layer.down), layer.norm2)
            heads = nn.functional.linear(latent, layer.up)
            # Every token reads all before it, as attention does: no rank can do this on its own rows.
            mixed = say.shape(heads.cumsum(-2) * 0.1, heads.shape[-1])
            x = say.add(x, self.reduce(nn.functional.linear(mixed, layer.out)))
            hidden = say.norm(x, layer.norm3)
            inner = nn.functional.silu(nn.functional.linear(hidden, layer.gate)) * nn.functional.linear(
                hidden, layer.wide
            )
            a, b = nn.functional.linear(inner, layer.narrow), nn.functional.linear(inner, layer.beside)
            x = say.add(x, self.reduce(a) + self.reduce(b) if say.summed == "twice" else self.reduce(a + b))
        return nn.functional.linear(say.norm(x, self.final), self.table)


def trace_block(spelling: Spelling, size: int, lead: Sequence[int] = (1,)) -> SharedRanks:
    """Every rank's trace, with token ids ``[*lead, T]``: rank 0's, with each rank's weights; a test checks that."""
    with fake_rank(0, size) as mesh:
        first = trace_rank(spelling, mesh, 0, size, lead)
    traces, axes = [], []
    for rank in range(size):
        with fake_rank(rank, size) as mesh:
            axes.append(axis_of("tp", mesh))
        weights = dict(Block(spelling, mesh, rank, size).named_parameters())
        inputs = [replace(i, value=weights[i.name]) if i.kind == "parameter" else i for i in first.inputs]
        traces.append(Trace(first.gm, inputs, first.seconds))
    return SharedRanks(traces, axes)


def trace_rank(spelling: Spelling, mesh: Any, rank: int, size: int, lead: Sequence[int] = (1,)) -> Trace:
    return capture(Block(spelling, mesh, rank, size), torch.zeros((*lead, 12), dtype=torch.long))
