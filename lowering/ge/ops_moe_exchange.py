"""Experts on several ranks in GE: tokens go to the ranks of their experts, and the experts' results come back.

Prototypes: CANN's ``ops_proto_nn.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats. The documentation
leaves open what the op that dispatches tells the one that combines: no other op may read ``expand_idx`` and the
receive counts. Here they are what the kernels below say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cpcompile.lowering.ge.dtypes import OF_ATTRIBUTE
from cpcompile.lowering.ge.ops_collectives import Talk, exchanged
from cpcompile.lowering.ge.ops_moe import spoil
from cpcompile.lowering.ge.ops_quantised import dynamic_quant
from cpcompile.lowering.ge.signatures import expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"
INFO = 128  # numbers that version 2 keeps about a row: here its rank, token and place among the token's experts


@dataclass(frozen=True)
class Experts:
    """Experts ``[0, count)`` over ``ranks`` ranks of ``group``, as many on each; this one is ``rank``."""

    group: str
    ranks: int
    rank: int
    count: int

    @property
    def local(self) -> int:
        """The experts of each rank."""
        return self.count // self.ranks

    def check(self, expert_ids: Tensor, rows: int, said: Mapping[str, Any]) -> Talk:
        """Refuse what is not part of the reference: tensor parallelism beside, and ranks of a shared expert."""
        expect_default(said, group_tp="", tp_world_size=(0, 1), tp_rank_id=0, expert_shard_type=0)
        expect_default(said, shared_expert_num=(0, 1), shared_expert_rank_num=0)
        size = yield self.group
        expect(size == self.ranks, f"attribute 'ep_world_size': expected {size}, the group's size, found {self.ranks}")
        expect(self.count % size == 0, f"attribute 'moe_expert_num': expected a multiple of {size}, found {self.count}")
        expect(expert_ids.ndim == 2 and len(expert_ids) > 0, f"expert_ids: expected [BS, K], found {expert_ids.shape}")
        expect(len(expert_ids) == rows, f"expected experts of {rows} tokens, found {len(expert_ids)}")
        inside = (expert_ids >= 0) & (expert_ids < self.count)
        expect(bool(inside.all()), f"expert_ids: expected numbers in [0, {self.count})")
        apart = expert_ids.sort(1).values.diff(dim=1) > 0
        expect(bool(apart.all()), "expert_ids: expected different ones for each token")


def active_rows(x_active_mask: Tensor | None, rows: int) -> int:
    """How many of ``rows`` tokens take part: those that ``x_active_mask [BS]`` names, which are the first; else all."""
    if x_active_mask is None:
        return rows
    found = x_active_mask.shape
    expect(list(found) == [rows], f"x_active_mask: expected [{rows}], found {list(found)}")
    count = int(x_active_mask.sum())
    expect(bool(x_active_mask[:count].all()), "x_active_mask: expected active tokens ahead of the others")
    return count


def pairs_per_rank(experts: Experts, expert_ids: Tensor) -> list[list[int]]:
    """How many of this rank's pairs of a token and an expert go to each rank's experts."""
    counts = torch.bincount(expert_ids.reshape(-1).long(), minlength=experts.count)
    return counts.view(experts.ranks, -1).tolist()


def _greeted(experts: Experts, tokens: int, active: int, global_bs: int, per_rank: list[list[int]]) -> Talk:
    """``[ranks, local]``: how many rows each rank sends to this one's experts. Ranks must agree on the tokens."""
    heads = [torch.tensor([experts.rank, tokens, *counts]) for counts in per_rank]
    flat = yield from exchanged(heads, [2 + experts.local] * experts.ranks, experts.group)
    table = flat.view(experts.ranks, -1)
    ranks, sizes = table[:, 0].tolist(), table[:, 1].tolist()
    expect(ranks == list(range(experts.ranks)), f"attribute 'ep_rank_id': expected each rank's place, found {ranks}")
    most = global_bs // experts.ranks
    fits = max(sizes) <= most and global_bs % experts.ranks == 0 if global_bs else len(set(sizes)) == 1
    expect(fits, f"attribute 'global_bs': expected {max(sizes) * experts.ranks} for tokens {sizes}, found {global_bs}")
    alike = len(set(sizes)) == 1 or active == tokens
    expect(alike, f"x_active_mask: expected all tokens where ranks have {sizes}, found {active} of {tokens}")
    return table[:, 2:]


def _dispatched(
    experts: Experts, x: Tensor, expert_ids: Tensor, scales: Tensor | None, active: int, said: Mapping[str, Any]
) -> Talk:
    """The outputs of both versions, and each row's ``[rank, token, place among its experts]``."""
    yield from experts.check(expert_ids, len(x), said)
    expect_default(said, quant_mode=(0, 2), expert_token_nums_type=(0, 1))
    quantised = said["quant_mode"] == 2
    expect(quantised or scales is None, "input 'scales' is for quantised rows; expected it unfed")
    room = (said["global_bs"] or len(x) * experts.ranks) * min(experts.local, expert_ids.shape[1])
    tokens, x, expert_ids = len(x), x[:active], expert_ids[:active]
    chosen, per_rank = expert_ids.shape[1], pairs_per_rank(experts, expert_ids)
    received = yield from _greeted(experts, tokens, active, said["global_bs"], per_rank)
    flat = expert_ids.reshape(-1).long()
    order = flat.sort(stable=True).indices
    rows = x[order // chosen]
    factors = torch.empty(len(rows), 0)
    if quantised:
        rows, factors = dynamic_quant(rows if scales is None else rows.float() * scales[flat[order]])
    origin = torch.stack([torch.full_like(order, experts.rank), order // chosen, order % chosen], 1)
    sent, counts = [sum(part) for part in per_rank], received.sum(1).tolist()
    # From each rank come its rows by expert; here they stand by expert, and within one by rank.
    ranks, local = torch.meshgrid(*(torch.arange(n) for n in received.shape), indexing="ij")
    keys = (local * experts.ranks + ranks).reshape(-1).repeat_interleave(received.reshape(-1))
    arrived = []
    for part in (rows, origin, factors.view(len(rows), int(quantised))):
        whole = yield from rows_exchanged(part, sent, counts, experts.group)
        arrived.append(whole[keys.sort(stable=True).indices])
    per_expert = received.sum(0)
    totals = per_expert if said["expert_token_nums_type"] == 1 else per_expert.cumsum(0)
    ends = received.T.reshape(-1).cumsum(0).to(torch.int32)
    expanded, dynamic = roomy(arrived[0], room), roomy(arrived[2].reshape(-1), room if quantised else 0)
    return expanded, dynamic, arrived[1], totals, ends


def rows_exchanged(rows: Tensor, sent: list[int], received: list[int], group: str) -> Talk:
    """The rows that ranks send this one, by rank, of ``sent[i]`` of its own to rank ``i`` each."""
    width = rows.shape[1]
    flat = yield from exchanged(list(rows.split(sent)), [count * width for count in received], group)
    return flat.view(sum(received), width)


def roomy(rows: Tensor, room: int) -> Tensor:
    """``rows`` and, up to ``room`` of them, rows of anything: NaN."""
    y = rows.new_empty(room, *rows.shape[1:])
    spoil(y)
    y[: len(rows)] = rows
    return y


def among_equals(expert_ids: Tensor) -> Tensor:
    """For each pair of a token and an expert, how many pairs before it have the same expert."""
    flat = expert_ids.reshape(-1)
    same = (flat[:, None] == flat).tril(-1)
    return same.sum(1).to(torch.int32)


@op(
    "MoeDistributeDispatch",
    "T, int32, float32, bool, float32 -> expand_x:any, dynamic_scales:float32, expand_idx:int32, "
    "expert_token_nums:int64, ep_recv_count:int32, tp_recv_count:int32, expand_scales:float32",
    T=_FLOAT,
)
def moe_distribute_dispatch(
    x: Tensor,
    expert_ids: Tensor,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
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
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
) -> Talk:
    """Each row of ``x [BS, H]`` to the ranks of its experts ``expert_ids [BS, K]``: ``[A, H]`` by expert, then rank.

    Rows behind the last are undefined; ``A = BS * ranks * min(K, experts a rank)``, ``global_bs`` in place of the
    first two if ranks' BS differ. ``quant_mode`` 2: int8, with ``dynamic_scales [A]``. Tokens an expert gets are
    counts (``expert_token_nums_type`` 1) or running totals (0). ``expand_idx``: how many of the rank's pairs before
    this one have its expert. Source: REG_OP(MoeDistributeDispatch); aclnnMoeDistributeDispatch. Tensor parallelism,
    masks, shared experts' ranks and other quantisation are refused.
    """
    said = locals()
    expect_unfed(x_active_mask=x_active_mask, expert_scales=expert_scales)
    experts = Experts(group_ep, ep_world_size, ep_rank_id, moe_expert_num)
    expanded, dynamic, _, totals, ends = yield from _dispatched(experts, x, expert_ids, scales, len(x), said)
    nothing = ends.new_empty(0), torch.empty(0)
    return expanded, dynamic, among_equals(expert_ids), totals, ends, *nothing


@op(
    "MoeDistributeDispatchV2",
    "T, int32, float32, bool, float32, int32, int64 -> expand_x:any, dynamic_scales:float32, expand_idx:int32, "
    "expert_token_nums:int64, ep_recv_count:int32, tp_recv_count:int32, expand_scales:float32",
    T=_FLOAT,
)
def moe_distribute_dispatch_v2(
    x: Tensor,
    expert_ids: Tensor,
    scales: Tensor | None = None,
    x_active_mask: Tensor | None = None,
    expert_scales: Tensor | None = None,
    elastic_info: Tensor | None = None,
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
    quant_mode: int = 0,
    global_bs: int = 0,
    expert_token_nums_type: int = 1,
    comm_alg: str = "",
    zero_expert_num: int = 0,
    copy_expert_num: int = 0,
    const_expert_num: int = 0,
    y_dtype: int = 0,
) -> Talk:
    """As MoeDistributeDispatch, but ``expand_idx [A * 128]`` tells of each row where it came from.

    Tokens that ``x_active_mask [BS]`` leaves out, none of them ahead of others, are not sent. ``y_dtype`` is the
    result's, as torchair says it; 0 leaves it to ``quant_mode``. Source: REG_OP(MoeDistributeDispatchV2);
    aclnnMoeDistributeDispatchV2. A mask by choices, experts that compute nothing, copy or are constant,
    fewer ranks than at the start, and the layered algorithm are refused.
    """
    said = locals()
    expect_unfed(expert_scales=expert_scales, elastic_info=elastic_info)
    expect_unfed(performance_info=performance_info)
    expect_default(said, comm_alg=("", "fullmesh"), zero_expert_num=0, copy_expert_num=0, const_expert_num=0)
    experts = Experts(group_ep, ep_world_size, ep_rank_id, moe_expert_num)
    active = active_rows(x_active_mask, len(x))
    expanded, dynamic, origin, totals, ends = yield from _dispatched(experts, x, expert_ids, scales, active, said)
    promised = OF_ATTRIBUTE.get(y_dtype) if y_dtype else expanded.dtype
    expect(expanded.dtype == promised, f"attribute 'y_dtype': expected that of {expanded.dtype}, found {y_dtype}")
    info = roomy(torch.nn.functional.pad(origin.to(torch.int32), (0, INFO - 3)), len(expanded)).reshape(-1)
    nothing = ends.new_empty(0), torch.empty(0)
    return expanded, dynamic, info, totals, ends, *nothing
