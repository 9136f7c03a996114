"""Data parallelism of a model with experts on vLLM's CPU platform, whose communicator lacks two of its collectives.

vLLM brings the tokens of data-parallel ranks together before the experts and scatters the sums behind them by
``all_gatherv`` and ``reduce_scatterv``; on a CPU both raise ``NotImplementedError`` (0.32). Here they are, over gloo.
Both are called from within vLLM's op of the experts, which CPUs have inlined: here it is one, as on other platforms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def install() -> None:
    """Patch this process's vLLM."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    CpuCommunicator.all_gatherv, CpuCommunicator.reduce_scatterv = _all_gatherv, _reduce_scatterv
    MoERunner._select_forward = _opaque


def _opaque(self: Any) -> Any:
    """vLLM's ops, registered by it for CPUs too."""
    op = torch.ops.vllm.moe_forward if self._shared_experts is None else torch.ops.vllm.moe_forward_shared
    return op


def _all_gatherv(self: Any, given: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Rows of every rank, ``sizes[r]`` of rank r, one after another."""
    if isinstance(given, list):
        return [_all_gatherv(self, each, dim, sizes) for each in given]
    assert dim == 0 and sizes is not None and given.shape[0] == sizes[self.rank_in_group]
    padded = torch.zeros(max(sizes), *given.shape[1:], dtype=given.dtype)
    padded[: given.shape[0]] = given
    found = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(found, padded, group=self.device_group)
    return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])


def _reduce_scatterv(self: Any, given: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """This rank's rows of the sum."""
    assert dim == 0 and sizes is not None and given.shape[0] == sum(sizes)
    summed = given.clone()
    dist.all_reduce(summed, group=self.device_group)
    return summed.split(sizes)[self.rank_in_group].clone()
