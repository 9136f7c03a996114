"""npu MC2: a matmul next to a reduce-scatter or an all-gather -> torch_npu's ops that do both, piece by piece."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from cpcompile.axes import resolve_group
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import (
    NATIVE,
    arguments,
    bound,
    emit,
    erase,
    group_name_of,
    is_contiguous,
    is_wait,
    only_user,
    sizes,
)
from cpcompile.passes.ge_forms import slices
from cpcompile.passes.npu_ops import missing_ops

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
RANKS = (2, 4, 8, 16, 32)  # Atlas A3; A2 takes up to 8
INNER = range(256, 65535)  # sizes of the summed dim that the kernels take


@dataclass(frozen=True)
class NpuMc2:
    """``mm, reduce_scatter`` -> ``npu_mm_reduce_scatter_base``; ``all_gather, mm`` -> ``npu_all_gather_base_mm``.

    Before: a product, padded to a multiple of the ranks, then scattered; or gathered rows, pads cut off, multiplied
    with one or more weights.
    After: rows of zeros appended to the product's operand instead, which gives the same; the pads cut off the product.
    The first product of gathered rows takes the gather with it and hands the rows to the others.

    Args:
        name_of: what the communication library calls a process group, by PyTorch's name of it.

    Refuses, with the reason, groups, dtypes, sizes and layouts that the kernels do not take, and other groups than the
    first: on Atlas A2 all such ops of a model have one.

    Source: torch_npu 2.13's documentation of both ops.
    """

    name_of: Callable[[str], str] = field(default_factory=lambda: hcom_name)
    name = "npu-mc2"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result, first = PassResult(), ""
        for target, fuse in (
            (NATIVE.reduce_scatter_tensor.default, self._scatter),
            (NATIVE.all_gather_into_tensor.default, self._gather),
        ):
            for node in gm.graph.find_nodes(op="call_function", target=target):
                group = group_name_of(node)
                refused = missing_ops(("npu_mm_reduce_scatter_base", "npu_all_gather_base_mm"))
                if first not in ("", group):
                    refused = refused or f"its group is another than {first}: a model's MC2 ops have one"
                refused = refused or fuse(node)
                if refused:
                    result.refuse(node, refused)
                else:
                    result.rewrites, first = result.rewrites + 1, group
        return result.finish(gm)

    def _scatter(self, node: fx.Node) -> str:
        value, reduce_op, ranks, _ = bound(node)
        wait = only_user(node)
        found = _product_behind(value)
        if found is None or wait is None or not is_wait(wait):
            return "what is scattered is not a product alone"
        product, pad = found
        x, weight = product.args
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        refused = _refused(x, weight, ranks) or ("" if reduce_op == "sum" else f"the reduction is {reduce_op!r}")
        if refused:
            return refused
        if pad is not None:
            x = emit(node, aten.cat.default, [x, slices(node, x, 0, pad, 0)], 0)
        elif not _divides(x, ranks):
            return f"its rows are no multiple of {ranks}"
        elif not is_contiguous(x):
            return "its rows are transposed: the kernels take them row by row"
        made = emit(
            node, torch.ops.npu.npu_mm_reduce_scatter_base.default, x, weight, self.name_of(group_name_of(node)), ranks
        )
        made.meta["val"] = node.meta["val"]  # as a meta function that divides sizes would not say
        wait.replace_all_uses_with(made)
        wait.graph.erase_node(wait)
        erase(node, collectives=True)
        return ""

    def _gather(self, node: fx.Node) -> str:
        x, ranks, _ = bound(node)
        wait = only_user(node)
        if wait is None or not is_wait(wait) or x.meta["val"].ndim != 2:
            return "what is gathered is not rows of one dim"
        found = _first_product(wait)
        if found is None:
            return "the gathered rows are not multiplied"
        product, cut = found
        weight = product.args[1]
        assert isinstance(weight, fx.Node)
        refused = _refused(x, weight, ranks)
        if refused:
            return refused
        if weight.op == "call_function" and not all(n.op == "placeholder" for n in weight.all_input_nodes):
            return "its weight is computed"
        own = weight if weight.op == "placeholder" else _copy_before(node, weight)
        name = self.name_of(group_name_of(node))
        both = emit(node, torch.ops.npu.npu_all_gather_base_mm.default, x, own, name, ranks)
        rows = emit(node, operator.getitem, both, 0)
        if cut is not None:  # where that is computed, it may be behind the gather
            rows = emit(product, aten.slice.Tensor, rows, 0, 0, cut)
        product.replace_all_uses_with(rows)
        gathered = emit(node, operator.getitem, both, 1)
        wait.replace_all_uses_with(gathered)
        erase(product)
        if not wait._erased:
            erase(wait, collectives=True)
        if not gathered._erased and not gathered.users:
            gathered.graph.erase_node(gathered)
        return ""


def hcom_name(group_name: str) -> str:
    """What the communication library calls a group; for groups without one, what torchair calls them."""
    group = resolve_group(group_name)
    ranks = torch.distributed.get_process_group_ranks(group)
    if torch.distributed.get_backend(group) == "hccl":
        own: Any = group._get_backend(torch.device("npu"))
        return str(own.get_hccl_comm_name(torch.distributed.get_rank()))
    tag = torch.distributed.distributed_c10d._get_group_tag(group)
    return f"tag={tag};rank_list={','.join(map(str, ranks))}"


def _refused(x: fx.Node, weight: fx.Node, ranks: int) -> str:
    dtype, inner = x.meta["val"].dtype, x.meta["val"].shape[-1]
    if ranks not in RANKS:
        return f"{ranks} ranks: the kernels take {', '.join(map(str, RANKS))}"
    if dtype not in (torch.float16, torch.bfloat16) or weight.meta["val"].dtype != dtype:
        return f"{dtype} times {weight.meta['val'].dtype}: the kernels take float16 and bfloat16"
    if not isinstance(inner, int) or inner not in INNER:
        return f"the summed dim is {inner}: the kernels take {INNER.start} to {INNER.stop - 1}"
    return ""


def _divides(x: fx.Node, ranks: int) -> bool:
    rows = (sizes(x) or (1,))[0]
    return bool((rows / ranks).is_integer)


def _product_behind(value: fx.Node) -> tuple[fx.Node, fx.Node | int | None] | None:
    """The matmul whose rows ``value`` is, and how many rows of zeros were appended to them."""
    pad: fx.Node | int | None = None
    while value.target is not aten.mm.default:
        if value.op != "call_function" or len(value.users) != 1:
            return None
        if value.target is aten.constant_pad_nd.default and pad is None:
            pads = arguments(value)["pad"]
            if arguments(value)["value"] or len(pads) < 4 or pads[:3] != [0, 0, 0] or any(pads[4:]):
                return None
            pad = pads[3]
        elif value.target not in _VIEWS or (sizes(value) or ())[-1:] != (sizes(value.args[0]) or ())[-1:]:
            return None
        value = value.args[0]  # type: ignore[assignment]
    return (value, pad) if len(value.users) == 1 else None


def _first_product(wait: fx.Node) -> tuple[fx.Node, fx.Node | int | None] | None:
    """The first matmul of the gathered rows, through views and one cut, and where that cuts."""
    pending: list[tuple[fx.Node, fx.Node | int | None]] = [(wait, None)]
    while pending:
        value, cut = pending.pop(0)
        for user in value.users:
            if user.target is aten.mm.default and user.args[0] is value:
                return user, cut
            if user.target is aten.slice.Tensor and cut is None:
                given = arguments(user)
                if given["dim"] == 0 and not given["start"] and given["step"] == 1 and value.meta["val"].ndim == 2:
                    pending.append((user, given["end"]))
            elif user.target in _VIEWS and (sizes(user) or ())[-1:] == (sizes(value) or ())[-1:]:
                pending.append((user, cut))
    return None


def _copy_before(node: fx.Node, weight: fx.Node) -> fx.Node:
    """The view ``weight`` of a parameter, once more ahead of ``node``."""
    assert callable(weight.target)
    return emit(node, weight.target, *weight.args, **weight.kwargs)
