"""What was decided about every collective of a graph, and why: the data behind ``explain``."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

REWRITTEN = ("scatter", "merge", "sink", "remove")


@dataclass(frozen=True)
class Collective:
    """One collective before or after the rewrite, or an indexer whose queries may be sharded.

    Elements are those that each rank sends at the report's token count: ``2(n-1)/n`` of the value for an all-reduce,
    ``(n-1)/n`` for a reduce-scatter or all-gather.

    Args:
        name: the FX node that it reduces or gathers.
        kind: ``"all_reduce"``, ``"all_gather"``, ``"sum of partial values"``, ``"picked rows"``, or ``"indexer"``: a
            sparse-attention indexer and the gather of its indices, if there is one.
        axis: the mesh axis.
        module: the module that the node comes from.
        decision: ``"scatter"``, ``"merge"``, ``"sink"``, ``"gather"``, ``"remove"`` or ``"keep"``; of an
            indexer ``"shard"`` (its queries run on each rank's rows) or ``"keep"`` (on all).
        becomes: what stands in its place.
        elements_before: elements sent per rank in the graph as it came.
        elements_after: elements sent per rank in the rewritten graph.
        elements_before_in_t: the same as an expression in T.
        elements_after_in_t: the same as an expression in T.
        reason: why, in one line.
        fused: number of the all-gather that carries this value; several values may share one. None for no gather.
    """

    name: str
    kind: str
    axis: str
    module: str
    decision: str
    becomes: str
    elements_before: int
    elements_after: int
    elements_before_in_t: str
    elements_after_in_t: str
    reason: str
    fused: int | None = None

    def matches(self, pattern: str) -> bool:
        """Whether an fnmatch ``pattern`` names this collective or its module."""
        return fnmatch.fnmatchcase(self.name, pattern) or fnmatch.fnmatchcase(self.module, pattern)


@dataclass(frozen=True)
class ModuleRow:
    """One module that was to be shared by a group of ranks.

    Args:
        role: ``"embedding"``, ``"o_proj"``, ``"mlp"`` or ``"lm_head"``.
        module: the model's name of it.
        axis: name of the group.
        ranks: ranks of the group.
        decision: ``"share"``, or ``"keep"`` whole.
        bytes_before: bytes of its weights on each rank before; 0 where it is kept.
        bytes_after: bytes of its weights on each rank.
        collectives: what it costs in each step.
        reason: why, in one line.
    """

    role: str
    module: str
    axis: str
    ranks: int
    decision: str
    bytes_before: int
    bytes_after: int
    collectives: str
    reason: str


@dataclass(frozen=True)
class PassRun:
    """One run of a pass: seconds, rewrites, and the places that it left alone with reasons."""

    name: str
    seconds: float
    rewrites: int
    refusals: tuple[tuple[str, str], ...] = ()


@dataclass
class Report:
    """Everything that ``explain`` shows for one token count.

    Args:
        tokens: the token count that the elements are stated for.
        nodes_before: nodes of the graph as it came.
        nodes_after: nodes of the rewritten graph.
        collectives: every all-reduce of the graph and every gather of the plan.
        solver: per axis: solver, cost, bound and certificate of the plan that holds at ``tokens``.
        passes: what ran, in order.
        verify: outcome of the proof.
        axes: the mesh axes and why one was left alone, if it was.
        modules: every module that was to be shared by ranks of its own.
    """

    tokens: int
    nodes_before: int = 0
    nodes_after: int = 0
    collectives: list[Collective] = field(default_factory=list)
    solver: list[dict[str, Any]] = field(default_factory=list)
    passes: list[PassRun] = field(default_factory=list)
    verify: dict[str, Any] = field(default_factory=dict)
    axes: list[dict[str, Any]] = field(default_factory=list)
    modules: list[ModuleRow] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        return {
            "tokens": self.tokens,
            "axes": self.axes,
            "graph": {"nodes_before": self.nodes_before, "nodes_after": self.nodes_after},
            "collectives": [dataclasses.asdict(c) for c in self.collectives],
            "volume": {
                "before": sum(c.elements_before for c in self.collectives),
                "after": sum(c.elements_after for c in self.collectives),
            },
            "modules": [dataclasses.asdict(m) for m in self.modules],
            "solver": self.solver,
            "passes": [dataclasses.asdict(p) for p in self.passes],
            "verify": self.verify,
        }

    def missing(self, required: Sequence[str]) -> list[str]:
        """The patterns of ``required`` that match no rewritten collective.

        A sharded indexer counts where the pattern matches no all-reduce, and a gather where it matches neither:
        attention that context parallelism split had none.
        """
        return [pattern for pattern in required if not self._has(pattern)]

    def _has(self, pattern: str) -> bool:
        matching = [c for c in self.collectives if c.matches(pattern)]
        reduced = [c for c in matching if c.kind != "indexer" and c.decision != "gather"]
        indexers = [c for c in matching if c.kind == "indexer"]
        if reduced:
            return any(c.decision in REWRITTEN for c in reduced)
        return any(c.decision == "shard" for c in indexers) if indexers else bool(matching)
