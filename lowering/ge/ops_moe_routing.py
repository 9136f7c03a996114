"""Rows of tokens by expert in GE: the first versions of the routing ops, and rows that came from several ranks.

Prototypes: CANN's ``nn_other.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_moe import moe_finalize_routing_v2
from cpcompile.lowering.ge.signatures import expect, expect_default, op

_FLOAT = "float16|bfloat16|float32"


@op("MoeInitRouting", "T, int32, int32 -> expanded_x:T, expanded_row_idx:int32, expanded_expert_idx:int32", T=_FLOAT)
def moe_init_routing(
    x: Tensor, row_idx: Tensor, expert_idx: Tensor, *, active_num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of ``x [N, H]``, one for each of ``expert_idx [N, K]``, by expert, the first ``active_num * K`` of them.

    ``row_idx [N, K]`` numbers the pairs, ``k * N + n``: ``expanded_row_idx [N * K]`` says where each number went, as
    MoeFinalizeRouting reads it. ``expanded_expert_idx`` are the experts in order. Source: REG_OP(MoeInitRouting);
    aclnnMoeInitRouting.
    """
    rows, chosen = expert_idx.shape
    expect(
        row_idx.shape == expert_idx.shape, f"row_idx: expected {list(expert_idx.shape)}, found {list(row_idx.shape)}"
    )
    numbers = row_idx.reshape(-1).long()
    expected = torch.arange(rows * chosen).view(chosen, rows).T.reshape(-1)
    expect(torch.equal(numbers, expected), f"row_idx: expected the number k * {rows} + n of each pair")
    expect(active_num >= 0, f"attribute 'active_num': expected a number of tokens, found {active_num}")
    experts, order = expert_idx.reshape(-1).sort(stable=True)
    places = torch.empty(rows * chosen, dtype=torch.int32)
    places[numbers[order]] = torch.arange(rows * chosen, dtype=torch.int32)
    return x[numbers[order[: active_num * chosen]] % rows], places, experts


@op("MoeComputeExpertTokens", "int32 -> total_rows_before_expert:int32")
def moe_compute_expert_tokens(sorted_experts: Tensor, *, num_experts: int) -> Tensor:
    """How many rows the experts up to each have, of rows in order of their experts.

    Source: REG_OP(MoeComputeExpertTokens); aclnnMoeComputeExpertTokens.
    """
    inside = (sorted_experts >= 0) & (sorted_experts < num_experts)
    expect(bool(inside.all()), f"sorted_experts: expected numbers in [0, {num_experts})")
    expect(bool((sorted_experts.diff() >= 0).all()), "sorted_experts: expected them in order")
    return torch.bincount(sorted_experts.long(), minlength=num_experts).cumsum(0).to(torch.int32)


@op("MoeFinalizeRouting", "T, T, T, T, T, int32, int32 -> y:T", T=_FLOAT)
def moe_finalize_routing(
    expanded_x: Tensor,
    x1: Tensor,
    x2: Tensor | None,
    bias: Tensor,
    scales: Tensor,
    expanded_row_idx: Tensor,
    expanded_expert_idx: Tensor,
) -> Tensor:
    """As MoeFinalizeRoutingV2 in its mode 0, with all operands but ``x2``, and ``expanded_expert_idx [N, K]``.

    Source: REG_OP(MoeFinalizeRouting); aclnnMoeFinalizeRouting.
    """
    return moe_finalize_routing_v2(expanded_x, expanded_row_idx, x1, x2, bias, scales, expanded_expert_idx)


@op(
    "MoeReRouting",
    "T, C, float32 -> permute_tokens:T, permute_per_token_scales:float32, permute_token_idx:int32, expert_token_num:C",
    T=f"int8|{_FLOAT}",
    C="int32|int64",
)
def moe_re_routing(
    tokens: Tensor,
    expert_token_num_per_rank: Tensor,
    per_token_scales: Tensor | None = None,
    *,
    expert_token_num_type: int = 1,
    idx_type: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows ``tokens [A, H]`` by rank, and within one by expert, put by expert, and within one by rank.

    ``expert_token_num_per_rank [N, E]`` are their numbers; ``permute_token_idx [A]`` says where a row came from.
    Without scales theirs are anything, here NaN.
    Source: REG_OP(MoeReRouting); its documentation admits the default of both attributes only.
    """
    expect_default({"num": expert_token_num_type, "idx": idx_type}, num=1, idx=0)
    counts = expert_token_num_per_rank.long()
    expect(int(counts.sum()) == len(tokens), f"expected {len(tokens)} rows in all, found {counts.tolist()}")
    experts = torch.arange(counts.shape[1]).repeat(counts.shape[0]).repeat_interleave(counts.reshape(-1))
    order = experts.sort(stable=True).indices
    scales = torch.full((len(tokens),), torch.nan) if per_token_scales is None else per_token_scales[order]
    numbers = counts.sum(0).to(expert_token_num_per_rank.dtype)
    return tokens[order], scales, order.to(torch.int32), numbers
