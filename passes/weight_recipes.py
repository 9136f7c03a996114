"""What becomes of a graph input that ranks share in another way than the model was loaded, carried out on real tensors.

A pass says it as data; whoever holds the parameters carries it out once, before the graph first runs: ``carry_out`` is
a collective of the recipe's ranks for ``Gather`` and ``Sum``, and local for ``Owner`` and ``Part``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cpcompile.axes import Axis
from cpcompile.passes.weight_cuts import Cut, cut_tensor

Collect = Callable[[torch.Tensor, Axis], Sequence[torch.Tensor]]
"""``(this rank's tensor, axis)`` to the tensors of all ranks of ``axis``, in rank order: a collective."""


@dataclass(frozen=True)
class Gather:
    """The parts of all ranks of ``axis``, one after another in rank order along ``dim``.

    Args:
        dim: the dim of the input.
        parts: ranks whose parts they are: the size of ``axis``.
        axis: the ranks.
    """

    dim: int
    parts: int
    axis: Axis


@dataclass(frozen=True)
class Sum:
    """The sum of all ranks of ``axis``: of summands that are added before a sum over more ranks.

    Args:
        axis: the ranks.
    """

    axis: Axis


@dataclass(frozen=True)
class Owner:
    """Rank ``rank`` of ``axis`` keeps the input, row-major; the others drop it and hold no row of it.

    Args:
        rank: a rank within the group.
        axis: the ranks.
    """

    rank: int
    axis: Axis

    @property
    def keeps(self) -> bool:
        """Whether this process is the owner."""
        return self.axis.rank == self.rank


@dataclass(frozen=True)
class Part:
    """This rank's part of an input that all ranks of ``axis`` hold whole.

    Args:
        cut: which part.
        axis: the ranks.
    """

    cut: Cut
    axis: Axis


Recipe = Gather | Sum | Owner | Part


def carry_out(tensor: torch.Tensor, recipe: Recipe, collect: Collect) -> torch.Tensor:
    """What the rewritten graph takes for ``tensor``, in memory of its own. All ranks of the recipe's axis call it.

    Args:
        tensor: this rank's tensor, a shard of a parameter without its DTensor.
        recipe: what the pass asks for.
        collect: see ``Collect``: :func:`collect_over` on real ranks.

    Returns:
        ``Gather``: ``parts`` times as much along ``dim``; ``Sum``: as much; ``Owner``: as much on the owner,
        ``[0, ...]`` elsewhere; ``Part``: the part.
    """
    if isinstance(recipe, Part):
        return cut_tensor(tensor.detach(), recipe.cut, recipe.axis.rank)
    if isinstance(recipe, Owner):
        kept = tensor if recipe.keeps else tensor[:0]
        return kept.detach().clone(memory_format=torch.contiguous_format)
    every = collect(tensor.detach().contiguous(), recipe.axis)
    assert len(every) == recipe.axis.size
    if isinstance(recipe, Gather):
        return torch.cat(list(every), recipe.dim)
    return torch.stack(list(every)).sum(0)


def collect_over(group_of: Callable[[Axis], dist.ProcessGroup]) -> Collect:
    """A ``Collect`` by one all-gather over the process group that ``group_of`` gives for an axis."""

    def collect(tensor: torch.Tensor, axis: Axis) -> Sequence[torch.Tensor]:
        every = [torch.empty_like(tensor) for _ in range(axis.size)]
        dist.all_gather(every, tensor, group=group_of(axis))
        return every

    return collect
