"""Module tensor parallelism in the pipeline: which modules are shared over which ranks, and what became of each.

Ranks that share a module agree once that they hold the same weights and can prove their graphs. Later compilations on
these weights (another batch size, a first call with one token) exchange nothing: other ranks need not compile then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor

from cpcompile import weights
from cpcompile.axes import Axis, axis_of
from cpcompile.errors import AxisError, GroupError, VerificationError, nearest
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.options import MODULE_SIZES, Options
from cpcompile.passes.base import Refusal
from cpcompile.passes.collectives import group_name_of, is_collective
from cpcompile.passes.module_parallel import SharedGraph, SharedModule, cuts_of, idle_graph, share_modules
from cpcompile.passes.module_roles import find_modules
from cpcompile.passes.row_groups import EQUAL
from cpcompile.passes.weight_cuts import Cut, CutRefused
from cpcompile.replication import InputFact, input_facts
from cpcompile.report import ModuleRow
from cpcompile.weights import local_tensor


def module_axes(options: Options) -> dict[str, Axis]:
    """Role → the ranks that share modules of that role, as the options say.

    Raises:
        GroupError: there is no group for a role, or it has another size.
    """
    found = {}
    for key, size in options.finegrained_tp_config.items():
        role = MODULE_SIZES[key]
        if size > 1:
            found[role] = _axis(options.groups, role, size, key)
    return found


def _axis(groups: object, kind: str, size: int, key: str) -> Axis:
    if groups is None:
        raise GroupError(
            f"{key}={size} needs its process group: give groups=ProcessGroups(rank_groups(Sizes(..., {kind}={size})))"
        )
    try:
        group = groups[kind]  # type: ignore[index]
    except KeyError as error:
        known = nearest(kind, groups) if isinstance(groups, Mapping) else ""
        raise GroupError(f"{key}={size}: groups has none of kind {kind!r}{known}") from error
    axis = group if isinstance(group, Axis) else axis_of(kind, group)
    if axis.size != size:
        raise GroupError(f"{key}={size}: its process group {kind!r} has {axis.size} ranks; give groups of that size")
    return axis


def replica_axes(sizes: Mapping[str, int], ranks: int, rank: int) -> dict[str, Axis]:
    """Role → the ranks that share such modules where replicas of ``ranks`` ranks each do, as there are no real ones.

    Args:
        sizes: role → replicas.
        ranks: ranks of one replica.
        rank: this rank of the first replica.
    """
    members = {role: tuple(rank + replica * ranks for replica in range(size)) for role, size in sizes.items()}
    return {r: Axis(f"{len(m)} replicas", f"{len(m)} replicas", len(m), 0, m) for r, m in members.items() if len(m) > 1}


@dataclass
class Sharing:
    """What module tensor parallelism makes of a graph.

    Args:
        modules: what is shared.
        cuts: graph input → how it is cut.
        axes: graph input → the ranks that share it.
        graphs: one graph per variant.
        rows: what became of every module, for the report.
        refusals: places that were looked at and left alone.
        new: ranks that have not compared these weights before: each weight, and why it is not shared, if it is not.
        idle: what a rank without tokens runs; None where ranks never differ in their numbers of tokens.
        not_idle: why a rank cannot be without tokens, empty if it can.
    """

    modules: list[SharedModule] = field(default_factory=list)
    cuts: dict[str, Cut] = field(default_factory=dict)
    axes: dict[str, Axis] = field(default_factory=dict)
    graphs: list[SharedGraph] = field(default_factory=list)
    rows: list[ModuleRow] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)
    new: dict[Axis, list[tuple[torch.Tensor, str]]] = field(default_factory=dict)
    idle: fx.GraphModule | None = None
    not_idle: str = ""

    def settle(self, failure: str, exchange_for: Callable[[Axis], Exchange]) -> str:
        """The failure of any rank, told to all that share modules for the first time; empty if all may go on.

        Raises:
            VerificationError: this rank failed, and the others have their parts of its weights already.
        """
        for axis in self.new:
            outcomes = exchange_for(axis).all_gather(failure, "outcome of sharing modules")
            failure = next((f"rank {r} of {axis.name}: {o}" for r, o in enumerate(outcomes) if o), "")
        if failure and not self.new and self.modules:
            raise VerificationError(f"{failure}; other ranks share these weights already, so that they cannot be whole")
        for axis, compared in self.new.items():
            for tensor, reason in compared:
                weights.note_verdict(tensor, axis.ranks, reason or failure)
        return failure

    def refused(self, reason: str) -> Sharing:
        """Nothing is shared, for ``reason``."""
        rows = [r if r.decision == "keep" else replace(r, decision="keep", reason=reason) for r in self.rows]
        return Sharing(rows=rows, refusals=self.refusals)


@dataclass(frozen=True)
class _Candidate:
    module: SharedModule
    inputs: tuple[str, ...]
    cuts: Mapping[str, Cut]


def share(
    canonical: fx.GraphModule,
    variants: Sequence[tuple[fx.GraphModule, frozenset[str]]],
    inputs: Sequence[GraphInput],
    roles: Mapping[str, Axis],
    token_axes: Sequence[Axis],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
) -> Sharing:
    """Share every module of ``roles`` that can be shared in all ``variants``.

    Args:
        canonical: the graph before tokens were placed, in which roles are found.
        variants: the graphs to rewrite, each with the nodes that are the same on all ranks of the last token axis.
        inputs: what their inputs are.
        roles: role → ranks.
        token_axes: axes whose ranks work on the same tokens: among them, ranks have equal numbers of rows.
        options: the user's options.
        exchange_for: how to reach the other ranks of an axis.

    Raises:
        AxisError: the ranks of a group found different modules.
        OptionError: a pattern of ``modules`` matches nothing.
    """
    found, refusals = find_modules(canonical, roles, options.modules)
    places = {n.name: given for n, given in zip(canonical.graph.find_nodes(op="placeholder"), inputs, strict=True)}
    sharing, candidates = Sharing(refusals=refusals), list[_Candidate]()
    for module in found:
        axis = roles[module.role]
        unequal = not any(_inside(axis, tokens) for tokens in token_axes)
        wanted = SharedModule(module.role, module.name, tuple(n.name for n in module.nodes), axis, unequal)
        try:
            if options.deterministic:
                raise CutRefused("deterministic=True keeps every reduction order")
            cuts, *_ = [cuts_of(gm, wanted).inputs() for gm, _ in variants]
            _check_weights(places, cuts)
        except CutRefused as refused:
            sharing.rows.append(_row(wanted, "keep", (0, 0), "", str(refused)))
        else:
            candidates.append(_Candidate(wanted, tuple(cuts), cuts))
    differing = _differing(candidates, places, exchange_for, options, sharing)
    for candidate in candidates:
        if candidate.module in differing:
            sharing.rows.append(_row(candidate.module, "keep", (0, 0), "", differing[candidate.module]))
        else:
            sharing.modules.append(candidate.module)
            sharing.cuts.update(candidate.cuts)
            sharing.axes.update(dict.fromkeys(candidate.inputs, candidate.module.axis))
            sharing.rows.append(_shared_row(candidate, places))
    alike = token_axes and all(_inside(m.axis, token_axes[-1]) for m in sharing.modules if not m.unequal)
    for gm, same in variants if sharing.modules else ():
        sharing.graphs.append(share_modules(gm, sharing.modules, options.group_tokens, same if alike else ()))
    if any(module.unequal for module in sharing.modules):
        sharing.idle = idle_graph(canonical, sharing.modules, options.group_tokens)
        sharing.not_idle = _needs_tokens(canonical, token_axes, options)
    return sharing


def _needs_tokens(gm: fx.GraphModule, token_axes: Sequence[Axis], options: Options) -> str:
    """Why a rank cannot be idle. Ranks of a token axis are idle together; of other groups nothing is known."""
    if options.group_tokens == EQUAL:
        return "group_tokens='equal' says that all ranks have as many tokens"
    groups = (group_name_of(node) for node in gm.graph.nodes if is_collective(node))
    foreign = next((g for g in groups if not any(axis.owns(g) for axis in token_axes)), None)
    return "" if foreign is None else f"the model itself communicates over group {foreign!r}"


def _inside(axis: Axis, tokens: Axis) -> bool:
    return set(axis.ranks) <= set(tokens.ranks)


def _check_weights(places: Mapping[str, GraphInput], cuts: Mapping[str, Cut]) -> None:
    for name in cuts:
        if places[name].kind not in ("parameter", "buffer"):
            raise CutRefused(f"{places[name].name} is an argument of the model, and no weight of it")


def _differing(
    candidates: Sequence[_Candidate],
    places: Mapping[str, GraphInput],
    exchange_for: Callable[[Axis], Exchange],
    options: Options,
    sharing: Sharing,
) -> dict[SharedModule, str]:
    """Modules whose weights are not known to be the same on their ranks, with the reason."""
    found: dict[SharedModule, str] = {}
    for axis in dict.fromkeys(candidate.module.axis for candidate in candidates):
        mine = [c for c in candidates if c.module.axis == axis]
        given = [places[name] for c in mine for name in c.inputs]
        verdicts = [weights.verdict(local_tensor(g.value), axis.ranks) if _is_real(g.value) else None for g in given]
        if None in verdicts:
            exchange = exchange_for(axis)
            _check_same_modules(mine, axis, exchange)
            facts = _facts(given, axis, exchange, options)
            why = f"ranks {list(axis.ranks)} may hold different"
            verdicts = ["" if fact.replicated else f"{why} {fact.name}: {fact.source}" for fact in facts]
            compared = zip(given, verdicts, strict=True)
            sharing.new[axis] = [(local_tensor(g.value), str(v)) for g, v in compared if _is_real(g.value)]
        told = iter(verdicts)
        for candidate in mine:
            reasons = [reason for reason in [next(told) for _ in candidate.inputs] if reason]
            if reasons:
                found[candidate.module] = reasons[0]
    return found


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta and not isinstance(local_tensor(value), FakeTensor)


def _check_same_modules(mine: Sequence[_Candidate], axis: Axis, exchange: Exchange) -> None:
    chosen = [(c.module.role, c.module.name) for c in mine]
    for rank, theirs in enumerate(exchange.all_gather(chosen, f"modules to share over {axis.name}")):
        if theirs != chosen:
            raise AxisError(
                f"rank {rank} of {axis.name} {list(axis.ranks)} would share other modules than rank {axis.rank}: "
                "compile the same model with the same options on all of them"
            )


def _facts(given: Sequence[GraphInput], axis: Axis, exchange: Exchange, options: Options) -> list[InputFact]:
    """Whether the weights are the same on all ranks of ``axis``: of a DTensor, what lies on each rank."""
    values = [local_tensor(g.value) for g in given]
    return input_facts(
        [g.name for g in given], values, [g.kind for g in given], axis, exchange, declared=options.replicated
    )


_MOVES = {
    "embedding": "all_gather of ids, reduce_scatter",
    "o_proj": "all_to_all, reduce_scatter",
    "mlp": "all_gather, reduce_scatter",
    "lm_head": "all_gather, all_to_all",
}


def _row(module: SharedModule, decision: str, size: tuple[int, int], collectives: str, reason: str) -> ModuleRow:
    axis = module.axis
    return ModuleRow(module.role, module.name, axis.name, axis.size, decision, *size, collectives, reason)


def _shared_row(candidate: _Candidate, places: Mapping[str, GraphInput]) -> ModuleRow:
    tensors = [local_tensor(places[name].value) for name in candidate.inputs]
    whole = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    module = candidate.module
    reason = "asked for; ranks may have different numbers of rows" if module.unequal else "asked for; as many rows each"
    return _row(module, "share", (whole, whole // module.axis.size), _MOVES[module.role], reason)
