"""Mistakes of a user against a real graph: one line that says what to do, and a graph in which nothing was rewritten.

Files that cannot be read are in ``test_plan``, ``test_trace_file`` and ``test_cli``, groups in ``test_axes``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx as fx
from placed import Layer
from simulate import fake_rank
from torch.distributed.device_mesh import DeviceMesh

from cpcompile.capture import Trace, capture
from cpcompile.errors import AxisError, CpcompileError, OptionError, PlanError, RequirementError, TraceError
from cpcompile.exchange import OfflineExchange
from cpcompile.options import Options
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.pipeline import compile_graph, copy_graph
from cpcompile.plan import Interval, Plan
from cpcompile.trace_file import load_trace

REPLICATED = ("table", "weight")


@dataclass
class Here:
    """The layer on rank 1 of 4, its graph canonical, so that compiling it changes no text unless it is rewritten."""

    mesh: DeviceMesh
    trace: Trace

    def compile(self, **options: Any) -> Any:
        gm = fx.GraphModule(self.trace.gm, copy_graph(self.trace.gm.graph))
        before = text(gm)
        try:
            return compile_graph(
                gm,
                self.trace.inputs,
                Options.parse({"strategy": "tp", "profile": "ascend-a3", "replicated": REPLICATED, **options}),
                lambda axis: OfflineExchange(axis.size, axis.rank),
            )
        finally:
            assert text(gm) == before, "half-rewritten"

    def refuses(self, kind: type[CpcompileError], **options: Any) -> str:
        with pytest.raises(kind) as caught:
            self.compile(**options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def plan(self, change: Callable[[Interval], Interval] = lambda i: i, **changes: Any) -> Plan:
        """This graph's own plan, with the one interval or fields of the axis changed."""
        (axis,) = self.compile().plan.axes
        return Plan((replace(axis, intervals=tuple(map(change, axis.intervals)), **changes),))


def text(gm: fx.GraphModule) -> str:
    return gm.print_readable(print_output=False)


@pytest.fixture(scope="module")
def here() -> Iterator[Here]:
    with fake_rank(1, 4) as mesh:
        trace = capture(Layer(mesh, 1, 4), torch.zeros(12, dtype=torch.int64))
        Canonicalise()(trace.gm)
        yield Here(mesh, trace)


def test_the_graph_can_be_rewritten(here: Here) -> None:
    """What is refused below is refused for its mistake alone, and this graph's own plan is taken."""
    made = here.compile()
    assert made.rewritten and "reduce_scatter" in text(made.variants[0].gm)
    assert here.compile(plan=here.plan()).plan == made.plan


# ---- groups --------------------------------------------------------------------------------------------------------


def test_a_group_of_another_size_than_the_mesh(here: Here) -> None:
    """A group of two of the four ranks that the model was sharded over."""
    found = here.refuses(AxisError, axes={"tp": dist.new_group([0, 1])})
    assert found.startswith("axis 'tp' has ranks [0, 1], and no all-reduce of the graph runs over them")
    assert found.endswith("give the group that the model was sharded over")
    assert here.mesh.get_group().group_name in found


def test_one_wrong_group_beside_the_right_one(here: Here) -> None:
    found = here.compile(axes={"tp": here.mesh, "ep": dist.new_group([0, 1])})
    assert found.rewritten and found.refused.keys() == {"ep"}
    assert found.refused["ep"].startswith("axis 'tp' is reduced over more often and placed, and this one ")


def test_a_group_that_this_rank_is_not_in(here: Here) -> None:
    remedy = "give the group that this rank is in"
    assert here.refuses(AxisError, axes={"tp": dist.new_group([2, 3])}).endswith(remedy)
    assert here.refuses(AxisError, axes={"tp": DeviceMesh("cpu", [2, 3])}).endswith(remedy)


def test_a_group_that_does_not_exist(here: Here) -> None:
    assert here.refuses(AxisError, axes={"tp": "nope"}).endswith("give the ProcessGroup itself")


# ---- plans ---------------------------------------------------------------------------------------------------------


def test_a_plan_of_another_graph(here: Here) -> None:
    found = here.refuses(PlanError, plan=here.plan(graph="0123abcd"))
    own = here.plan().axes[0].graph
    assert found == f"the plan is of another graph (0123abcd, this one is {own}): make a new plan"


def test_a_plan_really_made_for_another_graph(here: Here) -> None:
    class Two(Layer):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) * 2

    trace = capture(Two(here.mesh, 1, 4), torch.zeros(12, dtype=torch.int64))
    Canonicalise()(trace.gm)
    assert "of another graph" in Here(here.mesh, trace).refuses(PlanError, plan=here.plan())


def test_a_plan_for_another_number_of_ranks(here: Here) -> None:
    found = here.refuses(PlanError, plan=here.plan(size=8))
    assert found.startswith("the plan is for 8 ranks and axis ") and found.endswith(" has 4: make a new plan")


def test_a_plan_of_another_axis(here: Here) -> None:
    found = here.refuses(PlanError, plan=here.plan(axis="ep"))
    assert found.startswith("the plan has no axis ") and found.endswith("(it has ['ep']): make a new plan")
    assert "the plan has no axis" in here.refuses(PlanError, plan=Plan())


@pytest.mark.parametrize(
    "change",
    [
        lambda i: replace(i, labels={**i.labels, "nope": "S"}),
        lambda i: replace(i, labels={**i.labels, "rsqrt": "P"}),
        lambda i: replace(i, labels={**i.labels, "rsqrt": "Q"}),
        lambda i: replace(i, raises={**i.raises, "nope": "gather"}),
    ],
    ids=["no such node", "no partial sum", "no such placement", "no such value"],
)
def test_a_plan_that_was_edited(here: Here, change: Callable[[Interval], Interval]) -> None:
    found = here.refuses(PlanError, plan=here.plan(change))
    assert found.startswith("the plan ") and found.endswith(": make a new plan")


def test_an_edited_plan_of_which_a_collective_is_missing(here: Here) -> None:
    """The graph runs as it came on every rank; with ``require`` it is an error."""

    def without_gather(interval: Interval) -> Interval:
        return replace(interval, raises={n: r for n, r in interval.raises.items() if r != "gather"})

    plan = here.plan(without_gather)
    made = here.compile(plan=plan)
    assert not made.rewritten and all(made.refused.values()) and len(made.refused) == 1
    assert text(made.variants[0].gm).partition("\n")[2] == text(here.trace.gm).partition("\n")[2]
    assert here.refuses(RequirementError, plan=plan, require=["*"]).startswith("not rewritten: ")


def test_a_plan_file_with_a_missing_key(here: Here, tmp_path: Path) -> None:
    data = json.loads(here.plan().to_json())
    del data["axes"][0]["intervals"][0]["labels"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    found = here.refuses(PlanError, plan=tmp_path / "plan.json")
    assert "labels" in found and found.endswith("save one with Plan.save")


# ---- options and requirements --------------------------------------------------------------------------------------


def test_a_requirement_that_nothing_meets(here: Here) -> None:
    found = here.refuses(RequirementError, require=["*o_porj"])
    assert found.startswith("require='*o_porj': nothing of that name was rewritten; `cpcompile explain`")


def test_a_profile_that_does_not_exist(here: Here) -> None:
    assert "did you mean 'ascend-a3'?" in here.refuses(OptionError, profile="ascend-a33")


def test_a_directory_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TraceError) as caught:
        load_trace(tmp_path)
    assert str(caught.value) == f"cannot read the trace {tmp_path}: Is a directory"
