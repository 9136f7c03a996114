"""Verify rewrite: prove that the last rewrite of a graph changed where values lie and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from cpcompile.errors import VerificationError
from cpcompile.exchange import OfflineExchange
from cpcompile.passes.base import PassResult
from cpcompile.passes.context import context_of
from cpcompile.passes.verify_static import prove
from cpcompile.replication import rank_dependent_nodes


@dataclass(frozen=True)
class VerifyRewrite:
    """A rewritten graph -> the same graph, proven equal to the one before the rewrite.

    Refuses: a graph that no pass has rewritten since it was loaded; there is nothing to prove.

    Raises (on a call):
        VerificationError: the proof fails; the message names the first node that it fails at.
        TraceError: the graph came without its axes and facts.
    """

    name = "verify-static"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Check ``gm``; never changes it."""
        result, context = PassResult(), context_of(gm)
        rewrite = context.rewrite
        if rewrite is None:
            result.refuse("output", "no pass has rewritten this graph: there is nothing to prove")
            return result
        same = context.replicated[rewrite.axis.name]
        dependent = rank_dependent_nodes(rewrite.before, OfflineExchange(rewrite.axis.size, rewrite.axis.rank))
        proof = prove(rewrite.before, gm, rewrite.axis, rewrite.tokens, lambda name: same[name], dependent)
        if not proof.holds:
            failure = proof.failures[0]
            raise VerificationError(f"axis {rewrite.axis.name}: not proven at {failure.node}: {failure.message}")
        return result
