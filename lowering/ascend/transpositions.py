"""Transpositions and the reshapes after them, in a form that torchair converts rightly."""

from __future__ import annotations

import torch
import torch.fx as fx

from cpcompile.passes.collectives import emit
from cpcompile.passes.shard_ops import is_row_major

aten = torch.ops.aten

_PERMUTATIONS = (aten.transpose.int, aten.permute.default, aten.t.default)
_VIEWS = (*_PERMUTATIONS, aten.view.default, aten.reshape.default)  # what torchair converts as one chain


def prepare_transpositions(gm: fx.GraphModule) -> None:
    """Rewrite ``gm`` in place, its numbers as they were."""
    _view_before_permutations(gm)
    _copy_before_reshapes(gm)
    gm.recompile()


def _view_before_permutations(gm: fx.GraphModule) -> None:
    """View what is permuted with a dim more, and back, where sizes are symbolic and one is 1.

    Torchair leaves dims of 1 out of the permutation, by a reshape to sizes that it looks up in the views before. Where
    there are none, it packs its int64 constants with an int32 size. A view to the same shape is taken out before that.
    """
    for target in _PERMUTATIONS:
        for node in gm.graph.find_nodes(op="call_function", target=target):
            value = node.args[0]
            sizes = list(value.meta["val"].shape)
            symbolic = any(isinstance(size, torch.SymInt) for size in sizes)
            dim_of_1 = any(isinstance(size, int) and size == 1 for size in sizes)
            told = value.target in _VIEWS and list(value.args[0].meta["val"].shape) != sizes
            if told or not (symbolic and dim_of_1):
                continue
            shape = [
                emit(node, aten.sym_size.int, value, dim) if isinstance(size, torch.SymInt) else size
                for dim, size in enumerate(sizes)
            ]
            wider = emit(node, aten.view.default, value, [1, *shape])
            node.args = (emit(node, aten.view.default, wider, shape), *node.args[1:])


def _copy_before_reshapes(gm: fx.GraphModule) -> None:
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
