"""Routed experts as one op that is row-wise in the tokens, however it sorts them by expert inside.

Composite: a compiler that traces it sees the sort, the grouped products and the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("cpcompile", "FRAGMENT")
_LIBRARY.define(
    "routed_experts(Tensor hidden, Tensor expert_ids, Tensor expert_weights, Tensor gate_up, Tensor down, "
    "int[]? part=None) -> Tensor"
)


def routed_experts(
    hidden: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    part: Sequence[int] | None = None,
) -> Tensor:
    """``sum_k w_k * down_e(silu(gate_e(x)) * up_e(x))``, ``e = expert_ids[n, k]``, for each row ``x = hidden[n]``.

    Args:
        hidden: ``[N, H]``, floating point.
        expert_ids: ``[N, K]`` integers in ``[0, E)``.
        expert_weights: ``[N, K]``, floating point.
        gate_up: ``[E, H, 2 * I]``, the gate first.
        down: ``[E, I, H]``.
        part: ``[first, total]`` where experts are split over ranks: the tables are of experts ``first`` to ``first + E
            - 1`` of ``total``, which ids number, and the others add nothing.

    Returns:
        ``[N, H]`` in the dtype that a weight times a product has.

    Raises:
        ValueError: shapes differ from these.

    Source: ``grouped_mm_experts_forward`` of transformers, step by step.
    """
    if hidden.ndim != 2 or expert_ids.ndim != 2 or expert_ids.shape[0] != hidden.shape[0]:
        raise ValueError(f"expected [N, H] and [N, K], found {list(hidden.shape)} and {list(expert_ids.shape)}")
    if expert_weights.shape != expert_ids.shape:
        raise ValueError(f"expert_weights: expected {list(expert_ids.shape)}, found {list(expert_weights.shape)}")
    rows, chosen, experts = hidden.shape[0], expert_ids.shape[1], gate_up.shape[0]
    if part is not None:
        expert_ids = expert_ids - part[0]
        expert_ids = expert_ids.masked_fill((expert_ids < 0) | (expert_ids >= experts), experts)
    sorted_ids, order = torch.sort(expert_ids.reshape(-1))
    # histc takes floating point alone on CPU, integers alone on CUDA under deterministic algorithms.
    counted = sorted_ids.float() if hidden.device.type == "cpu" else sorted_ids.int()
    offsets = torch.histc(counted, experts, 0, experts - 1).cumsum(0, dtype=torch.int32)
    gate, up = _grouped(hidden[order // chosen], gate_up, offsets).chunk(2, dim=-1)
    out = _grouped(torch.nn.functional.silu(gate) * up, down, offsets)
    if part is not None:  # rows of experts elsewhere are the last, and no product is theirs
        out = out.masked_fill((sorted_ids >= experts).unsqueeze(-1), 0.0)
    out = out * expert_weights.reshape(-1)[order].unsqueeze(-1)
    slots = torch.arange(rows * chosen, device=order.device)
    back = torch.empty_like(order).index_put((order,), slots)
    return out[back].view(rows, chosen, out.shape[1]).sum(1)


def _grouped(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Torch's grouped product is for bfloat16."""
    rows = rows.to(weight.dtype)
    bfloat16 = weight.dtype == torch.bfloat16
    out: Tensor = torch._grouped_mm(rows, weight, offs=offsets) if bfloat16 else grouped_mm(rows, weight, offsets)
    return out


@torch.library.custom_op("cpcompile::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``[S, O]``: rows ``offsets[e - 1] .. offsets[e]`` of ``[S, I]`` times ``weight[e]``, of ``[E, I, O]``."""
    out = rows.new_zeros((rows.shape[0], weight.shape[2]))
    first = 0
    for expert, last in enumerate(offsets.tolist()):
        if last > first:
            torch.mm(rows[first:last], weight[expert], out=out[first:last])
        first = last
    return out


@grouped_mm.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty((rows.shape[0], weight.shape[2]))


_LIBRARY.impl("routed_experts", routed_experts, "CompositeImplicitAutograd")
