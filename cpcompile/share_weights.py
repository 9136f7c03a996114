"""Sharing weights in the pipeline: FlashComm 2, module tensor parallelism, layers; each step proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.compiled import Compiled, Variant
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.module_tp import Sharing, none_found, share
from cpcompile.o_proj import flash, flash_groups, spread_layers
from cpcompile.options import Options
from cpcompile.passes.flash_sites import FlashGroups
from cpcompile.passes.module_roles import ROLES, Module, find_modules
from cpcompile.passes.verify_flashcomm2 import prove_flashcomm2
from cpcompile.passes.verify_layer_sharding import prove_layer_sharding
from cpcompile.passes.verify_modules import prove_modules


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
        if groups is not None:
            graphs, renamed = self._flash(variants, graphs, alike, projections, groups)
            names = {old: renamed.get(old, old) for old in names}
            alike = [frozenset()] * len(graphs) if renamed else alike
            groups = groups if renamed else None
        graphs = self._modules(variants, graphs, alike)
        if layered:
            wanted = [(m, names[m.nodes[0].name]) for m in projections]
            graphs = self._layers(variants, graphs, wanted, groups)
        self.sharing.graphs = list(graphs)
        return self.failure

    def _flash(
        self,
        variants: Sequence[Variant],
        graphs: Sequence[fx.GraphModule],
        alike: Sequence[frozenset[str]],
        modules: Sequence[Module],
        groups: FlashGroups,
    ) -> tuple[list[fx.GraphModule], dict[str, str]]:
        made, renamed = self.step("flashcomm2", flash, graphs, alike, modules, groups, self.places, self.sharing)
        facts = dict(zip(self.places, self.result.facts.get(groups.tp.name, ()), strict=False))
        for variant, old, new in zip(variants, graphs, made, strict=True):
            if renamed:
                axes, recipes = (groups.tp, groups.otp, groups.odp), {n: r[0] for n, r in self.sharing.others.items()}
                same = lambda name: name in facts and facts[name].replicated  # noqa: E731
                self._prove(variant, "flashcomm2", prove_flashcomm2, old, new, axes, recipes, same)
        return made, renamed

    def _modules(
        self, variants: Sequence[Variant], graphs: Sequence[fx.GraphModule], alike: Sequence[frozenset[str]]
    ) -> list[fx.GraphModule]:
        roles = {kind: axis for kind, axis in self.kinds.items() if kind in ROLES}
        if not roles:
            return list(graphs)
        sharing = self.sharing
        with_same = list(zip(graphs, alike, strict=True))
        axes, exchange = self.result.axes, self.exchange_for
        self.step(
            "share-modules", share, self.canonical, with_same, self.inputs, roles, axes, self.options, exchange, sharing
        )
        equal = {module.axis.group_name for module in sharing.modules if not module.unequal}
        for variant, (old, same), new in zip(variants, with_same, sharing.graphs, strict=True):
            if sharing.modules:
                known, tokens = {*same, *sharing.beside}, self.options.group_tokens
                self._prove(
                    variant, "modules", prove_modules, old, new, sharing.cuts, sharing.axes,
                    group_tokens=tokens, same=known, equal=equal,
                )  # fmt: skip
        return sharing.graphs

    def _layers(
        self,
        variants: Sequence[Variant],
        graphs: Sequence[fx.GraphModule],
        wanted: Sequence[tuple[Module, str]],
        flashed: FlashGroups | None,
    ) -> list[fx.GraphModule]:
        axis = self.kinds["shared_weight"]
        made, layers = self.step(
            "layer-sharding", spread_layers, graphs, wanted, axis, self.places, flashed, self.options,
            self.exchange_for, self.sharing,
        )  # fmt: skip
        owners = {name: steps[-1] for name, steps in self.sharing.others.items()}
        for variant, old, new in zip(variants, graphs, made, strict=True):
            if layers:
                self._prove(variant, "layers", prove_layer_sharding, old, new, layers, axis, owners)
        return made  # type: ignore[no-any-return]

    def _prove(self, variant: Variant, method: str, prove: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        if self.options.verify == "off":
            return
        proof = self.step(f"verify-{method}", prove, *args, **kwargs)
        failures = [f"{f.node}: {f.message}" for f in proof.failures]
        self.result.proofs.append(
            {"axis": method, "first": variant.first, "last": variant.last, "holds": proof.holds, "method": method,
             "failures": failures}
        )  # fmt: skip
        self.failure = self.failure or next(iter(failures), "")
