"""Reshapes that copy, in a form in which torchair keeps the transposition before them."""

from __future__ import annotations

import torch
import torch.fx as fx

from cpcompile.passes.collectives import emit
from cpcompile.passes.shard_ops import is_row_major

aten = torch.ops.aten


def copy_before_reshapes(gm: fx.GraphModule) -> None:
    """Copy what is not row-major ahead of every ``aten::reshape`` of it, in place.

    Torchair takes a chain of views for one view of its first value, and asks the last value's strides which. A reshape
    that copies has the strides of a value that was never permuted, and the transposition is lost. A copy ends the
    chain, and as it changes the strides, no pass takes it for a no-op.
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.reshape.default):
        value = node.args[0]
        if not is_row_major(value.meta["val"]):
            copy = emit(node, aten.clone.default, value, memory_format=torch.contiguous_format)
            node.args = (copy, *node.args[1:])
    gm.recompile()
