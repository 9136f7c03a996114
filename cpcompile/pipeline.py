"""The pipeline: canonicalise, recognise, then rewrite the graph over one axis after another, and share weights.

Over an axis it is rewritten once for each of its token counts.

Decisions are functions of what all ranks of an axis share: one exchange establishes the facts, one compares what came
of it (``agreement``). What raises is left out by the runner: a pass, an interval, an axis, never the graph.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.fx as fx
from torch.utils._python_dispatch import _disable_current_modes

from cpcompile.agreement import Agreed, Ranks, agree_on, tell
from cpcompile.axes import Axis, find_axes, is_group
from cpcompile.axis_parts import AxisRewrite
from cpcompile.axis_rewrite import Rewriter
from cpcompile.compiled import Compiled, Variant
from cpcompile.costs import profile
from cpcompile.errors import CpcompileError, RequirementError
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput, meshes_of
from cpcompile.module_groups import module_axes
from cpcompile.options import Options
from cpcompile.passes.all_reduce_sites import find_sites
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.causal_attention import CausalAttention, find_masked
from cpcompile.passes.collectives import find_all_reduces, group_name_of, is_collective
from cpcompile.passes.dialects import is_of_a_server
from cpcompile.passes.per_token_attention import PerTokenAttention
from cpcompile.passes.recognise_routed_experts import RecogniseRoutedExperts
from cpcompile.passes.recognise_sparse_attention import RecogniseSparseAttention
from cpcompile.passes.vllm_ops import VllmOps
from cpcompile.plan import Plan
from cpcompile.rank_lists import clashing, with_rank_lists
from cpcompile.report import Report
from cpcompile.runner import Attempt, Runner
from cpcompile.runner import copy_graph as copy_graph
from cpcompile.share_weights import ShareWeights

log = logging.getLogger("cpcompile")


def compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    axes: Sequence[Axis] | None = None,
    modules: Mapping[str, Axis] | None = None,
    broken: str = "",
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
        broken: where dynamo broke the model, where the graph is only a part of it.

    Raises:
        AxisError, PlanError: the axes or the plan do not fit the graph.
        RequirementError: something that ``options.require`` names was not rewritten, or a proof failed under it.
        GroupError: a module is to be shared, and its ranks are not given.
    """
    kinds = module_axes(options) if modules is None else modules
    with _disable_current_modes():
        return _compile_graph(gm, inputs, options, exchange_for, axes, kinds, broken)


def _compile_graph(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    axes: Sequence[Axis] | None,
    kinds: Mapping[str, Axis],
    broken: str,
) -> Compiled:
    result = Compiled(gm, [], Plan())
    runner = result.runner
    runner.run("vllm-ops", VllmOps(), gm)  # before the copy, and unguarded: what it changes must not run as it came
    result.original = fx.GraphModule(gm, copy_graph(gm.graph))
    result.variants = [Variant(0, None, result.original)]
    runner.change("canonicalise", Canonicalise(), gm)
    runner.change("per-token-attention", PerTokenAttention(), gm)
    if options.sparse_attention and not options.deterministic:
        _recognise_sparse_attention(gm, result)
    if options.routed_experts:
        runner.change("recognise-routed-experts", RecogniseRoutedExperts(), gm)
    as_it_came = result.variants[0].gm
    placed = runner.attempt("the placement", _place, gm, inputs, options, exchange_for, axes, broken, result)
    if placed.reason:
        _nothing_placed(gm, options, placed.reason, result)
    if kinds:
        runner.attempt("the sharing of modules", _share, gm, inputs, options, exchange_for, kinds, result)
    if any(map(is_of_a_server, as_it_came.graph.nodes)):
        # Where nothing is placed, in small steps, a server's own all-reduce may be far faster than PyTorch's.
        result.variants = [replace(v, gm=as_it_came) if v.gm is gm else v for v in result.variants]
    if not options.deterministic:
        result.variants = [_without_causal_masks(v, result.runner) for v in result.variants]
    return result


def _without_causal_masks(variant: Variant, runner: Runner) -> Variant:
    """Whole attention needs no mask, which rows of it did: what was placed by rows keeps its own."""
    if not find_masked(variant.gm):
        return variant
    gm = fx.GraphModule(variant.gm, copy_graph(variant.gm.graph))
    gm.meta.update(variant.gm.meta)
    runner.change("causal-attention", CausalAttention(), gm)
    return replace(variant, gm=gm) if runner.runs[-1].rewrites else variant


def _recognise_sparse_attention(gm: fx.GraphModule, result: Compiled) -> None:
    """Recognise sparse attention in ``gm``, which then runs where nothing is placed; say what is not recognised."""
    result.runner.change("recognise-sparse-attention", RecogniseSparseAttention(), gm)
    done = result.runner.runs[-1]
    node, reason = next(iter(done.refusals), ("", ""))
    if node:  # else all are recognised, or the runner has told of an exception
        total = done.rewrites + len(done.refusals)
        log.warning(
            "cpcompile: sparse attention runs dense in %d of %d attentions: %s: %s",
            len(done.refusals), total, node, reason,
        )  # fmt: skip
    if done.rewrites:
        result.variants = [Variant(0, None, fx.GraphModule(gm, copy_graph(gm.graph)))]


def _place(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    axes: Sequence[Axis] | None,
    broken: str,
    result: Compiled,
) -> None:
    """Find the axes, and place the tokens over them."""
    reduced = find_all_reduces(gm)
    result.axes = (
        list(axes)
        if axes is not None
        else find_axes((ar.group_name for ar in reduced), options.axes, meshes_of(inputs))
    )
    unknown = _adopt_names(gm, result.axes)
    if (base := result.variants[0].gm) is not result.original:
        _adopt_names(base, result.axes)
    reduced = find_all_reduces(gm)
    result.sites = result.runner.attempt("the list of all-reduces", find_sites, gm).result or []
    if unknown:
        why = _NO_GROUP.format(unknown[0])
        result.variants = [Variant(0, None, result.original)]
        result.refused = dict.fromkeys([*(axis.name for axis in result.axes), *unknown], why)
        return _require(result, options)
    if options.strategy == "off" or options.deterministic or not result.axes:
        result.refused = {axis.name: _why_nothing(options) for axis in result.axes}
        return _require(result, options)
    return _rewrite(gm, inputs, options, exchange_for, broken, result)


def _nothing_placed(gm: fx.GraphModule, options: Options, reason: str, result: Compiled) -> None:
    """Every all-reduce is kept for ``reason``: what kept the graph as it came on every axis."""
    result.sites = result.sites or result.runner.attempt("the list of all-reduces", find_sites, gm).result or []
    of_no_axis = {s.group for s in result.sites if not any(axis.joins(s.group) for axis in result.axes)}
    result.refused = dict.fromkeys([*(axis.name for axis in result.axes), *sorted(of_no_axis)], reason)
    if options.require:
        raise RequirementError(f"not rewritten: {reason}")


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


def _why_nothing(options: Options) -> str:
    if options.strategy == "off":
        return "strategy='off'"
    return (
        "deterministic=True keeps every reduction order" if options.deterministic else "no collective of a known group"
    )


def _rewrite(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    broken: str,
    result: Compiled,
) -> None:
    """Rewrite ``gm`` axis by axis; what any rank of an axis cannot do over it, none of them does."""
    saved = options.plan if isinstance(options.plan, Plan) or options.plan is None else Plan.load(options.plan)
    hardware = profile(options.profile or default_profile(inputs))
    variants, failed = [Variant(0, None, gm)], ""
    result.axes = with_rank_lists(gm, result.axes, meshes_of(inputs), exchange_for)
    # Context parallelism first: the axis that is reduced over most then works on its shards.
    reduced = find_all_reduces(gm)
    result.axes.sort(key=lambda axis: sum(axis.joins(ar.group_name) for ar in reduced))
    result.refused = clashing(result.axes)
    ranks = Ranks({axis: exchange_for(axis) for axis in result.axes if axis.name not in result.refused})
    for axis, exchange in ranks.exchanges.items():
        work = Rewriter(
            axis, exchange, inputs, options, hardware, saved, result.original, result.tokens, broken, result.runner
        )
        try:
            found = result.runner.attempt(f"axis {axis.name}", work.run, variants, ranks.lost.get(axis, ""))
            agreed = _agreed(result, axis, ranks, found, variants)
            failed = failed or agreed.failed
            if found.result is not None:
                result.facts[axis.name] = found.result.facts.inputs
            if agreed.reason:
                result.refused[axis.name] = agreed.reason
            elif found.result is not None:
                result.tokens = found.result.tokens
            # All ranks have the same variants now, so all of them come here as often.
            while found.result and axis not in ranks.lost and any(v.next_count(axis.name) for v in agreed.variants):
                before = agreed.variants
                more = result.runner.attempt(f"further counts of axis {axis.name}", work.further, before, found.result)
                agreed = _agreed(result, axis, ranks, more, before)
                failed = failed or agreed.failed
        except CpcompileError as error:
            tell(exchange, error)
            raise
        variants = agreed.variants
    result.variants = variants if any(v.steps for v in variants) else result.variants
    if options.require and failed:
        raise RequirementError(f"not rewritten: {failed}")
    _require(result, options)


def _agreed(
    result: Compiled, axis: Axis, ranks: Ranks, found: Attempt[AxisRewrite], before: Sequence[Variant]
) -> Agreed:
    """What the ranks agree on of what was ``found`` over the axis; plans and proofs are noted."""
    agreed = agree_on(axis, ranks, found, before)
    result.plan = Plan((*result.plan.axes, *agreed.plans))
    if found.result is not None:
        result.proofs += found.result.proofs
    return agreed


def _share(
    gm: fx.GraphModule,
    inputs: Sequence[GraphInput],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    kinds: Mapping[str, Axis],
    result: Compiled,
) -> None:
    """Share weights in every variant, or in none on any rank."""
    exchange_for = functools.cache(exchange_for)
    variants = result.variants if result.rewritten else [Variant(0, None, gm)]
    work = ShareWeights(gm, inputs, options, exchange_for, kinds, result, result.runner.run)
    made = result.runner.attempt("weights of modules", work.run, variants)
    failure = work.sharing.settle(made.reason or made.result or "", exchange_for)
    sharing = work.sharing.refused(failure) if failure else work.sharing
    if failure:
        log.warning("cpcompile: no weight is shared: %s", failure)
        if options.require:
            raise RequirementError(f"not shared: {failure}")
    elif sharing.recipes:
        result.variants = [replace(v, gm=made) for v, made in zip(variants, sharing.graphs, strict=True)]
    result.sharing = sharing


def _require(result: Compiled, options: Options) -> None:
    """Every required pattern is rewritten in some interval, else an error."""
    missing = set(options.require)
    for variant in result.variants if missing else ():  # a report of a deep model takes a second
        tokens = variant.typical
        missing &= set(Report(tokens, collectives=result.rows(variant, tokens)).missing(options.require))
    if missing:
        reason = next(iter(result.left_alone.values()), "`cpcompile explain` gives the reason")
        raise RequirementError(f"require={min(missing)!r}: nothing of that name was rewritten; {reason}")


def default_profile(inputs: Sequence[GraphInput]) -> str:
    """The hardware profile of the device that the inputs are on."""
    device = next((i.value.device for i in inputs if isinstance(i.value, torch.Tensor)), torch.device("cpu"))
    if device.type == "npu":
        return "ascend-a3"
    if device.type == "cuda":
        return "h200-nvlink" if "H200" in torch.cuda.get_device_name(device) else "h100-nvlink"
    return "gloo"
