"""Data parallelism of models with experts on vLLM's CPU platform, whose communicator lacks two collectives of theirs.

vLLM gathers all replicas' tokens ahead of the experts and scatters their sums behind them. Its communicator for CPUs
raises NotImplementedError for both; here they are, of gloo's even collectives. Both are called within the op of the
experts, which vLLM inlines on CPUs, lengths and all; here it is one op, as on other platforms.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def install() -> None:
    """Patch this process's vLLM."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    CpuCommunicator.all_gatherv = _gather
    CpuCommunicator.reduce_scatterv = _scatter
    MoERunner._select_forward = _one_op


def _one_op(self: Any) -> Any:
    """vLLM's ops, which it registers everywhere."""
    ops = torch.ops.vllm
    return ops.moe_forward if self._shared_experts is None else ops.moe_forward_shared


def _gather(self: Any, given: Tensor | list[Tensor], dim: int = 0, sizes: list[int] | None = None) -> Any:
    """All ranks' rows, one after another; rank r has ``sizes[r]`` of them."""
    if isinstance(given, list):
        return [_gather(self, each, dim, sizes) for each in given]
    assert dim == 0 and sizes is not None and given.shape[0] == sizes[self.rank_in_group]
    mine = given.new_zeros((max(sizes), *given.shape[1:]))
    mine[: given.shape[0]] = given
    parts = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(parts, mine, group=self.device_group)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _scatter(self: Any, given: Tensor, dim: int = -1, sizes: list[int] | None = None) -> Tensor:
    """This rank's rows of the sum over ranks."""
    assert dim == 0 and sizes is not None and given.shape[0] == sum(sizes)
    whole = given.clone()
    dist.all_reduce(whole, group=self.device_group)
    return whole.split(sizes)[self.rank_in_group].clone()
