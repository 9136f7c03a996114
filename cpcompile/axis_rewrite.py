"""One mesh axis: facts, annotation and plan for each variant so far, and for each interval of T a graph and its proof.

What comes of it is data, which the ranks compare (``agreement``) before any of it is used. A variant that cannot be
planned, and an interval that cannot be rewritten or proven, are left out; the others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.axis_parts import WHOLE, AxisRewrite, Part
from cpcompile.compiled import Step, Variant, count_at, first_tokens
from cpcompile.costs import HardwareProfile
from cpcompile.errors import AxisError, ExchangeError, PlanError, VerificationError
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput, unique_names
from cpcompile.options import Options
from cpcompile.passes.collectives import find_all_reduces
from cpcompile.passes.explicit_causal_masks import ExplicitCausalMasks, find_causal
from cpcompile.passes.keep_names import keep_names
from cpcompile.passes.materialise import materialise
from cpcompile.passes.place import place
from cpcompile.passes.placement_problem import PlacementGraph, build
from cpcompile.passes.token_counts import Further
from cpcompile.passes.token_dims import Annotation, annotate, repeats_attention
from cpcompile.passes.token_layout import Expr
from cpcompile.passes.verify_numeric import check_numerically
from cpcompile.passes.verify_ranks import Differences, differences
from cpcompile.passes.verify_static import prove
from cpcompile.plan import AxisPlan, Interval, Plan
from cpcompile.replication import GraphFacts, exchange_facts, structure_fingerprint
from cpcompile.runner import Runner

_READ = (torch.Tensor, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Rewriter:
    """Rewrites variants over one axis.

    Args:
        axis: the axis.
        exchange: its ranks.
        inputs: what the graph's inputs are.
        options: the user's options.
        hardware: the machine's profile.
        saved: the plan to apply, if there is one.
        original: the graph as it came.
        base: the model's token count, where an earlier axis was planned for it.
        broken: where dynamo broke the model, if this graph is only a part of it.
        runner: runs each step.
    """

    axis: Axis
    exchange: Exchange
    inputs: Sequence[GraphInput]
    options: Options
    hardware: HardwareProfile
    saved: Plan | None
    original: fx.GraphModule
    base: Expr | None
    broken: str
    runner: Runner

    def run(self, variants: Sequence[Variant], lost: str) -> AxisRewrite:
        """Split every variant by the intervals of this axis's plan for it; ``lost`` says why its ranks do not meet.

        Raises:
            RanksDifferError: ranks have other graphs, or did not take part.
            AxisError, PlanError: the axis or the saved plan does not fit the graph.
        """
        if lost:
            raise ExchangeError(lost)
        found, original = AxisRewrite(tokens=self.base), structure_fingerprint(self.original)
        for variant in variants:
            found.facts = self._facts(variant.gm)  # every rank is here once for each variant
            known = replace(variant, differ=differences(variant.gm, self.exchange.all_gather))
            found.parts.append(self._attempt(known, original, found))
        return found

    def further(self, variants: Sequence[Variant], before: AxisRewrite) -> AxisRewrite:
        """Place each variant's next token count, which stays as it is over this axis so far.

        Nothing is exchanged: that ranks' rows differ shifts the nodes of the graphs, so they do not compare.

        Raises:
            AxisError, PlanError: the axis or the saved plan does not fit the graph.
        """
        found, original = AxisRewrite(tokens=before.tokens), structure_fingerprint(self.original)
        found.facts = GraphFacts(before.facts.inputs, frozenset(), before.facts.varying)
        for variant in variants:
            more = variant.next_count(self.axis.name)
            found.parts.append(self._attempt(variant, original, found, more) if more else Part(variant))
        return found

    def _attempt(self, variant: Variant, original: str, found: AxisRewrite, more: Further | None = None) -> Part:
        unit = f"the plan of axis {variant.next_unit(self.axis.name)}"
        made = self.runner.attempt(unit, self._part, variant, original, found, more)
        return made.result or Part(variant, refused={WHOLE: made.reason})

    def _facts(self, gm: fx.GraphModule) -> GraphFacts:
        names, values, kinds = unique_names(self.inputs), [i.value for i in self.inputs], [i.kind for i in self.inputs]
        written = [name for name, i in zip(names, self.inputs, strict=True) if i.written]
        return self.runner.run(
            "facts", exchange_facts, gm, names, values, kinds, self.axis, self.exchange,
            declared=self.options.replicated, mutated=written,
        )  # fmt: skip

    def _part(self, variant: Variant, original: str, found: AxisRewrite, more: Further | None) -> Part:
        facts = found.facts
        placeholders = [n.name for n in variant.gm.graph.find_nodes(op="placeholder")]
        # What is neither tensor nor number (a mesh, None) is read by no node.
        same = {
            p: f.replicated or not isinstance(i.value, _READ)
            for p, f, i in zip(placeholders, facts.inputs, self.inputs, strict=True)
        }
        known, repeats = self._annotated(variant.gm, same, facts, more)
        reason = "" if more else self._no_use(known, repeats, variant.gm)
        reason = reason or unplaceable(known, repeats, "" if more else self.options.strategy)
        if reason:
            among = f"; the model comes in several graphs: {self.broken}" if self.broken else ""
            return Part(variant, reason=reason + among)
        if repeats and not known.gathers and not known.own_rows:  # a graph's own moves are of contiguous rows
            known.axis = replace(self.axis, layout=self.options.layout)
        graph = self.runner.run("problem", build, known, self.hardware)
        plan = self._plan(graph, variant, original, found.tokens)
        if plan is None:
            return Part(variant, reason=f"the plan has none for {known.tokens} tokens: make a new plan")
        part = Part(variant, plan, reduced=[c.node.name for c in graph.choices if c.reduced])
        found.tokens = found.tokens or known.tokens
        prover = _Prover(self, graph, same.__getitem__, variant.differ or Differences(), found)
        for number, interval in enumerate(plan.intervals):
            prover.add(part, number, interval)
        return part

    def _annotated(
        self, gm: fx.GraphModule, same: dict[str, bool], facts: GraphFacts, more: Further | None
    ) -> tuple[Annotation, bool | None]:
        told = (self.axis, same, facts.rank_dependent, facts.varying, more)
        known = self.runner.run("annotate", annotate, gm, *told)
        repeats = repeats_attention(known)
        if repeats and not more and self.options.strategy != "tp" and find_causal(gm):
            # Only what is split by queries needs them: elsewhere the causal kernel is the faster one.
            self.runner.change("explicit-causal-masks", ExplicitCausalMasks(), gm)
            known = self.runner.run("annotate", annotate, gm, *told)
        return known, repeats

    def _no_use(self, known: Annotation, repeats: bool | None, gm: fx.GraphModule) -> str:
        """A given axis that a whole graph never reduces over and that splits attention is a mistake: say so."""
        groups = {ar.group_name for ar in find_all_reduces(gm)}
        if not self.options.axes or not groups or any(self.axis.joins(g) for g in groups) or repeats:
            return ""
        reason = (
            f"axis {self.axis.name!r} has ranks {list(self.axis.ranks)}, and no all-reduce of the graph runs over them"
        )
        if self.broken:
            return reason
        raise AxisError(f"{reason} (its groups: {sorted(groups)}); give the group that the model was sharded over")

    def _plan(self, graph: PlacementGraph, variant: Variant, original: str, base: Expr | None) -> AxisPlan | None:
        """The plan of the graph's token count; None where a saved one has none for a further count."""
        fingerprint, known = _identity(original, variant, self.axis.name), graph.known
        if self.saved is None:
            # A further count has one plan: the best where there are as many tokens as the variant is made for.
            at = count_at(known.tokens, base, variant.typical, graph.hints) if known.further else None
            return self.runner.run("place", place, graph, self.hardware, self.options.strategy, fingerprint, at)
        if known.further and all(plan.graph != fingerprint for plan in self.saved.axes):
            return None
        return _saved_plan(self.saved, known.axis, fingerprint)


@dataclass
class _Prover:
    """Rewrites and proves the intervals of one variant's plan."""

    of: Rewriter
    graph: PlacementGraph
    same: Callable[[str], bool]
    differ: Differences
    found: AxisRewrite

    def add(self, part: Part, number: int, interval: Interval) -> None:
        """Add what becomes of an interval, unless no token count of the variant lies in it."""
        assert part.plan is not None
        variant, unit = part.variant, part.variant.next_unit(self.graph.known.axis.name)
        begin, end = _range(interval, self.graph.known.tokens, self.found.tokens)
        first = max(variant.first, begin)
        last = min((v for v in (variant.last, end) if v is not None), default=None)
        if last is not None and last < first:
            return
        piece = part.pieces[number] = replace(variant, first=first, last=last)
        if interval.unchanged:
            same = frozenset(node.name for node in self.graph.known.replicated)
            step = Step(self.graph, interval, [], part.plan)
            part.pieces[number] = replace(piece, steps=[*variant.steps, step], same=same)
            return
        made = self.of.runner.attempt(f"axis {unit} at {piece.span}", self._made, piece, interval, part.plan)
        if made.result is None:
            part.refused[number] = made.reason
        else:
            part.pieces[number] = made.result

    def _made(self, piece: Variant, interval: Interval, plan: AxisPlan) -> Variant:
        """The piece with ``interval`` carried out. Raises :class:`VerificationError` where that cannot be proven."""
        run, known = self.of.runner, self.graph.known
        gm = run.run("materialise", materialise, piece.gm, self.graph, interval)
        changed = sum(route != "reduce" for route in interval.raises.values())
        run.runs[-1] = replace(run.runs[-1], rewrites=changed)
        done = replace(piece, steps=[*piece.steps, Step(self.graph, interval, gm.meta["gathers"], plan)])
        if done.next_count(known.axis.name):
            gm = keep_names(gm, gm.meta["wholes"], {node.name for node in piece.gm.graph.nodes})
        same, failures, differ = frozenset[str](), list[str](), self.differ
        if self.of.options.verify != "off":
            told = (self.differ.nodes, self.differ.symbols)
            proof = run.run("verify-static", prove, piece.gm, gm, known.axis, known.tokens, self.same, *told)
            same, failures = proof.same, [f"{f.node}: {f.message}" for f in proof.failures]
            differ = Differences(frozenset(n.name for n in gm.graph.nodes) - same, self.differ.symbols)
            self._note(piece, "static", failures, trusts=list(proof.trusts))
        if self.of.options.verify == "numeric":
            given = (self.graph, interval, self.same, self.differ.symbols)
            checked = run.run("verify-numeric", check_numerically, piece.gm, *given)
            self._note(piece, "numeric", checked)
            failures = [*failures, *checked]
        if failures:
            raise VerificationError(f"not proven: {failures[0]}")
        return replace(done, gm=gm, same=same, differ=differ)

    def _note(self, piece: Variant, method: str, failures: list[str], **more: Any) -> None:
        name = self.graph.known.axis.name
        self.found.proofs.append(
            {"axis": name, "first": piece.first, "last": piece.last, "holds": not failures, "method": method,
             "failures": failures, **more}
        )  # fmt: skip


def _identity(original: str, variant: Variant, axis: str) -> str:
    """What a plan is for: the graph as it came, and how earlier axes rewrote it. The same on ranks of every axis.

    A further count is told by its number: symbols have other names elsewhere.
    """
    steps = [f"{s.graph.known.axis.name} {s.interval.first}-{s.interval.last}" for s in variant.steps]
    number = variant.next_number(axis)
    return " after ".join([original, *steps]) + (f", token count {number}" if number > 1 else "")


def unplaceable(known: Annotation, repeats: bool | None, strategy: str) -> str:
    """Why there is nothing to place over the axis; empty where there is."""
    name = known.axis.name
    if known.tokens is None:
        return f"no sum all-reduce of axis {name!r} carries tokens, and no vocabulary gather reads any"
    if known.tokens.free_symbols & known.varying:
        return f"the ranks of axis {name!r} have different numbers of tokens: give all of them the same step"
    if known.tokens.is_zero:
        return "there are no tokens: nothing to split"
    if not known.all_reduces and not known.gathers and not repeats:
        return f"no sum all-reduce of axis {name!r} carries tokens, and no attention is the same on all its ranks"
    if strategy == "tp" and repeats:
        return f"strategy='tp', and every rank of axis {name!r} computes all of attention: that is for 'cp' or 'auto'"
    if strategy == "cp" and not repeats:
        return f"strategy='cp', and attention is split over axis {name!r}: that is for 'tp', 'hybrid' or 'auto'"
    return ""


def _range(interval: Interval, count: Expr | None, base: Expr | None) -> tuple[int, int | None]:
    """The model's token counts at which ``interval`` of an axis's own counts holds."""
    begin = first_tokens(count, base, interval.first)
    return begin, None if interval.last is None else first_tokens(count, base, interval.last + 1) - 1


def _saved_plan(saved: Plan, axis: Axis, fingerprint: str) -> AxisPlan:
    plans = [p for p in saved.axes if p.axis == axis.name]
    if not plans:
        raise PlanError(f"the plan has no axis {axis.name!r} (it has {[p.axis for p in saved.axes]}): make a new plan")
    for plan in plans:
        if plan.graph == fingerprint:
            if plan.size != axis.size:
                raise PlanError(
                    f"the plan is for {plan.size} ranks and axis {axis.name!r} has {axis.size}: make a new plan"
                )
            if plan.layout != axis.layout:
                raise PlanError(
                    f"the plan splits axis {axis.name!r} as {plan.layout!r} and layout is {axis.layout!r}: "
                    f"give layout={plan.layout!r}, or make a new plan"
                )
            return plan
    raise PlanError(f"the plan is of another graph ({plans[0].graph}, this one is {fingerprint}): make a new plan")
