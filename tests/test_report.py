"""The report as data: totals, and which patterns of ``require`` are met."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cpcompile.report import REWRITTEN, Collective, PassRun, Report

ROW = Collective(
    "wait_tensor",
    "all_reduce",
    "tp",
    "layers.0.mlp.down_proj",
    "scatter",
    "reduce_scatter",
    12,
    6,
    "12*T",
    "6*T",
    "why",
)
GATHER = replace(ROW, name="mul", kind="all_gather", module="", decision="gather", elements_before=0, elements_after=5)


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("wait_tensor", True),
        ("layers.0.mlp.down_proj", True),
        ("*down_proj", True),
        ("layers.?.mlp.*", True),
        ("down_proj", False),
        ("*DOWN_PROJ", False),
        ("", False),
    ],
)
def test_a_pattern_is_of_the_whole_name_or_the_whole_module(pattern: str, matches: bool) -> None:
    assert ROW.matches(pattern) == matches


@pytest.mark.parametrize("decision", ["scatter", "merge", "sink", "keep"])
def test_only_a_rewritten_all_reduce_meets_a_requirement(decision: str) -> None:
    report = Report(8, collectives=[replace(ROW, decision=decision)])
    assert report.missing(["*down_proj"]) == ([] if decision in REWRITTEN else ["*down_proj"])
    assert (decision in REWRITTEN) == (decision != "keep")


def test_a_gather_meets_a_requirement_where_nothing_is_reduced() -> None:
    """Context parallelism adds gathers to modules that had no collective; elsewhere the all-reduce is what counts."""
    assert Report(8, collectives=[GATHER]).missing(["mul", "*down_proj"]) == ["*down_proj"]
    kept = replace(ROW, decision="keep")
    beside = replace(GATHER, module=ROW.module)
    assert Report(8, collectives=[kept, beside]).missing(["*down_proj"]) == ["*down_proj"]


@pytest.mark.parametrize(("decision", "met"), [("shard", True), ("keep", False)])
def test_an_indexer_meets_a_requirement_where_it_is_sharded_and_nothing_is_reduced(decision: str, met: bool) -> None:
    indexer = replace(GATHER, name="indexer", kind="indexer", module="attn.indexer", decision=decision)
    keys = replace(GATHER, module="attn.indexer")
    projection = replace(ROW, module="attn.o_proj")
    for rows in ([indexer], [indexer, keys]):
        assert Report(8, collectives=rows).missing(["*indexer"]) == ([] if met else ["*indexer"])
    # An all-reduce of the same pattern decides alone, as it did without the row.
    assert Report(8, collectives=[indexer, projection]).missing(["attn.*"]) == []
    kept = replace(projection, decision="keep")
    assert Report(8, collectives=[indexer, kept]).missing(["attn.*"]) == ["attn.*"]


def test_every_pattern_that_nothing_meets_is_missing() -> None:
    assert Report(8, collectives=[ROW, GATHER]).missing(["*nope", "*down_proj", "mul"]) == ["*nope"]
    assert Report(8).missing([]) == []


def test_totals_and_plain_data() -> None:
    run = PassRun("place", 0.5, 2, (("add", "why not"),))
    data = Report(8, 20, 30, [ROW, GATHER], passes=[run]).to_dict()
    assert data["volume"] == {"before": 12, "after": 11}
    assert data["graph"] == {"nodes_before": 20, "nodes_after": 30}
    assert json.loads(json.dumps(data))["passes"] == [
        {"name": "place", "seconds": 0.5, "rewrites": 2, "refusals": [["add", "why not"]]}
    ]
    assert data["collectives"][0]["reason"] == "why"
