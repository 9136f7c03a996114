"""The process groups of modules that ranks share: from the options, or of replicas that follow each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch.distributed as dist

from cpcompile.axes import Axis, axis_of
from cpcompile.errors import GroupError, nearest
from cpcompile.options import MODULE_SIZES, Options


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
