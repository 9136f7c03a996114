"""Sharing weights in the pipeline: FlashComm 2, module tensor parallelism, layers; each step proven."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.compiled import Compiled, Variant
from cpcompile.errors import CpcompileError, unexpected
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.module_sharing import Candidate, ModuleSharing
from cpcompile.module_tp import Sharing, none_found
from cpcompile.o_proj import flash, flash_groups, spread_layers
from cpcompile.options import Options
from cpcompile.passes.flash_sites import FlashGroups
from cpcompile.passes.module_cuts import SharedModule
from cpcompile.passes.module_parallel import ModulesRefused, SharedGraph, made_for
from cpcompile.passes.module_roles import ROLES, Module, find_modules
from cpcompile.passes.verify_flashcomm2 import prove_flashcomm2
from cpcompile.passes.verify_layer_sharding import prove_layer_sharding
from cpcompile.passes.verify_modules import prove_modules
from cpcompile.passes.verify_proof import Failure, Proof
from cpcompile.report import ModuleRow
from cpcompile.weights import local_tensor

T = TypeVar("T")
ATTEMPTS = 4  # to share what is provable: the last but one refuses all that is left


@dataclass
class ShareWeights:
    """One graph's weights, shared.

    Args:
        canonical: the graph before tokens were placed, in which modules are found.
        inputs: what its inputs are.
        options: the user's options.
        exchange_for: how to reach the other ranks of an axis.
        kinds: kind of group, as ``cpcompile.mesh`` calls it → this rank's.
        result: the compilation so far; proofs are added.
        step: runs a named step of the pipeline.
        sharing: the outcome.
    """

    canonical: fx.GraphModule
    inputs: Sequence[GraphInput]
    options: Options
    exchange_for: Callable[[Axis], Exchange]
    kinds: Mapping[str, Axis]
    result: Compiled
    step: Callable[..., Any]
    sharing: Sharing = field(default_factory=Sharing)

    def __post_init__(self) -> None:
        """Name the inputs."""
        nodes = self.canonical.graph.find_nodes(op="placeholder")
        self.places = {node.name: given for node, given in zip(nodes, self.inputs, strict=True)}
        self.failure = ""

    def run(self, variants: Sequence[Variant]) -> str:
        """Share weights in ``variants``; return the first proof that failed, empty if none did."""
        graphs, alike = [v.gm for v in variants], [v.same for v in variants]
        flashes = "flashcomm2_otp" in self.kinds and not self.options.deterministic
        layered = "shared_weight" in self.kinds
        projections: list[Module] = []
        if flashes or layered:
            found, refused = find_modules(self.canonical, ["o_proj"], self.options.modules)
            projections, self.sharing.refusals = found, [*self.sharing.refusals, *refused]
            if not found:
                self.sharing.rows.append(
                    none_found("o_proj", self.kinds["flashcomm2_otp" if flashes else "shared_weight"])
                )
        groups = flash_groups(self.kinds, self.result.axes) if flashes else None
        names = {m.nodes[0].name: m.nodes[0].name for m in projections}
        if groups is not None and projections:
            run = functools.partial(self._flash, variants, graphs, alike, projections, groups)
            graphs, renamed = self._attempt(groups.tp, projections, run) or (graphs, {})
            names = {old: renamed.get(old, old) for old in names}
            alike = [frozenset()] * len(graphs) if renamed else alike
            groups = groups if renamed else None
        graphs = self._modules(variants, graphs, alike)
        if layered and projections:
            wanted = [(m, names[m.nodes[0].name]) for m in projections]
            axis = self.kinds["shared_weight"]
            work = functools.partial(self._layers, variants, graphs, wanted, groups)
            graphs = self._attempt(axis, projections, work) or graphs
        self.sharing.graphs = list(graphs)
        return self.failure

    def _attempt(self, axis: Axis, modules: Sequence[Module], work: Callable[[], tuple[T, str]]) -> T | None:
        """What ``work`` returns; None and what was there before, where a rank of ``axis`` failed or cannot prove it."""
        sharing, proofs = self.sharing, len(self.result.proofs)
        before = replace(sharing, rows=list(sharing.rows), others=dict(sharing.others))
        made: T | None = None
        try:
            made, failure = work()
        except CpcompileError:
            raise
        except Exception as error:  # a bug of ours must not take more than this step
            failure = unexpected(error, f"sharing o_proj over {axis.name}")
        sizes = [list(local_tensor(self.places[name].value).shape) for name in self.sharing.others]
        every = self.exchange_for(axis).all_gather([failure, sizes], "outcome of sharing o_proj")
        failure = next((f"rank {rank} of {axis.name}: {told[0]}" for rank, told in enumerate(every) if told[0]), "")  # type: ignore[index]
        if not failure and any(told != every[0] for told in every):
            failure = f"the ranks of {axis.name} hold weights of other sizes: heads must divide by the ranks"
        if not failure:
            return made
        del self.result.proofs[proofs:]
        before.rows += [ModuleRow("o_proj", m.name, axis.name, axis.size, "keep", 0, 0, "", failure) for m in modules]
        self.sharing = replace(before, new=sharing.new, old=sharing.old)
        return None

    def _flash(
        self,
        variants: Sequence[Variant],
        graphs: Sequence[fx.GraphModule],
        alike: Sequence[frozenset[str]],
        modules: Sequence[Module],
        groups: FlashGroups,
    ) -> tuple[tuple[list[fx.GraphModule], dict[str, str]], str]:
        """The graphs with FlashComm 2 and its products' names there; and why they cannot be proven."""
        made, renamed = self.step("flashcomm2", flash, graphs, alike, modules, groups, self.places, self.sharing)
        failures: list[Failure] = []
        facts = dict(zip(self.places, self.result.facts.get(groups.tp.name, ()), strict=False))
        for variant, old, new in zip(variants, graphs, made, strict=True):
            if renamed:
                axes, recipes = (groups.tp, groups.otp, groups.odp), {n: r[0] for n, r in self.sharing.others.items()}
                same = lambda name: name in facts and facts[name].replicated  # noqa: E731
                failures += self._prove(variant, "flashcomm2", prove_flashcomm2, old, new, axes, recipes, same)
        return (made, renamed), _first(failures)

    def _modules(
        self, variants: Sequence[Variant], graphs: Sequence[fx.GraphModule], alike: Sequence[frozenset[str]]
    ) -> list[fx.GraphModule]:
        roles = {kind: axis for kind, axis in self.kinds.items() if kind in ROLES}
        if not roles:
            return list(graphs)
        with_same = list(zip(graphs, alike, strict=True))
        work = ModuleSharing(
            self.canonical, with_same, self.places, self.result.axes, self.options, self.exchange_for, self.sharing
        )
        candidates: list[Candidate] = self.step("find-modules", work.candidates, roles)
        refused = self._prove_modules(work, candidates, variants, {})
        agreed = work.agree(candidates, refused)
        if agreed.keys() != refused.keys():  # other ranks refuse more
            further = self._prove_modules(work, candidates, variants, agreed)
            self.failure = next((reason for m, reason in further.items() if m not in agreed), "")
        work.done(candidates, agreed)
        return self.sharing.graphs

    def _prove_modules(
        self,
        work: ModuleSharing,
        candidates: Sequence[Candidate],
        variants: Sequence[Variant],
        refused: Mapping[SharedModule, str],
    ) -> dict[SharedModule, str]:
        """Share ``candidates`` without those that are ``refused`` or turn out to be unprovable; return these."""
        out, proofs = dict(refused), list(self.result.proofs)
        for attempt in range(ATTEMPTS):
            left = [c for c in candidates if c.module not in out]
            self.result.proofs[:] = proofs
            try:
                made = self.step("share-modules", work.share, left)
                blamed = self._blamed(work, made, variants) if left else {}
            except ModulesRefused as error:
                blamed = dict.fromkeys(error.modules, str(error))
            except Exception as error:  # a bug of ours must not take the model down
                blamed = {c.module: unexpected(error, "sharing modules") for c in left}
            if not blamed:
                break
            last = attempt == ATTEMPTS - 2
            out |= {c.module: next(iter(blamed.values())) for c in left} | blamed if last else blamed
        return out

    def _blamed(
        self, work: ModuleSharing, made: Sequence[SharedGraph], variants: Sequence[Variant]
    ) -> dict[SharedModule, str]:
        """The modules whose values cannot be proven, with the reason; all of them where the proof names none."""
        sharing, found = self.sharing, dict[SharedModule, str]()
        equal = {module.axis.group_name for module in sharing.modules if not module.unequal}
        for variant, (old, same), new in zip(variants, work.variants, made, strict=True):
            failures = self._prove(
                variant, "modules", prove_modules, old, new.gm, sharing.cuts, sharing.axes,
                group_tokens=self.options.group_tokens, same={*same, *sharing.beside}, equal=equal,
            )  # fmt: skip
            for failure in failures:
                blamed = made_for(new, failure.node) or sharing.modules
                found |= {module: f"not proven: {failure.message}" for module in blamed if module not in found}
        return found

    def _layers(
        self,
        variants: Sequence[Variant],
        graphs: Sequence[fx.GraphModule],
        wanted: Sequence[tuple[Module, str]],
        flashed: FlashGroups | None,
    ) -> tuple[list[fx.GraphModule], str]:
        """The graphs with layers' weights on one rank each; and why they cannot be proven."""
        axis = self.kinds["shared_weight"]
        made, layers = self.step(
            "layer-sharding", spread_layers, graphs, wanted, axis, self.places, flashed, self.options,
            self.exchange_for, self.sharing,
        )  # fmt: skip
        failures: list[Failure] = []
        owners = {name: steps[-1] for name, steps in self.sharing.others.items()}
        for variant, old, new in zip(variants, graphs, made, strict=True):
            if layers:
                failures += self._prove(variant, "layers", prove_layer_sharding, old, new, layers, axis, owners)
        return made, _first(failures)

    def _prove(
        self, variant: Variant, method: str, prove: Callable[..., Proof], *args: Any, **kwargs: Any
    ) -> Sequence[Failure]:
        """Run a proof and note its outcome; return its failures."""
        if self.options.verify == "off":
            return ()
        proof: Proof = self.step(f"verify-{method}", prove, *args, **kwargs)
        self.result.proofs.append(
            {"axis": method, "first": variant.first, "last": variant.last, "holds": proof.holds, "method": method,
             "failures": [f"{f.node}: {f.message}" for f in proof.failures]}
        )  # fmt: skip
        return proof.failures


def _first(failures: Sequence[Failure]) -> str:
    return f"{failures[0].node}: {failures[0].message}" if failures else ""
