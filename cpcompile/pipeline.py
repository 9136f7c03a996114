"""The pipeline: canonicalise, annotate, place, materialise and verify a graph, for every axis and interval of T.

Decisions are functions of what all ranks share: one exchange establishes the facts, one compares the outcome, and if
any rank could not rewrite or prove its graph, every rank runs the graph as it came.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import _disable_current_modes

from cpcompile.axes import Axis, find_axes, is_group
from cpcompile.compiled import Compiled, Step, Variant, first_tokens
from cpcompile.costs import HardwareProfile, profile
from cpcompile.errors import AxisError, CpcompileError, PlanError, RequirementError
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput, meshes_of
from cpcompile.module_groups import module_axes
from cpcompile.options import Options
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.collectives import find_all_reduces, group_name_of, is_collective
from cpcompile.passes.explicit_causal_masks import ExplicitCausalMasks, find_causal
from cpcompile.passes.materialise import materialise
from cpcompile.passes.per_token_attention import PerTokenAttention
from cpcompile.passes.place import place
from cpcompile.passes.placement_problem import PlacementGraph, build
from cpcompile.passes.recognise_routed_experts import RecogniseRoutedExperts
from cpcompile.passes.recognise_sparse_attention import RecogniseSparseAttention
from cpcompile.passes.token_dims import Annotation, annotate, repeats_attention
from cpcompile.passes.token_layout import Expr
from cpcompile.passes.verify_numeric import check_numerically
from cpcompile.passes.verify_static import prove
from cpcompile.passes.vllm_ops import VllmOps
from cpcompile.plan import AxisPlan, Interval, Plan
from cpcompile.replication import exchange_facts, structure_fingerprint
from cpcompile.report import Collective, PassRun, Report
from cpcompile.share_weights import ShareWeights

log = logging.getLogger("cpcompile")


class Runner:
    """Runs passes, times them, and notes what they did."""

    def __init__(self) -> None:
        self.runs: list[PassRun] = []

    def run(self, name: str, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``work`` and note its time; a :class:`PassResult` tells rewrites and refusals."""
        began = time.perf_counter()
        result = work(*args, **kwargs)
        refusals = tuple((r.node, r.reason) for r in getattr(result, "refusals", ()))
        self.runs.append(PassRun(name, time.perf_counter() - began, getattr(result, "rewrites", 0), refusals))
        return result


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    axes: Sequence[Axis] | None = None,
    modules: Mapping[str, Axis] | None = None,
) -> Compiled:
    """Run the pipeline on a functional ATen graph.

    It runs outside of all dispatch modes. A compiler is called under dynamo's fake mode, under which a pass could not
    read a constant of the graph, and its own small tensors would be fake.

    Args:
        gm: one rank's graph; canonicalised in place.
        inputs: what each of its inputs is.
        options: the user's options.
        exchange_for: how to reach the other ranks of an axis.
        axes: the axes, where the caller knows them; else found from ``options.axes`` and the graph.
        modules: kind of group → its ranks, for weights that ranks share, where the caller knows them; else from the
            options.

    Raises:
        AxisError, PlanError: the axes or the plan do not fit the graph.
        RequirementError: something that ``options.require`` names was not rewritten, or a proof failed under it.
        GroupError: a module is to be shared, and its ranks are not given.
    """
    kinds = module_axes(options) if modules is None else modules
    with _disable_current_modes():
        return _compile_graph(gm, inputs, options, exchange_for, axes, kinds)


def _compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    axes: Sequence[Axis] | None,
    kinds: Mapping[str, Axis],
) -> Compiled:
    runner = Runner()
    runner.run("vllm-ops", VllmOps(), gm)  # before the copy: what it changes must not run as it came
    original = fx.GraphModule(gm, copy_graph(gm.graph))
    runner.run("canonicalise", Canonicalise(), gm)
    runner.run("per-token-attention", PerTokenAttention(), gm)
    if options.sparse_attention:
        runner.run("recognise-sparse-attention", RecogniseSparseAttention(), gm)
    if options.routed_experts:
        runner.run("recognise-routed-experts", RecogniseRoutedExperts(), gm)
    result = Compiled(original, [Variant(0, None, original)], Plan(), passes=runner.runs)
    _place(gm, inputs, options, exchange_for, axes, result, runner)
    if kinds:
        _share(gm, inputs, options, exchange_for, kinds, result, runner)
    return result


def _place(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    axes: Sequence[Axis] | None,
    result: Compiled,
    runner: Runner,
) -> None:
    """Find the axes, and place the tokens over them."""
    reduced = find_all_reduces(gm)
    result.axes = (
        list(axes)
        if axes is not None
        else find_axes((ar.group_name for ar in reduced), options.axes, meshes_of(inputs))
    )
    unknown = _adopt_names(gm, result.axes)
    reduced = find_all_reduces(gm)
    # Context parallelism first: the axis that is reduced over most then works on its shards.
    result.axes.sort(key=lambda axis: sum(axis.owns(ar.group_name) for ar in reduced))
    if unknown:
        result.refused = dict.fromkeys([axis.name for axis in result.axes] or unknown, _NO_GROUP.format(unknown[0]))
        result.unplaced = [_kept(ar.wait.name, ar.group_name, _NO_GROUP.format(unknown[0])) for ar in reduced]
        return _require(result, options, [])
    if options.strategy == "off" or options.deterministic or not result.axes:
        why = _why_nothing(options)
        result.refused = {axis.name: why for axis in result.axes}
        result.unplaced = [_kept(ar.wait.name, ar.group_name, why) for ar in reduced]
        return _require(result, options, [])
    return _rewrite(gm, inputs, options, exchange_for, result, runner)


_NO_GROUP = "no process group is called {0!r}: give axes={{name: group}} with the name before the colon"


def _adopt_names(gm: fx.GraphModule, axes: Sequence[Axis]) -> list[str]:
    """Give frameworks' own group names (vLLM's ``"tp:0"``) the name of the axis's group; return those of no group.

    A canonical graph runs PyTorch's collectives, which know groups by PyTorch's names only.
    """
    unknown, adopted = [], False
    for node in gm.graph.nodes:
        name = group_name_of(node) if is_collective(node) else ""
        if ":" not in name or is_group(name):
            continue  # a name of PyTorch's own; a trace from elsewhere may name groups that this process lacks
        axis = next((a for a in axes if a.name == name.partition(":")[0]), None)
        if axis is None:
            unknown.append(name)
        else:
            node.args = tuple(axis.group_name if arg == name else arg for arg in node.args)
            adopted = True
    if adopted:
        gm.recompile()  # where nothing is rewritten this graph runs itself
    return unknown


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` with its metadata."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _why_nothing(options: Options) -> str:
    if options.strategy == "off":
        return "strategy='off'"
    return (
        "deterministic=True keeps every reduction order" if options.deterministic else "no collective of a known group"
    )


def _kept(name: str, group: str, reason: str) -> Collective:
    return Collective(name, "all_reduce", group, "", "keep", "all_reduce", 0, 0, "", "", reason)


def _check_axis(known: Annotation, repeats: bool | None, options: Options, groups: set[str]) -> None:
    """A given axis that the graph never reduces over and that splits attention is a mistake: say so."""
    axis = known.axis
    if options.axes and groups and not any(axis.owns(g) for g in groups) and not repeats:
        raise AxisError(
            f"axis {axis.name!r} has ranks {list(axis.ranks)}, and no all-reduce of the graph runs over them "
            f"(its groups: {sorted(groups)}); give the group that the model was sharded over"
        )


def _rewrite(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    result: Compiled,
    runner: Runner,
) -> None:
    """Rewrite ``gm`` axis by axis; on a failure of any rank, keep the graph as it came."""
    saved = options.plan if isinstance(options.plan, Plan) or options.plan is None else Plan.load(options.plan)
    hardware = profile(options.profile or default_profile(inputs))
    variants, plans, failure = [Variant(0, None, gm)], [], ""
    exchanges = {axis: exchange_for(axis) for axis in result.axes}
    try:
        for axis in result.axes:
            variants, axis_plans = _rewrite_axis(
                variants, axis, inputs, options, exchanges[axis], hardware, saved, result, runner
            )
            plans += axis_plans
    except CpcompileError:
        raise
    except Exception as error:  # a bug of ours must not take the user's model down on one rank only
        log.exception("cpcompile failed")
        failure = f"{type(error).__name__}: {error}"
    plan = Plan(tuple(plans))
    failed = [f"{p['axis']}: {p['failures'][0]}" for p in result.proofs if not p["holds"]]
    failure = failure or (failed[0] if failed else "")
    for axis, exchange in exchanges.items():
        failure = _agree(axis, exchange, plan, failure)
    if failure:
        log.warning("cpcompile: the graph runs as it came: %s", failure)
        if options.require:
            raise RequirementError(f"not rewritten: {failure}")
        result.refused = {axis.name: failure for axis in result.axes}
        return
    result.plan = plan
    result.variants = variants if any(v.steps for v in variants) else result.variants
    _require(result, options, variants)


def _agree(axis: Axis, exchange: Exchange, plan: Plan, failure: str) -> str:
    """The failure of any rank of ``axis``; differing plans are one."""
    mine = (hashlib.sha256(plan.to_json().encode()).hexdigest(), failure)
    outcomes = exchange.all_gather(mine, "outcome of the rewrite")
    for rank, outcome in enumerate(outcomes):
        if outcome[1]:  # type: ignore[index]
            return f"rank {rank} of axis {axis.name}: {outcome[1]}"  # type: ignore[index]
    if len({outcome[0] for outcome in outcomes}) > 1:  # type: ignore[index]
        return f"the ranks of axis {axis.name} made different plans: give all of them the same options and inputs"
    return failure


def _rewrite_axis(
    variants: list[Variant],
    axis: Axis,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange: Exchange,
    hardware: HardwareProfile,
    saved: Plan | None,
    result: Compiled,
    runner: Runner,
) -> tuple[list[Variant], list[AxisPlan]]:
    """Split every variant by the intervals of this axis's plan for it."""
    found: list[Variant] = []
    plans = []
    original = structure_fingerprint(result.original)
    for variant in variants:
        names, values, kinds = unique_names(inputs), [i.value for i in inputs], [i.kind for i in inputs]
        written = [name for name, i in zip(names, inputs, strict=True) if i.written]
        facts = runner.run(
            "facts", exchange_facts, variant.gm, names, values, kinds, axis, exchange,
            declared=options.replicated, mutated=written,
        )  # fmt: skip
        result.facts[axis.name] = facts.inputs
        placeholders = [n.name for n in variant.gm.graph.find_nodes(op="placeholder")]
        # Sizes are part of the axis's contract: every rank runs the same step.
        same = {
            p: f.replicated or not isinstance(i.value, torch.Tensor)
            for p, f, i in zip(placeholders, facts.inputs, inputs, strict=True)
        }
        known: Annotation = runner.run("annotate", annotate, variant.gm, axis, same, facts.rank_dependent)
        repeats = repeats_attention(known)
        if repeats and options.strategy != "tp" and find_causal(variant.gm):
            # Only what is split by queries needs them: elsewhere the causal kernel is the faster one.
            runner.run("explicit-causal-masks", ExplicitCausalMasks(), variant.gm)
            known = runner.run("annotate", annotate, variant.gm, axis, same, facts.rank_dependent)
        _check_axis(known, repeats, options, {ar.group_name for ar in find_all_reduces(variant.gm)})
        reason = _unplaceable(known, repeats, options.strategy)
        if reason:
            result.refused[axis.name] = reason
            result.unplaced += [_kept(w.name, axis.name, reason) for w in known.all_reduces]
            found.append(variant)
            continue
        result.tokens = result.tokens or known.tokens
        if repeats and not known.gathers and not known.own_rows:  # a graph's own moves are of contiguous rows
            known.axis = replace(axis, layout=options.layout)
        graph = runner.run("problem", build, known, hardware)
        fingerprint = _identity(original, variant)
        if saved is not None:
            plan = _saved_plan(saved, known.axis, fingerprint)
        else:
            plan = runner.run("place", place, graph, hardware, options.strategy, fingerprint)
        plans.append(plan)
        for interval in plan.intervals:
            made = _materialise(variant, interval, plan, graph, same, options, result, runner)
            if made is not None:
                found.append(made)
    return found, plans


def _identity(original: str, variant: Variant) -> str:
    """What a plan is for: the graph as it came, and how earlier axes rewrote it. The same on ranks of every axis."""
    steps = [f"{s.graph.known.axis.name} {s.interval.first}-{s.interval.last}" for s in variant.steps]
    return " after ".join([original, *steps])


def _unplaceable(known: Annotation, repeats: bool | None, strategy: str) -> str:
    name = known.axis.name
    if known.tokens is None:
        return f"no sum all-reduce of axis {name!r} carries tokens, and no vocabulary gather reads any"
    if known.tokens.is_zero:
        return "there are no tokens: nothing to split"
    if not known.all_reduces and not known.gathers and not repeats:
        return f"no sum all-reduce of axis {name!r} carries tokens, and no attention is the same on all its ranks"
    if strategy == "tp" and repeats:
        return f"strategy='tp', and every rank of axis {name!r} computes all of attention: that is for 'cp' or 'auto'"
    if strategy == "cp" and not repeats:
        return f"strategy='cp', and attention is split over axis {name!r}: that is for 'tp', 'hybrid' or 'auto'"
    return ""


def _materialise(
    variant: Variant,
    interval: Interval,
    plan: AxisPlan,
    graph: PlacementGraph,
    replicated: dict[str, bool],
    options: Options,
    result: Compiled,
    runner: Runner,
) -> Variant | None:
    begin, end = _range(interval, graph.known.tokens, result.tokens)
    first = max(variant.first, begin)
    last = min((v for v in (variant.last, end) if v is not None), default=None)
    if last is not None and last < first:
        return None
    if interval.unchanged:
        same = frozenset(node.name for node in graph.known.replicated)
        steps = [*variant.steps, Step(graph, interval, [], plan)]
        return replace(variant, first=first, last=last, steps=steps, same=same)
    gm = runner.run("materialise", materialise, variant.gm, graph, interval)
    changed = sum(route != "reduce" for route in interval.raises.values())
    runner.runs[-1] = replace(runner.runs[-1], rewrites=changed)
    known, same = graph.known, frozenset[str]()
    if options.verify != "off":
        proof = runner.run("verify-static", prove, variant.gm, gm, known.axis, known.tokens, replicated.__getitem__)
        same = proof.same
        result.proofs.append(
            {"axis": known.axis.name, "first": first, "last": last, "holds": proof.holds,
             "method": "static", "failures": [f"{f.node}: {f.message}" for f in proof.failures],
             "trusts": list(proof.trusts)}
        )  # fmt: skip
    if options.verify == "numeric":
        failures = runner.run("verify-numeric", check_numerically, variant.gm, graph, interval, replicated.__getitem__)
        result.proofs.append(
            {"axis": known.axis.name, "first": first, "last": last, "holds": not failures, "method": "numeric",
             "failures": failures}
        )  # fmt: skip
    return Variant(first, last, gm, [*variant.steps, Step(graph, interval, gm.meta["gathers"], plan)], same)


def _share(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    kinds: Mapping[str, Axis],
    result: Compiled,
    runner: Runner,
) -> None:
    """Share weights in every variant, or in none on any rank."""
    exchange_for = functools.cache(exchange_for)
    variants = result.variants if result.rewritten else [Variant(0, None, gm)]
    work = ShareWeights(gm, inputs, options, exchange_for, kinds, result, runner.run)
    failure = work.sharing.settle(work.run(variants), exchange_for)
    sharing = work.sharing.refused(failure) if failure else work.sharing
    if failure:
        log.warning("cpcompile: no weight is shared: %s", failure)
        if options.require:
            raise RequirementError(f"not shared: {failure}")
    elif sharing.recipes:
        result.variants = [replace(v, gm=made) for v, made in zip(variants, sharing.graphs, strict=True)]
    result.sharing = sharing


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


def _require(result: Compiled, options: Options, variants: Sequence[Variant]) -> None:
    """Every required pattern is rewritten in some interval, else an error."""
    missing = set(options.require)
    for variant in variants if missing else ():  # a report of a deep model takes a second
        tokens = variant.typical
        rows = [c for s in variant.steps for c in s.describe(tokens, result.tokens)]
        missing &= set(Report(tokens, collectives=rows).missing(options.require))
    if missing:
        raise RequirementError(
            f"require={min(missing)!r}: nothing of that name was rewritten; `cpcompile explain` gives the reason"
        )


def unique_names(inputs: Sequence[GraphInput]) -> list[str]:
    """The inputs' names, numbered where several share one (the tensors inside one DTensor)."""
    seen: dict[str, int] = {}
    names = []
    for given in inputs:
        seen[given.name] = count = seen.get(given.name, 0) + 1
        names.append(given.name if count == 1 else f"{given.name}#{count}")
    return names


def default_profile(inputs: Sequence[GraphInput]) -> str:
    """The hardware profile of the device that the inputs are on."""
    device = next((i.value.device for i in inputs if isinstance(i.value, torch.Tensor)), torch.device("cpu"))
    if device.type == "npu":
        return "ascend-a3"
    if device.type == "cuda":
        return "h200-nvlink" if "H200" in torch.cuda.get_device_name(device) else "h100-nvlink"
    return "gloo"
