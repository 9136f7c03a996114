"""GE forms: ATen ops that torchair cannot convert -> equal ones that it can."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.fx as fx

from cpcompile.axes import resolve_group
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, sizes
from cpcompile.passes.npu_ops import missing_ops
from cpcompile.passes.token_layout import size_expr

aten = torch.ops.aten


@dataclass(frozen=True)
class GeForms:
    """``aten::index_put``, ``aten::squeeze.dims``, ``aten::constant_pad_nd`` -> ``where``, ``squeeze.dim``, ``cat``.

    Before: a scalar put where a mask of the value's leading dims says; rows put where numbers say, as keys are into a
    cache; several dims squeezed at once; rows appended; an all-to-all of
    rows.
    After: a choice between the value and the scalar; ``npu_scatter_nd_update``, whose numbers count from the first; one
    squeeze for each dim, from the last; a tensor of the rows; torchair's all-to-all of elements.

    Refuses, with the reason, other puts, cutting rows off, and parts of unsaid sizes.
    """

    name = "ge-forms"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for node in list(gm.graph.nodes):
            form = FORMS.get(node.target) if node.op == "call_function" else None
            if form is None:
                continue
            made = form(node)
            if isinstance(made, str):
                result.refuse(node, made)
            if isinstance(made, str) or made is node:
                continue
            node.replace_all_uses_with(made)
            erase(node)
            result.rewrites += 1
        return result.finish(gm)


def _put(node: fx.Node) -> fx.Node | str:
    given = arguments(node)
    indices = given["indices"]
    if given["accumulate"] or any(index is None for index in indices):
        return "only what is put at places of the first dims, without accumulation, has a form"
    if given["values"].meta["val"].dtype != given["self"].meta["val"].dtype:
        return "the values have another dtype"
    if all(index.meta["val"].dtype in (torch.int32, torch.int64) for index in indices):
        return _rows_put(node, given["self"], indices, given["values"])
    if len(indices) == 1 and indices[0].meta["val"].dtype == torch.bool:
        return _masked_put(node, given["self"], indices[0], given["values"])
    return "several masks"


def _rows_put(node: fx.Node, source: fx.Node, indices: Sequence[fx.Node], values: fx.Node) -> fx.Node | str:
    """``source[indices] = values``, which are spread where the graph does not say that each place has a row of them."""
    shape, dtype, first = sizes(source) or (), source.meta["val"].dtype, sizes(indices[0]) or ()
    if dtype not in _SCATTERED:
        return f"the values are {dtype}: npu_scatter_nd_update takes {', '.join(map(str, _SCATTERED))}"
    if any(sizes(index) != first for index in indices):
        return "the places' numbers differ in shape"
    if missing := missing_ops(("npu_scatter_nd_update",)):
        return missing
    if sizes(values) != first + shape[len(indices) :]:
        parts = [(indices[0], range(len(first))), (source, range(len(indices), len(shape)))]
        wanted = [_size(node, of, dim) for of, dims in parts for dim in dims]
        values = emit(node, aten.expand.default, values, wanted)
    columns = [_counted(node, index, source, dim) for dim, index in enumerate(indices)]
    places = columns[0] if len(columns) == 1 else emit(node, aten.cat.default, columns, -1)
    return emit(node, torch.ops.npu.npu_scatter_nd_update.default, source, places, values)


def _counted(node: fx.Node, index: fx.Node, source: fx.Node, dim: int) -> fx.Node:
    """``[N, 1]``: ``index``, negative ones counted from the first as well; one for all puts at the same places."""
    size = source.meta["val"].shape[dim]
    for user in index.users:
        if user.meta.get(_COUNTED) == size_expr(size):
            return next(iter(user.users))
    count = _size(node, source, dim)
    negative = emit(node, aten.lt.Scalar, index, 0)
    behind = emit(node, aten.add.Tensor, index, count)
    made = emit(node, aten.where.self, negative, behind, index)
    made.meta[_COUNTED] = size_expr(size)
    return emit(node, aten.unsqueeze.default, made, -1)


def _size(node: fx.Node, of: fx.Node, dim: int) -> fx.Node | int:
    size = of.meta["val"].shape[dim]
    return size if isinstance(size, int) else emit(node, aten.sym_size.int, of, dim)


_COUNTED = "counted from the first"
_SCATTERED = (torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.int8)


def _masked_put(node: fx.Node, source: fx.Node, mask: fx.Node, values: fx.Node) -> fx.Node | str:
    if values.meta["val"].numel() != 1:
        return "values of a mask's places are not where they go: only a scalar can be chosen"
    for _ in range(source.meta["val"].ndim - mask.meta["val"].ndim):
        mask = emit(node, aten.unsqueeze.default, mask, -1)
    return emit(node, aten.where.self, mask, values, source)


def _squeezes(node: fx.Node) -> fx.Node | str:
    given = arguments(node)
    made: fx.Node = given["self"]
    ndim = made.meta["val"].ndim
    for dim in sorted((dim % ndim for dim in given["dim"]), reverse=True):
        made = emit(node, aten.squeeze.dim, made, dim)
    return made


def _appended(node: fx.Node) -> fx.Node | str:
    given = arguments(node)
    made: fx.Node = given["self"]
    pads = given["pad"]
    # Torchair has a converter for constants, which gives GE's PadV3 a value that is not of the tensor's dtype.
    if any(isinstance(pad, int) and pad < 0 for pad in pads):
        return "negative padding"
    for pair, (before, behind) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = made.meta["val"].ndim - 1 - pair
        rows = [slices(node, made, dim, n, given["value"]) if n != 0 else None for n in (before, behind)]
        parts = [part for part in (rows[0], made, rows[1]) if part is not None]
        made = emit(node, aten.cat.default, parts, dim) if len(parts) > 1 else made
    return made


def slices(node: fx.Node, like: fx.Node, dim: int, count: fx.Node | int, value: float) -> fx.Node:
    """Ahead of ``node``, ``count`` slices along ``dim`` that hold ``value``, else as ``like`` is."""
    shape = [_size(node, like, d) for d in range(like.meta["val"].ndim)]
    shape[dim] = count
    return emit(node, aten.new_full.default, like, shape, value)


def _exchanged(node: fx.Node) -> fx.Node | str:
    """Torchair has its own op for this, which counts elements; its GE op's result is one vector."""
    given = arguments(node)
    source: fx.Node = given["input"]
    width = list(source.meta["val"].shape[1:])
    splits = [given["input_split_sizes"], given["output_split_sizes"]]
    if not all(splits) or not all(isinstance(size, int) for size in width):
        return "the sizes of the parts, or of a row, are not said"
    sent, received = ([_times(node, rows, math.prod(width)) for rows in part] for part in splits)
    group = resolve_group(given["group_name"])
    tag, ranks = dist.distributed_c10d._get_group_tag(group), dist.get_process_group_ranks(group)
    flat = emit(node, aten.reshape.default, source, [-1])
    places = [_starts(node, sent), _starts(node, received)]
    exchange = torch.ops.npu_define.all_to_all_single_npu.default
    made = emit(node, exchange, flat, sent, places[0], received, places[1], tag, ranks, len(ranks))
    return emit(node, aten.reshape.default, made, [-1, *width])


def _times(node: fx.Node, rows: fx.Node | int, width: int) -> fx.Node | int:
    return emit(node, operator.mul, rows, width) if isinstance(rows, fx.Node) else rows * width


def _starts(node: fx.Node, counts: Sequence[fx.Node | int]) -> list[fx.Node | int]:
    """Where each part begins, if they lie one after another."""
    found: list[fx.Node | int] = [0]
    for count in counts[:-1]:
        before = found[-1]
        both_known = isinstance(before, int) and isinstance(count, int)
        found.append(before + count if both_known else emit(node, operator.add, before, count))  # type: ignore[operator]
    return found


FORMS: Mapping[object, Callable[[fx.Node], fx.Node | str]] = {
    aten.index_put.default: _put,
    aten.squeeze.dims: _squeezes,
    aten.constant_pad_nd.default: _appended,
    torch.ops._c10d_functional.all_to_all_single.default: _exchanged,
}
