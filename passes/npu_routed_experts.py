"""npu routed experts: experts as one op of this project -> torch_npu's routing, grouped products and SwiGLU."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile import expert_ops  # noqa: F401  registers the op
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase
from cpcompile.passes.npu_ops import missing_ops

aten = torch.ops.aten
NEEDED = ("npu_moe_init_routing_v2", "npu_grouped_matmul", "npu_swiglu", "npu_moe_finalize_routing")


@dataclass(frozen=True)
class NpuRoutedExperts:
    """``cpcompile::routed_experts`` -> ``npu_moe_init_routing_v2``, two ``npu_grouped_matmul``, ``npu_swiglu``,
    ``npu_moe_finalize_routing``.

    Before: experts' outputs of each token, weighted and summed, in one op.
    After: rows sorted by expert and counted, multiplied group by group, and summed back by weight, in the weights'
    dtype where that is the wider one. Of experts that are split over ranks, those of others get no rows: their slots
    weigh 0 and read the first row, and all is 0 where no slot is of an expert here.

    Refuses, with the reason, where torch_npu does not have an op.
    """  # noqa: D205  the first line has the ops

    name = "npu-routed-experts"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.routed_experts.default):
            missing = missing_ops(NEEDED)
            if missing:
                result.refuse(node, missing)
                continue
            node.replace_all_uses_with(_experts(node))
            erase(node)
            result.rewrites += 1
        return result.finish(gm)


def _experts(node: fx.Node) -> fx.Node:
    """``[N, H]``."""
    given, npu = arguments(node), torch.ops.npu
    hidden, ids, weights = given["hidden"], given["expert_ids"], given["expert_weights"]
    experts, chosen = given["gate_up"].meta["val"].shape[0], ids.meta["val"].shape[1]
    if hidden.meta["val"].dtype != given["gate_up"].meta["val"].dtype:
        hidden = emit(node, aten._to_copy.default, hidden, dtype=given["gate_up"].meta["val"].dtype)
    ids = emit(node, aten._to_copy.default, ids, dtype=torch.int32)
    first, total = given["part"] or (0, experts)
    routed = emit(
        node, npu.npu_moe_init_routing_v2.default, hidden, ids, active_num=_places(ids, chosen), expert_num=total,
        expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[first, first + experts],
        quant_mode=-1,
    )  # fmt: skip
    rows, places, counts = (emit(node, operator.getitem, routed, index) for index in range(3))
    out = applied(node, rows, given["gate_up"], given["down"], counts)
    wide = node.meta["val"].dtype
    if out.meta["val"].dtype != wide:
        out = emit(node, aten._to_copy.default, out, dtype=wide)
    if weights.meta["val"].dtype != wide:
        weights = emit(node, aten._to_copy.default, weights, dtype=wide)
    here = None
    if given["part"] is not None:
        here = _between(node, ids, first, first + experts)
        nothing, start = (emit(node, aten.zeros_like.default, like) for like in (weights, places))
        weights = emit(node, aten.where.self, here, weights, nothing)
        places = emit(node, aten.where.self, emit(node, aten.reshape.default, here, [-1]), places, start)
    # Mode 2: places are numbered token by token, as the routing returns them.
    made = emit(
        node, npu.npu_moe_finalize_routing.default, out, None, None, None, weights, places, ids, drop_pad_mode=2
    )
    if here is None:
        return made
    return emit(node, aten.where.self, _any(node, here), made, emit(node, aten.zeros_like.default, made))


def _between(node: fx.Node, ids: fx.Node, first: int, last: int) -> fx.Node:
    below, above = emit(node, aten.lt.Scalar, ids, last), emit(node, aten.ge.Scalar, ids, first)
    return emit(node, aten.logical_and.default, below, above)


def _any(node: fx.Node, here: fx.Node) -> fx.Node:
    """``[N, 1]``: whether a row has a slot that is ``here``. The sum is of numbers, as torchair has no any."""
    count = emit(node, aten.sum.dim_IntList, emit(node, aten._to_copy.default, here, dtype=torch.float32), [1], True)
    return emit(node, aten.gt.Scalar, count, 0)


def applied(node: fx.Node, rows: fx.Node, gate_up: fx.Node, down: fx.Node, counts: fx.Node) -> fx.Node:
    """``[S, H]``: rows by expert, of which each has its ``counts``, through the experts; rows behind are undefined."""
    gated = emit(node, torch.ops.npu.npu_swiglu.default, _grouped(node, rows, gate_up, counts), -1)
    return _grouped(node, gated, down, counts)


def _places(ids: fx.Node, chosen: int) -> int:
    """How many rows there are for experts; -1, which stands for all of them, where it is no constant."""
    rows = ids.meta["val"].shape[0]
    return rows * chosen if isinstance(rows, int) else -1


def _grouped(node: fx.Node, rows: fx.Node, weight: fx.Node, counts: fx.Node) -> fx.Node:
    """Rows of expert ``e`` times ``weight[e]``, where the experts' ``counts`` of rows follow each other."""
    product = emit(
        node, torch.ops.npu.npu_grouped_matmul.default, [rows], [weight], group_list=counts, split_item=3,
        group_type=0, group_list_type=1,
    )  # fmt: skip
    return emit(node, operator.getitem, product, 0)
