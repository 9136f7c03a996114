"""The ranks of every parallel group, as data: the one place that knows which ranks talk to each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpcompile.errors import GroupError, nearest
from cpcompile.mesh.orders import ATTENTION, Order, find_order
from cpcompile.mesh.sizes import MODULES, Sizes, module_axes

Ranks = tuple[int, ...]

MODEL = "model"
"""The purpose of groups whose collectives run one after another on the model's stream: they may share a communicator.

Whatever runs beside them must not, or its messages would meet the model's: MC2 kernels, the broadcast of shared weights
one layer ahead, the transfer of KV heads.
"""


@dataclass(frozen=True)
class Kind:
    """All groups of one kind. They partition the world.

    Args:
        name: such as ``"tp"`` or ``"o_proj"``.
        purpose: groups with the same ranks and the same purpose share a communicator.
        groups: the global ranks of each group, ascending; the groups ascend by their first rank.
    """

    name: str
    purpose: str
    groups: tuple[Ranks, ...]

    @property
    def size(self) -> int:
        """Number of ranks in each group."""
        return len(self.groups[0])

    def index(self, rank: int) -> int:
        """Which of ``groups`` the global rank ``rank`` is in."""
        return next(i for i, group in enumerate(self.groups) if rank in group)

    def of(self, rank: int) -> Ranks:
        """The group that the global rank ``rank`` is in."""
        return self.groups[self.index(rank)]


@dataclass(frozen=True)
class Communicator:
    """Ranks that need one communicator, and the kinds of groups that use it."""

    purpose: str
    ranks: Ranks
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class RankGroups:
    """Every group of every kind for one set of sizes and one rank order.

    Args:
        order: how ranks are numbered.
        sizes: the sizes, all axes filled in.
        grid: the axes that multiply to the world, outermost first, tp as ``attn_dp``, ``attn_cp``, ``attn_tp``.
        kinds: name to groups, in the order in which communicators are created.
    """

    order: Order
    sizes: Sizes
    grid: Mapping[str, int]
    kinds: Mapping[str, Kind]

    @property
    def world(self) -> int:
        """Number of all ranks."""
        assert self.sizes.world is not None
        return self.sizes.world

    def __getitem__(self, kind: str) -> Kind:
        """The groups of ``kind``.

        Raises:
            GroupError: there are none of that kind.
        """
        if kind not in self.kinds:
            raise GroupError(f"rank groups ({self.order.name}): no groups of kind {kind!r}{nearest(kind, self.kinds)}")
        return self.kinds[kind]

    def of(self, rank: int) -> dict[str, Ranks]:
        """Kind to the group of ``rank``.

        Raises:
            GroupError: there is no such rank.
        """
        if not 0 <= rank < self.world:
            raise GroupError(f"rank groups: expected a rank from 0 to {self.world - 1}, found {rank}")
        return {name: kind.of(rank) for name, kind in self.kinds.items()}

    def submesh(self, rank: int, axes: Sequence[str]) -> NDArray[np.int64]:
        """The ranks that differ from ``rank`` in ``axes`` alone, one dim for each of ``axes``; "tp" is a whole tp axis.

        Raises:
            GroupError: an axis is not one of the grid, is listed twice, or lies in tp, which is listed too.
        """
        names = [
            part for axis in axes for part in (ATTENTION if axis == "tp" else (axis,)) if axis in ("tp", *self.grid)
        ]
        if len(set(names)) != len(names) or any(axis not in ("tp", *self.grid) for axis in axes):
            raise GroupError(
                f"mesh {tuple(axes)}: expected each axis of ({', '.join(self.grid)}) once at most, or tp for its parts"
            )
        ranks = np.arange(self.world).reshape(tuple(self.grid.values()))
        where = np.unravel_index(rank, ranks.shape)
        here = ranks[tuple(slice(None) if axis in names else where[i] for i, axis in enumerate(self.grid))]
        left = [axis for axis in self.grid if axis in names]
        return here.transpose([left.index(name) for name in names]).reshape([self._extent(axis) for axis in axes])

    def _extent(self, axis: str) -> int:
        return self.sizes.product((axis,))

    def communicators(self) -> tuple[Communicator, ...]:
        """Every (ranks, purpose) once, in one order for all ranks."""
        users: dict[tuple[str, Ranks], list[str]] = {}
        for name, kind in self.kinds.items():
            for ranks in kind.groups:
                users.setdefault((kind.purpose, ranks), []).append(name)
        return tuple(Communicator(purpose, ranks, tuple(names)) for (purpose, ranks), names in users.items())

    def to_dict(self) -> dict[str, Any]:
        """These groups as JSON values."""
        kinds = {k.name: {"purpose": k.purpose, "size": k.size, "groups": k.groups} for k in self.kinds.values()}
        return {
            "order": self.order.name,
            "world": self.world,
            "sizes": {name: size for name, size in asdict(self.sizes).items() if size is not None},
            "grid": dict(self.grid),
            "kinds": kinds,
            "communicators": [asdict(c) for c in self.communicators() if len(c.ranks) > 1],
        }


def rank_groups(sizes: Sizes, order: str | Sequence[str] = "vllm") -> RankGroups:
    """The groups of ``sizes`` under ``order``: "vllm", "sglang", "cann-recipes", or axes from the outermost in.

    Sources: SGLang and vLLM ``initialize_model_parallel``, vllm-ascend ``init_ascend_model_parallel`` (corrected: see
    the tests), cann-recipes-infer ``CommManager``.

    Raises:
        GroupError: the order is unknown, or the sizes do not fit.
    """
    found = find_order(order)
    filled = sizes.resolve(found)
    axes = [part for axis in found.axes for part in (ATTENTION if axis == "tp" else (axis,))]
    grid = {axis: filled.product((axis,)) for axis in axes}
    kinds = {
        k.name: k
        for k in (*_axis_kinds(grid, found), *_expert_kinds(grid, filled, found), *_asked(grid, filled, found))
    }
    everyone = list(range(filled.world or 0))
    assert all(sorted(itertools.chain(*kind.groups)) == everyone for kind in kinds.values())
    return RankGroups(found, filled, MappingProxyType(grid), MappingProxyType(kinds))


def _along(grid: Mapping[str, int], axes: Iterable[str]) -> NDArray[np.int64]:
    """Rank numbers, ``[groups, size]``: a row holds the ranks that differ in ``axes`` alone, ascending."""
    names, chosen = list(grid), [axis for axis in grid if axis in set(axes)]
    ranks = np.arange(int(np.prod(list(grid.values())))).reshape(list(grid.values()))
    last = ranks.transpose([names.index(name) for name in (*(n for n in names if n not in chosen), *chosen)])
    return last.reshape(-1, int(np.prod([grid[name] for name in chosen])))


def _kind(name: str, rows: NDArray[np.int64], purpose: str = MODEL) -> Kind:
    return Kind(name, purpose, tuple(sorted(tuple(row) for row in rows.tolist())))


def _stages(grid: Mapping[str, int]) -> NDArray[np.int64]:
    return _along(grid, set(grid) - {"external_dp", "pp"})


def _axis_kinds(grid: Mapping[str, int], order: Order) -> Iterable[Kind]:
    yield _kind("tp", _along(grid, ATTENTION))
    for axis in ("pp", *(axis for axis in ("dp", "cp") if not order.dp_inside_tp), *ATTENTION):
        yield _kind(axis, _along(grid, [axis]))


def _expert_kinds(grid: Mapping[str, int], s: Sizes, order: Order) -> Iterable[Kind]:
    """A stage's ranks, ascending, are [moe_dp, moe_ep, moe_tp]; so they are in all three systems."""
    assert s.moe_dp is not None and s.moe_ep is not None and s.moe_tp is not None and s.attn_cp is not None
    ranks = _stages(grid).reshape(-1, s.moe_dp, s.moe_ep, s.moe_tp)
    shares_tokens = order.name == "sglang" and s.attn_cp > s.moe_dp  # its cp ranks bring their tokens together first
    copies = _along(grid, ["attn_cp"]) if shares_tokens else ranks.transpose(0, 2, 3, 1).reshape(-1, s.moe_dp)
    yield _kind("moe_dp", copies)
    yield _kind("moe_ep", ranks.transpose(0, 1, 3, 2).reshape(-1, s.moe_ep))
    yield _kind("moe_tp", ranks.reshape(-1, s.moe_tp))


def _asked(grid: Mapping[str, int], s: Sizes, order: Order) -> Iterable[Kind]:
    """The groups that exist where a user asks for them."""
    for module in MODULES:
        size = getattr(s, module)
        if size is not None:
            yield _kind(module, _along(grid, module_axes(s, order)).reshape(-1, size))
    heads = _along(grid, ["attn_tp"])
    if s.flashcomm2_otp is not None:
        chunks = heads.reshape(len(heads), s.flashcomm2_otp, -1)  # [groups, otp, G]: rank base + i + j·G is at [j, i]
        yield _kind("flashcomm2_otp", chunks.transpose(0, 2, 1).reshape(-1, s.flashcomm2_otp))
        yield _kind("flashcomm2_odp", chunks.reshape(-1, chunks.shape[2]))
    if s.prefill_tp_ratio is not None:
        # Ranks of one replica, [groups, replica, head], in runs of as many heads as one decode rank holds.
        replicas = s.head_replicas or 1
        runs = heads.reshape(len(heads), -1, replicas).transpose(0, 2, 1)
        yield _kind("p_tp", runs.reshape(-1, s.prefill_tp_ratio // replicas), "p_tp")
    if s.shared_weight:
        yield _kind("shared_weight", _stages(grid), "shared_weight")
    if s.mc2:
        yield _kind("mc2", _stages(grid), "mc2")
