"""Fused attention ops of PyTorch: where each takes its mask, and which of its results have a row for each query.

``query [B, H, Tq, D]``, ``key [B, H, Tk, D]``, ``value [B, H, Tk, Dv]`` → ``[B, H, Tq, Dv]`` and more. Which op a model
traces to is decided by device, head sizes and mask: on CPU ``_flash_attention_for_cpu`` where keys and values are as
wide (else products and a softmax), on CUDA ``_efficient_attention`` with a mask and ``_flash_attention`` without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.collectives import arguments


@dataclass(frozen=True)
class Fused:
    """One op.

    Args:
        mask: name of its mask argument, broadcast to ``[B, H, Tq, Tk]``; ``""`` if it takes none.
        rows: how many of its first results have a row for each query in dim 2: the others are padded, random state, or
            not computed.
        boolean: whether its mask may be boolean (True: may be seen) and not only added to the scores.
    """

    mask: str
    rows: int
    boolean: bool = False


# Schemas of torch 2.13, aten/src/ATen/native/native_functions.yaml.
FUSED: Mapping[str, Fused] = {
    "aten::scaled_dot_product_attention": Fused("attn_mask", 1, boolean=True),
    "aten::_scaled_dot_product_attention_math": Fused("attn_mask", 2),
    "aten::_scaled_dot_product_flash_attention_for_cpu": Fused("attn_mask", 2),
    "aten::_scaled_dot_product_flash_attention": Fused("", 2),
    "aten::_scaled_dot_product_efficient_attention": Fused("attn_bias", 1),
    "aten::_scaled_dot_product_cudnn_attention": Fused("attn_bias", 1),
    "aten::_scaled_dot_product_fused_attention_overrideable": Fused("attn_bias", 1),
}


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers. What only drops out draws none at probability 0."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    return bool(arguments(node).get("dropout_p", 1.0) != 0)
