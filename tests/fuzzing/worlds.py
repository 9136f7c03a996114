"""Worlds of simulated ranks: groups as rank lists, and each rank's process groups, which are real but do nothing."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.distributed.multi_threaded_pg import ThreadLocalWorld

Ranks = tuple[int, ...]

AXIS = "tp"
PATIENCE_S = 300.0  # a machine that others share; a rank that raised is noticed at once


@dataclass(frozen=True)
class World:
    """``size`` ranks and their groups.

    Args:
        size: number of ranks.
        groups: group name → its blocks of ranks, each rank in one at most: ranks of several blocks share the name, as
            tensor-parallel groups do. ``AXIS`` is the group that the model is sharded over.
        kinds: group name → how it lies to the axis, such as ``"nested"``.
    """

    size: int
    groups: Mapping[str, tuple[Ranks, ...]]
    kinds: Mapping[str, str] = field(default_factory=dict)

    def members(self, name: str, rank: int) -> Ranks:
        """The ranks of ``rank``'s group called ``name``, in group order."""
        return next((block for block in self.groups[name] if rank in block), ())

    def width(self, name: str) -> int:
        """Ranks in each block of ``name``."""
        return len(self.groups[name][0])


def _consecutive(size: int, width: int) -> tuple[Ranks, ...]:
    return tuple(tuple(range(first, first + width)) for first in range(0, size, width))


def _strided(size: int, width: int) -> tuple[Ranks, ...]:
    step = size // width
    return tuple(tuple(range(first, size, step)) for first in range(step))


def _across(blocks: tuple[Ranks, ...]) -> tuple[Ranks, ...]:
    """The other dim of the mesh whose one dim has ``blocks``."""
    return tuple(zip(*blocks, strict=True))


def _nested(blocks: tuple[Ranks, ...], width: int) -> tuple[Ranks, ...]:
    return tuple(block[first : first + width] for block in blocks for first in range(0, len(block), width))


def _crossing(size: int, blocks: tuple[Ranks, ...]) -> tuple[Ranks, ...] | None:
    """Pairs, some of which lie inside a block of the axis and some of which do not."""
    shifted = tuple(((first - 1) % size, first) for first in range(0, size, 2))
    pairs = tuple(tuple(sorted(pair)) for pair in shifted)
    inside = {any(set(pair) <= set(block) for block in blocks) for pair in pairs}
    return pairs if len(inside) == 2 else None


def random_world(rng: random.Random, others: bool = True) -> World:
    """A world of 2 to 8 ranks; with ``others``, up to two groups besides the axis, of every relation that fits."""
    size = rng.choices((2, 3, 4, 6, 8), (55, 10, 25, 5, 5))[0]
    width = rng.choice([w for w in range(2, size + 1) if size % w == 0])
    axis = rng.choice((_consecutive, _strided))(size, width)
    known: dict[str, tuple[str, tuple[Ranks, ...] | None]] = {
        "twin": ("equal", axis),
        "pairs": ("nested", _nested(axis, 2) if width > 2 and width % 2 == 0 else None),
        "dp": ("orthogonal", _across(axis) if len(axis) > 1 else None),
        "world": ("containing", _consecutive(size, size) if size > width else None),
        "crossing": ("crossing", _crossing(size, axis) if size > 2 and size % 2 == 0 else None),
        "solo": ("disjoint", _consecutive(size, 1)),
    }
    possible = [name for name, (_, blocks) in known.items() if blocks is not None] if others else []
    taken = rng.sample(possible, min(len(possible), rng.choice((0, 1, 1, 2))))
    groups = {AXIS: axis, **{name: blocks for name in taken if (blocks := known[name][1]) is not None}}
    return World(size, groups, {AXIS: "axis", **{name: known[name][0] for name in taken}})


@dataclass
class Meeting:
    """Where ranks, each a thread, exchange; one thread works at a time, as fake tensors are not for several."""

    turn: threading.Condition = field(default_factory=threading.Condition)
    posts: dict[tuple[Ranks, int], dict[int, object]] = field(default_factory=dict)
    failed: bool = False


class RankLeft(Exception):
    """Another rank raised; this one waited for it."""


@dataclass
class MeetingExchange:
    """The exchange of one rank of one axis."""

    meeting: Meeting
    ranks: Ranks
    rank: int
    turns: int = 0

    @property
    def size(self) -> int:
        """Number of ranks of the axis."""
        return len(self.ranks)

    def all_gather(self, obj: object, what: str) -> list[object]:
        """Every rank's ``obj`` in group order."""
        self.turns += 1
        posts = self.meeting.posts.setdefault((self.ranks, self.turns), {})
        posts[self.rank] = (what, obj)
        self.meeting.turn.notify_all()
        while len(posts) < self.size:
            if self.meeting.failed or not self.meeting.turn.wait(PATIENCE_S):
                raise RankLeft(f"{what}: ranks {sorted(set(range(self.size)) - posts.keys())} of {self.ranks} are gone")
        told = [posts[rank] for rank in range(self.size)]
        if len({mine for mine, _ in told}) > 1:  # type: ignore[misc]
            raise RankLeft(f"ranks of {self.ranks} exchange different things: {[mine for mine, _ in told]}")  # type: ignore[misc]
        return [theirs for _, theirs in told]  # type: ignore[misc]


@contextlib.contextmanager
def own_worlds() -> Iterator[None]:
    """Each thread has process groups of its own."""
    before = c10d._world
    torch._C._distributed_c10d._set_thread_isolation_mode(True)  # type: ignore[attr-defined]
    if not hasattr(ThreadLocalWorld, "comms"):  # before torch 2.12 it lacks what destroying a group asks for
        ThreadLocalWorld.comms = []
    c10d._world = ThreadLocalWorld()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        c10d._world = before
        torch._C._distributed_c10d._set_thread_isolation_mode(False)  # type: ignore[attr-defined]


@contextlib.contextmanager
def _as_rank(world: World, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world.size)
    try:
        for name in world.groups:
            ranks = world.members(name, rank)
            if ranks:
                group, _ = c10d._new_process_group_helper(
                    len(ranks), ranks.index(rank), list(ranks), "fake", FakeStore(), name, timeout=timedelta(60)
                )
                c10d._world.pg_group_ranks[group] = {r: i for i, r in enumerate(ranks)}
        yield
    finally:
        dist.destroy_process_group()


def on_every_rank(world: World, work: Callable[[int, Callable[[Any], MeetingExchange]], Any]) -> list[Any]:
    """What ``work(rank, exchange_for)`` gives or raises on every rank, each in a thread that has its process groups."""
    meeting = Meeting()
    results: list[Any] = [None] * world.size

    def attempt(rank: int) -> None:
        exchanges: dict[Ranks, MeetingExchange] = {}

        def exchange_for(axis: Any) -> MeetingExchange:
            made = MeetingExchange(meeting, axis.ranks, axis.rank)
            return exchanges.setdefault(axis.ranks, made)

        with meeting.turn:
            try:
                with _as_rank(world, rank):
                    results[rank] = work(rank, exchange_for)
            except BaseException as error:
                results[rank] = error
                meeting.failed = True
                meeting.turn.notify_all()

    with own_worlds():
        threads = [threading.Thread(target=attempt, args=(rank,)) for rank in range(world.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return results
