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
    dtype where that is the wider one.

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
    routed = emit(
        node, npu.npu_moe_init_routing_v2.default, hidden, ids, active_num=_places(ids, chosen),
        expert_num=experts, expert_tokens_num_type=1, expert_tokens_num_flag=True, active_expert_range=[0, experts],
        quant_mode=-1,
    )  # fmt: skip
    rows, places, counts = (emit(node, operator.getitem, routed, index) for index in range(3))
    gated = emit(node, npu.npu_swiglu.default, _grouped(node, rows, given["gate_up"], counts), -1)
    out = _grouped(node, gated, given["down"], counts)
    wide = node.meta["val"].dtype
    if out.meta["val"].dtype != wide:
        out = emit(node, aten._to_copy.default, out, dtype=wide)
    if weights.meta["val"].dtype != wide:
        weights = emit(node, aten._to_copy.default, weights, dtype=wide)
    # Mode 2: places are numbered token by token, as the routing returns them.
    return emit(
        node, npu.npu_moe_finalize_routing.default, out, None, None, None, weights, places, ids, drop_pad_mode=2
    )


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
