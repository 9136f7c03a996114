"""The outcome of the pipeline: which graph runs for which token count, and how each came about."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from cpcompile.passes.placement_problem import PlacementGraph, takes_rows
from cpcompile.passes.token_counts import Further, further_counts
from cpcompile.passes.token_layout import Expr, counted, size_expr
from cpcompile.passes.verify_ranks import Differences
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
    refused: dict[str, str] = field(default_factory=dict)  # what is not rewritten (``next_unit``) → why
    differ: Differences | None = None  # what of the graph differs between these ranks, as the proof has it

    @property
    def span(self) -> str:
        """Its token counts, in words."""
        return f"T >= {self.first}" if self.last is None else f"T in [{self.first}, {self.last}]"

    @property
    def typical(self) -> int:
        """A token count to state this variant's report for: what it was planned at, where that lies in its range."""
        at = self.steps[0].interval.at if self.steps else self.first
        return at if at >= self.first and (self.last is None or at <= self.last) else self.first

    def over(self, axis: str) -> list[Step]:
        """The steps over one axis: one for each token count."""
        return [step for step in self.steps if step.graph.known.axis.name == axis]

    def next_count(self, axis: str) -> Further | None:
        """The next further token count to place over ``axis``, which was placed for one; None where there is none."""
        steps = self.over(axis)
        for count, sums in further_counts(steps[0].graph.known).items() if steps else ():
            done = any(step.graph.known.tokens == count for step in steps)
            if not done and _unit(axis, count) not in self.refused:
                before = steps[-1].graph
                same = frozenset(n.name for n in before.known.replicated if not takes_rows(before, n))
                return Further(count, sums, same)
        return None

    def next_unit(self, axis: str) -> str:
        """What is to be placed next over ``axis``, in words; empty where nothing is."""
        if not self.over(axis):
            return "" if axis in self.refused else axis
        more = self.next_count(axis)
        return _unit(axis, more.count) if more else ""

    def next_number(self, axis: str) -> int:
        """The number of the token count that is placed next over ``axis``, from 1."""
        more = self.next_count(axis)
        return 2 + list(further_counts(self.over(axis)[0].graph.known)).index(more.count) if more else 1


def _unit(axis: str, count: Expr) -> str:
    return f"{axis} ({count} tokens)"


@dataclass
class Step:
    """How one axis was rewritten in a variant for one token count: by ``interval``, which is one of ``plan``."""

    graph: PlacementGraph
    interval: Interval
    gathers: list[list[str]]
    plan: AxisPlan

    def describe(self, tokens: int, base: Expr | None) -> list[Collective]:
        """Rows of this axis at ``tokens`` tokens of the model, whose symbol is ``base``."""
        count = self.graph.known.tokens
        here = count_at(count, base, tokens, self.graph.hints)
        return describe(self.graph, self.interval, here, self.gathers, self._break_evens(count, base))

    def _break_evens(self, count: Expr | None, base: Expr | None) -> dict[str, int]:
        """Indexer → the fewest tokens of the model at which the plan shards it; none for static T and if at every T."""
        if count is None or count.is_number:
            return {}
        names = [node.name for node in self.graph.number if is_indexer(node)]
        least = {name: least_sharded(self.plan.intervals, name) for name in names}
        return {name: first_tokens(count, base, t) for name, t in least.items() if t}


def count_at(
    count: Expr | None, base: Expr | None, tokens: int, hints: Mapping[sympy.Symbol, int] | None = None
) -> int:
    """A token count at ``tokens`` tokens of the model: after context parallelism, those of a shard.

    One that does not depend on the model's (a second micro-batch's) is stated alike; other sizes have their ``hints``.
    """
    if count is None or base is None or count == base:
        return tokens
    found = counted(count, base, sympy.Integer(tokens)).subs(base, tokens)
    if found.free_symbols and found == count:
        return tokens
    return int(found.subs({s: (hints or {}).get(s, 1) for s in found.free_symbols}))


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
        return [row for of_step in self.step_rows(variant, tokens) for row in of_step] + self.kept_rows(variant)

    def step_rows(self, variant: Variant, tokens: int) -> list[list[Collective]]:
        """The rows of each step. An all-reduce of a further count is told by the step that places that, or refused."""
        found = []
        for number, step in enumerate(variant.steps):
            axis = step.graph.known.axis.name
            made = self.runner.attempt(f"the report of axis {axis}", step.describe, tokens, self.tokens)
            rows = made.result if made.result is not None else outline(step.graph, step.interval, made.reason)
            after = (s.graph.known for s in variant.steps[number + 1 :])
            later = {wait.name for known in after if known.axis.name == axis for wait in known.all_reduces}
            why = {
                name: variant.refused.get(_unit(axis, count), "")
                for count, names in further_counts(step.graph.known).items()
                for name in names
            }
            found.append([replace(r, reason=why.get(r.name) or r.reason) for r in rows if r.name not in later])
        return found

    def kept_rows(self, variant: Variant) -> list[Collective]:
        """Every all-reduce of the variant that no axis could move."""
        placed = [step.graph.known.axis for step in variant.steps]
        return [self._kept(s, variant) for s in self.sites if s.reason or not any(a.joins(s.group) for a in placed)]

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


_Term = tuple[int, int, int | None]  # a factor of a size of an input, by index and dim; a number has no dim


def token_reader(gm: fx.GraphModule, tokens: Expr | None) -> Callable[[Sequence[Any]], int] | None:
    """How to read the token count, or a sum of counts, off a call's inputs; None where it is static or unreadable."""
    if tokens is None or tokens.is_number:
        return None
    sizes = list(_sizes(gm))
    constant, rest = tokens.as_coeff_Add()
    for parts in ([tokens], sympy.Add.make_args(rest)):
        terms = [term for part in parts if (term := _term(sizes, part)) is not None]
        if len(terms) == len(parts):
            return partial(_count, int(constant) if parts != [tokens] else 0, terms)
    return None


def _sizes(gm: fx.GraphModule) -> Iterator[tuple[Expr, int, int | None]]:
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            yield value.node.expr, index, None
        elif isinstance(value, torch.Tensor):
            yield from ((size_expr(size), index, dim) for dim, size in enumerate(value.shape))


def _term(sizes: Sequence[tuple[Expr, int, int | None]], part: Expr) -> _Term | None:
    found = ((part / size, index, dim) for size, index, dim in sizes)
    return next(((int(factor), index, dim) for factor, index, dim in found if factor.is_Integer), None)


def _count(constant: int, terms: Sequence[_Term], args: Sequence[Any]) -> int:
    found = (factor * int(args[i] if dim is None else args[i].shape[dim]) for factor, i, dim in terms)
    return constant + sum(found)
