"""What the ranks of all axes agree on before a rewrite over one of them is used: one exchange of outcomes.

What any rank could not do is done by none, on the whole mesh: over the other axes go the numbers of what is left out.
Ranks that do not meet in an exchange all learn it there, and exchange no more over that axis in this compilation.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cpcompile.axes import Axis
from cpcompile.axis_parts import WHOLE, AxisRewrite, Part
from cpcompile.compiled import Variant
from cpcompile.errors import AxisError, CpcompileError, ExchangeError
from cpcompile.exchange import Exchange
from cpcompile.plan import AxisPlan, Plan
from cpcompile.runner import Attempt

_WHAT = "outcome of the rewrite"
_LeftOut = dict[tuple[int, int], str]  # number of a variant and of an interval, or WHOLE, of both → reason


@dataclass
class Ranks:
    """The ranks of all axes.

    Args:
        exchanges: axis → its ranks.
        lost: axis → why its ranks did not meet.
    """

    exchanges: Mapping[Axis, Exchange]
    lost: dict[Axis, str] = field(default_factory=dict)

    def told(self, axis: Axis, obj: object, what: str) -> list[Any]:
        """What every rank of ``axis`` says; empty where they do not meet."""
        if axis not in self.lost:
            try:
                return self.exchanges[axis].all_gather(obj, what)
            except ExchangeError as error:
                self.lost[axis] = str(error)
        return []


@dataclass(frozen=True)
class _Outcome:
    """What one rank tells: why it has none; of each variant the plan, empty where there is none, and what failed."""

    failure: str = ""
    plans: Sequence[str] = ()
    refused: Sequence[dict[int, str]] = ()


@dataclass
class Agreed:
    """What is done over the axis on all of its ranks.

    Args:
        variants: the variants after it.
        plans: its plans.
        reason: why nothing is done over it; empty where any piece is rewritten or left to the plan.
        failed: what failed, on any rank; empty where nothing did.
    """

    variants: list[Variant]
    plans: list[AxisPlan] = field(default_factory=list)
    reason: str = ""
    failed: str = ""


def agree_on(axis: Axis, ranks: Ranks, found: Attempt[AxisRewrite], before: Sequence[Variant]) -> Agreed:
    """Compare with the other ranks what was ``found`` of the variants ``before``; keep what all of them could do."""
    if isinstance(found.error, ExchangeError):
        ranks.lost[axis] = found.reason
    everyone: list[_Outcome] = ranks.told(axis, _outcome(found), _WHAT) or [_Outcome(ranks.lost[axis])]
    reason = _any([o.failure for o in everyone], axis) or _differing(everyone, axis)
    left_out: _LeftOut = {(WHOLE, WHOLE): reason} if reason else _left_out(everyone, axis)
    for other in ranks.exchanges:
        if other is not axis:
            for theirs in ranks.told(other, left_out, "what is left out"):
                left_out |= {at: why for at, why in theirs.items() if at not in left_out}
    failed = next(iter(left_out.values()), "")
    reason = left_out.get((WHOLE, WHOLE), "")
    if reason or found.result is None:
        return Agreed([_left_alone(v, axis, reason) for v in before], reason=reason, failed=failed)
    agreed = Agreed([], failed=failed)
    for number, part in enumerate(found.result.parts):
        why = {interval: text for (of, interval), text in left_out.items() if of == number}
        _settle(agreed, part, axis, why)
    reasons = [v.refused[axis.name] for v in agreed.variants if axis.name in v.refused]
    if len(reasons) == len(agreed.variants):
        agreed.plans, agreed.reason = [], reasons[0]
    return agreed


def tell(exchange: Exchange, error: CpcompileError) -> None:
    """Let the other ranks not wait for this one, which raises ``error``."""
    with contextlib.suppress(AxisError):
        exchange.all_gather(_Outcome(str(error)), _WHAT)


def _outcome(found: Attempt[AxisRewrite]) -> _Outcome:
    if found.result is None:
        return _Outcome(found.reason)
    parts = found.result.parts
    texts = [Plan((p.plan,)).to_json() if p.plan else "" for p in parts]  # why there is none may name a rank's files
    return _Outcome("", [hashlib.sha256(text.encode()).hexdigest() for text in texts], [p.refused for p in parts])


def _any(reasons: Sequence[str], axis: Axis) -> str:
    """The first of the ranks' reasons, with the rank where not all have it."""
    rank, reason = next(((r, told) for r, told in enumerate(reasons) if told), (0, ""))
    return reason if not reason or len(set(reasons)) == 1 else f"rank {rank} of axis {axis.name}: {reason}"


def _differing(everyone: Sequence[_Outcome], axis: Axis) -> str:
    """Why the ranks' plans do not fit together. A variant that failed on some rank is left alone by all."""
    for number in range(len(everyone[0].plans)):
        failed = any(WHOLE in o.refused[number] for o in everyone)
        if not failed and len({o.plans[number] for o in everyone}) > 1:
            return f"the ranks of axis {axis.name} made different plans: give all of them the same options and inputs"
    return ""


def _left_out(everyone: Sequence[_Outcome], axis: Axis) -> _LeftOut:
    numbers = {(v, n) for o in everyone for v, refused in enumerate(o.refused) for n in refused}
    return {(v, n): _any([o.refused[v].get(n, "") for o in everyone], axis) for v, n in sorted(numbers)}


def _settle(agreed: Agreed, part: Part, axis: Axis, why: Mapping[int, str]) -> None:
    if WHOLE in why or part.plan is None:
        agreed.variants.append(_left_alone(part.variant, axis, why.get(WHOLE, part.reason)))
        return
    for number, piece in part.pieces.items():
        as_it_came = replace(part.variant, first=piece.first, last=piece.last)
        agreed.variants.append(_left_alone(as_it_came, axis, why[number]) if number in why else piece)
    agreed.plans.append(part.plan_without(why))


def _left_alone(variant: Variant, axis: Axis, reason: str) -> Variant:
    unit = variant.next_unit(axis.name)  # none for a variant that had nothing to be placed
    return replace(variant, refused={**variant.refused, unit: reason}) if unit and reason else variant
