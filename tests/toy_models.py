"""A toy tensor-parallel model that traces in a second, and functions that the command line must refuse or take."""

import torch
import torch.distributed._functional_collectives as funcol
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

HIDDEN, VOCAB = 64, 32


def replicated(value: torch.Tensor, mesh: DeviceMesh) -> nn.Parameter:
    """A DTensor, so that it is known to be the same on every rank; shards here are plain tensors."""
    return nn.Parameter(DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim))


class Block(nn.Module):
    """``x + all_reduce(relu(norm(x) @ up) @ down)``; ``up`` ``[H, 4H/n]`` and ``down`` ``[4H/n, H]`` are shards."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.group = mesh.get_group()
        self.norm = replicated(torch.ones(HIDDEN), mesh)
        self.up = nn.Parameter(torch.randn(HIDDEN, 4 * HIDDEN // mesh.size()))
        self.down = nn.Parameter(torch.randn(4 * HIDDEN // mesh.size(), HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.norm.to_local()
        return x + funcol.all_reduce(torch.relu(normed @ self.up) @ self.down, "sum", self.group)


class Toy(nn.Module):
    """Token ids ``[B, T]`` → ``[B, T, H]``."""

    def __init__(self, mesh: DeviceMesh, layers: int = 2) -> None:
        super().__init__()
        self.embed = replicated(torch.randn(VOCAB, HIDDEN), mesh)
        self.layers = nn.Sequential(*(Block(mesh) for _ in range(layers)))

    def forward(self, ids: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return self.layers(nn.functional.embedding(ids, self.embed.to_local())) * scale


def ids() -> torch.Tensor:
    return torch.zeros(1, 16, dtype=torch.int64)


def toy(mesh):
    return Toy(mesh["tp"]), (ids(),)


def with_kwargs(mesh):
    return Toy(mesh["tp"], layers=1), [ids()], {"scale": 2.0}


def on_two_axes(mesh):
    return nn.Sequential(Toy(mesh["tp"], layers=1), Block(mesh["ep"])), (ids(),)


def no_mesh():
    return nn.Embedding(VOCAB, HIDDEN), (ids(),)


def only_a_model(mesh):
    return Toy(mesh["tp"])


def args_without_a_tuple(mesh):
    return Toy(mesh["tp"]), ids()


def raises():
    raise RuntimeError("no weights here\nsecond line")


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1


def untraceable():
    return Branching(), (ids(),)
