"""The backend as vLLM calls it: with the configuration and the process groups that vLLM has made."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.fx as fx

from cpcompile.backend import cpcompile_backend
from cpcompile.serving.vllm_settings import check_ranks, read_options

log = logging.getLogger("cpcompile")


class Entry:
    """Dynamo's backend for one compiled module of vLLM.

    Args:
        vllm_config: vLLM's configuration, which is not the current one any more when dynamo calls.
        prefix: the module's name in the model, ``""`` for the model itself.

    The class counts the calls of this process and holds the groups of the modules that its rank shares.
    """

    calls: ClassVar[int] = 0
    groups: ClassVar[dict[str, torch.distributed.ProcessGroup]] = {}

    def __init__(self, vllm_config: Any, prefix: str = "") -> None:
        """Remember the configuration."""
        self.vllm_config = vllm_config
        self.prefix = prefix

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        """Compile one dynamo graph."""
        Entry.calls += 1
        config = self.vllm_config
        options = read_options(config.additional_config, config.parallel_config.tensor_parallel_size)
        options |= {"axes": tensor_parallel_axes(config), **({"groups": Entry.groups} if Entry.groups else {})}
        return cpcompile_backend(gm, example_inputs, options=options)

    @classmethod
    def tell_if_not_called_since(cls, calls: int) -> None:
        """Say so if no graph has come in a worker's start-up, before which ``calls`` had."""
        if cls.calls == calls:
            log.warning(
                "cpcompile was NEVER called: vLLM runs this model uncompiled or from a cache "
                "(look for VLLM_USE_BREAKABLE_CUDAGRAPH, VLLM_CPU_CI_ENV, or a model class that vLLM does not compile)"
            )


def tensor_parallel_axes(vllm_config: Any) -> dict[str, Any]:
    """Mesh axis → the process group that vLLM has made for it.

    Raises:
        GroupError: vLLM's ranks are in another order than ours.
    """
    from vllm.distributed import get_tp_group

    tp = get_tp_group()
    check_ranks(vllm_config.parallel_config, torch.distributed.get_world_size(), {"tp": tp.ranks})
    return {"tp": tp.device_group} if tp.world_size > 1 else {}
