"""The way back from experts on several ranks, in GE: what their rows become is summed by token.

Prototypes: CANN's ``ops_proto_nn.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats. What these ops are
told by the ones that dispatched is said in ``ops_moe_exchange.py``, and checked as far as one rank can.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_collectives import Talk
from cpcompile.lowering.ge.ops_moe_exchange import (
    INFO,
    Experts,
    active_rows,
    among_equals,
    pairs_per_rank,
    roomy,
    rows_exchanged,
)
from cpcompile.lowering.ge.ops_shape import ints
from cpcompile.lowering.ge.signatures import expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"


def _sources(experts: Experts, expand_x: Tensor, ends: Tensor) -> Tensor:
    """The rank that each defined row came from: rows are by expert, and within one by rank, up to ``ends``."""
    bounds = ints(ends, "ep_send_counts")
    blocks = experts.ranks * experts.local
    expect(
        len(bounds) == blocks and bounds == sorted(bounds) and bounds[0] >= 0 and bounds[-1] <= len(expand_x),
        f"ep_send_counts: expected {blocks} ends of {len(expand_x)} rows, found {bounds}",
    )
    counts = torch.tensor(bounds).diff(prepend=torch.zeros(1, dtype=torch.long))
    return torch.arange(experts.ranks).repeat(experts.local).repeat_interleave(counts)


def _combined(
    experts: Experts, rows: Tensor, sources: Tensor, expert_ids: Tensor, expert_scales: Tensor, places: Tensor | None,
    pairs: Tensor | None,
) -> Talk:  # fmt: skip
    """Rows back to the ranks ``sources``, weighted and summed by token.

    Which of a rank's pairs ``n * K + k`` a row is, that rank knows (``places``, in the order in which rows come back),
    or the row's own rank does (``pairs``).
    """
    order = sources.sort(stable=True).indices
    sent = torch.bincount(sources, minlength=experts.ranks).tolist()
    received = [sum(part) for part in pairs_per_rank(experts, expert_ids)]
    back = yield from rows_exchanged(rows[order], sent, received, experts.group)
    if pairs is not None:
        whole = yield from rows_exchanged(pairs[order, None], sent, received, experts.group)
        places = whole[:, 0]
    assert places is not None
    if not len(expert_ids):
        return rows.new_empty(0, rows.shape[1])
    every = list(range(expert_ids.numel()))
    expect(sorted(places.tolist()) == every, f"expected rows of {len(every)} pairs, found {places.tolist()}")
    whole = torch.empty(len(every), rows.shape[1])
    whole[places] = back.float()
    weighted = whole.view(*expert_ids.shape, -1) * expert_scales[..., None]
    return weighted.sum(1).to(rows.dtype)


def _check(experts: Experts, expert_ids: Tensor, expert_scales: Tensor, said: Mapping[str, Any]) -> Talk:
    yield from experts.check(expert_ids, len(expert_scales), said)
    expect_default(said, out_dtype=0, comm_quant_mode=0, group_list_type=0)
    refused = ("tp_send_counts", "activation_scale", "weight_scale", "group_list", "expand_scales")
    expect_unfed(**{name: said[name] for name in refused})
    expect(expert_scales.shape == expert_ids.shape, f"expert_scales: expected {list(expert_ids.shape)}")


@op(
    "MoeDistributeCombine",
    "T, int32, int32, int32, float32, int32, bool, float32, float32, int64, float32 -> x:T",
    T=_FLOAT,
)
def moe_distribute_combine(
    expand_x: Tensor,
    expert_ids: Tensor,
    expand_idx: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    activation_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    group_list: Tensor | None = None,
    expand_scales: Tensor | None = None,
    *,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
) -> Talk:
    """``sum_k expert_scales[n, k] * row of the pair (n, k)``, ``[BS, H]``, of rows that MoeDistributeDispatch made.

    Computed in float32. Source: REG_OP(MoeDistributeCombine); aclnnMoeDistributeCombine.
    """
    said = locals()
    experts = Experts(group_ep, ep_world_size, ep_rank_id, moe_expert_num)
    expect_unfed(x_active_mask=x_active_mask)
    yield from _check(experts, expert_ids, expert_scales, said)
    sources = _sources(experts, expand_x, ep_send_counts)
    expect(torch.equal(expand_idx, among_equals(expert_ids)), "expand_idx is not of a dispatch to these experts")
    places = expert_ids.reshape(-1).sort(stable=True).indices
    rows = expand_x[: len(sources)]
    return (yield from _combined(experts, rows, sources, expert_ids, expert_scales, places, None))


@op(
    "MoeDistributeCombineV2",
    "T, int32, int32, int32, float32, int32, bool, float32, float32, int64, float32, T, int32, T, T, T, T, int64"
    " -> x:T",
    T=_FLOAT,
)
def moe_distribute_combine_v2(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    tp_send_counts: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    activation_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    group_list: Tensor | None = None,
    expand_scales: Tensor | None = None,
    shared_expert_x: Tensor | None = None,
    elastic_info: Tensor | None = None,
    ori_x: Tensor | None = None,
    const_expert_alpha_1: Tensor | None = None,
    const_expert_alpha_2: Tensor | None = None,
    const_expert_v: Tensor | None = None,
    performance_info: Tensor | None = None,
    *,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
    group_tp: str = "",
    tp_world_size: int = 0,
    tp_rank_id: int = 0,
    expert_shard_type: int = 0,
    shared_expert_num: int = 1,
    shared_expert_rank_num: int = 0,
    global_bs: int = 0,
    out_dtype: int = 0,
    comm_quant_mode: int = 0,
    group_list_type: int = 0,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
) -> Talk:
    """As MoeDistributeCombine, of rows that MoeDistributeDispatchV2 made and told of.

    What tokens become that ``x_active_mask [BS]`` leaves out is not said: NaN here.
    ``shared_expert_x`` is refused: the documentation's formula weighs it, its text does not. Source:
    REG_OP(MoeDistributeCombineV2); aclnnMoeDistributeCombineV2.
    """
    said = locals()
    expect_unfed(shared_expert_x=shared_expert_x, elastic_info=elastic_info, ori_x=ori_x)
    expect_unfed(const_expert_alpha_1=const_expert_alpha_1, const_expert_alpha_2=const_expert_alpha_2)
    expect_unfed(const_expert_v=const_expert_v, performance_info=performance_info)
    expect_default(said, comm_alg=("", "fullmesh"), zero_expert_num=0, copy_expert_num=0, const_expert_num=0)
    experts = Experts(group_ep, ep_world_size, ep_rank_id, moe_expert_num)
    yield from _check(experts, expert_ids, expert_scales, said)
    sources = _sources(experts, expand_x, ep_send_counts)
    size = assist_info_for_combine.numel()
    expect(size == len(expand_x) * INFO, f"assist_info_for_combine: expected {len(expand_x) * INFO}, found {size}")
    info = assist_info_for_combine.view(-1, INFO)[: len(sources)].long()
    expect(torch.equal(info[:, 0], sources), "assist_info_for_combine and ep_send_counts are of different dispatches")
    pairs = info[:, 1] * expert_ids.shape[1] + info[:, 2]
    rows, tokens = expand_x[: len(sources)], len(expert_ids)
    active = active_rows(x_active_mask, tokens)
    ids, scales = expert_ids[:active], expert_scales[:active]
    found = yield from _combined(experts, rows, sources, ids, scales, None, pairs)
    return roomy(found, tokens)
