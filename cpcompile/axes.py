"""Mesh axes: what the passes know of a process group, and how the groups of a graph are found."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import _disable_current_modes

from cpcompile.errors import AxisError
from cpcompile.layouts import shard_rows


@dataclass(frozen=True)
class Axis:
    """One mesh axis.

    Args:
        name: the mesh dim's name, such as ``"tp"``.
        group_name: the functional-collectives name of the process group (``ProcessGroup.group_name``).
        size: number of ranks ``n`` in the group.
        rank: this process's rank within the group, ``0 <= rank < size``.
        ranks: the global ranks of the group, in group order.
        layout: which rows of the tokens each rank holds where they are sharded: a kind of ``cpcompile.layouts``.
        groups: name of a group, as this rank's graph has it → the rank lists, each in group order, that run its
            collectives together on the ranks of which that is known. Of a group without name here nothing is known.
    """

    name: str
    group_name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    layout: str = "contiguous"
    groups: Mapping[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def me(self) -> int:
        """This process's global rank."""
        return self.ranks[self.rank]

    def rows(self, tokens: int) -> int:
        """Rows of a shard of ``tokens`` tokens, pad rows included."""
        return shard_rows(tokens, self.size, self.layout)

    def owns(self, group_name: object) -> bool:
        """Whether a collective over ``group_name`` runs over this axis."""
        return group_name == self.group_name

    def joins(self, group_name: str) -> bool:
        """Whether a group is of this axis's ranks, which may have several groups."""
        return set(self.members(group_name, self.me) or ()) == set(self.ranks)

    def members(self, group_name: str, rank: int) -> tuple[int, ...] | None:
        """The global ranks with which ``rank`` runs the collectives over ``group_name``; None where not known."""
        if group_name == self.group_name and rank in self.ranks:
            return self.ranks
        return next((ranks for ranks in self.groups.get(group_name, ()) if rank in ranks), None)


def resolve_group(name: str) -> dist.ProcessGroup:
    """The process group that functional collectives call ``name``."""
    group: dist.ProcessGroup = c10d._resolve_process_group(name)  # type: ignore[attr-defined,arg-type]
    return group


def is_group(name: str) -> bool:
    """Whether functional collectives know a process group called ``name``."""
    try:
        resolve_group(name)
    except (RuntimeError, ValueError, KeyError):
        return False
    return True


def axis_of(name: str, group: object) -> Axis:
    """The axis called ``name`` over ``group``: a ``ProcessGroup``, a one-dimensional ``DeviceMesh``, or a group's name.

    Raises:
        AxisError: the group does not exist, has several dims, or this process is not in it.
    """
    groups = {}
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            known = name in (group.mesh_dim_names or ())
            raise AxisError(
                f"axis {name!r}: the mesh has {group.ndim} dims, named {group.mesh_dim_names}; "
                f"give one of them: {f'mesh[{name!r}]' if known else 'mesh.get_group(dim)'}"
            )
        if group.get_coordinate() is None:
            raise AxisError(_not_in(name, f" {group.mesh.tolist()}"))
        groups = groups_of(group)
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:  # what new_group returns on the ranks that it leaves out
        raise AxisError(_not_in(name))
    if isinstance(group, str):
        try:
            group = resolve_group(group)
        except (RuntimeError, ValueError, KeyError) as error:
            raise AxisError(
                f"axis {name!r}: no process group is called {group!r}; give the ProcessGroup itself"
            ) from error
    if not isinstance(group, dist.ProcessGroup):
        raise AxisError(
            f"axis {name!r} is {type(group).__name__}: give a ProcessGroup, a DeviceMesh of one dim, or a name"
        )
    ranks = tuple(dist.get_process_group_ranks(group))
    rank = dist.get_rank()
    assert rank in ranks, f"rank {rank} holds a group of ranks {ranks}"
    return Axis(name, group.group_name, len(ranks), ranks.index(rank), ranks, groups=groups)


def groups_of(mesh: DeviceMesh) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The groups of every dim of ``mesh``, and of the mesh that it is a part of: this rank's names → rank lists."""
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    for whole in (mesh, mesh._get_root_mesh()):
        if whole.get_coordinate() is None:
            continue
        with _disable_current_modes():
            for dim in range(whole.ndim):
                with contextlib.suppress(RuntimeError, ValueError, KeyError):  # its process groups are gone
                    lists = whole.mesh.movedim(dim, -1).reshape(-1, whole.size(dim)).tolist()
                    found[whole.get_group(dim).group_name] = tuple(map(tuple, lists))
    return found


def _not_in(name: str, ranks: str = "") -> str:
    return f"axis {name!r}: rank {dist.get_rank()} is not in its group{ranks}; give the group that this rank is in"


def find_axes(group_names: Iterable[str], given: Mapping[str, Any], meshes: Iterable[DeviceMesh] = ()) -> list[Axis]:
    """The axes to rewrite: those that the user gave, else every group that the graph all-reduces over.

    Args:
        group_names: groups of the graph's all-reduces, in graph order.
        given: the ``axes`` option.
        meshes: device meshes seen among the inputs. An axis is called after the mesh dim with its ranks, else by the
            place of its group among the groups of the graph: "0", "1", ... Both are the same on all ranks of a mesh,
            unlike names of groups. A second group of the same ranks is the same axis.

    Raises:
        AxisError: a given axis is not valid, or two of them are the same group.
    """
    if given:
        axes = [axis_of(name, group) for name, group in given.items()]
        for index, axis in enumerate(axes):
            twin = next((a for a in axes[:index] if a.ranks == axis.ranks), None)
            if twin is not None:
                raise AxisError(
                    f"axes {twin.name!r} and {axis.name!r} have the same ranks {list(axis.ranks)}: give one"
                )
        return axes
    axes = []
    for place, group_name in enumerate(dict.fromkeys(group_names)):
        try:
            axis = axis_of(group_name, group_name)
        except AxisError:
            continue  # its collectives are listed as not understood
        if axis.size > 1 and not any(set(a.ranks) == set(axis.ranks) for a in axes):
            axes.append(_named(axis, meshes, {a.name for a in axes}, str(place)))
    return axes


def _named(axis: Axis, meshes: Iterable[DeviceMesh], taken: Collection[str], place: str) -> Axis:
    for mesh in meshes:
        if mesh.get_coordinate() is None:
            continue  # this rank has no group of it
        for dim, name in enumerate(mesh.mesh_dim_names or ()):
            if name not in taken and tuple(dist.get_process_group_ranks(mesh.get_group(dim))) == axis.ranks:
                return replace(axis, name=name)
    made_for = resolve_group(axis.group_name).group_desc  # "mesh_tp": that of a mesh that is not among the inputs
    name = made_for.removeprefix("mesh_")
    return replace(axis, name=name if name != made_for and name not in taken else place)
