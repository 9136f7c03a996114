import pytest
import torch.distributed as dist

from cpcompile.errors import OptionError, RequirementError, TraceError
from cpcompile.explanation import Explanation, explain
from cpcompile.model_spec import fake_mesh
from cpcompile.plan import Plan
from tests.toy_models import Branching, Toy, ids, no_mesh, toy

TOKENS = 65536


@pytest.fixture(scope="module")
def mesh():
    with fake_mesh({"tp": 4}, 0) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def explanation(mesh) -> Explanation:
    model, args = toy(mesh)
    return explain(model, *args, tokens=TOKENS, axes={"tp": mesh["tp"]}, profile="ascend-a3")


def test_the_report_is_stated_for_the_tokens(explanation):
    data = explanation.to_dict()
    assert data["tokens"] == explanation.report.tokens == TOKENS
    rows = [c for c in data["collectives"] if c["kind"] == "all_reduce"]
    assert [(c["module"], c["decision"]) for c in rows] == [("layers.0", "scatter"), ("layers.1", "scatter")]
    assert rows[0]["elements_before"] == 2 * 3 * TOKENS * 64 // 4


def test_the_plan_can_be_saved(explanation, tmp_path):
    explanation.plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == explanation.plan
    assert [a.axis for a in explanation.plan.axes] == ["tp"]


def test_intervals_cover_every_token_count(explanation):
    intervals = explanation.to_dict()["intervals"]
    assert len(intervals) > 1
    assert intervals[0]["first"] == 0 and intervals[-1]["last"] is None
    assert intervals[0]["counts"] == {"keep": 2}
    assert intervals[-1]["counts"]["scatter"] == 2
    assert all(i["bound_s"] <= i["cost_s"] <= i["unchanged_s"] for i in intervals)
    assert explanation.to_dict()["capture"]["dynamo_s"] > 0


def test_as_text(explanation):
    text = str(explanation)
    assert "\x1b" not in text
    for part in ("layers.0", "reduce_scatter", f"Collectives at T = {TOKENS}", "Intervals of T", "graphs proven"):
        assert part in text


def test_text_of_a_model_is_not_markup(explanation):
    import dataclasses

    row = dataclasses.replace(explanation.report.collectives[0], module="[bold]experts[0]")
    explanation.report.collectives.append(row)
    try:
        assert "[bold]experts[0]" in str(explanation)
    finally:
        explanation.report.collectives.pop()


def test_kwargs_are_given_to_the_model(mesh):
    found = explain(Toy(mesh["tp"], layers=1), ids(), kwargs={"scale": 3.0}, tokens=1, strategy="off")
    assert [c.decision for c in found.report.collectives] == ["keep"]
    assert found.to_dict()["intervals"] == []
    assert "is left alone: strategy='off'" in str(found)


def test_axes_are_found_in_the_graph_when_none_are_given(mesh):
    found = explain(Toy(mesh["tp"], layers=1), ids(), tokens=TOKENS, profile="ascend-a3")
    assert [a["size"] for a in found.report.axes] == [4]
    assert "scatter" in {c.decision for c in found.report.collectives}


def test_errors_come_through(mesh):
    with pytest.raises(OptionError, match="did you mean 'strategy'"):
        explain(Toy(mesh["tp"], layers=1), ids(), strateg="tp")
    with pytest.raises(TraceError, match="the model cannot be traced"):
        explain(Branching(), ids())
    with pytest.raises(RequirementError, match="require='nothing'"):
        explain(Toy(mesh["tp"], layers=1), ids(), require="nothing")


def test_a_model_without_process_group_has_nothing_to_explain():
    group = dist.is_initialized()
    model, args = no_mesh()
    found = explain(model, *args)
    assert found.report.collectives == [] and dist.is_initialized() == group
    assert "Volume: each rank sends 0 elements before, 0 after at T = 16384" in str(found)
