"""Recipes on real tensors: what each rank holds afterwards, in memory of its own; over a real process group too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from cpcompile.axes import Axis, axis_of
from cpcompile.passes.weight_recipes import Gather, Owner, Sum, carry_out, collect_over

PARTS = [torch.arange(6.0).reshape(2, 3) + 10 * rank for rank in range(3)]


def axis(rank: int) -> Axis:
    return Axis("odp", "odp", 3, rank, (4, 5, 6))


def collect(_: torch.Tensor, over: Axis) -> list[torch.Tensor]:
    return [PARTS[r - 4] for r in over.ranks]


@pytest.mark.parametrize("dim", [0, 1])
def test_parts_in_rank_order(dim: int) -> None:
    found = carry_out(PARTS[1].T.contiguous().T, Gather(dim, 3, axis(1)), collect)
    assert torch.equal(found, torch.cat(PARTS, dim)) and found.is_contiguous()


def test_summands() -> None:
    assert torch.equal(carry_out(PARTS[2], Sum(axis(2)), collect), PARTS[0] + PARTS[1] + PARTS[2])


@pytest.mark.parametrize("rank", range(3))
def test_one_rank_keeps_it_row_major(rank: int) -> None:
    """The broadcast sends memory as it lies: a transposed weight would arrive transposed."""
    weight = PARTS[0].T.contiguous().T
    found = carry_out(weight, Owner(1, axis(rank)), collect)
    assert found.shape == ((2, 3) if rank == 1 else (0, 3)) and found.is_contiguous()
    assert found.untyped_storage().nbytes() == (24 if rank == 1 else 0)
    assert found.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@pytest.fixture
def alone() -> Iterator[Axis]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield axis_of("tp", dist.group.WORLD)
    dist.destroy_process_group()


def test_over_a_process_group(alone: Axis) -> None:
    asked: list[Axis] = []

    def group_of(over: Axis) -> dist.ProcessGroup:
        asked.append(over)
        return dist.group.WORLD  # type: ignore[return-value]

    found = carry_out(PARTS[0], Gather(0, 1, alone), collect_over(group_of))
    assert torch.equal(found, PARTS[0]) and asked == [alone]
