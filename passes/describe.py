"""Describe: one row with decision, elements and reason for every all-reduce, indexer and gather of an axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import sympy
import torch.fx as fx

from cpcompile.passes.indexer_costs import IndexerCosts, IndexerModel, is_indexer
from cpcompile.passes.op_call import Mixing
from cpcompile.passes.placement_problem import PlacementGraph
from cpcompile.passes.token_layout import Expr, counted, product
from cpcompile.plan import Interval
from cpcompile.report import Collective

_BECOMES = {
    "scatter": ("scatter", "reduce_scatter"),
    "scatter+gather": ("scatter", "reduce_scatter, all_gather"),
    "reduce": ("keep", "all_reduce"),
    "": ("keep", "nothing: no one reads it"),
}
_T = sympy.Symbol("T")
_STEPS = {"scatter": 1, "scatter+gather": 2, "reduce": 2, "gather": 1, "": 0}


def module_of(node: fx.Node) -> str:
    """The module that a node comes from, as the model names it; ``""`` outside any."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    return path.removeprefix("L['self'].").removeprefix("L['self']").split(".forward.__closure__")[0]


def describe(
    graph: PlacementGraph,
    interval: Interval,
    tokens: int,
    gathers: Sequence[Sequence[str]],
    break_evens: Mapping[str, int] | None = None,
) -> list[Collective]:
    """Rows for one axis at ``tokens`` tokens, in graph order.

    Args:
        graph: the placement graph.
        interval: the plan that holds at ``tokens``.
        tokens: the token count that elements are stated for.
        gathers: names of the values that each all-gather carries.
        break_evens: indexer → the least T at which the whole plan shards it, where that is known.
    """
    around = IndexerModel(graph, interval, tokens) if any(map(is_indexer, graph.known.shapes)) else None
    fused = {name: number for number, names in enumerate(gathers) for name in names}
    rows = []
    for node in graph.known.shapes:
        route = interval.raises.get(node.name, "")
        if node in graph.known.all_reduces:
            rows.append(_all_reduce(graph, node, route, interval, tokens, fused.get(node.name)))
        elif node in graph.known.gathers and node in graph.number:
            rows.append(_existing_gather(graph, node, route, tokens, fused.get(node.name)))
        elif around is not None and is_indexer(node):
            row = _indexer(graph, node, around, interval, break_evens or {})
            if row.decision == "shard" and route:
                moved = _raised(graph, node, route, tokens, fused.get(node.name))
                row = replace(moved, kind=row.kind, decision="shard", reason=f"{row.reason}; {moved.reason}")
            rows.append(row)
        elif route:
            rows.append(_raised(graph, node, route, tokens, fused.get(node.name)))
    return rows


def outline(graph: PlacementGraph, interval: Interval, reason: str) -> list[Collective]:
    """Rows for an axis of which :func:`describe` failed for ``reason``: what became of each all-reduce, and no more."""
    rows = []
    for node in graph.known.all_reduces:
        route = interval.raises.get(node.name)
        decision, becomes = _BECOMES.get("reduce" if node not in graph.number else route or "", ("keep", ""))
        if route is None and node in graph.number:
            decision, becomes = "merge", "part of another sum"
        row = Collective(node.name, "all_reduce", graph.known.axis.name, "", decision, becomes, 0, 0, "", "", reason)
        rows.append(row)
    return rows


def _elements(graph: PlacementGraph, node: fx.Node, steps: int, tokens: int) -> tuple[int, str]:
    """What one rank sends at ``tokens`` tokens, symbols other than T at their hints, and the same in terms of T."""
    size, t = graph.known.axis.size, graph.known.tokens
    assert t is not None
    whole: Expr = product(graph.known.shapes[node][0])
    if not t.is_number:
        whole = counted(whole, t, _T).subs(t, _T)
    expr = whole * sympy.Rational(steps * (size - 1), size)
    value = expr.subs({s: tokens if s == _T else graph.hints.get(s, 1) for s in expr.free_symbols})
    return round(float(value)), str(expr)


def _all_reduce(
    graph: PlacementGraph, node: fx.Node, route: str, interval: Interval, tokens: int, fused: int | None
) -> Collective:
    before, before_expr = _elements(graph, node, 2, tokens)
    axis, module = graph.known.axis.name, module_of(graph.known.all_reduces[node].start)
    if node not in graph.number:
        outcome = graph.known.classes.get(node)
        reason = outcome.reason if isinstance(outcome, Mixing) else "it carries no tokens"
        return Collective(
            node.name,
            "all_reduce",
            axis,
            module,
            "keep",
            "all_reduce",
            before,
            before,
            before_expr,
            before_expr,
            reason,
        )
    target = _summed_into(graph, node, interval) if not route else None
    if target is not None:
        decision = "merge" if len(_addends(graph, target, interval)) > 1 else "sink"
        reason = f"the sum over the ranks is taken once, of {target.name}"
        return Collective(
            node.name,
            "all_reduce",
            axis,
            module,
            decision,
            f"part of {target.name}",
            before,
            0,
            before_expr,
            "0",
            reason,
        )
    decision, becomes = _BECOMES[route]
    after, after_expr = _elements(graph, node, _STEPS[route], tokens)
    reason = _why_scattered(graph, node, interval) if decision == "scatter" else _why_kept(route)
    return Collective(
        node.name, "all_reduce", axis, module, decision, becomes, before, after, before_expr, after_expr, reason, fused
    )


def _existing_gather(graph: PlacementGraph, node: fx.Node, route: str, tokens: int, fused: int | None) -> Collective:
    """A gather that the graph came with: removed where its readers run on the rows that each rank brings."""
    row = _raised(graph, node, "gather", tokens, fused)
    row = replace(row, elements_before=row.elements_after, elements_before_in_t=row.elements_after_in_t)
    if route:
        return replace(row, decision="keep")
    reason = (
        "its readers are row-wise and run on the rows that each rank brings; what they need whole is gathered later"
    )
    return replace(row, decision="remove", becomes="nothing", elements_after=0, elements_after_in_t="0", reason=reason)


def _indexer(
    graph: PlacementGraph, node: fx.Node, around: IndexerModel, interval: Interval, break_evens: Mapping[str, int]
) -> Collective:
    """An indexer, without the gather of its indices."""
    decision, becomes, reason = "keep", "the whole indexer on every rank", ""
    if node not in graph.number:
        outcome = graph.known.classes.get(node)
        reason = outcome.reason if isinstance(outcome, Mixing) else "its queries differ between the ranks"
    else:
        costs = around.costs(graph.number[node])
        reason = _why_sharded(costs, graph.known.axis.size) if costs.sharded else _why_whole(costs)
        if costs.pays != costs.sharded:
            reason += (
                f"; alone it would be the other way, but plans are chosen as a whole, this one at T = {interval.at}"
            )
        if node.name in break_evens:
            reason += f"; break-even T = {break_evens[node.name]}"
        if costs.sharded:
            decision, becomes = "shard", "nothing: its readers run on the same rows"
    axis = graph.known.axis.name
    return Collective(node.name, "indexer", axis, module_of(node), decision, becomes, 0, 0, "0", "0", reason)


def _why_sharded(costs: IndexerCosts, size: int) -> str:
    spared = f" and {_us(costs.operands)} of gathers of its operands" if costs.operands else ""
    gather = f"its indices' gather costs {_us(costs.indices)}" if costs.indices else "its indices are not gathered"
    return f"its queries run on 1/{size} of the rows: saves {_saved(costs)}{spared}, {gather}"


def _why_whole(costs: IndexerCosts) -> str:
    spared = f" and {_us(costs.operands)} of gathers of its operands" if costs.operands else ""
    return f"sharding its queries would save {_saved(costs)}{spared} and gather its indices for {_us(costs.indices)}"


def _saved(costs: IndexerCosts) -> str:
    return (
        f"{_us(costs.compute)} of compute ({_us(costs.own)} its own, the rest in {costs.helpers} ops for its queries)"
    )


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} us"


def _why_kept(route: str) -> str:
    return "one all-reduce is cheaper here than shards would be" if route else "its result is not used"


def _why_scattered(graph: PlacementGraph, node: fx.Node, interval: Interval) -> str:
    users = [c for v, c, _ in graph.uses if v is node and c is not None]
    local = [graph.choices[c].node for c in users if interval.labels.get(graph.choices[c].node.name) == "S"]
    names = ", ".join(n.name for n in local[:3])
    return f"its readers are row-wise and run on 1/{graph.known.axis.size} of the rows: {names}"


def _raised(graph: PlacementGraph, node: fx.Node, route: str, tokens: int, fused: int | None) -> Collective:
    after, expr = _elements(graph, node, _STEPS[route], tokens)
    kind = "all_gather" if route == "gather" else "sum of partial values"
    decision = {"gather": "gather", "reduce": "keep"}.get(route, "scatter")
    if graph.choices[graph.values[node][0]].picks:
        kind, decision = "picked rows", "gather"
    becomes = {"gather": "all_gather", "reduce": "all_reduce"}.get(route, _BECOMES.get(route, ("", ""))[1])
    whole = [f"{consumer.name}: {why}" for consumer, why in graph.consumers.get(node, [])]
    reason = (
        f"needed whole by {'; '.join(whole[:2])}"
        if whole
        else "its readers run on shards"
        if decision == "scatter"
        else "its readers run whole" + _unknown_below(graph, node)
    )
    return Collective(
        node.name, kind, graph.known.axis.name, module_of(node), decision, becomes, 0, after, "0", expr, reason, fused
    )


def _unknown_below(graph: PlacementGraph, node: fx.Node) -> str:
    """An op further down that is not known, and so has its operands whole."""
    found = [node]
    for value in found:
        for consumer, why in graph.consumers.get(value, []):
            if "not in the table" in why:
                return f", for {consumer.name}: {why}"
        found += [n for n in _readers(graph, value) if n not in found]
    return ""


def _readers(graph: PlacementGraph, node: fx.Node) -> list[fx.Node]:
    return [graph.choices[c].node for v, c, _ in graph.uses if v is node and c is not None]


def _summed_into(graph: PlacementGraph, node: fx.Node, interval: Interval) -> fx.Node | None:
    """The value at which a partial sum is finally reduced; None if nobody reads it."""
    while node.name not in interval.raises:
        following = [n for n in _readers(graph, node) if interval.labels.get(n.name) == "P"]
        if not following:
            return None
        node = following[0]
    return node


def _addends(graph: PlacementGraph, target: fx.Node, interval: Interval) -> list[fx.Node]:
    return [
        w
        for w in graph.known.all_reduces
        if w in graph.number and w is not target and _summed_into(graph, w, interval) is target
    ]
