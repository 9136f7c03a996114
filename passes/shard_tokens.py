"""Shard tokens: annotate, place and materialise one axis for one token count."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from cpcompile.costs import profile
from cpcompile.exchange import OfflineExchange
from cpcompile.passes.base import PassResult
from cpcompile.passes.context import Rewrite, context_of
from cpcompile.passes.describe import describe
from cpcompile.passes.materialise import materialise
from cpcompile.passes.place import place
from cpcompile.passes.placement_problem import build
from cpcompile.passes.token_dims import annotate
from cpcompile.replication import rank_dependent_nodes, structure_fingerprint


@dataclass(frozen=True)
class ShardTokens:
    """``all_reduce(x)`` and row-wise ops on all rows -> ``reduce_scatter``, ops on ``ceil(T/n)`` rows, ``all_gather``.

    Before -> after: what the plan of ``axis`` for ``tokens`` tokens changes; the graph stays right for every other
    token count. One rewrite is one all-reduce that is replaced or one value that is gathered.

    Refuses:
        - a graph without a sum all-reduce of the axis that carries tokens;
        - each all-reduce that is best left as it is, with the reason.

    Args:
        axis: name of the mesh axis.
        tokens: token count T that the plan is best for.
        strategy: ``"auto"`` or ``"tp"``, as in ``Options``.
        profile: name of the hardware profile.

    Raises (on a call):
        AxisError: the graph has no such axis.
        OptionError: there is no such profile.
        TraceError: the graph came without its axes and facts.
    """

    axis: str = "tp"
    tokens: int = 16384
    strategy: str = "auto"
    profile: str = "ascend-a3"

    name = "shard-tokens"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result, context, hardware = PassResult(), context_of(gm), profile(self.profile)
        axis = context.axis(self.axis)
        offline = OfflineExchange(axis.size, axis.rank)
        known = annotate(gm, axis, context.replicated[axis.name], rank_dependent_nodes(gm, offline))
        if known.tokens is None or known.tokens.is_zero or not known.all_reduces:
            result.refuse(axis.name, f"no sum all-reduce of axis {axis.name!r} carries tokens")
            return result
        graph = build(known, hardware)
        interval = place(graph, hardware, self.strategy, structure_fingerprint(gm)).at(self.tokens)
        gathers: list[list[str]] = []
        if not interval.unchanged:
            gathers = _apply(gm, materialise(gm, graph, interval), Rewrite(_keep(gm), axis, known.tokens))
        for row in describe(graph, interval, self.tokens, gathers):
            if row.decision == "keep":
                result.refuse(row.name, row.reason)
            else:
                result.rewrites += 1
        return result


def _keep(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph as it is; its nodes are not copied, for materialise builds new ones."""
    return fx.GraphModule(gm, gm.graph)


def _apply(gm: fx.GraphModule, rewritten: fx.GraphModule, rewrite: Rewrite) -> list[list[str]]:
    gm.graph = rewritten.graph
    context_of(gm).rewrite = rewrite
    gathers: list[list[str]] = rewritten.meta["gathers"]
    return gathers
