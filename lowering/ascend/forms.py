"""From the pipeline's graph to one that torchair can convert: the passes that every target on Ascend runs, in order."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch.fx as fx

from cpcompile.lowering.targets import Settings
from cpcompile.passes.base import GraphPass, PassResult
from cpcompile.passes.ge_forms import GeForms
from cpcompile.passes.inline_composites import InlineComposites
from cpcompile.passes.npu_attention import NpuAttention
from cpcompile.passes.npu_gating import NpuGating
from cpcompile.passes.npu_key_cache import NpuKeyCache
from cpcompile.passes.npu_mc2 import NpuMc2
from cpcompile.passes.npu_mla_prolog import NpuMlaProlog
from cpcompile.passes.npu_moe_dispatch import NpuMoeDispatch
from cpcompile.passes.npu_norms import NpuNorms
from cpcompile.passes.npu_quant import NpuQuant
from cpcompile.passes.npu_rope import NpuRope
from cpcompile.passes.npu_routed_experts import NpuRoutedExperts
from cpcompile.passes.npu_swiglu import NpuSwiglu
from cpcompile.passes.npu_uneven import NpuUneven
from cpcompile.passes.paged_keys import PagedKeys
from cpcompile.passes.recognise_routed_experts import RecogniseRoutedExperts

log = logging.getLogger("cpcompile")


def ascend_passes(settings: Settings) -> list[GraphPass]:
    """The passes, in order."""
    passes: list[GraphPass] = [RecogniseRoutedExperts(), InlineComposites(), PagedKeys(), NpuAttention()]
    if settings.moe_dispatch:
        passes.append(NpuMoeDispatch(settings.moe_dispatch))
    passes += [NpuRoutedExperts(), NpuGating(), NpuNorms(), NpuRope(), NpuSwiglu(), NpuQuant()]
    if settings.mla_prolog:
        passes.append(NpuMlaProlog())
    passes.append(NpuKeyCache())  # of what the prolog has not taken along
    if settings.mc2:
        passes.append(NpuMc2())
    if settings.uneven_collectives:
        passes.append(NpuUneven())  # what MC2 has not taken along
    return [*passes, GeForms()]


def to_ascend(gm: fx.GraphModule, settings: Settings) -> Iterator[tuple[str, PassResult]]:
    """Run the passes on ``gm`` in place; yields the name and outcome of each. torch_npu's ops must be there."""
    for each in ascend_passes(settings):
        result = each(gm)
        if isinstance(each, NpuMoeDispatch):  # asked for, and every refusal keeps all rows on all ranks
            for refusal in result.refusals:
                log.warning("cpcompile: experts at %s are not dispatched: %s", refusal.node, refusal.reason)
        yield each.name, result
