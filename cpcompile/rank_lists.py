"""Which ranks run each collective of a graph together, on this rank and on all that it shares a group with.

A group's name says nothing: only rank lists tell whether a second group is the axis, lies inside it, or crosses it.
What device meshes name is known; of other groups the ranks tell each other, over each of them once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch.distributed as dist
import torch.fx as fx
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.axes import Axis, groups_of, is_group, resolve_group
from cpcompile.errors import CpcompileError
from cpcompile.exchange import Exchange, OfflineExchange, sooner
from cpcompile.passes.collectives import group_name_of, is_collective
from cpcompile.passes.group_relations import GroupRelations

log = logging.getLogger("cpcompile")

Ranks = tuple[int, ...]
Lists = Mapping[str, tuple[Ranks, ...]]
# What a rank knows: global rank → its group in each place, a place being a collective of the graph or an axis.
Cards = dict[int, tuple[Ranks | None, ...]]


def with_rank_lists(
    gm: fx.GraphModule, axes: Sequence[Axis], meshes: Iterable[DeviceMesh], exchange_for: Callable[[Axis], Exchange]
) -> list[Axis]:
    """``axes``, each with what is known of the groups of ``gm``. One exchange per group where meshes do not name all.

    Every rank of a group calls this for the same graph, and exchanges in the graph's order, as its collectives run. A
    rank that does not answer leaves its groups unknown.

    Args:
        gm: a canonical graph.
        axes: the mesh axes; what they know of groups already stays known.
        meshes: device meshes that name groups, seen among the graph's inputs.
        exchange_for: how to reach the other ranks of a group, given as an axis of its name.
    """
    if not axes:
        return []
    known: dict[str, tuple[Ranks, ...]] = {}
    for lists in [*(axis.groups for axis in axes), *map(groups_of, meshes)]:
        known.update(lists)
    names = [group_name_of(node) for node in gm.graph.nodes if is_collective(node)]
    own = {axis.group_name: axis.ranks for axis in axes}
    names += own  # the axes' groups last: over them ranks then pass on all that they heard
    own |= {name: _ranks_of(name) for name in dict.fromkeys(names) if name not in own and is_group(name)}
    several = len({frozenset(ranks) for ranks in own.values() if len(ranks) > 1}) > 1
    if several and not all(name in known for name in names):
        known |= _exchanged(axes[0].me, names, own, exchange_for)
    for name, ranks in own.items():
        known.setdefault(name, (ranks,))
    return [replace(axis, groups=known) for axis in axes]


def clashing(axes: Sequence[Axis]) -> dict[str, str]:
    """Axes that cannot be placed because of a later one of ``axes``, by name, each with the reason.

    What is split over two axes must be the dims of a mesh: else ranks of one would hold different rows of the other.
    """
    refused: dict[str, str] = {}
    kept: list[Axis] = []
    for axis in reversed(axes):
        for other in kept:
            why = GroupRelations(other).why_rows_meet(axis.group_name)
            if why:
                refused[axis.name] = f"axis {other.name!r} is reduced over more often and placed, and this one {why}"
                break
        else:
            kept.append(axis)
    return refused


def _ranks_of(name: str) -> Ranks:
    return tuple(dist.get_process_group_ranks(resolve_group(name)))


def _exchanged(
    me: int, names: Sequence[str], own: Mapping[str, Ranks], exchange_for: Callable[[Axis], Exchange]
) -> Lists:
    """Rank lists by name, from what the ranks of every group tell each other: their own and what they heard."""
    card = tuple(own.get(name) for name in names)
    cards: Cards = {me: card}
    last = {frozenset(own.get(name, ())): name for name in names}
    for name in sorted(last.values(), key=lambda name: len(names) - names[::-1].index(name)):
        ranks = own.get(name, ())
        if len(ranks) > 1:
            cards |= _heard(exchange_for, Axis(name, name, len(ranks), ranks.index(me), ranks), cards)
    return {name: _joined(name, names, cards) for name in last.values()}


def _heard(exchange_for: Callable[[Axis], Exchange], axis: Axis, cards: Cards) -> Cards:
    try:
        exchange = exchange_for(axis)
        if isinstance(exchange, OfflineExchange):
            return {}
        found: Cards = {}
        for said in sooner(exchange).all_gather(cards, "rank lists of the graph's groups"):
            found |= cast(Cards, said)
    except CpcompileError as error:
        log.warning("cpcompile: group %s: what its ranks hold is not known: %s", axis.group_name, error)
        return {}
    return found


def _joined(name: str, names: Sequence[str], cards: Mapping[int, Sequence[Any]]) -> tuple[Ranks, ...]:
    """The rank lists of the places called ``name``; none where ranks contradict each other."""
    places = [place for place, other in enumerate(names) if other == name]
    lists = {card[place] for card in cards.values() if len(card) == len(names) for place in places}
    found = sorted(ranks for ranks in lists if ranks is not None)
    members = [rank for ranks in found for rank in ranks]
    return tuple(found) if len(set(members)) == len(members) else ()
