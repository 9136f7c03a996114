"""Which modules of a graph are shared, and what became of each: the unit of a refusal is one module.

Ranks agree on what is left out: a module that one of them cannot prove stays whole on all that would share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.errors import VerificationError, unexpected
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.module_tp import Sharing, check_weights, compare, none_found, size_in_bytes
from cpcompile.options import Options
from cpcompile.passes.collectives import group_name_of, is_collective
from cpcompile.passes.module_cuts import SharedModule, cuts_of, read_beside
from cpcompile.passes.module_parallel import SharedGraph, idle_graph, share_modules
from cpcompile.passes.module_roles import Module, find_modules
from cpcompile.passes.row_groups import EQUAL
from cpcompile.passes.weight_cuts import Cut, CutRefused
from cpcompile.report import ModuleRow
from cpcompile.weights import local_tensor


@dataclass(frozen=True)
class Candidate:
    """A module that can be shared.

    Args:
        module: the module.
        cuts: graph input → how it is cut.
        beside: graph inputs that are read beside these.
    """

    module: SharedModule
    cuts: Mapping[str, Cut]
    beside: tuple[str, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """What its ranks must hold alike."""
        return (*self.cuts, *self.beside)


@dataclass(frozen=True)
class ModuleSharing:
    """Shares modules in the variants of one graph.

    Args:
        canonical: the graph before tokens were placed, in which roles are found.
        variants: the graphs to rewrite, each with the nodes that are the same on all ranks of the last token axis.
        places: graph input → what it is.
        token_axes: axes whose ranks work on the same tokens: among them, ranks have equal numbers of rows.
        options: the user's options.
        exchange_for: how to reach the other ranks of an axis.
        sharing: where the outcome goes.
    """

    canonical: fx.GraphModule
    variants: Sequence[tuple[fx.GraphModule, frozenset[str]]]
    places: Mapping[str, GraphInput]
    token_axes: Sequence[Axis]
    options: Options
    exchange_for: Callable[[Axis], Exchange]
    sharing: Sharing

    def candidates(self, roles: Mapping[str, Axis]) -> list[Candidate]:
        """What can be shared in all variants and is the same on the ranks of its role; the rest gets a row.

        Raises:
            OptionError: a pattern of ``modules`` matches nothing.
        """
        found, refusals = find_modules(self.canonical, roles, self.options.modules)
        self.sharing.refusals += refusals
        for role, axis in roles.items():
            if all(module.role != role for module in found):
                self.sharing.rows.append(none_found(role, axis, refusals))
        wanted = [self._wanted(module, roles[module.role]) for module in found]
        every = [c for module in wanted if (c := self._candidate(module)) is not None]
        differing = self._differing(every)
        self.keep(differing)
        return [c for c in every if c.module not in differing]

    def _wanted(self, module: Module, axis: Axis) -> SharedModule:
        unequal = not any(_inside(axis, tokens) for tokens in self.token_axes)
        return SharedModule(module.role, module.name, tuple(n.name for n in module.nodes), axis, unequal)

    def _candidate(self, module: SharedModule) -> Candidate | None:
        try:
            if self.options.deterministic:
                raise CutRefused("deterministic=True keeps every reduction order")
            cuts = [cuts_of(gm, module).inputs() for gm, _ in self.variants]
            if any(others != cuts[0] for others in cuts):
                raise CutRefused("its weights would be cut in another way for other numbers of tokens")
            beside = tuple({name: None for gm, _ in self.variants for name in read_beside(gm, module, cuts[0])})
            check_weights(self.places, [*cuts[0], *beside])
        except CutRefused as refused:
            self.keep({module: str(refused)})
        except Exception as error:  # a bug of ours must not take more than this module
            self.keep({module: unexpected(error, f"cutting {module.name}")})
        else:
            return Candidate(module, cuts[0], beside)
        return None

    def keep(self, refused: Mapping[SharedModule, str]) -> None:
        """A row for each module that stays whole, with its reason."""
        self.sharing.rows += [_row(module, "keep", (0, 0), "", reason) for module, reason in refused.items()]

    def _differing(self, candidates: Sequence[Candidate]) -> dict[SharedModule, str]:
        """Modules whose weights are not known to be the same on their ranks, with the reason."""
        found: dict[SharedModule, str] = {}
        for axis in _axes(candidates):
            mine = [c for c in candidates if c.module.axis == axis]
            given = [self.places[name] for c in mine for name in c.inputs]
            labels = [f"{c.module.role} {c.module.name}" for c in mine]
            told = iter(compare(given, labels, axis, self.exchange_for, self.options, self.sharing))
            for candidate in mine:
                reasons = [reason for reason in [next(told) for _ in candidate.inputs] if reason]
                if reasons:
                    found[candidate.module] = reasons[0]
        return found

    def share(self, candidates: Sequence[Candidate]) -> list[SharedGraph]:
        """Share ``candidates`` in all variants, instead of what was shared before.

        Raises:
            ModulesRefused: some of them cannot be.
        """
        sharing, modules, tokens = self.sharing, [c.module for c in candidates], self.options.group_tokens
        alike = self.token_axes and all(_inside(m.axis, self.token_axes[-1]) for m in modules if not m.unequal)
        made = [share_modules(gm, modules, tokens, same if alike else ()) for gm, same in self.variants if modules]
        sharing.idle = idle_graph(self.canonical, modules, tokens) if any(m.unequal for m in modules) else None
        sharing.not_idle = _needs_tokens(self.canonical, self.token_axes, self.options) if sharing.idle else ""
        sharing.modules = modules
        sharing.cuts = {name: cut for c in candidates for name, cut in c.cuts.items()}
        sharing.axes = {name: c.module.axis for c in candidates for name in c.cuts}
        sharing.beside = {name for c in candidates for name in c.beside}
        sharing.graphs = [one.gm for one in made] or [gm for gm, _ in self.variants]
        sharing.limited = {rows for one in made for rows in one.most_rows}
        return made

    def agree(self, candidates: Sequence[Candidate], refused: Mapping[SharedModule, str]) -> dict[SharedModule, str]:
        """What any of the ranks that would share a module refuses, with the reason; they remember it.

        Raises:
            VerificationError: this rank refuses what the others share already.
        """
        found: dict[SharedModule, str] = {}
        for axis in _axes(candidates):
            mine = [c for c in candidates if c.module.axis == axis]
            told = [refused.get(c.module, "") for c in mine]
            if axis not in self.sharing.new:
                if any(told):
                    why = next(filter(None, told))
                    raise VerificationError(f"{why}; other ranks share it already, so that it cannot be whole")
                continue
            every = self.exchange_for(axis).all_gather(told, f"modules that cannot be shared over {axis.name}")
            for index, candidate in enumerate(mine):
                reasons = [theirs[index] for theirs in every if theirs[index]]  # type: ignore[index]
                if reasons:
                    found[candidate.module] = reasons[0]
                    self._remember(candidate, reasons[0])
        return found

    def _remember(self, candidate: Candidate, reason: str) -> None:
        """Note that the weights of ``candidate`` are not shared, for later compilations."""
        mine = {id(local_tensor(self.places[name].value)) for name in candidate.cuts}
        axis, compared = candidate.module.axis, self.sharing.new[candidate.module.axis]
        self.sharing.new[axis] = [(t, reason if id(t) in mine else old) for t, old in compared]

    def done(self, candidates: Sequence[Candidate], refused: Mapping[SharedModule, str]) -> None:
        """A row for each of ``candidates``, in their order."""
        for candidate in candidates:
            if candidate.module in refused:
                self.keep({candidate.module: refused[candidate.module]})
            else:
                self.sharing.rows.append(_shared_row(candidate, self.places))


def _axes(candidates: Sequence[Candidate]) -> list[Axis]:
    return list(dict.fromkeys(candidate.module.axis for candidate in candidates))


def _needs_tokens(gm: fx.GraphModule, token_axes: Sequence[Axis], options: Options) -> str:
    """Why a rank cannot be idle. Ranks of a token axis are idle together; of other groups nothing is known."""
    if options.group_tokens == EQUAL:
        return "group_tokens='equal' says that all ranks have as many tokens"
    groups = (group_name_of(node) for node in gm.graph.nodes if is_collective(node))
    foreign = next((g for g in groups if not any(axis.owns(g) for axis in token_axes)), None)
    return "" if foreign is None else f"the model itself communicates over group {foreign!r}"


def _inside(axis: Axis, tokens: Axis) -> bool:
    return set(axis.ranks) <= set(tokens.ranks)


_MOVES = {
    "embedding": "all_gather of ids, reduce_scatter",
    "o_proj": "all_to_all, reduce_scatter",
    "mlp": "all_gather, reduce_scatter",
    "lm_head": "all_gather, all_to_all",
}


def _row(module: SharedModule, decision: str, size: tuple[int, int], collectives: str, reason: str) -> ModuleRow:
    axis = module.axis
    return ModuleRow(module.role, module.name, axis.name, axis.size, decision, *size, collectives, reason)


def _shared_row(candidate: Candidate, places: Mapping[str, GraphInput]) -> ModuleRow:
    whole, module = sum(size_in_bytes(places[name]) for name in candidate.cuts), candidate.module
    reason = "asked for; ranks may have different numbers of rows" if module.unequal else "asked for; as many rows each"
    return _row(module, "share", (whole, whole // module.axis.size), _MOVES[module.role], reason)
