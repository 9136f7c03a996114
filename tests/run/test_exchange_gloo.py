"""Exchanges between two real processes over gloo: agreement, disagreement, and a rank that does not take part."""

import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cpcompile.axes import Axis
from cpcompile.errors import AxisError
from cpcompile.exchange import GroupExchange, agree
from cpcompile.replication import input_facts

WORLD = 2


def error_of(body):
    start = time.perf_counter()
    with pytest.raises(AxisError) as caught:
        body()
    return str(caught.value), time.perf_counter() - start


def agreement(group, rank):
    """By group object, by name and again: the turns of both exchanges are one sequence."""
    by_name = GroupExchange(group.group_name, 20)
    assert (by_name.size, by_name.rank) == (WORLD, rank)
    for turn in range(20):
        assert by_name.all_gather((rank, turn), "turn") == [(0, turn), (1, turn)]
    assert GroupExchange(group, 20).all_gather(b"\x00\xff" * (rank + 1), "bytes") == [b"\x00\xff", b"\x00\xff" * 2]
    agree(by_name, "same plan", "hash of the plan")
    store = by_name._store
    assert store.check(["22/0", "22/1"])  # the last turn is all that this exchange keeps
    assert not any(store.check([f"{turn}/{rank}"]) for turn in range(22))


def disagreement(group, rank):
    exchange = GroupExchange(group, 20)
    message, _ = error_of(lambda: agree(exchange, f"plan {rank}", "hash of the plan"))
    assert "ranks [0] against ranks [1]" in message
    message, seconds = error_of(lambda: exchange.all_gather(0, f"graph {rank}"))
    assert f"expected 'graph {rank}' on every rank, found rank {1 - rank} 'graph {1 - rank}'" in message
    assert seconds < 10  # at once, not after the timeout
    assert exchange.all_gather(rank, "after errors") == [0, 1]


def facts(group, rank):
    axis = Axis("tp", group.group_name, WORLD, rank, (0, 1))
    values = [torch.ones(3), torch.full((3,), float(rank))]
    found = input_facts(["same", "shard"], values, ["parameter"] * 2, axis, GroupExchange(group, 20))
    assert [fact.replicated for fact in found] == [True, False]


def absence(group, rank):
    exchange = GroupExchange(group, 2.0)
    if rank == 0:
        message, seconds = error_of(lambda: exchange.all_gather(0, "facts of a graph"))
        assert f"exchange of 'facts of a graph' over group '{group.group_name}' (global ranks [0, 1])" in message
        assert "ranks [1] did not take part within 2 s; compile the same graphs" in message
        assert 1.9 < seconds < 6
    dist.barrier()  # rank 1 comes only after rank 0 has given up
    if rank == 1:
        message, seconds = error_of(lambda: exchange.all_gather(0, "facts of a graph"))
        assert "ranks [0] had given up before" in message and seconds < 1


def subgroups(_, rank):
    """Each rank's own group of one, under the same name: they must not meet."""
    own = [dist.new_group([r], group_desc="own") for r in range(WORLD)][rank]
    assert GroupExchange(own, 2.0).all_gather(rank, "own") == [rank]
    not_mine = [dist.new_group([r]) for r in range(WORLD)][1 - rank]
    message, _ = error_of(lambda: GroupExchange(not_mine))
    assert "expected a process group that this rank is in" in message


def run_rank(rank, stores, scenarios):
    torch.set_num_threads(1)
    for kind, place in stores:
        store = dist.FileStore(place, WORLD) if kind == "file" else dist.TCPStore("127.0.0.1", place, WORLD, rank == 0)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
        try:
            for scenario in scenarios:
                scenario(dist.new_group([0, 1]), rank)
        finally:
            dist.destroy_process_group()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.ranks
def test_two_ranks_over_a_file_store_then_over_a_tcp_store(tmp_path):
    """One spawn for both: turns are counted in the store, so those of the first must not reach into the second."""
    stores = [("file", str(tmp_path / "rendezvous")), ("tcp", free_port())]
    mp.spawn(run_rank, (stores, (agreement, disagreement, facts, subgroups, absence)), nprocs=WORLD)
