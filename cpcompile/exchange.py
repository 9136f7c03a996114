"""What the ranks of one mesh axis tell each other at compile time: one agreement at a time, never a hang."""

from __future__ import annotations

import copy
import hashlib
import pickle
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from cpcompile.errors import AxisError, ExchangeError, OptionError, RanksDifferError

_REMEDY = "compile the same graphs in the same order on every rank (look for a branch on the rank, or an earlier error)"

_MET, _GAVE_UP = "met", "gave up"  # outcome of an exchange; the key under which lies which rank gave up first


class Exchange(Protocol):
    """One agreement among the ranks of one mesh axis."""

    @property
    def size(self) -> int:
        """Number of ranks of the axis."""

    @property
    def rank(self) -> int:
        """This rank's place in the group, ``0 <= rank < size``."""

    def all_gather(self, obj: object, what: str) -> list[object]:
        """Return every rank's ``obj`` in group order; ``what`` says what is exchanged, alike on every rank.

        Raises:
            ExchangeError: a rank did not take part in time, or is exchanging something else. All ranks that come to
                this exchange get it.
        """


@dataclass(frozen=True)
class _Post:
    what: str
    obj: object


def _objects(posts: Sequence[_Post], what: str, where: str) -> list[object]:
    others = [f"rank {rank} {post.what!r}" for rank, post in enumerate(posts) if post.what != what]
    if others:
        raise ExchangeError(
            f"exchange over {where}: expected {what!r} on every rank, found {', '.join(others)}; {_REMEDY}"
        )
    return [post.obj for post in posts]


def _late(missing: object, what: str, where: str, timeout_s: float) -> ExchangeError:
    return ExchangeError(
        f"exchange of {what!r} over {where}: ranks {missing} did not take part within {timeout_s:g} s; {_REMEDY}, "
        "or raise the timeout if they are only slower"
    )


def _given_up(rank: int, what: str, where: str) -> ExchangeError:
    return ExchangeError(f"exchange of {what!r} over {where}: ranks [{rank}] had given up before; {_REMEDY}")


def _positive(timeout_s: float) -> float:
    if not timeout_s > 0:
        raise OptionError(f"timeout_s: expected a positive number of seconds, found {timeout_s!r}")
    return timeout_s


class GroupExchange:
    """Ranks of a real process group, through the key-value store that started it.

    The store serves every backend without device tensors and honours a timeout on each wait, which a collective over
    the group (``all_gather_object``) does not: with NCCL or HCCL a missing rank hangs it.

    Args:
        group: the process group, or its functional-collectives name.
        timeout_s: seconds to wait for the other ranks in each exchange.

    Raises:
        AxisError: the group is unknown, is a fake one, or does not hold this rank.
        OptionError: ``timeout_s`` is not positive.
    """

    def __init__(self, group: dist.ProcessGroup | str, timeout_s: float = 60.0) -> None:
        """Join the ranks of ``group``."""
        process_group = _resolve(group) if isinstance(group, str) else group
        if not isinstance(process_group, dist.ProcessGroup):  # what new_group gives to ranks outside the group
            raise AxisError(
                f"exchange: expected a process group that this rank is in, found {group!r}; pass its own group"
            )
        self.size = dist.get_world_size(process_group)
        self.rank = dist.get_rank(process_group)
        name, ranks = process_group.group_name, dist.get_process_group_ranks(process_group)
        self._where = f"group {name!r} (global ranks {_short(ranks)})"
        if dist.get_backend(process_group) == "fake":
            raise AxisError(f"exchange over {self._where}: its backend 'fake' has no other ranks; use OfflineExchange")
        # Disjoint groups may share a name (each rank's own "tp"), so the ranks are part of the key.
        key = hashlib.sha256(f"{name}:{ranks}".encode()).hexdigest()[:16]
        self._store = c10d.PrefixStore(f"cpcompile/{key}", c10d._get_default_store())
        self._timeout_s = _positive(timeout_s)

    def all_gather(self, obj: object, what: str) -> list[object]:
        """See ``Exchange.all_gather``. Once a rank gave up, ranks are out of step: all later calls raise at once."""
        try:
            if self._store.check([_GAVE_UP]):
                raise _given_up(int(self._store.get(_GAVE_UP)), what, self._where)
            return _objects(self._gather(_Post(what, obj)), what, self._where)
        except RuntimeError as error:
            raise AxisError(
                f"exchange of {what!r} over {self._where}: the store does not answer: {error}; is rank 0 up?"
            ) from error

    def _gather(self, post: _Post) -> list[_Post]:
        # The count lives in the store, so that it ends with the group and is shared by all exchanges over it.
        turn = self._store.add(f"turn/{self.rank}", 1)
        self._store.set(f"{turn}/{self.rank}", pickle.dumps(post))  # type: ignore[arg-type]
        keys = [f"{turn}/{rank}" for rank in range(self.size)]
        late = self._wait(keys)
        # The first rank to have seen all, or to have given up, decides for all of them: they must not part here.
        first = self._store.compare_set(f"{turn}/outcome", "", f"{self.rank}" if late else _MET).decode()
        if first != _MET:
            self._store.set(_GAVE_UP, first)
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            if late and missing:
                raise _late(missing, post.what, self._where, self._timeout_s) from late
            raise _given_up(int(first), post.what, self._where)
        # `what` is in the value, not in the key: a rank exchanging something else is named at once.
        posts = [pickle.loads(self._store.get(key)) for key in keys]
        if turn > 1:  # whoever posted this turn has read the last one
            self._store.delete_key(f"{turn - 1}/{self.rank}")
            if self.rank == 0:
                self._store.delete_key(f"{turn - 1}/outcome")
        return posts

    def within(self, timeout_s: float) -> GroupExchange:
        """The same ranks, waited for no longer than ``timeout_s`` seconds in each exchange."""
        other = copy.copy(self)
        other._timeout_s = min(self._timeout_s, timeout_s)
        return other

    def _wait(self, keys: list[str]) -> RuntimeError | None:
        try:
            self._store.wait(keys, timedelta(seconds=self._timeout_s))
        except RuntimeError as error:  # DistStoreError, or a plain RuntimeError from FileStore
            return error
        return None


def _resolve(name: str) -> dist.ProcessGroup:
    try:
        return c10d._resolve_process_group(name)  # type: ignore[arg-type,attr-defined]
    except (LookupError, RuntimeError, ValueError) as error:
        raise AxisError(
            f"exchange: expected the name of a process group, found {name!r}: {error}; create it before compiling"
        ) from error


def _short(ranks: Sequence[int]) -> str:
    return str(list(ranks)) if len(ranks) <= 8 else f"{ranks[0]}, {ranks[1]}, ..., {ranks[-1]}; {len(ranks)} in all"


class LocalExchange:
    """One of ``n`` simulated ranks in this process, each running in its own thread; made by ``LocalExchange.ring``."""

    def __init__(self, rank: int, board: list[_Post | None], barrier: threading.Barrier, timeout_s: float) -> None:
        """Stand for ``rank`` among those that share ``board`` and ``barrier``."""
        self.rank = rank
        self.size = len(board)
        self._board = board
        self._barrier = barrier
        self._timeout_s = timeout_s

    @classmethod
    def ring(cls, n: int, timeout_s: float = 60.0) -> list[LocalExchange]:
        """Return the exchanges of ``n`` simulated ranks, one for each thread.

        Raises:
            OptionError: ``timeout_s`` is not positive.
        """
        board: list[_Post | None] = [None] * n
        barrier = threading.Barrier(n)
        return [cls(rank, board, barrier, _positive(timeout_s)) for rank in range(n)]

    def all_gather(self, obj: object, what: str) -> list[object]:
        """See ``Exchange.all_gather``. After a timeout the ring is broken: every later call raises at once."""
        self._board[self.rank] = _Post(what, obj)
        try:
            self._barrier.wait(self._timeout_s)
            posts = [post for post in self._board if post is not None]
            self._barrier.wait(self._timeout_s)  # nobody posts anew before all have read
        except threading.BrokenBarrierError as error:
            missing = [rank for rank, post in enumerate(self._board) if post is None]
            if not missing:
                raise ExchangeError(
                    f"exchange of {what!r} over a local ring: another rank gave up; {_REMEDY}"
                ) from error
            raise _late(missing, what, "a local ring", self._timeout_s) from error
        self._board[self.rank] = None
        return _objects(posts, what, "a local ring")


@dataclass(frozen=True)
class OfflineExchange:
    """One process stands for every rank: what it says is taken as said by all, so equality proves nothing."""

    size: int
    rank: int = 0

    def all_gather(self, obj: object, what: str) -> list[object]:
        """Return ``obj`` once for each rank."""
        return [obj] * self.size


def sooner(exchange: Exchange) -> Exchange:
    """``exchange`` with half of its time: who waits in vain over one group is not late in the next one's exchange."""
    return exchange.within(exchange._timeout_s / 2) if isinstance(exchange, GroupExchange) else exchange


def agree(exchange: Exchange, value: str, what: str) -> None:
    """Check that ``value`` is the same on every rank; only its hash travels.

    Raises:
        RanksDifferError: it is not (the ranks are listed by the value that they hold), or a rank does not take part.
    """
    digests = exchange.all_gather(hashlib.sha256(value.encode()).hexdigest(), what)
    camps: dict[object, list[int]] = {}
    for rank, digest in enumerate(digests):
        camps.setdefault(digest, []).append(rank)
    if len(camps) > 1:
        found = " against ".join(f"ranks {ranks}" for ranks in camps.values())
        raise RanksDifferError(f"{what}: expected the same on all {exchange.size} ranks, found {found}; {_REMEDY}")
