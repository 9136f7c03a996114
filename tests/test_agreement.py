"""What ranks agree on after each did its own part of an axis: one interval is left out, or one axis."""

from __future__ import annotations

from dataclasses import replace

import torch.fx as fx
from simulate import in_threads, none_failed

from cpcompile.agreement import Agreed, Ranks, agree_on
from cpcompile.axes import Axis
from cpcompile.axis_rewrite import AxisRewrite, Part
from cpcompile.compiled import Variant
from cpcompile.exchange import LocalExchange
from cpcompile.plan import AxisPlan, Interval
from cpcompile.runner import Attempt

BOUNDS = [(0, 7), (8, 63), (64, None)]


def graph() -> fx.GraphModule:
    return fx.GraphModule({}, fx.Graph())


def plan(axis: str) -> AxisPlan:
    intervals = [Interval(a, b, {"mm": "S"}, {"wait": "scatter"}, "cut", 1.0, 2.0, 1.0, 8) for a, b in BOUNDS]
    return AxisPlan(axis, 2, "s0", "f", "auto", "gloo", tuple(intervals))


def part(axis: str, before: Variant, **refused: str) -> Part:
    """A plan of three intervals, each rewritten but the ``refused`` ones, by number."""
    left_out = {int(number.removeprefix("at_")): why for number, why in refused.items()}
    pieces = {n: replace(before, first=a, last=b, gm=graph()) for n, (a, b) in enumerate(BOUNDS) if n not in left_out}
    pieces |= {n: replace(before, first=BOUNDS[n][0], last=BOUNDS[n][1]) for n in left_out}
    return Part(before, plan(axis), dict(sorted(pieces.items())), left_out, reduced=["wait"])


def rewritten(agreed: Agreed, before: Variant) -> list[bool]:
    return [variant.gm is not before.gm for variant in agreed.variants]


def test_one_refused_interval_leaves_the_others_on_both_ranks() -> None:
    ring, before = LocalExchange.ring(2), Variant(0, None, graph())

    def settle(refusing: set[int], rank: int) -> Agreed:
        axis = Axis("tp", "tp", 2, rank, (0, 1))
        refused = {"at_1": f"not proven by {rank}"} if rank in refusing else {}
        found = AxisRewrite([part("tp", before, **refused)])
        return agree_on(axis, Ranks({axis: ring[rank]}), Attempt(found), [before])

    for agreed in none_failed(in_threads(lambda rank: settle({1}, rank), 2)):
        assert rewritten(agreed, before) == [True, False, True]
        assert [(v.first, v.last) for v in agreed.variants] == BOUNDS
        assert [v.refused for v in agreed.variants] == [{}, {"tp": "rank 1 of axis tp: not proven by 1"}, {}]
        assert [i.unchanged for i in agreed.plans[0].intervals] == [False, True, False]
        assert (agreed.reason, agreed.failed) == ("", "rank 1 of axis tp: not proven by 1")
    for agreed in none_failed(in_threads(lambda rank: settle(set(), rank), 2)):
        assert rewritten(agreed, before) == [True] * 3 and not agreed.failed
        assert not any(i.unchanged for i in agreed.plans[0].intervals)


def test_what_one_rank_cannot_do_over_one_axis_all_leave_out_over_that_axis_only() -> None:
    """A mesh of 2 x 2: the rank that fails over ``cp`` meets one other over ``cp``, and one over ``tp``."""
    lists = {"cp": [(0, 2), (1, 3)], "tp": [(0, 1), (2, 3)]}
    rings = {ranks: LocalExchange.ring(2) for groups in lists.values() for ranks in groups}
    before = Variant(0, None, graph())

    def compiled(failing: int | None, rank: int) -> list[Agreed]:
        mine = {name: next(g for g in groups if rank in g) for name, groups in lists.items()}
        axes = [Axis(name, name, 2, ranks.index(rank), ranks) for name, ranks in mine.items()]
        ranks, found = Ranks({axis: rings[axis.ranks][axis.rank] for axis in axes}), []
        for axis in axes:
            work = Attempt(AxisRewrite([part(axis.name, before)]))
            if (axis.name, rank) == ("cp", failing):
                work = Attempt(None, "made to fail", KeyError())
            found.append(agree_on(axis, ranks, work, [before]))
        return found

    for over_cp, over_tp in none_failed(in_threads(lambda rank: compiled(1, rank), 4)):
        assert rewritten(over_cp, before) == [False] and over_cp.plans == []
        assert over_cp.reason == "rank 0 of axis cp: made to fail"  # the first of ranks 1 and 3
        assert rewritten(over_tp, before) == [True] * 3 and not over_tp.failed
    for both in none_failed(in_threads(lambda rank: compiled(None, rank), 4)):
        assert [rewritten(agreed, before) for agreed in both] == [[True] * 3] * 2
