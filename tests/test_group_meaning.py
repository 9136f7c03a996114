"""What a collective means follows from its op, its reduction and rank lists: placed, proven and run in lockstep."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from simulate import fake_rank, in_threads, none_failed, real_inputs
from torch import Tensor, nn

from cpcompile.axes import Axis
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.exchange import LocalExchange, OfflineExchange
from cpcompile.options import Options
from cpcompile.passes.collectives import NATIVE
from cpcompile.passes.group_relations import GroupRelations
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.op_call import Mixing
from cpcompile.pipeline import compile_graph
from cpcompile.rank_lists import _exchanged, _joined

H = 8
Lists = tuple[tuple[int, ...], ...]
PAIRS: Lists = ((0, 1), (2, 3))
FOUR: Lists = ((0, 1, 2, 3),)
PARTS = ("a", "up", "down")


class Model(nn.Module):
    """A layer of tensor parallelism over ``axis`` whose normed rows are scaled by a reduction over ``other``."""

    def __init__(self, axis: Any, other: Any, op: str, what: str, rank: int = 0) -> None:
        super().__init__()
        self.axis, self.other, self.op, self.what = axis, other, op, what

        def weight(*shape: int, seed: int) -> nn.Parameter:
            values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3
            return nn.Parameter(values, requires_grad=False)

        self.table = weight(32, H, seed=1)
        self.a, self.up, self.down = (weight(H, H, seed=10 * k + rank) for k in (1, 2, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.embedding(ids, self.table)
        h = torch.tanh(x + funcol.all_reduce(x @ self.a, "sum", self.axis))
        of = h if self.what == "same" else h @ self.up
        scale = funcol.all_reduce(1 + of.abs().amax(-1, keepdim=True), self.op, self.other)
        h = torch.relu(h / scale)
        return h + funcol.all_reduce(torch.relu(h @ self.up) @ self.down, "sum", self.axis)


@dataclass(frozen=True)
class Meeting:
    """An axis, a group that meets it, a reduction of values that are the ``"same"`` on the axis's ranks or ``"own"``.

    ``becomes``: the reduction runs on ``"rows"`` or on ``"whole"`` values, is ``"gone"``, or is one of the axis.
    """

    axis: Lists
    other: Lists
    op: str
    what: str
    becomes: str

    @property
    def ranks(self) -> range:
        return range(1 + max(max(ranks) for ranks in self.axis))


ITSELF: Lists = ((0, 1),)
MEETINGS = [
    *(Meeting(ITSELF, ITSELF, op, "same", "gone") for op in ("max", "min", "avg")),
    *(Meeting(ITSELF, ITSELF, op, "same", "whole") for op in ("product",)),
    *(Meeting(ITSELF, ITSELF, op, "own", "whole") for op in ("max", "min", "avg", "product")),
    Meeting(((0, 1, 2),), ((2, 0, 1),), "sum", "own", "axis"),  # a second group of the same ranks, in another order
    Meeting(((0, 1, 2),), ((2, 0, 1),), "max", "own", "whole"),
    Meeting(FOUR, PAIRS, "sum", "same", "whole"),  # nested: pairs inside the axis
    Meeting(FOUR, PAIRS, "max", "same", "gone"),
    Meeting(FOUR, PAIRS, "max", "own", "whole"),
    Meeting(PAIRS, ((0, 2), (1, 3)), "sum", "same", "rows"),  # the other dim of a mesh
    Meeting(PAIRS, ((0, 2), (1, 3)), "max", "same", "rows"),
    Meeting(PAIRS, ((0, 2), (1, 3)), "avg", "own", "whole"),
    Meeting(PAIRS, ((0, 3), (1, 2)), "sum", "same", "whole"),  # crossing: one rank in common, at another place
    Meeting(PAIRS, ((0, 3), (1, 2)), "max", "same", "whole"),
    Meeting(PAIRS, FOUR, "sum", "same", "whole"),  # around: the axis is inside the group
    Meeting(PAIRS, FOUR, "max", "own", "whole"),
]
NAMES = [f"{m.axis}-{m.other}-{m.op}-{m.what}".replace(" ", "") for m in MEETINGS]


@functools.cache
def traced(meeting: Meeting) -> tuple[Trace, str, str]:
    """Rank 0's trace, and what it calls the groups of the axis and the other."""
    with fake_rank(0, len(meeting.ranks)):
        axis = dist.new_group(list(meeting.axis[0]))
        other = axis if meeting.other == meeting.axis else dist.new_group(list(meeting.other[0]))
        trace = capture(Model(axis, other, meeting.op, meeting.what), torch.zeros(9, dtype=torch.int64))
        return trace, axis.group_name, other.group_name


def axis_on(meeting: Meeting, rank: int, known: bool = True) -> Axis:
    _, name, other = traced(meeting)
    ranks = next(ranks for ranks in meeting.axis if rank in ranks)
    groups = {name: meeting.axis, other: meeting.other} if known else {}
    return Axis("tp", name, len(ranks), ranks.index(rank), ranks, groups=groups)


def compiled(meeting: Meeting, rank: int, known: bool = True, **options: Any) -> Compiled:
    trace, axis = traced(meeting)[0], axis_on(meeting, rank, known)
    gm = fx.GraphModule(trace.gm, fx.Graph())
    gm.graph.output(gm.graph.graph_copy(trace.gm.graph, {}))
    replicated = ("*", *(f"!{name}" for name in PARTS))
    parsed = Options.parse({"strategy": "tp", "replicated": replicated, **options})
    return compile_graph(gm, trace.inputs, parsed, lambda a: OfflineExchange(a.size, a.rank), [axis])


def run(meeting: Meeting, graphs: list[fx.GraphModule], tokens: int) -> list[Any]:
    trace, name, other = traced(meeting)
    ids = torch.arange(tokens)
    programs = []
    for rank, gm in zip(meeting.ranks, graphs, strict=True):
        weights = dict(Model(None, None, "", "", rank).named_parameters())
        inputs = real_inputs(trace, ids)
        values = [weights.get(i.name, value) for i, value in zip(trace.inputs, inputs, strict=True)]
        lists = {n: next(r for r in of if rank in r) for n, of in ((name, meeting.axis), (other, meeting.other))}
        programs.append(RankProgram(gm, values, lists))
    return run_lockstep(programs)


def what_became(meeting: Meeting, gm: fx.GraphModule) -> str:
    """Of the reduction that is not one of the layer's two sums."""
    found = gm.graph.find_nodes(op="call_function", target=NATIVE.all_reduce.default)
    rows = [n.meta["val"].shape[0] for n in found if n.meta["val"].shape[-1] == 1]
    if [n for n in found if n.args[1:] == ("sum", traced(meeting)[1])]:
        return "axis"
    if not rows:
        return "gone"
    values = [n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")]
    return "whole" if str(rows[0]) in [str(v) for v in values if isinstance(v, torch.SymInt)] else "rows"


@pytest.mark.parametrize("meeting", MEETINGS, ids=NAMES)
def test_every_rank_has_what_the_original_gives_it(meeting: Meeting) -> None:
    made = [compiled(meeting, rank, verify="numeric") for rank in meeting.ranks]
    graphs = [one.at(64).gm for one in made]
    for one, gm in zip(made, graphs, strict=True):
        assert not one.refused and one.proofs and all(p["holds"] for p in one.proofs), (one.refused, one.proofs)
        assert gm.graph.find_nodes(op="call_function", target=NATIVE.reduce_scatter_tensor.default)
        assert what_became(meeting, gm) == meeting.becomes
    for tokens in (9, 2):
        expected = run(meeting, [made[0].original] * len(graphs), tokens)
        for mine, theirs in zip(run(meeting, graphs, tokens), expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "meeting", [m for m in MEETINGS if m.becomes == "whole" and m.what == "same"], ids=lambda m: f"{m.other}{m.op}"
)
@pytest.mark.parametrize("verify", ["static", "numeric"])
def test_a_planner_that_takes_it_for_row_wise_is_refuted(
    meeting: Meeting, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GroupRelations, "why_rows_meet", lambda self, name: "")
    monkeypatch.setattr(GroupRelations, "keeps_replication", lambda self, name: True)
    found = compiled(meeting, 0, verify=verify)
    asked = [p["holds"] for p in found.proofs if p["method"] == verify]
    assert asked and not any(asked)
    assert found.refused and not found.rewritten


def test_a_planner_that_takes_any_reduction_for_a_copy_is_refuted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpcompile.passes.token_dims.IDEMPOTENT", {"product"})
    found = compiled(Meeting(ITSELF, ITSELF, "product", "same", ""), 0, verify="numeric")
    assert {p["method"]: p["holds"] for p in found.proofs} == {"static": False, "numeric": False}


def test_where_rank_lists_are_not_known_nothing_is_taken_for_another_dim_of_a_mesh() -> None:
    meeting = Meeting(PAIRS, ((0, 2), (1, 3)), "sum", "same", "")
    found = compiled(meeting, 0, known=False)
    assert found.rewritten and what_became(meeting, found.at(64).gm) == "whole"
    outcomes = found.at(64).steps[0].graph.known.classes.values()
    (reason,) = [o.reason for o in outcomes if isinstance(o, Mixing) and "nobody says" in o.reason]
    assert reason.endswith("give `axes` dims of one DeviceMesh that has all groups")
    found = compiled(meeting, 0, known=False, verify="numeric")
    assert [p["failures"] for p in found.proofs if not p["holds"]] == [
        [f"it is not known which ranks run group {traced(meeting)[2]!r} with rank 0: use verify='static'"]
    ]


# ---- how ranks learn each other's groups ---------------------------------------------------------------------------


def learned(groups: dict[str, Lists], names: list[str], ranks: int, silent: tuple[int, ...] = ()) -> list[Any]:
    """What each rank knows of ``names``, the groups of a graph's collectives in their order."""
    rings = {r: LocalExchange.ring(len(r), 1.0) for lists in groups.values() for r in lists}

    def work(rank: int) -> Any:
        own = {name: next(r for r in groups[name] if rank in r) for name in names}
        if rank in silent:
            return None
        return _exchanged(rank, names, own, lambda axis: rings[axis.ranks][axis.rank])

    return none_failed(in_threads(work, ranks))


@pytest.mark.parametrize("other", [((0, 2), (1, 3)), ((0, 3), (1, 2)), FOUR])
def test_ranks_tell_each_other_all_that_a_mesh_needs(other: Lists) -> None:
    for names in (["tp", "other", "tp"], ["other", "tp"]):
        found = learned({"tp": PAIRS, "other": other}, names, 4)
        assert found == [{"tp": PAIRS, "other": other}] * 4


def test_three_dims_of_a_mesh_are_known_to_all() -> None:
    cube = {
        "tp": ((0, 1), (2, 3), (4, 5), (6, 7)),
        "cp": ((0, 2), (1, 3), (4, 6), (5, 7)),
        "dp": ((0, 4), (1, 5), (2, 6), (3, 7)),
    }
    for rank, found in enumerate(learned(cube, ["dp", "tp", "cp"], 8)):
        for axis in cube:
            ranks = next(r for r in cube[axis] if rank in r)
            known = Axis(axis, axis, 2, ranks.index(rank), ranks, groups=found)
            relations = GroupRelations(known)
            assert all(relations.why_rows_meet(other) == "" for other in cube if other != axis)
            assert all(relations.keeps_replication(other) for other in cube)


def test_ranks_that_do_not_answer_leave_their_groups_unknown() -> None:
    found = learned({"tp": PAIRS, "other": ((0, 2), (1, 3))}, ["other", "tp"], 4, silent=(2, 3))
    relations = GroupRelations(Axis("tp", "tp", 2, 0, (0, 1), groups=found[0]))
    assert found[0] == found[1] and relations.why_rows_meet("other").startswith("nobody says which rows rank 2")


def test_ranks_that_contradict_each_other_are_not_believed() -> None:
    """Two collectives over one group here, over two groups there."""
    there = ((0, 1), (1, 2))
    assert _joined("g", ["g", "g"], {0: ((0, 1), (0, 1)), 1: there}) == ()
    assert _joined("g", ["g", "h"], {0: ((0, 1), (0, 1)), 1: there}) == ((0, 1),)
