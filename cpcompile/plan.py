"""A plan as data: which placement each value has, per interval of the token count, on each mesh axis.

A plan can be printed, saved as JSON, loaded, compared and applied; nothing in it refers to a live graph.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpcompile.errors import PlanError
from cpcompile.layouts import KINDS
from cpcompile.strict_json import read_json

FORMAT = 1
LABELS, ROUTES = ("P", "S"), ("scatter", "gather", "scatter+gather", "reduce")
MOST_BYTES = 256 << 20  # of a file


@dataclass(frozen=True)
class Interval:
    """One best plan and the token counts that it is best for.

    Args:
        first: least token count, inclusive.
        last: greatest token count, inclusive; None is unbounded.
        labels: node name → ``"P"`` or ``"S"``; nodes that are not named are whole (``"R"``).
        raises: value name → collectives that raise it: ``"scatter"``, ``"gather"``, ``"scatter+gather"``, ``"reduce"``.
        solver: which solver answered.
        cost_s: seconds that the placed part of the step takes at ``at`` tokens, by the cost model.
        unchanged_s: the same for the graph as it came.
        bound_s: no plan takes less; equal to ``cost_s`` where the plan is proven optimal.
        at: token count at which the costs are stated.
    """

    first: int
    last: int | None
    labels: Mapping[str, str]
    raises: Mapping[str, str]
    solver: str
    cost_s: float
    unchanged_s: float
    bound_s: float
    at: int

    def holds(self, tokens: int) -> bool:
        """Whether this interval is the one for ``tokens`` tokens."""
        return self.first <= tokens and (self.last is None or tokens <= self.last)

    @property
    def unchanged(self) -> bool:
        """Whether the graph runs as it came: every all-reduce stays where it is, nothing is sharded."""
        return not self.labels and set(self.raises.values()) <= {"reduce"}


@dataclass(frozen=True)
class AxisPlan:
    """The placements on one mesh axis.

    Args:
        axis: the axis's name.
        size: number of ranks.
        tokens: the token count that it is for, as the graph writes it (``"s27"``), or its static value.
        graph: fingerprint of the graph that the plan was made for.
        strategy: the strategy that was asked for.
        profile: name of the hardware profile.
        intervals: by ascending token count, without gaps from 0.
        refused: why nothing was placed, if nothing was.
        layout: which rows of the tokens each rank holds.
    """

    axis: str
    size: int
    tokens: str
    graph: str
    strategy: str
    profile: str
    intervals: tuple[Interval, ...]
    refused: str = ""
    layout: str = "contiguous"

    def at(self, tokens: int) -> Interval:
        """The interval that holds ``tokens``."""
        for interval in self.intervals:
            if interval.holds(tokens):
                return interval
        raise PlanError(f"the plan of axis {self.axis!r} has no interval for {tokens} tokens: make a new plan")


@dataclass(frozen=True)
class Plan:
    """A plan for every mesh axis of a graph, in the order in which the axes are rewritten.

    An axis has one for each of its token counts, and these again for each interval of what was placed before.
    """

    axes: tuple[AxisPlan, ...] = field(default=())

    def to_json(self) -> str:
        """The plan as JSON text with sorted keys."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, sort_keys=True)

    def save(self, path: str | Path) -> None:
        """Write the plan to ``path``."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan back. Raises :class:`PlanError` if ``text`` is not one."""
        try:
            data = read_json(text)
        except ValueError as error:
            raise _no(f"{type(error).__name__}: {_line(error)}") from error
        about = _object(data, "a plan", {"format", "axes"})
        if about["format"] != FORMAT:
            raise PlanError(f"the plan's format is not {FORMAT}: make it again with this version")
        return cls(tuple(_axis(axis) for axis in _a(list, about["axes"], "axes")))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan from a file. Raises :class:`PlanError` if it is missing or not a plan."""
        try:
            if Path(path).stat().st_size > MOST_BYTES:
                raise PlanError(f"the plan {path} has more than {MOST_BYTES} bytes; save one with Plan.save")
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PlanError(f"cannot read the plan {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise PlanError(f"the plan {path} is not UTF-8 text; save one with Plan.save") from error

    def diff(self, other: Plan) -> list[str]:
        """Differences to ``other``, one line each; empty if both place everything alike."""
        lines = []
        ours, theirs = self._by_name(), other._by_name()
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs:
                lines.append(f"axis {name}: only in {'the first' if name in ours else 'the second'} plan")
                continue
            lines += [f"axis {name}: {line}" for line in _axis_diff(ours[name], theirs[name])]
        return lines

    def _by_name(self) -> dict[str, AxisPlan]:
        """The plans by their axes' names; the second and further ones of an axis have a number."""
        found: dict[str, AxisPlan] = {}
        for plan in self.axes:
            number = 1 + sum(other.axis == plan.axis for other in found.values())
            found[plan.axis if number == 1 else f"{plan.axis}, plan {number}"] = plan
        return found


# ---- what a file may hold --------------------------------------------------------------------------------------------


def _axis(data: object) -> AxisPlan:
    about = _object(data, "an axis", {f.name for f in dataclasses.fields(AxisPlan)})
    intervals = tuple(_interval(one) for one in _a(list, about.pop("intervals"), "intervals"))
    size, layout = _integer(about.pop("size"), "size", 1), about.pop("layout")
    if layout not in KINDS:
        raise _no(f"expected one of {', '.join(KINDS)} as layout; found {_told(layout)}")
    nexts = [0, *(None if one.last is None else one.last + 1 for one in intervals)]
    if any(one.first != first for one, first in zip(intervals, nexts, strict=False)):
        raise _no("expected intervals in ascending order, from 0 and without gaps")
    words = {key: _a(str, value, key) for key, value in about.items()}
    return AxisPlan(size=size, intervals=intervals, layout=layout, **words)


def _interval(data: object) -> Interval:
    about = _object(data, "an interval", {f.name for f in dataclasses.fields(Interval)})
    first, last = _integer(about["first"], "first"), about["last"]
    return Interval(
        first=first,
        last=None if last is None else _integer(last, "last", first),
        labels=_words(about["labels"], "labels", LABELS),
        raises=_words(about["raises"], "raises", ROUTES),
        solver=_a(str, about["solver"], "solver"),
        cost_s=_seconds(about["cost_s"], "cost_s"),
        unchanged_s=_seconds(about["unchanged_s"], "unchanged_s"),
        bound_s=_seconds(about["bound_s"], "bound_s"),
        at=_integer(about["at"], "at"),
    )


def _object(data: object, what: str, keys: set[str]) -> dict[str, Any]:
    found = dict(_a(dict, data, what))
    if found.keys() != keys:
        odd = sorted(found.keys() ^ keys)[0]
        raise _no(f"{what} has {'no' if odd in keys else 'a'} {_told(odd)}")
    return found


def _no(why: str) -> PlanError:
    return PlanError(f"not a plan: {why}; save one with Plan.save")


def _a(kind: type, value: object, what: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise _no(f"expected {kind.__name__} as {what}; found {_told(value)}")
    return value


def _integer(value: object, what: str, least: int = 0) -> int:
    number: int = _a(int, value, what)
    if not least <= number < 1 << 63:
        raise _no(f"expected {what} from {least} to 2**63; found {_told(value)}")
    return number


def _seconds(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
        raise _no(f"expected seconds as {what}; found {_told(value)}")
    return value


def _words(data: object, what: str, known: tuple[str, ...]) -> Mapping[str, str]:
    found: Mapping[str, str] = _a(dict, data, what)
    odd = [word for word in found.values() if word not in known]
    if odd:
        raise _no(f"expected one of {', '.join(known)} in {what}; found {_told(odd[0])}")
    return found


def _told(value: object) -> str:
    return reprlib.repr(value)[:80]


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:200]


# ---- differences -----------------------------------------------------------------------------------------------------


def _axis_diff(a: AxisPlan, b: AxisPlan) -> list[str]:
    lines = [
        f"{key}: {getattr(a, key)} -> {getattr(b, key)}"
        for key in ("size", "tokens", "graph", "strategy", "profile", "refused", "layout")
        if getattr(a, key) != getattr(b, key)
    ]
    spans = [[(i.first, i.last) for i in plan.intervals] for plan in (a, b)]
    if spans[0] != spans[1]:
        return [*lines, f"intervals: {spans[0]} -> {spans[1]}"]
    for i, j in zip(a.intervals, b.intervals, strict=True):
        for node in sorted(i.labels.keys() | j.labels.keys()):
            old, new = i.labels.get(node, "R"), j.labels.get(node, "R")
            if old != new:
                lines.append(f"T in [{i.first}, {i.last}]: {node}: {old} -> {new}")
        for value in sorted(i.raises.keys() | j.raises.keys()):
            old, new = i.raises.get(value, "none"), j.raises.get(value, "none")
            if old != new:
                lines.append(f"T in [{i.first}, {i.last}]: collectives of {value}: {old} -> {new}")
    return lines
