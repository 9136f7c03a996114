"""From the pipeline's graph to one that torchair can convert: the passes that every target on Ascend runs, in order."""

from __future__ import annotations

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
from cpcompile.passes.npu_norms import NpuNorms
from cpcompile.passes.npu_quant import NpuQuant
from cpcompile.passes.npu_rope import NpuRope
from cpcompile.passes.npu_routed_experts import NpuRoutedExperts
from cpcompile.passes.npu_swiglu import NpuSwiglu
from cpcompile.passes.npu_uneven import NpuUneven
from cpcompile.passes.paged_keys import PagedKeys
from cpcompile.passes.recognise_routed_experts import RecogniseRoutedExperts


def ascend_passes(settings: Settings) -> list[GraphPass]:
    """The passes, in order."""
    passes: list[GraphPass] = [RecogniseRoutedExperts(), InlineComposites(), PagedKeys(), NpuAttention()]
    passes += [NpuRoutedExperts(), NpuGating(), NpuNorms(), NpuRope(), NpuSwiglu(), NpuQuant(), NpuKeyCache()]
    if settings.mc2:
        passes.append(NpuMc2())
    if settings.uneven_collectives:
        passes.append(NpuUneven())  # what MC2 has not taken along
    return [*passes, GeForms()]


def to_ascend(gm: fx.GraphModule, settings: Settings) -> Iterator[tuple[str, PassResult]]:
    """Run the passes on ``gm`` in place; yields the name and outcome of each. torch_npu's ops must be there."""
    for each in ascend_passes(settings):
        yield each.name, each(gm)
