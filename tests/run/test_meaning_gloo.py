"""What ranks put in decides: groups that meet the axis and a rank's own numbers, on four gloo ranks, as eager has it.

Through ``torch.compile`` as a user calls it, each model twice with other shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.multiprocessing as mp
from gloo_ranks import joined
from heard import hear
from torch import Tensor, nn

WORLD, H = 4, 8


class Layer(nn.Module):
    """A layer of tensor parallelism, ``between`` whose two sums something else is done to its rows."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        self.between, rank = between, dist.get_rank()

        def weight(*shape: int, seed: int) -> nn.Parameter:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
            return nn.Parameter(values, requires_grad=False)

        self.table, self.last = weight(32, H, seed=1), weight(H, H, seed=2)
        self.a, self.up, self.down = (weight(H, H, seed=10 * k + rank) for k in (1, 2, 3))

    def forward(self, ids: Tensor, *rest: Any) -> Tensor:
        x = nn.functional.embedding(ids, self.table)
        h = torch.tanh(x + funcol.all_reduce(x @ self.a, "sum", dist.group.WORLD))
        h = torch.tanh(self.between(h, torch.relu(h @ self.up), *rest)) @ self.last
        return h + funcol.all_reduce(torch.relu(h @ self.up) @ self.down, "sum", dist.group.WORLD)


def groups() -> dict[str, Any]:
    """A second group of all ranks, and one of the two pairs inside."""
    second = dist.new_group(list(range(WORLD))[::-1])
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {"own": dist.group.WORLD, "second": second, "pairs": pairs[dist.get_rank() // 2]}


def as_eager(
    between: Callable[..., Tensor], calls: list[tuple[Any, ...]], options: dict[str, Any], dynamic: bool | None = None
) -> list[str]:
    """Compare on this rank; returns what was said."""
    model = Layer(between)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="cpcompile", options=options or None, dynamic=dynamic)
    with hear() as heard, torch.no_grad():
        for args in calls:
            if dynamic is None:
                torch._dynamo.mark_dynamic(args[0], 0)
            expected, found = model(*args), compiled(*args)
            assert (found - expected).norm() <= 2e-6 * expected.norm(), (dist.get_rank(), options, args[1:])
    return heard.lines()


def reductions(options: dict[str, Any]) -> None:
    """Every reduction over every group, of what all ranks share and of what is each one's own."""
    of = groups()

    def between(h: Tensor, own: Tensor) -> Tensor:
        for op in ("max", "min", "avg", "product", "sum"):
            for group in of.values():
                scales = [funcol.all_reduce(v.abs().mean(-1, keepdim=True), op, group) for v in (h, own)]
                h = h / (1 + scales[0] + scales[1])
        return h

    said = as_eager(between, [(torch.arange(9),), (torch.arange(6),)], options)
    if options:
        assert any(", rank" in line and not line.split(": ")[-1].startswith("0 of") for line in said), said


def numbers(options: dict[str, Any]) -> None:
    """A number of the rank's own, and a tensor of a size of its own."""
    rank = dist.get_rank()

    def between(h: Tensor, own: Tensor, k: int, mine: Tensor) -> Tensor:
        return h * k + mine.shape[0] * h + torch.ones_like(mine).sum()

    calls = [(torch.arange(9 - step), 2 + step + rank, torch.zeros(20 - 3 * rank - step)) for step in range(2)]
    as_eager(between, calls, options, dynamic=True)


def run_rank(rank: int, folder: str) -> None:
    with joined(rank, WORLD, folder):
        for options in ({}, {"strategy": "tp"}):
            reductions(options)
            numbers(options)
        dist.barrier()


@pytest.mark.ranks
def test_four_ranks(tmp_path: Any) -> None:
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
