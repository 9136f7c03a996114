"""What one mesh axis makes of the variants so far, as data: graphs, plans, proofs, and what is left out."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

from cpcompile.compiled import Variant
from cpcompile.passes.token_layout import Expr
from cpcompile.plan import AxisPlan
from cpcompile.replication import GraphFacts

WHOLE = -1


@dataclass
class Part:
    """What the axis makes of one variant.

    Args:
        variant: the variant before.
        plan: the axis's plan for it; None where there is none.
        pieces: number of an interval of the plan → what the variant becomes there, by ascending token count.
        refused: number of an interval, or ``WHOLE`` → why it runs as it came over this axis: what failed.
        reason: why there is nothing to place; empty where there is a plan, or something failed.
        reduced: the values that the axis's all-reduces make.
    """

    variant: Variant
    plan: AxisPlan | None = None
    pieces: dict[int, Variant] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    reason: str = ""
    reduced: list[str] = field(default_factory=list)

    def plan_without(self, refused: Collection[int]) -> AxisPlan:
        """The plan in which the intervals of these numbers are as the graph came."""
        assert self.plan is not None
        raises = dict.fromkeys(self.reduced, "reduce")
        intervals = [
            replace(i, labels={}, raises=raises, cost_s=i.unchanged_s, bound_s=i.unchanged_s) if n in refused else i
            for n, i in enumerate(self.plan.intervals)
        ]
        return replace(self.plan, intervals=tuple(intervals))


@dataclass
class AxisRewrite:
    """What one axis makes of all variants, as this rank sees it.

    Args:
        parts: one for each variant.
        facts: what was established of every graph input; the rest is of the last variant's graph.
        tokens: the token count as an expression; None where nothing was planned.
        proofs: see ``Compiled.proofs``.
    """

    parts: list[Part] = field(default_factory=list)
    facts: GraphFacts = field(default_factory=lambda: GraphFacts([], frozenset()))
    tokens: Expr | None = None
    proofs: list[dict[str, Any]] = field(default_factory=list)
