"""Two more ways to place the weights of o_proj: FlashComm 2 within tensor parallelism, and whole layers by rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.errors import GroupError
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.module_tp import Sharing, check_weights, compare, size_in_bytes
from cpcompile.options import Options
from cpcompile.passes.flash_sites import FlashGroups
from cpcompile.passes.flashcomm2 import FlashGraph, use_flashcomm2
from cpcompile.passes.layer_sharding import LayerGraph, idle_layers, shard_layers
from cpcompile.passes.module_roles import Module
from cpcompile.passes.weight_cuts import CutRefused
from cpcompile.passes.weight_recipes import Owner, Recipe
from cpcompile.report import ModuleRow


def flash_groups(kinds: Mapping[str, Axis], token_axes: Sequence[Axis]) -> FlashGroups:
    """The ranks of FlashComm 2.

    Raises:
        GroupError: no tensor-parallel axis of the graph is made of these groups.
    """
    otp, odp = kinds["flashcomm2_otp"], kinds["flashcomm2_odp"]
    both = {*otp.ranks, *odp.ranks}
    tp = next((a for a in token_axes if both <= set(a.ranks) and a.size == otp.size * odp.size), None)
    if tp is None:
        raise GroupError(
            f"flashcomm2_oproj_tensor_parallel_size={otp.size}: the graph reduces over no axis of "
            f"{otp.size} x {odp.size} ranks that has {sorted(both)}; give both groups of one tp axis"
        )
    return FlashGroups(tp, otp, odp)


def flash(
    graphs: Sequence[fx.GraphModule],
    same: Sequence[frozenset[str]],
    modules: Sequence[Module],
    groups: FlashGroups,
    places: Mapping[str, GraphInput],
    sharing: Sharing,
) -> tuple[list[fx.GraphModule], dict[str, str]]:
    """Run the o_proj ``modules`` as FlashComm 2 in every variant, those that can be in all.

    Returns:
        The graphs, and what each product that was rewritten is called in them.
    """
    wanted = [m.nodes[0].name for m in modules]
    made: list[FlashGraph] = []
    while True:  # again without what one of the variants refuses
        made = [use_flashcomm2(gm, wanted, groups, alike) for gm, alike in zip(graphs, same, strict=True)]
        refused = {r.node: r.reason for one in made for r in one.refused}
        refused |= _no_weights(made[0].recipes, places, wanted)
        for module in modules:
            if module.nodes[0].name in refused:
                sharing.rows.append(_row(module, groups.otp, "keep", (0, 0), "", refused[module.nodes[0].name]))
        accepted = [name for name in wanted if name not in refused]
        if accepted == wanted:
            break
        wanted = accepted
    if not wanted:
        return list(graphs), {}
    recipes: dict[str, tuple[Recipe, ...]] = {name: (recipe,) for name, recipe in made[0].recipes.items()}
    sharing.others.update(recipes)
    sharing.new.setdefault(groups.tp, [])
    before = sum(size_in_bytes(places[name]) for name in recipes) // len(wanted)
    for module in modules:
        if module.nodes[0].name in wanted:
            moves = "all_to_all, reduce_scatter" if groups.otp.size > 1 else "all_to_all"
            why = f"FlashComm 2: 1/{groups.odp.size} of the rows, {groups.odp.size} times the columns"
            sharing.rows.append(_row(module, groups.otp, "share", (before, before * groups.odp.size), moves, why))
    return [one.gm for one in made], dict(made[0].products)


def spread_layers(
    graphs: Sequence[fx.GraphModule],
    modules: Sequence[tuple[Module, str]],
    axis: Axis,
    places: Mapping[str, GraphInput],
    flashed: FlashGroups | None,
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    sharing: Sharing,
) -> tuple[list[fx.GraphModule], list[list[str]]]:
    """Spread the weights of ``modules``, each with its product's name, over ``axis`` by layers.

    Returns:
        The graphs, and the names of each layer's products in the graphs before.
    """
    kept: dict[str, str] = {}
    layers = [[name] for _, name in modules]
    made: list[LayerGraph] = []
    while True:  # again without what a variant refuses
        made = [shard_layers(gm, layers, axis) for gm in graphs]
        kept |= {r.node: r.reason for one in made for r in one.refused}
        kept |= _no_weights(made[0].recipes, places, [name for of_layer in layers for name in of_layer])
        accepted = [[name] for _, name in modules if name not in kept]
        if accepted == layers:
            break
        layers = accepted
    if layers:  # whatever was refused before, what is left is compared
        kept |= _not_alike(layers, made[0].recipes, axis, places, flashed, options, exchange_for, sharing)
        layers = [[name] for _, name in modules if name not in kept]
    for module, name in modules:
        if name in kept:
            sharing.rows.append(_row(module, axis, "keep", (0, 0), "", kept[name]))
    if not layers:
        return list(graphs), []
    sizes = iter(_sizes(layers, made[0].recipes, places))
    for module, name in modules:
        if name not in kept:
            sharing.rows.append(_row(module, axis, "share", next(sizes), "broadcast", "one layer ahead"))
    for name, owner in made[0].recipes.items():
        sharing.others[name] = (*sharing.others.get(name, ()), owner)
    sharing.new.setdefault(axis, [])
    if sharing.idle is not None:
        sharing.not_idle = sharing.not_idle or "layer_sharding broadcasts between the collectives of shared modules"
    else:
        sharing.idle = idle_layers(graphs[0], layers, axis)
    return [one.gm for one in made], layers


def _no_weights(
    recipes: Mapping[str, Recipe], places: Mapping[str, GraphInput], products: Sequence[str]
) -> dict[str, str]:
    """All ``products`` with the reason, if what they would share is no weight of the model."""
    try:
        check_weights(places, recipes)
    except CutRefused as refused:
        return dict.fromkeys(products, str(refused))
    return {}


def _not_alike(
    layers: Sequence[Sequence[str]],
    recipes: Mapping[str, Owner],
    axis: Axis,
    places: Mapping[str, GraphInput],
    flashed: FlashGroups | None,
    options: Options,
    exchange_for: Callable[[Axis], Exchange],
    sharing: Sharing,
) -> dict[str, str]:
    """Products whose weights the ranks of ``axis`` may not hold alike, with the reason."""
    if flashed is not None:  # gathered over all of tp: the same there, whatever each rank had
        alike = flashed.otp.size == 1 and set(axis.ranks) <= set(flashed.tp.ranks)
        why = "layer_sharding with FlashComm 2 needs otp 1 and ranks of one tp axis"
        return {} if alike else {name: why for names in layers for name in names}
    names = list(recipes)
    reasons = compare([places[n] for n in names], names, axis, exchange_for, options, sharing)
    different = next((reason for reason in reasons if reason), "")
    return {name: different for of_layer in layers for name in of_layer} if different else {}


def _sizes(
    layers: Sequence[Sequence[str]], recipes: Mapping[str, Owner], places: Mapping[str, GraphInput]
) -> list[tuple[int, int]]:
    """Bytes of each layer before and after on this rank: its inputs are those of one owner, in turn."""
    every = [(size_in_bytes(places[name]), recipe.keeps) for name, recipe in recipes.items()]
    each = len(every) // len(layers)
    parts = [every[i * each : (i + 1) * each] for i in range(len(layers))]
    return [(sum(s for s, _ in part), sum(s for s, keeps in part if keeps)) for part in parts]


def _row(module: Module, axis: Axis, decision: str, size: tuple[int, int], collectives: str, reason: str) -> ModuleRow:
    return ModuleRow("o_proj", module.name, axis.name, axis.size, decision, *size, collectives, reason)
