"""Module tensor parallelism in the pipeline: which modules are shared over which ranks, and what became of each.

Ranks that share a module agree once that they hold the same weights and can prove their graphs. Later compilations on
these weights (another batch size, a first call with one token) exchange nothing: other ranks need not compile then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx

from cpcompile import weights
from cpcompile.axes import Axis
from cpcompile.errors import VerificationError
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.options import Options
from cpcompile.passes.base import Refusal
from cpcompile.passes.module_cuts import SharedModule
from cpcompile.passes.token_layout import Expr
from cpcompile.passes.weight_cuts import Cut, CutRefused
from cpcompile.passes.weight_recipes import Part, Recipe
from cpcompile.replication import InputFact, input_facts
from cpcompile.report import ModuleRow
from cpcompile.weights import is_real, local_tensor


@dataclass
class Sharing:
    """What sharing weights makes of a graph.

    Args:
        modules: what is shared as module tensor parallelism.
        cuts: graph input → how it is cut.
        axes: graph input → the ranks that share it.
        others: graph input → what else becomes of it, step by step: FlashComm 2, layer sharding.
        beside: graph inputs that are read beside cut ones, and are the same on the ranks that share these.
        graphs: one graph per variant.
        limited: numbers of rows that must not be more than ``group_tokens``, where that is a number.
        rows: what became of every module, for the report.
        refusals: places that were looked at and left alone.
        new: ranks that have not compared these weights before: each weight, and why it is not shared, if it is not.
        old: ranks that have.
        idle: what a rank without tokens runs; None where ranks never differ in their numbers of tokens.
        not_idle: why a rank cannot be without tokens, empty if it can.
    """

    modules: list[SharedModule] = field(default_factory=list)
    cuts: dict[str, Cut] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    others: dict[str, tuple[Recipe, ...]] = field(default_factory=dict)
    beside: set[str] = field(default_factory=set)
    graphs: list[fx.GraphModule] = field(default_factory=list)
    limited: set[Expr] = field(default_factory=set)
    rows: list[ModuleRow] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    new: dict[Axis, list[tuple[torch.Tensor, str]]] = field(default_factory=dict)
    old: set[Axis] = field(default_factory=set)
    idle: fx.GraphModule | None = None
    not_idle: str = ""

    @property
    def recipes(self) -> dict[str, tuple[Recipe, ...]]:
        """Graph input → what becomes of it, step by step."""
        return {**{name: (Part(cut, self.axes[name]),) for name, cut in self.cuts.items()}, **self.others}

    def settle(self, failure: str, exchange_for: Callable[[Axis], Exchange]) -> str:
        """The failure of any rank, told to all that share weights for the first time; empty if all may go on.

        Raises:
            VerificationError: this rank failed, and the others have their parts of its weights already.
        """
        for axis in self.new:
            outcomes = exchange_for(axis).all_gather(failure, "outcome of sharing weights")
            failure = next((f"rank {r} of {axis.name}: {o}" for r, o in enumerate(outcomes) if o), "")
        if failure and self.old:
            raise VerificationError(f"{failure}; other ranks share these weights already, so that they cannot be whole")
        for axis, compared in self.new.items():
            for tensor, reason in compared:
                weights.note_verdict(tensor, axis.ranks, reason or failure)
        return failure

    def refused(self, reason: str) -> Sharing:
        """Nothing is shared, for ``reason``."""
        rows = [r if r.decision == "keep" else replace(r, decision="keep", reason=reason) for r in self.rows]
        return Sharing(rows=rows, refusals=self.refusals)


def none_found(role: str, axis: Axis, refusals: Sequence[Refusal] = ()) -> ModuleRow:
    """The report's row for a role that was asked for and that no module of the graph has."""
    failed = next((f": {r.reason}" for r in refusals if r.node == role), "")
    reason = f"no module of this graph was found to be one{failed}"
    return ModuleRow(role, "", axis.name, axis.size, "keep", 0, 0, "", reason)


def check_weights(places: Mapping[str, GraphInput], names: Iterable[str]) -> None:
    """Raise :class:`CutRefused` if one of the graph inputs ``names`` is no parameter or buffer."""
    for name in names:
        if places[name].kind not in ("parameter", "buffer"):
            raise CutRefused(f"{places[name].name} is an argument of the model, and no weight of it")


def compare(
    given: Sequence[GraphInput],
    labels: Sequence[str],
    axis: Axis,
    exchange_for: Callable[[Axis], Exchange],
    options: Options,
    sharing: Sharing,
) -> list[str]:
    """Why the ranks of ``axis`` may not hold the same of each weight, empty where they do.

    Args:
        given: the weights.
        labels: what they are for, which must be the same on every rank.
        axis: the ranks, which exchange something if any of these weights was never compared.
        exchange_for: how to reach the other ranks of an axis.
        options: the user's options.
        sharing: where it is noted what was compared.

    Returns:
        One for each weight. Where the ranks come with other labels, all are different.
    """
    known = [weights.verdict(local_tensor(g.value), axis.ranks) if is_real(g.value) else None for g in given]
    told = [verdict for verdict in known if verdict is not None]
    if len(told) == len(known):
        sharing.old.add(axis)
        return told
    exchange = exchange_for(axis)
    every = exchange.all_gather(list(labels), f"modules to share over {axis.name}")
    other = next((rank for rank, theirs in enumerate(every) if theirs != every[0]), 0)
    if other:
        why = f"rank {other} of {axis.name} {list(axis.ranks)} would share other modules than rank 0"
        found = [f"{why}: compile the same model with the same options on all of them"] * len(given)
    else:
        why = f"ranks {list(axis.ranks)} may hold different"
        facts = _facts(given, axis, exchange, options)
        found = ["" if fact.replicated else f"{why} {fact.name}: {fact.source}" for fact in facts]
    compared = zip(given, found, strict=True)
    sharing.new.setdefault(axis, []).extend((local_tensor(g.value), v) for g, v in compared if is_real(g.value))
    return found


def _facts(given: Sequence[GraphInput], axis: Axis, exchange: Exchange, options: Options) -> list[InputFact]:
    """Whether the weights are the same on all ranks of ``axis``: of a DTensor, what lies on each rank."""
    values = [local_tensor(g.value) for g in given]
    return input_facts(
        [g.name for g in given], values, [g.kind for g in given], axis, exchange, declared=options.replicated
    )


def size_in_bytes(given: GraphInput) -> int:
    """Bytes of a weight on this rank."""
    tensor = local_tensor(given.value)
    return tensor.numel() * tensor.element_size()
