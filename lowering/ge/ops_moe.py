"""Mixture of experts in GE: the router's choice, rows sorted by expert, grouped products, and the sum.

Prototypes: CANN's ``fusion_ops.h`` and ``nn_other.h``, which torchair's ``auto_generated_ge_raw_ops.py`` and
``dynamic_output_ops.py`` repeat. What an op leaves undefined is NaN here, so that whatever reads it shows.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_shape import ints
from cpcompile.lowering.ge.signatures import Tensors, expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"


@op("MoeGatingTopK", "T, T, int32|int64, int32|int64 -> y:T, expert_idx:int32, y2:float32", T=_FLOAT)
def moe_gating_top_k(
    x: Tensor,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    *,
    k: int,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """DeepSeek's router: the ``k`` best experts of the ``k_group`` best groups, and their weights.

    Scores are sigmoids (``norm_type`` 1) or a softmax (0) of ``x [N, E]``; with ``bias`` they choose: groups by their
    best (``group_select_mode`` 0) or the sum of their two best (1). Weights are scores without bias, over their sum
    for sigmoids or ``renorm``, times the factor. ``y2`` are the scores if ``out_flag``. Source: REG_OP(MoeGatingTopK);
    torch_npu.npu_moe_gating_top_k.
    """
    expect_unfed(input_ids=input_ids, tid2eid=tid2eid)
    found = {"group_select_mode": group_select_mode, "norm_type": norm_type, "renorm": renorm}
    expect_default(found, group_select_mode=(0, 1), norm_type=(0, 1), renorm=(0, 1))
    rows, experts = x.shape
    expect(experts % group_count == 0, f"expected {experts} experts in {group_count} equal groups")
    scores = x.float().sigmoid() if norm_type == 1 else x.float().softmax(-1)
    choice = scores if bias is None else scores + bias.float()
    grouped = choice.view(rows, group_count, -1)
    best = grouped.amax(-1) if group_select_mode == 0 else grouped.topk(2, -1).values.sum(-1)
    taken = best.sort(dim=-1, descending=True, stable=True).indices[:, :k_group]
    open_ = torch.zeros(rows, group_count, dtype=torch.bool).scatter_(1, taken, True)
    choice = grouped.masked_fill(~open_[..., None], -torch.inf).view(rows, experts)
    chosen = choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    weights = scores.gather(1, chosen)
    if norm_type == 1 or renorm == 1:
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    y = (weights * routed_scaling_factor).to(x.dtype)
    return y, chosen.to(torch.int32), scores if out_flag else scores.new_empty(0)


@op(
    "MoeInitRoutingV3",
    "T, int32, float32, float32 -> expanded_x:T, expanded_row_idx:int32, expert_tokens_count_or_cumsum:int64, "
    "expanded_scale:float32",
    T=f"int8|{_FLOAT}",
)
def moe_init_routing_v3(
    x: Tensor,
    expert_idx: Tensor,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    *,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: list[int] = [],  # noqa: B006
    row_idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of ``x [N, H]``, one for each of ``expert_idx [N, K]``, by expert; those of no active expert drop out.

    ``expanded_x [N * K, H]``, rows behind the active ones undefined. ``expanded_row_idx``: where the pair ``n * K + k``
    went (``row_idx_type`` 0, -1 if nowhere), or which pair came here (1). Tokens an active expert gets: running totals
    (``expert_tokens_num_type`` 0) or counts (1). ``expanded_scale`` are the rows' scales, if given. Without
    quantisation, capacities and dropping. Source: REG_OP(MoeInitRoutingV3); aclnnMoeInitRoutingV3.
    """
    expect_unfed(offset=offset)
    expect_default({"quant_mode": quant_mode, "drop_pad_mode": drop_pad_mode}, quant_mode=-1, drop_pad_mode=0)
    types = {"expert_tokens_num_type": expert_tokens_num_type, "row_idx_type": row_idx_type}
    expect_default(types, expert_tokens_num_type=(0, 1), row_idx_type=(0, 1))
    rows, chosen = expert_idx.shape
    expect(
        active_num in (-1, 0, rows * chosen),
        f"attribute 'active_num': expected -1 or {rows * chosen}, found {active_num}",
    )
    expect(expert_num > 0, f"attribute 'expert_num': expected the number of experts, found {expert_num}")
    first, last = active_expert_range or [0, expert_num]
    flat = expert_idx.reshape(-1).long()
    expect(bool(((flat >= 0) & (flat < expert_num)).all()), f"expert_idx: expected numbers in [0, {expert_num})")
    active = (flat >= first) & (flat < last)
    order = torch.where(active, flat, expert_num).sort(stable=True).indices
    count = int(active.sum())
    expanded = x[order // chosen]
    spoil(expanded[count:])
    places = torch.full((len(flat),), -1, dtype=torch.int32)
    if row_idx_type == 0:
        places[order[:count]] = torch.arange(count, dtype=torch.int32)
    else:
        places[:count] = order[:count].to(torch.int32)
    counts = torch.bincount(flat[active] - first, minlength=last - first)
    tokens = counts.cumsum(0) if expert_tokens_num_type == 0 else counts
    tokens = tokens if expert_tokens_num_flag else tokens.new_empty(0)
    scales = torch.empty(0, dtype=torch.float32) if scale is None else scale[order // chosen]
    return expanded, places, tokens, scales


def spoil(rows: Tensor) -> None:
    """Make ``rows`` undefined: NaN, or the least integer."""
    rows.fill_(torch.nan if rows.dtype.is_floating_point else torch.iinfo(rows.dtype).min)


@op("MoeFinalizeRoutingV2", "T, int32, T, T, T, S, int32 -> y:T", T=_FLOAT, S=_FLOAT)
def moe_finalize_routing_v2(
    expanded_x: Tensor,
    expanded_row_idx: Tensor,
    x1: Tensor | None = None,
    x2: Tensor | None = None,
    bias: Tensor | None = None,
    scales: Tensor | None = None,
    expert_idx: Tensor | None = None,
    *,
    drop_pad_mode: int = 0,
    k: int = 1,
) -> Tensor:
    """``x1 + x2 + sum_k scales[n, k] * (expanded_x[place] + bias[expert_idx[n, k]])`` for each token.

    The place of a token's ``k``-th row is ``expanded_row_idx[n + k * N]`` (``drop_pad_mode`` 0) or ``[n * K + k]``
    (2); a place of -1 adds nothing. Padded modes are refused. Without scales their number
    is the attribute ``k``. Computed in float32.
    Source: REG_OP(MoeFinalizeRoutingV2); aclnnMoeFinalizeRoutingV2.
    """
    expect_default({"drop_pad_mode": drop_pad_mode}, drop_pad_mode=(0, 2))
    chosen = k if scales is None else scales.shape[1]
    rows = len(expanded_row_idx) // chosen
    expect(
        len(expanded_row_idx) == rows * chosen, f"expected a multiple of {chosen} places, found {len(expanded_row_idx)}"
    )
    expect(scales is None or scales.shape[0] == rows, f"expected scales of {rows} tokens")
    places = expanded_row_idx.long()
    places = places.view(chosen, rows).T if drop_pad_mode == 0 else places.view(rows, chosen)
    expect(bool((places < len(expanded_x)).all()), f"expanded_row_idx: expected places below {len(expanded_x)}")
    total = torch.zeros(rows, expanded_x.shape[1])
    for skip in (x1, x2):
        total = total if skip is None else total + skip.float()
    for i in range(chosen):
        part = expanded_x[places[:, i].clamp(min=0)].float()
        if bias is not None:
            expect(expert_idx is not None, "expected expert_idx with a bias, found none")
            assert expert_idx is not None
            part = part + bias.float()[expert_idx[:, i].long()]
        part = part if scales is None else part * scales[:, i, None].float()
        total = total + torch.where(places[:, i, None] >= 0, part, 0)
    return total.to(expanded_x.dtype)


_OUTPUTS = {0: torch.float16, 1: torch.bfloat16, -1: None}


@op(
    "GroupedMatmul",
    "T, W, any, any, float32, any, any, int64, float32 -> *y:any",
    T=f"int8|{_FLOAT}",
    W=f"int8|{_FLOAT}",
)
def grouped_matmul(
    x: Tensors,
    weight: Tensors,
    bias: Tensors,
    scale: Tensors,
    offset: Tensors,
    antiquant_scale: Tensors,
    antiquant_offset: Tensors,
    group_list: Tensor | None = None,
    per_token_scale: Tensor | None = None,
    *,
    split_item: int = 0,
    dtype: int = 0,
    transpose_weight: bool = False,
    transpose_x: bool = False,
    group_type: int = -1,
    group_list_type: int = 0,
    act_type: int = 0,
    tuning_config: list[int] = [0],  # noqa: B006
) -> list[Tensor]:
    """Groups of rows of ``x[0] [M, K]``, each times its ``weight[0][e]`` of ``[E, K, N]``, as one tensor ``[M, N]``.

    ``group_list`` has the groups' ends (``group_list_type`` 0) or sizes (1). Rows behind the last are undefined. int8
    operands: ``(x @ w + bias) * scale * per_token_scale`` as float16 (``dtype`` 0) or bfloat16 (1). Groups of rows
    alone (``group_type`` 0, ``split_item`` 2 or 3), no activation. Source: REG_OP(GroupedMatmul); aclnnGroupedMatmulV4.
    """
    expect_unfed(offset=offset, antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    found = {"split_item": split_item, "group_type": group_type, "act_type": act_type, "transpose_x": transpose_x}
    expect_default(found, split_item=(2, 3), group_type=0, act_type=0, transpose_x=False)
    expect_default({"group_list_type": group_list_type}, group_list_type=(0, 1))
    expect(len(x) == len(weight) == 1 and group_list is not None, "expected one x, one weight and a group_list")
    assert group_list is not None
    rows, matrices = x[0], weight[0].mT if transpose_weight else weight[0]
    expect(rows.dtype == matrices.dtype, f"expected a weight of {rows.dtype}, found {matrices.dtype}")
    expect(
        matrices.ndim == 3 and rows.ndim == 2,
        f"expected [M, K] and [E, K, N], found {list(rows.shape)} and {list(matrices.shape)}",
    )
    expect(
        rows.shape[1] == matrices.shape[1],
        f"expected inner sizes that agree, found {list(rows.shape)} and {list(matrices.shape)}",
    )
    ends = group_list if group_list_type == 0 else group_list.cumsum(0)
    bounds = [0, *ints(ends, "group_list")]
    expect(len(bounds) == len(matrices) + 1, f"group_list: expected {len(matrices)} groups, found {len(bounds) - 1}")
    expect(
        bounds == sorted(bounds) and bounds[-1] <= len(rows),
        f"group_list: expected ends up to {len(rows)}, found {bounds[1:]}",
    )
    shifts = next((part for part in bias if part.numel()), None)
    factors = next((part for part in scale if part.numel()), None)
    quantised = rows.dtype == torch.int8
    expect(quantised or (factors is None and per_token_scale is None), "scales are for int8 operands")
    kind = _OUTPUTS.get(dtype) if quantised else rows.dtype
    expect(kind is not None, f"attribute 'dtype': expected 0 or 1 for int8 operands, found {dtype}")
    y = torch.full((len(rows), matrices.shape[2]), torch.nan, dtype=kind)
    for e, (first, last) in enumerate(itertools.pairwise(bounds)):
        part = rows[first:last]
        if quantised:
            expect(factors is not None, "expected a scale for int8 operands")
            assert factors is not None
            exact = (part.double() @ matrices[e].double()).float()
            exact = exact if shifts is None else exact + shifts[e].float()
            exact = exact * factors[e].float()
            exact = exact if per_token_scale is None else exact * per_token_scale[first:last, None]
            y[first:last] = exact.to(kind)
        else:
            product = part @ matrices[e]
            y[first:last] = product if shifts is None else (product.float() + shifts[e].float()).to(kind)
    return [y]
