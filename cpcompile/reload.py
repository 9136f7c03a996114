"""Saved code is taken again only if all ranks can take it: one exchange on each axis says so on every rank."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from cpcompile.axes import Axis, axis_of
from cpcompile.backend import exchange_for
from cpcompile.identity import difference, identity
from cpcompile.options import Options
from cpcompile.replication import fingerprint
from cpcompile.saved_code import SavedCode, form
from cpcompile.weight_guard import WeightGuard

NOTHING = "no saved code"
_Post = tuple[str, str, dict[str, str]]  # why a rank cannot take its code, its word of a compilation, fingerprints


def settle(
    found: SavedCode | None,
    model: torch.nn.Module,
    options: Mapping[str, Any],
    problem: str = NOTHING,
) -> str:
    """Decide with all other ranks whether saved code runs in the place of a new compilation, and start it if so.

    Every rank calls this at the same point, whether it has saved code or not. Weights that were the same on all ranks
    when the code was made are compared again.

    Args:
        found: what this rank has read, or None.
        model: the module whose graph it is.
        options: those of the backend; ``axes`` must be given.
        problem: why nothing was found.

    Returns:
        Empty where the code was started on all ranks, else why every rank has to compile anew; "" and not "" agree
        on all ranks.

    Raises:
        AxisError: a rank does not take part in time.
    """
    parsed = Options.parse(options)
    axes = [axis_of(name, group) for name, group in parsed.axes.items()]
    tensors: dict[str, torch.Tensor] = {}
    if found is not None:
        problem = _misfit(found, parsed, axes) or _look_up(found, model, tensors) or _unreadable(found)
    prints: dict[str, str] = {}
    if found is not None and not problem:
        prints = {name: fingerprint(tensors[name]) for name in found.grounds.watched.values()}
    for axis in axes:
        post: _Post = (problem, "", {})
        if found is not None and not problem:
            post = ("", found.grounds.words[axis.name], {n: prints[n] for n in found.grounds.same[axis.name]})
        posts = exchange_for(axis, parsed.timeout_s).all_gather(post, "saved code")
        problem = _verdict(axis, cast(Sequence[_Post], posts))
    if found is not None and not problem:
        _start(found, axes, tensors, parsed.timeout_s)
    return problem


def _start(found: SavedCode, axes: Sequence[Axis], tensors: Mapping[str, torch.Tensor], timeout_s: float) -> None:
    grounds, reach = found.grounds, functools.partial(exchange_for, timeout_s=timeout_s)
    weights = {place: (name, tensors[name]) for place, name in grounds.watched.items()}
    now = {axis.name: axis for axis in axes}
    same = [
        (now[axis.name], [place for place, name in grounds.watched.items() if name in grounds.same[axis.name]])
        for axis in grounds.axes
    ]
    guard = WeightGuard(weights, same, reach)
    groups = {axis.group_name: now[axis.name].group_name for axis in grounds.axes}
    found.start(groups, lambda args: not guard.problem(args))


def _misfit(found: SavedCode, options: Options, axes: Sequence[Axis]) -> str:
    """Why the code is not what is wanted now, as far as this rank alone can tell."""
    differs = difference(found.grounds.identity, identity(options))
    if differs:
        return f"saved code is of other options or versions: {differs}"
    then, now = ({a.name: (a.ranks, a.rank) for a in each} for each in (found.grounds.axes, axes))
    return "" if then == now else f"saved code is for the axes {_told(then)}, not {_told(now)}"


def _told(axes: Mapping[str, tuple[tuple[int, ...], int]]) -> str:
    return ", ".join(f"{name} of ranks {list(ranks)}, rank {rank}" for name, (ranks, rank) in axes.items()) or "none"


def _look_up(found: SavedCode, model: torch.nn.Module, tensors: dict[str, torch.Tensor]) -> str:
    """Find the weights that the code is for; why not, where the model has others."""
    for name, wanted in found.grounds.weights.items():
        try:
            value = operator.attrgetter(name)(model)
        except AttributeError:
            return f"saved code is of another model: there is no weight {name}"
        if form(value) != wanted:
            return f"saved code is of another model: weight {name} was {wanted} and is {form(value)}"
        tensors[name] = value
    return ""


def _unreadable(found: SavedCode) -> str:
    try:
        found.read()
    except Exception as error:  # whatever a damaged file leads to: the other ranks wait for this rank's word
        return f"saved code cannot be read: {type(error).__name__}: {error}".splitlines()[0]
    return ""


def _verdict(axis: Axis, posts: Sequence[_Post]) -> str:
    """The same on every rank of ``axis``: a function of what all of them said."""
    problems = [f"rank {rank} of axis {axis.name}: {said[0]}" for rank, said in enumerate(posts) if said[0]]
    if problems:
        return problems[0] if any(said[0] != NOTHING for said in posts) else NOTHING
    if len({word for _, word, _ in posts}) > 1:
        return f"the ranks of axis {axis.name} have code of different compilations"
    for name, print_ in posts[0][2].items():
        if any(said[2].get(name) != print_ for said in posts):
            return f"weight {name} is no longer the same on all ranks of axis {axis.name}"
    return ""
