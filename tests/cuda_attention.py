"""``scaled_dot_product_attention`` as PyTorch's dispatch spells it in a graph on CUDA, which a processor's never shows.

From aten/src/ATen/native/transformers/attention.cpp of PyTorch 2.11 and 2.13: a mask of booleans becomes what is added
to the scores (of cuDNN's kernel with a finite number for what is hidden), and the memory-efficient kernel's is padded
and cut, so that its rows are aligned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import Tensor, nn

from cpcompile.passes.collectives import arguments
from cpcompile.runner import copy_graph

aten = torch.ops.aten
HIDDEN = {"cudnn": -65504.0, "efficient": float("-inf")}
OPS = {f"_scaled_dot_product_{kernel}_attention": kernel for kernel in HIDDEN}


@contextmanager
def on_cuda(kernel: str) -> Iterator[None]:
    """Traces made in here have the op of ``kernel``: "cudnn" or "efficient"."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            zero = torch.scalar_tensor(0.0, dtype=query.dtype)
            attn_mask = torch.where(attn_mask.logical_not(), HIDDEN[kernel], zero)
        if kernel == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(
                query, key, value, attn_mask, False, dropout_p, is_causal, False, scale=scale
            )[0]
        if attn_mask is not None:
            keys = attn_mask.shape[-1]
            attn_mask = nn.functional.pad(attn_mask, (0, 16 - keys % 16))[..., :keys]
            attn_mask = attn_mask.expand(*query.shape[:2], query.shape[2], keys)
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, False, dropout_p, is_causal, scale=scale
        )[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "scaled_dot_product_attention", attention)
        yield


def as_on_cpu(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that runs on a processor: CUDA's kernels, of which one result is read, as products and a softmax."""
    copy, attention = fx.GraphModule(gm, copy_graph(gm.graph)), aten.scaled_dot_product_attention.default
    for node in [n for n in copy.graph.nodes if kernels_in_node(n)]:
        named = arguments(node)
        given = [named[n] for n in ("query", "key", "value", "attn_bias", "dropout_p", "is_causal")]
        with copy.graph.inserting_before(node):
            new = copy.graph.call_function(attention, tuple(given), {"scale": named["scale"]})
        (first,) = node.users
        first.replace_all_uses_with(new)
        copy.graph.erase_node(first)
        copy.graph.erase_node(node)
    for node in copy.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default  # the memory-efficient kernel's results have other strides
    copy.recompile()
    return copy


def calls_in(gm: fx.GraphModule) -> list[dict[str, Any]]:
    """Arguments of each call of the kernels."""
    return [arguments(n) for n in gm.graph.nodes if kernels_in_node(n)]


def kernels_in_node(node: fx.Node) -> set[str]:
    return {OPS[name]} if (name := getattr(node.target, "_opname", "")) in OPS else set()


def kernels_in(gm: fx.GraphModule) -> set[str]:
    """Which of the kernels a graph calls."""
    return set().union(*map(kernels_in_node, gm.graph.nodes))
