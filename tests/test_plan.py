"""Plans as data: JSON there and back, what differs, which interval holds, and what a bad file says."""

from __future__ import annotations

import json
import string
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcompile.errors import PlanError
from cpcompile.plan import FORMAT, AxisPlan, Interval, Plan

ALONE = Interval(0, 511, {}, {"wait": "reduce"}, "minimum cut", 3e-3, 3e-3, 3e-3, 1)
SHARDED = Interval(
    512,
    None,
    {"norm": "S", "mm": "P"},
    {"wait": "scatter", "norm": "gather"},
    "integer programme",
    1e-3,
    2e-3,
    9e-4,
    512,
)
AXIS = AxisPlan("tp", 4, "s27", "abc123", "sp", "ascend-a3", (ALONE, SHARDED))
PLAN = Plan((AXIS, AxisPlan("dp", 2, "4096", "abc123", "sp", "gloo", (), "no all-reduce on this axis")))

NAMES = st.text(string.ascii_lowercase + '_0123456789"\\\u00e9', min_size=1, max_size=8)
SECONDS = st.floats(0, 10, allow_nan=False)


@st.composite
def axis_plans(draw: st.DrawFn) -> AxisPlan:
    starts = [0, *sorted(draw(st.sets(st.integers(1, 10**6), max_size=3)))]
    ends = [*(s - 1 for s in starts[1:]), None]
    intervals = tuple(
        Interval(
            first,
            last,
            draw(st.dictionaries(NAMES, st.sampled_from("PS"), max_size=3)),
            draw(
                st.dictionaries(NAMES, st.sampled_from(["scatter", "gather", "scatter+gather", "reduce"]), max_size=3)
            ),
            draw(NAMES),
            draw(SECONDS),
            draw(SECONDS),
            draw(SECONDS),
            first,
        )
        for first, last in zip(starts, ends, strict=True)
    )
    return AxisPlan(*(draw(NAMES) if k != 1 else draw(st.integers(1, 64)) for k in range(6)), intervals, draw(NAMES))  # type: ignore[arg-type]


def message(error: pytest.ExceptionInfo[PlanError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# There and back


@settings(max_examples=40, deadline=None)
@given(st.lists(axis_plans(), max_size=3))
def test_json_round_trip(axes: list[AxisPlan]) -> None:
    plan = Plan(tuple(axes))
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()


def test_a_file_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    PLAN.save(path)
    assert Plan.load(path) == Plan.load(str(path)) == PLAN
    assert path.read_text(encoding="utf-8").endswith("}\n")


def test_equal_plans_have_equal_text() -> None:
    """What ranks compare: the order in which a mapping was filled does not show."""
    turned = replace(SHARDED, labels=dict(reversed(SHARDED.labels.items())))
    assert Plan((replace(AXIS, intervals=(ALONE, turned)),)).to_json() == Plan((AXIS,)).to_json()


# Bad files


def changed(key: str, old: object, new: object) -> str:
    """The plan with another value of ``key`` where it was ``old``."""
    text = PLAN.to_json().replace(f'"{key}": {json.dumps(old)}', f'"{key}": {json.dumps(new)}')
    assert text != PLAN.to_json()
    return text


def without(key: str) -> str:
    data = json.loads(PLAN.to_json())
    del data["axes"][0][key]
    return json.dumps(data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        "7",
        "[]",
        '"plan"',
        "{}",
        json.dumps({"format": FORMAT}),
        json.dumps({"format": FORMAT, "axes": 3}),
        json.dumps({"format": FORMAT, "axes": [3]}),
        json.dumps({"format": FORMAT, "axes": [{}]}),
        json.dumps({"format": FORMAT, "axes": [{"intervals": []}]}),
        json.dumps({"format": FORMAT, "axes": {"intervals": []}}),
        json.dumps({"format": FORMAT, "axes": [{"intervals": [{"first": 0}]}]}),
        PLAN.to_json()[:-20],
        PLAN.to_json().replace('"first"', '"second"'),
        without("intervals"),
        without("tokens"),
        changed("size", 4, "4"),
        changed("size", 4, True),
        changed("size", 4, 0),
        changed("axis", "tp", ["tp"]),
        changed("layout", "contiguous", "diagonal"),
        changed("norm", "S", "R"),
        changed("norm", "S", None),
        changed("wait", "scatter", "broadcast"),
        changed("wait", "scatter", ["scatter"]),
        changed("first", 512, 513),
        changed("first", 0, -1),
        changed("first", 0, 0.0),
        changed("last", 511, None),
        changed("last", 511, 10**30),
        changed("cost_s", 1e-3, float("nan")),
        changed("cost_s", 1e-3, float("inf")),
        changed("solver", "minimum cut", 3),
        changed("at", 512, "512"),
        PLAN.to_json().replace('"size": 4', '"size": 4, "size": 4'),
        "[" * 100_000,
        '{"format": 1, "axes": ' + "[" * 500 + "]" * 500 + "}",
        '{"format": 1, "axes": [' + "9" * 5000 + "]}",
    ],
)
def test_what_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert message(caught).startswith("not a plan: ") and "Plan.save" in message(caught)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert str(path) in message(caught)


@pytest.mark.parametrize("other", [0, FORMAT + 1, "1", None])
def test_another_format(other: object) -> None:
    text = json.dumps({**json.loads(PLAN.to_json()), "format": other})
    with pytest.raises(PlanError) as caught:
        Plan.from_json(text)
    assert message(caught) == f"the plan's format is not {FORMAT}: make it again with this version"


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.load(tmp_path / "none.json")
    assert message(caught) == f"cannot read the plan {tmp_path / 'none.json'}: No such file or directory"
    with pytest.raises(PlanError, match="Is a directory"):
        Plan.load(tmp_path)


# Intervals


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, ALONE), (1, ALONE), (511, ALONE), (512, SHARDED), (513, SHARDED), (10**9, SHARDED)]
)
def test_the_interval_that_holds(tokens: int, expected: Interval) -> None:
    assert AXIS.at(tokens) is expected
    assert ALONE.holds(tokens) != SHARDED.holds(tokens)


@settings(max_examples=40, deadline=None)
@given(axis_plans(), st.integers(0, 2 * 10**6))
def test_intervals_without_gaps_hold_every_count_once(axis: AxisPlan, tokens: int) -> None:
    assert [i for i in axis.intervals if i.holds(tokens)] == [axis.at(tokens)]


def test_no_interval() -> None:
    with pytest.raises(PlanError) as caught:
        replace(AXIS, intervals=(SHARDED,)).at(511)
    assert message(caught) == "the plan of axis 'tp' has no interval for 511 tokens: make a new plan"


@pytest.mark.parametrize(
    ("labels", "raises", "unchanged"),
    [
        ({}, {}, True),
        ({}, {"a": "reduce"}, True),
        ({"a": "S"}, {}, False),
        ({}, {"a": "scatter"}, False),
        ({}, {"a": "gather"}, False),
        ({}, {"a": "reduce", "b": "scatter+gather"}, False),
    ],
)
def test_unchanged(labels: dict[str, str], raises: dict[str, str], unchanged: bool) -> None:
    assert replace(ALONE, labels=labels, raises=raises).unchanged is unchanged


# Differences


def test_no_difference() -> None:
    assert PLAN.diff(Plan.from_json(PLAN.to_json())) == []


def test_costs_are_no_difference() -> None:
    """Two plans that place everything alike are alike, whatever they say it costs."""
    assert Plan((AXIS,)).diff(Plan((replace(AXIS, intervals=(ALONE, replace(SHARDED, cost_s=1.0))),))) == []


def test_an_axis_of_one_plan_only() -> None:
    assert PLAN.diff(Plan((AXIS,))) == ["axis dp: only in the first plan"]
    assert Plan((AXIS,)).diff(PLAN) == ["axis dp: only in the second plan"]


@pytest.mark.parametrize(
    "change",
    [
        {"size": 8},
        {"tokens": "s5"},
        {"refused": "no token dim"},
        {"graph": "def"},
        {"strategy": "cp"},
        {"profile": "gloo"},
    ],
)
def test_other_circumstances(change: dict[str, object]) -> None:
    ((key, new),) = change.items()
    other = Plan((replace(AXIS, **change),))  # type: ignore[arg-type]
    assert Plan((AXIS,)).diff(other) == [f"axis tp: {key}: {getattr(AXIS, key)} -> {new}"]


def test_other_intervals() -> None:
    other = Plan((replace(AXIS, intervals=(replace(ALONE, last=None),)),))
    assert Plan((AXIS,)).diff(other) == ["axis tp: intervals: [(0, 511), (512, None)] -> [(0, None)]"]


def test_other_placements_and_collectives() -> None:
    moved = replace(SHARDED, labels={"mm": "S", "add": "S"}, raises={"wait": "scatter+gather", "add": "gather"})
    other = Plan((replace(AXIS, intervals=(ALONE, moved)),))
    assert Plan((AXIS,)).diff(other) == [
        "axis tp: T in [512, None]: add: R -> S",
        "axis tp: T in [512, None]: mm: P -> S",
        "axis tp: T in [512, None]: norm: S -> R",
        "axis tp: T in [512, None]: collectives of add: none -> gather",
        "axis tp: T in [512, None]: collectives of norm: gather -> none",
        "axis tp: T in [512, None]: collectives of wait: scatter -> scatter+gather",
    ]
