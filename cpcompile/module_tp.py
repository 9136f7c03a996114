"""Module tensor parallelism in the pipeline: which modules are shared over which ranks, and what became of each.

Ranks that share a module agree once that they hold the same weights and can prove their graphs. Later compilations on
these weights (another batch size, a first call with one token) exchange nothing: other ranks need not compile then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
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
from cpcompile.passes.module_cuts import SharedModule, cuts_of, read_beside
from cpcompile.passes.module_parallel import idle_graph, share_modules
from cpcompile.passes.module_roles import find_modules
from cpcompile.passes.row_groups import EQUAL
from cpcompile.passes.token_layout import Expr
from cpcompile.passes.weight_cuts import Cut, CutRefused
from cpcompile.passes.weight_recipes import Part, Recipe
from cpcompile.replication import InputFact, input_facts
from cpcompile.report import ModuleRow
from cpcompile.weights import local_tensor


def module_axes(options: Options) -> dict[str, Axis]:
    """Kind of group, as ``cpcompile.mesh`` calls it → this rank's, for the weights that the options want shared.

    Raises:
        GroupError: there is no group of that kind, or it has another size.
    """
    found: dict[str, Axis] = {}
    for key, size in options.finegrained_tp_config.items():
        role = MODULE_SIZES[key]
        if size > 1:
            found[role] = group_axis(options.groups, role, size, key)
    found = _merged(found)
    otp = options.flashcomm2_oproj_tensor_parallel_size
    if otp:
        key = "flashcomm2_oproj_tensor_parallel_size"
        if "o_proj" in found:
            raise GroupError(f"{key}={otp} and oproj_tensor_parallel_size={found['o_proj'].size}: o_proj is cut by one")
        found["flashcomm2_otp"] = group_axis(options.groups, "flashcomm2_otp", otp, key)
        found["flashcomm2_odp"] = group_axis(options.groups, "flashcomm2_odp", None, key)
    if options.layer_sharding:
        if "o_proj" in found or otp > 1:
            raise GroupError("layer_sharding=['o_proj'] spreads whole weights, and o_proj is cut: give one of them")
        found["shared_weight"] = group_axis(options.groups, "shared_weight", None, "layer_sharding")
    return found


def _merged(found: Mapping[str, Axis]) -> dict[str, Axis]:
    """Roles that share a communicator have one axis, called after all of them: they agree on rows once."""
    roles: dict[str, list[str]] = {}
    for role, axis in found.items():
        roles.setdefault(axis.group_name, []).append(role)
    return {role: replace(axis, name="+".join(roles[axis.group_name])) for role, axis in found.items()}


def group_axis(groups: object, kind: str, size: int | None, key: str) -> Axis:
    """The process group of ``kind`` among ``groups``, which the option ``key`` needs, of ``size`` ranks if given.

    Raises:
        GroupError: there is none, or it has another size.
    """
    if groups is None:
        raise GroupError(f"{key} needs the process group {kind!r}: give groups=ProcessGroups(rank_groups(Sizes(...)))")
    try:
        group = groups[kind]  # type: ignore[index]
    except KeyError as error:
        known = nearest(kind, groups) if isinstance(groups, Mapping) else ""
        raise GroupError(f"{key}: groups has none of kind {kind!r}{known}") from error
    axis = group if isinstance(group, Axis) else axis_of(kind, group)
    if size is not None and axis.size != size:
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


def replica_groups(sizes: Mapping[str, int], ranks: int) -> dict[str, Axis]:
    """The same with process groups, of replicas that follow each other: those that this rank is in.

    Args:
        sizes: role → replicas.
        ranks: ranks of one replica.
    """
    replica, own = divmod(dist.get_rank(), ranks)
    found: dict[int, Axis] = {}
    for size in sorted({size for size in sizes.values() if size > 1}):
        first = replica - replica % size
        group = dist.new_group([own + number * ranks for number in range(first, first + size)])
        found[size] = axis_of(f"{size} replicas", group)
    return {role: found[size] for role, size in sizes.items() if size > 1}


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


@dataclass(frozen=True)
class _Candidate:
    module: SharedModule
    cuts: Mapping[str, Cut]
    beside: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """What its ranks must hold alike."""
        return (*self.cuts, *self.beside)


def share(
    canonical: fx.GraphModule,
    variants: Sequence[tuple[fx.GraphModule, frozenset[str]]],
    inputs: Sequence[GraphInput],
    roles: Mapping[str, Axis],
    token_axes: Sequence[Axis],
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    sharing: Sharing,
) -> None:
    """Share every module of ``roles`` that can be shared in all ``variants``.

    Args:
        canonical: the graph before tokens were placed, in which roles are found.
        variants: the graphs to rewrite, each with the nodes that are the same on all ranks of the last token axis.
        inputs: what their inputs are.
        roles: role → ranks.
        token_axes: axes whose ranks work on the same tokens: among them, ranks have equal numbers of rows.
        options: the user's options.
        exchange_for: how to reach the other ranks of an axis.
        sharing: where the outcome goes.

    Raises:
        AxisError: the ranks of a group found different modules.
        OptionError: a pattern of ``modules`` matches nothing.
    """
    found, refusals = find_modules(canonical, roles, options.modules)
    places = {n.name: given for n, given in zip(canonical.graph.find_nodes(op="placeholder"), inputs, strict=True)}
    candidates: list[_Candidate] = []
    sharing.refusals += refusals
    sharing.rows += [none_found(role, axis) for role, axis in roles.items() if all(m.role != role for m in found)]
    sharing.graphs = [gm for gm, _ in variants]
    for module in found:
        axis = roles[module.role]
        unequal = not any(_inside(axis, tokens) for tokens in token_axes)
        wanted = SharedModule(module.role, module.name, tuple(n.name for n in module.nodes), axis, unequal)
        try:
            if options.deterministic:
                raise CutRefused("deterministic=True keeps every reduction order")
            found_cuts = [cuts_of(gm, wanted) for gm, _ in variants]
            beside = tuple(read_beside(variants[0][0], wanted, found_cuts[0]))
            cuts = found_cuts[0].inputs()
            check_weights(places, [*cuts, *beside])
        except CutRefused as refused:
            sharing.rows.append(_row(wanted, "keep", (0, 0), "", str(refused)))
        else:
            candidates.append(_Candidate(wanted, cuts, beside))
    differing = _differing(candidates, places, exchange_for, options, sharing)
    for candidate in candidates:
        if candidate.module in differing:
            sharing.rows.append(_row(candidate.module, "keep", (0, 0), "", differing[candidate.module]))
        else:
            sharing.modules.append(candidate.module)
            sharing.cuts.update(candidate.cuts)
            sharing.axes.update(dict.fromkeys(candidate.cuts, candidate.module.axis))
            sharing.beside.update(candidate.beside)
            sharing.rows.append(_shared_row(candidate, places))
    alike = token_axes and all(_inside(m.axis, token_axes[-1]) for m in sharing.modules if not m.unequal)
    for index, (gm, same) in enumerate(variants if sharing.modules else ()):
        made = share_modules(gm, sharing.modules, options.group_tokens, same if alike else ())
        sharing.graphs[index] = made.gm
        sharing.limited.update(made.most_rows)
    if any(module.unequal for module in sharing.modules):
        sharing.idle = idle_graph(canonical, sharing.modules, options.group_tokens)
        sharing.not_idle = _needs_tokens(canonical, token_axes, options)


def none_found(role: str, axis: Axis) -> ModuleRow:
    """The report's row for a role that was asked for and that no module of the graph has."""
    return ModuleRow(role, "", axis.name, axis.size, "keep", 0, 0, "", "no module of this graph was found to be one")


def _needs_tokens(gm: fx.GraphModule, token_axes: Sequence[Axis], options: Options) -> str:
    """Why a rank cannot be idle. Ranks of a token axis are idle together; of other groups nothing is known."""
    if options.group_tokens == EQUAL:
        return "group_tokens='equal' says that all ranks have as many tokens"
    groups = (group_name_of(node) for node in gm.graph.nodes if is_collective(node))
    foreign = next((g for g in groups if not any(axis.owns(g) for axis in token_axes)), None)
    return "" if foreign is None else f"the model itself communicates over group {foreign!r}"


def _inside(axis: Axis, tokens: Axis) -> bool:
    return set(axis.ranks) <= set(tokens.ranks)


def check_weights(places: Mapping[str, GraphInput], names: Iterable[str]) -> None:
    """Raise :class:`CutRefused` if one of the graph inputs ``names`` is no parameter or buffer."""
    for name in names:
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
        labels = [f"{c.module.role} {c.module.name}" for c in mine]
        verdicts = compare(given, labels, axis, exchange_for, options, sharing)
        told = iter(verdicts)
        for candidate in mine:
            reasons = [reason for reason in [next(told) for _ in candidate.inputs] if reason]
            if reasons:
                found[candidate.module] = reasons[0]
    return found


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

    Raises:
        AxisError: the ranks came with other labels.
    """
    known = [weights.verdict(local_tensor(g.value), axis.ranks) if _is_real(g.value) else None for g in given]
    told = [verdict for verdict in known if verdict is not None]
    if len(told) == len(known):
        sharing.old.add(axis)
        return told
    exchange = exchange_for(axis)
    for rank, theirs in enumerate(exchange.all_gather(list(labels), f"modules to share over {axis.name}")):
        if theirs != list(labels):
            raise AxisError(
                f"rank {rank} of {axis.name} {list(axis.ranks)} would share other modules than rank {axis.rank}: "
                "compile the same model with the same options on all of them"
            )
    why = f"ranks {list(axis.ranks)} may hold different"
    facts = _facts(given, axis, exchange, options)
    found = ["" if fact.replicated else f"{why} {fact.name}: {fact.source}" for fact in facts]
    compared = zip(given, found, strict=True)
    sharing.new.setdefault(axis, []).extend((local_tensor(g.value), v) for g, v in compared if _is_real(g.value))
    return found


def _is_real(value: object) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_meta and not isinstance(local_tensor(value), FakeTensor)


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
    whole, module = sum(size_in_bytes(places[name]) for name in candidate.cuts), candidate.module
    reason = "asked for; ranks may have different numbers of rows" if module.unequal else "asked for; as many rows each"
    return _row(module, "share", (whole, whole // module.axis.size), _MOVES[module.role], reason)
