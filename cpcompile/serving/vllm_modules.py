"""Weights that ranks share under vLLM: what its configuration allows, and the groups, of its sizes in its rank order.

vLLM's data-parallel ranks have requests of their own. Where the model has experts they step together, an idle rank with
a dummy token, so that the collectives of modules that they share meet. Without experts vLLM runs them apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

from cpcompile import weights
from cpcompile.errors import OptionError
from cpcompile.mesh import rank_groups
from cpcompile.mesh.groups import MODEL
from cpcompile.mesh.process_groups import ProcessGroups
from cpcompile.options import MODULE_SIZES, Options
from cpcompile.passes.row_groups import EQUAL, EXCHANGE
from cpcompile.serving.vllm_settings import check_ranks, sizes_of

_LM_HEAD = "lmhead_tensor_parallel_size"


def module_sizes(options: Options) -> dict[str, Any]:
    """The sizes of ``cpcompile.mesh.Sizes`` for the weights that ``options`` wants shared."""
    found: dict[str, Any] = {MODULE_SIZES[k]: size for k, size in options.finegrained_tp_config.items() if size > 1}
    if options.flashcomm2_oproj_tensor_parallel_size:
        found["flashcomm2_otp"] = options.flashcomm2_oproj_tensor_parallel_size
    return {**found, "shared_weight": True} if options.layer_sharding else found


def check_modules(given: Mapping[str, Any], vllm_config: Any, in_pieces: bool = False) -> None:
    """Check, before anything is loaded, that vLLM can run what the options ``given`` want shared.

    Args:
        given: our options.
        vllm_config: vLLM's configuration.
        in_pieces: the model is compiled in pieces, each without the model's weights.

    Raises:
        OptionError: vLLM has no place for it, or its ranks would not step together.
        GroupError: the sizes do not fit vLLM's.
    """
    options = Options.parse(given)
    modules = module_sizes(options)
    if not modules:
        return
    if in_pieces:
        raise OptionError(
            "modules are shared in mode DYNAMO_TRACE_ONCE alone: vLLM compiles pieces without the model's weights"
        )
    rank_groups(sizes_of(vllm_config.parallel_config, **modules), "vllm")
    for refused, reason in (*_refusals(options, vllm_config), *_release_refusals(options, vllm_config)):
        if refused:
            raise OptionError(reason)


def _refusals(options: Options, config: Any) -> Iterable[tuple[bool, str]]:
    parallel, rows, most = config.parallel_config, options.group_tokens, config.scheduler_config.max_num_batched_tokens
    yield (
        options.finegrained_tp_config.get(_LM_HEAD, 1) > 1,
        f"{_LM_HEAD}: vLLM computes logits outside of the graph that it has compiled: leave it out",
    )
    yield parallel.enable_elastic_ep, "modules cannot be shared with enable_elastic_ep: vLLM's ranks come and go"
    yield (
        parallel.use_ubatching,
        "modules cannot be shared with microbatches (enable_dbo, ubatch_size): two threads would use one group",
    )
    over_dp = any(size > 1 for size in options.finegrained_tp_config.values())
    yield (
        parallel.data_parallel_size > 1 and not config.model_config.is_moe and bool(over_dp or options.layer_sharding),
        "modules cannot be shared over data parallelism without experts: vLLM then runs each rank at its own pace",
    )
    if not over_dp:
        return
    yield rows == EQUAL, "group_tokens='equal': vLLM's data-parallel ranks have tokens of their own: use 'exchange'"
    yield (
        rows == EXCHANGE and config.compilation_config.cudagraph_mode.name != "NONE",
        "group_tokens='exchange' reads a number in each step, which no CUDA graph can: give cudagraph_mode 'NONE', or "
        f"group_tokens={most} (max_num_batched_tokens), to which every step is padded then",
    )
    yield (
        isinstance(rows, int) and rows < most,
        f"group_tokens={rows}, and a step may have max_num_batched_tokens={most}: give at least that, or 'exchange'",
    )


def _release_refusals(options: Options, config: Any) -> Iterable[tuple[bool, str]]:
    """What reads or writes a whole weight outside of the compiled graph."""
    if not options.release_weights:
        return
    why = {
        "speculative decoding, whose drafter may read the embedding": config.speculative_config is not None,
        "LoRA": config.lora_config is not None,
        "enable_sleep_mode": config.model_config.enable_sleep_mode,
    }
    for what, found in why.items():
        yield bool(found), f"release_weights=True cannot go with {what}: leave release_weights out"


def keep_what_others_read(given: Mapping[str, Any], model: nn.Module) -> None:
    """Keep the memory of weights that several modules of ``model`` hold, where the options ``given`` release any.

    One of them may be read outside of the compiled graph: an lm_head that is the embedding, parts of kv_b_proj that
    attention has taken.
    """
    seen: dict[int, tuple[str, torch.Tensor]] = {}
    for module_name, module in model.named_modules() if Options.parse(given).release_weights else ():
        for name, weight in module.named_parameters(module_name, recurse=False):
            first, other = seen.setdefault(weight.untyped_storage()._cdata, (name, weight))
            if first != name:
                weights.keep(weight, f"it is {first}, too")
                weights.keep(other, f"it is {name}, too")


def make_groups(given: Mapping[str, Any], vllm_config: Any) -> dict[str, ProcessGroup]:
    """Kind of group → this rank's, for what the options ``given`` want shared: vLLM's own where the ranks are the same.

    Every rank calls it, after vLLM has made its groups.

    Raises:
        GroupError: the sizes do not fit this world.
        AxisError: another rank was given other sizes, or did not come.
    """
    options = Options.parse(given)
    modules = module_sizes(options)
    if not modules:
        return {}
    parallel, world = vllm_config.parallel_config, torch.distributed.get_world_size()
    groups = rank_groups(sizes_of(parallel, world, **modules), "vllm")
    wanted = [name for name in groups.kinds if name in modules or name == "flashcomm2_odp"]
    found: dict[str, ProcessGroup] = {}
    for theirs, group in _groups_of_vllm(parallel, world).items():
        alike = [k for k in wanted if groups[k].purpose == MODEL and groups[k].groups == groups[theirs].groups]
        found.update(dict.fromkeys(alike, group))
    rest = {name: groups[name] for name in wanted if name not in found}
    made = ProcessGroups(dataclasses.replace(groups, kinds=rest), timeout_s=options.timeout_s)
    return {**found, **{name: made[name] for name in rest}}


def _groups_of_vllm(parallel_config: Any, world: int) -> dict[str, ProcessGroup]:
    from vllm.distributed import get_dp_group, get_tp_group

    groups = {"dp": get_dp_group(), "tp": get_tp_group()}
    check_ranks(parallel_config, world, {kind: group.ranks for kind, group in groups.items()})
    return {kind: group.device_group for kind, group in groups.items()}
