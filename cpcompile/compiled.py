"""The outcome of the pipeline: which graph runs for which token count, and how each came about."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import sympy
import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.module_tp import Sharing
from cpcompile.passes.all_reduce_sites import Site
from cpcompile.passes.describe import describe, outline
from cpcompile.passes.indexer_costs import is_indexer, least_sharded
from cpcompile.passes.placement_problem import PlacementGraph
from cpcompile.passes.token_layout import Expr, counted, size_expr
from cpcompile.plan import AxisPlan, Interval, Plan
from cpcompile.replication import InputFact
from cpcompile.report import Collective, PassRun, Report
from cpcompile.runner import Runner


@dataclass
class Variant:
    """The graph to run for token counts in ``[first, last]``."""

    first: int
    last: int | None
    gm: fx.GraphModule
    steps: list[Step] = field(default_factory=list)
    same: frozenset[str] = frozenset()  # nodes that are known to be the same on all ranks of the last step's axis
    refused: dict[str, str] = field(default_factory=dict)  # axis name → why it is not rewritten over that axis

    @property
    def span(self) -> str:
        """Its token counts, in words."""
        return f"T >= {self.first}" if self.last is None else f"T in [{self.first}, {self.last}]"

    @property
    def typical(self) -> int:
        """A token count to state this variant's report for: what it was planned at, where that lies in its range."""
        at = self.steps[0].interval.at if self.steps else self.first
        return at if at >= self.first and (self.last is None or at <= self.last) else self.first


@dataclass
class Step:
    """How one axis was rewritten in a variant: by ``interval``, which is one of ``plan``."""

    graph: PlacementGraph
    interval: Interval
    gathers: list[list[str]]
    plan: AxisPlan

    def describe(self, tokens: int, base: Expr | None) -> list[Collective]:
        """Rows of this axis at ``tokens`` tokens of the model, whose symbol is ``base``."""
        count = self.graph.known.tokens
        return describe(
            self.graph, self.interval, count_at(count, base, tokens), self.gathers, self._break_evens(count, base)
        )

    def _break_evens(self, count: Expr | None, base: Expr | None) -> dict[str, int]:
        """Indexer → the fewest tokens of the model at which the plan shards it; none for static T and if at every T."""
        if count is None or count.is_number:
            return {}
        names = [node.name for node in self.graph.number if is_indexer(node)]
        least = {name: least_sharded(self.plan.intervals, name) for name in names}
        return {name: first_tokens(count, base, t) for name, t in least.items() if t}


def count_at(count: Expr | None, base: Expr | None, tokens: int) -> int:
    """An axis's token count at ``tokens`` tokens of the model: after context parallelism, those of a shard."""
    if count is None or base is None or count == base:
        return tokens
    return int(counted(count, base, sympy.Integer(tokens)).subs(base, tokens))


def first_tokens(count: Expr | None, base: Expr | None, least: int) -> int:
    """The fewest tokens of the model at which an axis's count, which grows with them, is at least ``least``."""
    high = 1
    while count_at(count, base, high) < least:
        high *= 2
    return bisect.bisect_left(range(high), least, key=lambda t: count_at(count, base, t))


@dataclass
class Compiled:
    """The outcome of the pipeline.

    Args:
        original: the graph as it came.
        variants: by ascending token count, without gaps.
        plan: the plan of every axis.
        tokens: the token count as an expression, None where nothing was placed.
        runner: what ran, in order, and what failed.
        facts: per axis name, what was established of every graph input.
        proofs: one entry per proof: axis, interval, whether it held, and the failures.
        refused: axis name → why it was left alone.
        sites: every all-reduce of the canonical graph.
        axes: the mesh axes, in the order in which they are placed.
        sharing: the modules that ranks share, None where none is asked for.
    """

    original: fx.GraphModule
    variants: list[Variant]
    plan: Plan
    tokens: Expr | None = None
    runner: Runner = field(default_factory=Runner)
    facts: dict[str, list[InputFact]] = field(default_factory=dict)
    proofs: list[dict[str, Any]] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    sites: list[Site] = field(default_factory=list)
    axes: list[Axis] = field(default_factory=list)
    sharing: Sharing | None = None

    @property
    def passes(self) -> list[PassRun]:
        """What ran, in order."""
        return self.runner.runs

    @property
    def rewritten(self) -> bool:
        """Whether any variant differs from the graph as it came."""
        return any(v.steps for v in self.variants)

    @property
    def rests_on_facts(self) -> bool:
        """Whether a graph would be wrong if an input differed between ranks that was found to be the same on all."""
        placed = any(not step.interval.unchanged for v in self.variants for step in v.steps)
        return placed or (self.sharing is not None and bool(self.sharing.recipes))

    def watched(self) -> list[tuple[Axis, list[int]]]:
        """Every axis with the places of the inputs that were compared over it, and on whose sameness a graph rests."""
        compared = {
            name: [i for i, fact in enumerate(facts) if fact.source == "fingerprint" and fact.replicated]
            for name, facts in self.facts.items()
        }
        return [(axis, compared.get(axis.name, []) if self.rests_on_facts else []) for axis in self.axes]

    def at(self, tokens: int) -> Variant:
        """The variant for ``tokens`` tokens."""
        return next(v for v in self.variants if v.first <= tokens and (v.last is None or tokens <= v.last))

    @property
    def left_alone(self) -> dict[str, str]:
        """Axis name → why nothing, or not every token count, is rewritten over it."""
        return {k: v for of in (*(v.refused for v in self.variants), self.refused) for k, v in of.items()}

    def rows(self, variant: Variant, tokens: int) -> list[Collective]:
        """Every collective of the variant that was placed, and every all-reduce that was not."""
        rows = []
        for step in variant.steps:
            name = f"the report of axis {step.graph.known.axis.name}"
            made = self.runner.attempt(name, step.describe, tokens, self.tokens)
            rows += made.result if made.result is not None else outline(step.graph, step.interval, made.reason)
        placed = [step.graph.known.axis for step in variant.steps]
        return rows + [
            self._kept(s, variant) for s in self.sites if s.reason or not any(a.joins(s.group) for a in placed)
        ]

    def _kept(self, site: Site, variant: Variant) -> Collective:
        axis = next((a.name for a in self.axes if a.joins(site.group)), site.group)
        no_axis = "its group is no axis: it has one rank, or is not among those of axes={...}"
        reason = site.reason or variant.refused.get(axis) or self.refused.get(axis) or no_axis
        return Collective(site.name, "all_reduce", axis, site.module, "keep", "all_reduce", 0, 0, "", "", reason)

    def report(self, tokens: int) -> Report:
        """What happens to a step of ``tokens`` tokens."""
        variant = self.at(tokens)
        report = Report(tokens, len(self.original.graph.nodes), len(variant.gm.graph.nodes), passes=self.passes)
        report.collectives = self.rows(variant, tokens)
        for step in variant.steps:
            i, axis = step.interval, step.graph.known.axis
            report.solver.append(
                {"axis": axis.name, "solver": i.solver, "at": i.at, "cost_s": i.cost_s, "bound_s": i.bound_s,
                 "unchanged_s": i.unchanged_s, "certificate": i.cost_s == i.bound_s, "first": i.first, "last": i.last}
            )  # fmt: skip
        report.verify = {"proofs": self.proofs, "holds": all(p["holds"] for p in self.proofs)}
        report.modules = self.sharing.rows if self.sharing else []
        refused = {**variant.refused, **self.refused}
        report.axes = [
            {"name": a.name, "size": a.size, "rank": a.rank, "refused": refused.get(a.name, "")} for a in self.axes
        ]
        return report


def token_reader(gm: fx.GraphModule, tokens: Expr | None) -> Callable[[Sequence[Any]], int] | None:
    """How to read the token count off a call's inputs; None where it is static or cannot be read."""
    if tokens is None or tokens.is_number:
        return None
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and (factor := tokens / value.node.expr).is_Integer:
            return partial(_size, index, None, int(factor))
        if isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                if (factor := tokens / size_expr(size)).is_Integer:
                    return partial(_size, index, dim, int(factor))
    return None


def _size(index: int, dim: int | None, factor: int, args: Sequence[Any]) -> int:
    return factor * int(args[index] if dim is None else args[index].shape[dim])
