"""Guards on the weights of compiled calls: facts about weights are established again where these changed."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor

from cpcompile.axes import Axis
from cpcompile.errors import AxisError, ParameterChangedError
from cpcompile.exchange import Exchange
from cpcompile.replication import fingerprint
from cpcompile.weights import address, released_fingerprint

log = logging.getLogger("cpcompile")

#: Calls in a row that may find weights changed before these are left alone: another graph writes them, step by step.
PATIENCE = 8

_State = tuple[tuple[int | None, ...], tuple[int, ...]]  # versions and addresses
_version = attrgetter("_version")


@dataclass
class _Known:
    """What is known of one set of weights: those of one layer, say.

    Args:
        state: how they were at the last call with them.
        problem: why the compiled graph is not for them; empty where it is.
        watches: drop this entry when one of them dies, for a new tensor may then be taken for it.
        changes: calls in a row that found them changed.
        stale: they changed since they were compared.
    """

    state: _State
    problem: str
    watches: list[weakref.ref[Tensor]]
    changes: int = 0
    stale: bool = False


class WeightGuard:
    """Whether a call's weights are the same on every rank, where the compiled graph takes them to be.

    A fact belongs to a weight: one tensor, its memory and its version. Other tensors in its place (a second layer that
    runs the same graph, a weight that was replaced) and new contents are compared over the ranks of each axis, all
    weights in one exchange, and the outcome is remembered while they live. A call that finds all as it was exchanges
    nothing. Weights that change at every call are left alone until a call finds them unchanged.

    All ranks come to the same answer: they make the same calls, so all of them meet unknown weights at the same one,
    and what one finds reaches the others through the exchanges. A rank that sees a change alone waits for the others
    and raises after the timeout: after a branch on the rank, or a ``dist.broadcast``, which bumps no version counter
    where it receives. Writes through ``param.data`` and to inference tensors are seen by no rank.

    Args:
        weights: place among the graph's inputs → name and tensor of what was compared when it was compiled.
        same: every axis of the graph, in the same order on all ranks, with the places of what is the same over it.
        reach: how to reach the other ranks of an axis.
    """

    def __init__(
        self,
        weights: Mapping[int, tuple[str, Tensor]],
        same: Sequence[tuple[Axis, Collection[int]]],
        reach: Callable[[Axis], Exchange],
    ) -> None:
        """Remember the weights that the graph was compiled with."""
        self._places, self._names = list(weights), [name for name, _ in weights.values()]
        self._same = [(axis, [self._places.index(place) for place in places]) for axis, places in same]
        self._reach = reach
        self._known: dict[tuple[int, ...], _Known] = {}
        self._told: set[str] = set()
        self._note([tensor for _, tensor in weights.values()], "")

    def problem(self, inputs: Sequence[Any]) -> str:
        """Why the compiled graph is not for the weights among the inputs of a call; empty where it is.

        Raises:
            AxisError: they changed on this rank, and another rank does not take part in comparing them.
        """
        if not self._places:
            return ""
        weights: list[Tensor] = [inputs[place] for place in self._places]
        with torch._C.DisableTorchFunctionSubclass():
            known, state = self._known.get(tuple(map(id, weights))), _state(weights)
            if known is None:
                why = f"{self._names[0]!r} is another tensor than in earlier calls"
                return self._note(weights, self._compare(weights, why)).problem
            if state != known.state or known.stale:
                self._look_again(known, weights, state)
            else:
                known.changes = 0
            return known.problem

    def _look_again(self, known: _Known, weights: Sequence[Tensor], state: _State) -> None:
        pairs = zip(self._names, zip(*known.state, strict=True), zip(*state, strict=True), strict=True)
        changed = [name for name, old, new in pairs if old != new]
        known.state, known.stale = state, True  # until they are compared, which may fail
        known.changes = known.changes + 1 if changed else 0
        if known.changes > PATIENCE:
            name = changed[0]
            known.problem = f'{name!r} changes between calls: if all ranks write the same, give replicated=["{name}"]'
            return self._tell(known.problem)
        known.problem = self._compare(
            weights, f"{changed[0]!r} was written or moved" if changed else f"{self._names[0]!r} or another changed"
        )
        known.stale = False
        return None

    def _compare(self, weights: Sequence[Tensor], why: str) -> str:
        """Why the compiled graph is not for ``weights``: on all ranks of all axes, or on none."""
        prints = [released_fingerprint(weight) or fingerprint(weight) for weight in weights]
        problem = ""
        # With several axes a second round: what the last of them found has to reach the other ranks of the first.
        for axis, places in [*self._same, *self._same[:-1]]:
            mine = problem, {self._names[place]: prints[place] for place in places}
            try:
                said = self._reach(axis).all_gather(mine, "fingerprints of weights")
            except AxisError as error:
                raise AxisError(f"weight {why}, and is compared again: change weights on all ranks; {error}") from error
            problem = _verdict(axis, cast(list[tuple[str, dict[str, str]]], said))
        if problem:
            self._tell(problem)
        return problem

    def _tell(self, problem: str) -> None:
        if problem not in self._told:
            self._told.add(problem)
            log.warning("cpcompile: the graph runs as it came: weight %s and call torch._dynamo.reset()", problem)

    def _note(self, weights: Sequence[Tensor], problem: str) -> _Known:
        key = tuple(map(id, weights))
        watches = [weakref.ref(tensor, partial(_forget, self._known, key)) for tensor in weights]
        self._known[key] = _Known(_state(weights), problem, watches)
        return self._known[key]


def _verdict(axis: Axis, said: Sequence[tuple[str, dict[str, str]]]) -> str:
    for problem, _ in said:
        if problem:
            return problem
    for name, own in said[0][1].items():
        if any(prints.get(name) != own for _, prints in said):
            return f'{name!r} differs between the ranks of axis {axis.name}: give replicated=["!{name}"]'
    return ""


def _forget(known: dict[tuple[int, ...], _Known], key: tuple[int, ...], _: object) -> None:
    known.pop(key, None)


def _state(weights: Sequence[Tensor]) -> _State:
    try:
        return tuple(map(_version, weights)), tuple(map(Tensor.data_ptr, weights))
    except RuntimeError:  # inference tensors have no version, released weights no memory
        return tuple(None if w.is_inference() else w._version for w in weights), tuple(map(address, weights))


class PartGuard:
    """Tells when a weight was replaced or written of which a compiled graph holds a part.

    Holds the tensors weakly. Writes through ``param.data`` bump no version counter and are not seen, nor are writes to
    inference tensors, which have none: after reloading weights in such a way, reset and compile again.

    Args:
        weights: ``(name, tensor)`` of each weight to watch.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Remember where each weight lies and how often it was written."""
        self._gone: list[str] = []  # filled by the watches: a new tensor may then lie at the old address
        self._watches: list[weakref.ref[Tensor]] = []
        self._entries: list[tuple[int, int | None, str]] = []
        for name, tensor in weights:
            self._watches.append(weakref.ref(tensor, partial(_died, self._gone, name)))
            version = None if tensor.is_inference() else tensor._version
            self._entries.append((address(tensor), version, name))

    def check(self, current: Sequence[Tensor]) -> None:
        """Compare the weights of a call, in the guard's order, with those at construction.

        Raises:
            ParameterChangedError: one was replaced, moved or written.
        """
        if self._gone:
            raise _changed(self._gone[0], "replaced")
        for (place, version, name), tensor in zip(self._entries, current, strict=True):
            if address(tensor) != place:
                raise _changed(name, "in other memory")
            if version is not None and tensor._version != version:
                raise _changed(name, "written")


def _died(gone: list[str], name: str, _: object) -> None:
    gone.append(name)


def _changed(name: str, how: str) -> ParameterChangedError:
    return ParameterChangedError(
        f"parameter {name!r}: expected the contents that its part was made of, found it {how}; "
        "call torch._dynamo.reset() and compile again"
    )
