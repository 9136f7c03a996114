"""Explain a model of your own: ``cpcompile explain examples/own_model.py:build --axis tp=4 --tokens 8192``.

``build`` is called with a mesh over the axes that the command names, on a fake process group: one process, no
accelerator. The weights say what they are by being DTensors; everything else is declared replicated.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

HIDDEN, INNER, VOCABULARY = 1024, 4096, 512


class Block(nn.Module):
    """A tensor-parallel MLP with residual and norm, weights sharded over ``mesh``."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.norm = nn.Parameter(distribute_tensor(torch.ones(HIDDEN), mesh, [Replicate()]))
        self.up = nn.Parameter(distribute_tensor(torch.randn(INNER, HIDDEN) * 0.02, mesh, [Shard(0)]))
        self.down = nn.Parameter(distribute_tensor(torch.randn(HIDDEN, INNER) * 0.02, mesh, [Shard(1)]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of ``[T, HIDDEN]``, replicated; DTensor's own rules put the all-reduce in."""
        normed = nn.functional.rms_norm(x, (HIDDEN,), self.norm)
        out = nn.functional.linear(nn.functional.silu(nn.functional.linear(normed, self.up)), self.down)
        assert isinstance(out, DTensor)
        return x + out.redistribute(placements=[Replicate()])


class Model(nn.Module):
    """Token ids ``[T]`` to logits ``[T, VOCABULARY]`` through three blocks."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.table = nn.Parameter(distribute_tensor(torch.randn(VOCABULARY, HIDDEN), mesh, [Replicate()]))
        self.blocks = nn.ModuleList(Block(mesh) for _ in range(3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden rows against the table."""
        tokens = DTensor.from_local(ids, self.mesh, [Replicate()], run_check=False)
        x = nn.functional.embedding(tokens, self.table)
        for block in self.blocks:
            x = block(x)
        logits = nn.functional.linear(x, self.table)
        assert isinstance(logits, DTensor)
        return logits.to_local()


def build(mesh: DeviceMesh) -> tuple[nn.Module, tuple[torch.Tensor]]:
    """What ``cpcompile explain`` calls."""
    return Model(mesh).eval(), (torch.zeros(16, dtype=torch.long),)
