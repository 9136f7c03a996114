"""Communicators of rank groups between four real processes over gloo: created, shared, used, destroyed once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cpcompile.errors import AxisError, GroupError
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.mesh.process_groups import ProcessGroups

WORLD = 4
# vLLM order: rank = 2·dp + tp
SIZES = Sizes(dp=2, tp=2, lm_head=2, mlp=2, embedding=1, shared_weight=True, mc2=True, flashcomm2_otp=1)


def reduced(group: dist.ProcessGroup, rank: int) -> int:
    value = torch.tensor([10**rank])
    dist.all_reduce(value, group=group)
    return int(value)


def all_reduce_in_every_group(groups: ProcessGroups, rank: int) -> None:
    """The digits of each sum say which ranks were in it."""
    for kind, ranks in groups.groups.of(rank).items():
        assert reduced(groups[kind], rank) == sum(10**r for r in ranks), kind
        axis = groups.axis(kind)
        assert (axis.name, axis.ranks, axis.rank) == (kind, ranks, ranks.index(rank))


def sharing(groups: ProcessGroups) -> None:
    assert groups["lm_head"] is groups["mlp"] is groups["dp"]
    assert groups["flashcomm2_odp"] is groups["tp"]
    assert groups["tp"] is not groups["dp"]
    assert groups["embedding"] is groups["moe_ep"]  # this rank alone
    own = [groups[kind] for kind in ("moe_tp", "shared_weight", "mc2")]
    assert len({id(group) for group in own}) == 3
    assert len({tuple(dist.get_process_group_ranks(group)) for group in own}) == 1


def two_groups_at_once(groups: ProcessGroups, rank: int) -> None:
    """A broadcast that is under way does not meet the model's all-reduce over the same ranks."""
    weight = torch.full((1000,), float(rank))
    pending = dist.broadcast(weight, src=3, group=groups["shared_weight"], async_op=True)
    assert reduced(groups["moe_tp"], rank) == 1111
    pending.wait()
    assert weight.eq(3).all()


def meshes(groups: ProcessGroups, rank: int) -> None:
    mesh = groups.device_mesh("cpu", ["dp", "tp"])
    assert mesh.mesh.tolist() == [[0, 1], [2, 3]] and mesh.mesh_dim_names == ("dp", "tp")
    assert mesh["tp"].get_group() is groups["tp"] and mesh["dp"].get_group() is groups["dp"]
    assert list(mesh.get_coordinate()) == [rank // 2, rank % 2]
    line = groups.device_mesh("cpu", ["dp"])
    assert line.mesh.tolist() == list(groups.groups["dp"].of(rank))
    assert reduced(line.get_group(), rank) == sum(10**r for r in groups.groups["dp"].of(rank))


def destroyed_once(groups: ProcessGroups) -> None:
    destroyed = []
    real = dist.destroy_process_group
    dist.destroy_process_group = lambda group: (destroyed.append(group.group_name), real(group))
    try:
        groups.destroy()
        groups.destroy()
    finally:
        dist.destroy_process_group = real
    # dp with lm_head and mlp; tp with attn_tp and ODP; the stage for moe_tp, shared_weight and mc2; this rank alone
    assert len(destroyed) == len(set(destroyed)) == 6
    with pytest.raises(GroupError, match=r"'dp' is asked for after destroy\(\)"):
        groups["dp"]


def disagreement(rank: int) -> None:
    sizes = Sizes(dp=2, tp=2) if rank == 3 else Sizes(tp=4)
    with pytest.raises(AxisError, match=r"rank groups: .*ranks \[0, 1, 2\] against ranks \[3\]"):
        ProcessGroups(rank_groups(sizes))
    with pytest.raises(GroupError, match="expected 8 ranks"):
        ProcessGroups(rank_groups(Sizes(tp=8)))


def failure_on_the_way(rank: int) -> None:
    """What was created before an error is destroyed."""
    real, made = dist.new_group, []

    def breaking(*args, **kwargs):
        if len(made) == 2:
            raise RuntimeError("out of memory")
        made.append(real(*args, **kwargs))
        return made[-1]

    dist.new_group = breaking
    before = len(dist.distributed_c10d._world.pg_map)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            ProcessGroups(rank_groups(Sizes(dp=2, tp=2)))
    finally:
        dist.new_group = real
    assert len(made) == 2 and len(dist.distributed_c10d._world.pg_map) == before


def run_rank(rank: int, place: str) -> None:
    torch.set_num_threads(1)
    with pytest.raises(GroupError, match="no default process group"):
        ProcessGroups(rank_groups(SIZES))
    dist.init_process_group("gloo", store=dist.FileStore(place, WORLD), rank=rank, world_size=WORLD)
    disagreement(rank)
    before = len(dist.distributed_c10d._world.pg_map)
    groups = ProcessGroups(rank_groups(SIZES))
    all_reduce_in_every_group(groups, rank)
    sharing(groups)
    two_groups_at_once(groups, rank)
    meshes(groups, rank)
    destroyed_once(groups)
    assert len(dist.distributed_c10d._world.pg_map) == before  # nothing is left behind
    again = ProcessGroups(rank_groups(Sizes(pp=2, tp=2), "sglang"))
    all_reduce_in_every_group(again, rank)
    again.destroy()
    failure_on_the_way(rank)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.ranks
def test_four_ranks(tmp_path):
    mp.spawn(run_rank, (str(tmp_path / "rendezvous"),), nprocs=WORLD)
