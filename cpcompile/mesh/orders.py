"""Rank orders: how a system numbers its ranks, and what it takes a size to be that nobody gave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpcompile.errors import GroupError, nearest

AXES = ("external_dp", "dp", "pp", "cp", "tp")
ATTENTION = ("attn_dp", "attn_cp", "attn_tp")
"""What the tp axis is made of in attention, outermost first."""
EXPERTS = ("moe_dp", "moe_ep", "moe_tp")
"""What a pipeline stage is made of in routed experts, outermost first."""
ALONG = {"dp": ("dp", "attn_dp"), "cp": ("cp", "attn_cp"), "tp": ("attn_tp",), "stage": ("dp", "cp", *ATTENTION)}
"""Which axes the chunks of o_proj, lm_head, embedding and mlp may run along."""


@dataclass(frozen=True)
class Order:
    """How ranks are numbered.

    Args:
        name: what users call it.
        axes: the axes that multiply to the world, outermost first. Where ``dp`` and ``cp`` are not among them, as in
            SGLang, they divide the tp axis: ``dp`` is ``attn_dp`` and ``cp`` is ``attn_cp``.
        module_along: a key of ``ALONG``.
        inferred: the size of attention and the size of experts that take what the other sizes leave.
    """

    name: str
    axes: tuple[str, ...]
    module_along: str = "dp"
    inferred: tuple[str, str] = ("attn_tp", "moe_tp")

    @property
    def dp_inside_tp(self) -> bool:
        """Whether ``dp`` and ``cp`` divide the tp axis instead of multiplying the world."""
        return self.name in ("sglang", "cann-recipes")


ORDERS = {
    order.name: order
    for order in (
        # SGLang initialize_model_parallel: rank in stage = (dp_rank·cp + cp_rank)·attn_tp + attn_tp_rank.
        Order("sglang", ("external_dp", "pp", "tp")),
        # vLLM initialize_model_parallel: ExternalDP × DP × PP × PCP × TP.
        Order("vllm", AXES),
        # cann-recipes-infer CommManager: contiguous groups of each size; moe_ep strided by world/moe_ep.
        Order("cann-recipes", ("external_dp", "pp", "tp"), "stage", ("attn_dp", "moe_ep")),
    )
}


def find_order(order: str | Sequence[str]) -> Order:
    """The order called ``order``, or the one whose axes it lists, outermost first.

    Raises:
        GroupError: no order has that name, or an axis is unknown or listed twice.
    """
    if isinstance(order, str):
        if order not in ORDERS:
            raise GroupError(f"rank order: expected a name or a tuple of axes, found {order!r}{nearest(order, ORDERS)}")
        return ORDERS[order]
    axes = tuple(order)
    for axis in axes:
        if axis not in AXES:
            raise GroupError(f"rank order {axes}: no axis is called {axis!r}{nearest(str(axis), AXES)}")
        if axes.count(axis) > 1:
            raise GroupError(f"rank order {axes}: axis {axis!r} is listed {axes.count(axis)} times; list it once")
    return Order(",".join(axes), axes)
