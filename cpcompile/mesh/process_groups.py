"""Communicators for rank groups: created in one order on all ranks, shared by ranks and purpose, destroyed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.axes import Axis, axis_of
from cpcompile.errors import GroupError
from cpcompile.exchange import GroupExchange, agree
from cpcompile.mesh.groups import Communicator, RankGroups


class ProcessGroups:
    """This rank's process groups, one for each kind of ``groups``. Every rank of the default group must create them.

    Args:
        groups: the same on every rank, which is checked first: ranks that disagree would hang.
        backend: of the new groups; the default group's when None.
        timeout_s: seconds to wait for the other ranks to come with the same groups.

    Raises:
        GroupError: the default group is missing or has another number of ranks.
        AxisError: a rank has other groups, or did not come.
    """

    def __init__(self, groups: RankGroups, backend: str | None = None, timeout_s: float = 60.0) -> None:
        """Create the communicators."""
        if not dist.is_initialized():
            raise GroupError(
                "process groups: no default process group; call torch.distributed.init_process_group first"
            )
        if dist.get_world_size() != groups.world:
            raise GroupError(
                f"process groups: expected {groups.world} ranks (the product of the sizes), found "
                f"{dist.get_world_size()}; start that many, or give the sizes of this world"
            )
        _agree(groups, timeout_s)
        self.groups = groups
        self._groups: dict[str, dist.ProcessGroup] = {}
        self._created: list[dist.ProcessGroup] = []
        try:
            for communicator in groups.communicators():
                self._create(communicator, backend)
        except BaseException:
            self.destroy()
            raise

    def _create(self, communicator: Communicator, backend: str | None) -> None:
        member = dist.get_rank() in communicator.ranks
        # A group of one concerns nobody else: thousands of ranks need not all wait for each one's.
        alone = len(communicator.ranks) == 1
        if alone and not member:
            return
        group = dist.new_group(
            list(communicator.ranks),
            backend=backend,
            use_local_synchronization=alone,
            group_desc=f"{communicator.purpose}:{'+'.join(communicator.kinds)}",
        )
        if member:
            self._created.append(group)
            self._groups.update(dict.fromkeys(communicator.kinds, group))

    def __getitem__(self, kind: str) -> dist.ProcessGroup:
        """This rank's process group of ``kind``.

        Raises:
            GroupError: there is none of that kind, or the groups are destroyed.
        """
        expected = self.groups[kind]
        if not self._created:
            raise GroupError(f"process groups: {expected.name!r} is asked for after destroy(); create the groups anew")
        return self._groups[kind]

    def axis(self, kind: str) -> Axis:
        """The mesh axis ``kind`` for the passes."""
        return axis_of(kind, self[kind])

    def device_mesh(self, device_type: str, axes: Sequence[str]) -> DeviceMesh:
        """A mesh of this rank's part of the grid, one dim for each of ``axes``, over the groups that exist already.

        Raises:
            GroupError: an axis is not one of the grid.
        """
        ranks = torch.from_numpy(self.groups.submesh(dist.get_rank(), axes).copy())
        return DeviceMesh.from_group([self[axis] for axis in axes], device_type, ranks, mesh_dim_names=tuple(axes))

    def destroy(self) -> None:
        """Destroy every communicator once, the last one created first. A second call does nothing."""
        while self._created:
            dist.destroy_process_group(self._created.pop())
        self._groups.clear()


def _agree(groups: RankGroups, timeout_s: float) -> None:
    world = dist.group.WORLD
    assert world is not None
    digest = hashlib.sha256(json.dumps(groups.to_dict()).encode()).hexdigest()
    agree(GroupExchange(world, timeout_s), digest, "rank groups")
