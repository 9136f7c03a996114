"""Real SGLang on two gloo ranks with this backend and no option says what it says uncompiled, and transformers."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import pytest
from answers import arrivals, checked, job
from expected import LENGTHS, by_graph, prompt, right, same
from model_folder import ALL_REDUCES, make_folder
from ranks import Done, run

from cpcompile.plan import AxisPlan, Plan
from cpcompile.report import REWRITTEN

# When nobody decodes, prompts that begin as the last one did and go on for 8 and 7 tokens.
SHARED, OWN, LATER = 57, (8, 7), (60, 80)
CHUNK = 33  # tokens of a step, those that are decoded too: prompts of 31 and 65 do not fit
IN_CHUNKS = ("--enable-mixed-chunk",)  # and with the radix cache
PLAIN = {"TORCH_COMPILE_DISABLE": "1"}  # SGLang compiles its router with inductor, which takes half a minute


ARRIVALS = arrivals() + [
    (prompt(LENGTHS[-1])[:SHARED] + prompt(own), step) for own, step in zip(OWN, LATER, strict=True)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), "v3", hidden_size=1024)


@pytest.fixture(scope="module")
def two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    work = tmp_path_factory.mktemp("two")
    options = {"dump_dir": str(work / "dump")}
    given = job(folder, ARRIVALS, options, switches=IN_CHUNKS, compare=True, mix=True, die=True)
    given["flags"]["--chunked-prefill-size"] = str(CHUNK)
    done = run(work, given, 2)
    assert len(done.told) == 2, "\n".join(log[-4000:] for log in done.logs)
    return done, work / "dump"


def test_tokens_are_those_of_transformers(folder: Path, two_ranks: tuple[Done, Path]) -> None:
    first, second = (rank["answers"] for rank in two_ranks[0].told)
    right(folder, [ids for ids, _ in ARRIVALS], first)
    same(second, first)


@pytest.mark.parametrize("rank", [0, 1])
def test_hidden_states_are_those_uncompiled(rank: int, two_ranks: tuple[Done, Path]) -> None:
    steps = two_ranks[0].told[rank]["steps"]
    assert {1, 7, 8, CHUNK} <= {tokens for tokens, _ in steps}
    assert max(error for _, error in steps) <= 2e-5


def test_prompts_are_cut_and_mixed_and_a_prefix_is_cached(two_ranks: tuple[Done, Path]) -> None:
    for rank in two_ranks[0].told:
        assert rank["modes"] == ["DECODE", "EXTEND", "MIXED"]
        assert max(tokens for tokens, _ in rank["steps"]) == CHUNK < max(LENGTHS)
        for name in ("answers", "mixed"):
            assert [answer["cached"] for answer in rank[name]] == [0] * len(LENGTHS) + [SHARED] * len(OWN)
        assert [answer["tokens"] for answer in rank["mixed"]] == [answer["tokens"] for answer in rank["answers"]]


@pytest.fixture(scope="module")
def two_plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return checked(run(tmp_path_factory.mktemp("plain"), job(folder, ARRIVALS, drop=True), 2, **PLAIN))


def test_tokens_are_those_of_two_ranks_uncompiled(two_plain: Done, two_ranks: tuple[Done, Path]) -> None:
    for ours, plain in zip(two_ranks[0].logs, two_plain.logs, strict=True):
        assert "cpcompile:" in ours and "cpcompile:" not in plain
    for rank in two_ranks[0].told:
        same(rank["answers"], two_plain.told[0]["answers"])


def test_without_all_reduces_the_tokens_are_others(two_plain: Done) -> None:
    expected, found = (
        [token for answer in two_plain.told[0][name] for token in answer["tokens"]] for name in ("answers", "dropped")
    )
    assert sum(a == b for a, b in zip(found, expected, strict=True)) < len(expected) // 4


@pytest.mark.parametrize("rank", [0, 1])
def test_every_all_reduce_of_large_steps_is_rewritten(rank: int, two_ranks: tuple[Done, Path]) -> None:
    """And none of small ones: without any option the tokens come of both graphs."""
    done, dump = two_ranks
    told = [json.loads(path.read_text()) for path in sorted((dump / f"rank_{rank}").glob("graph_*/report.json"))]
    # Some hundred steps: prefill of several requests and of one, decode; prefill and decode of one token.
    first, second, *single = by_graph(done.logs[rank], rank)
    assert first == second and single == [[(0, 0, ALL_REDUCES)]] * 2
    small, some, _ = first  # the third, where all are rewritten, pays in larger steps than these only
    assert [counts for _, *counts in first] == [[n, ALL_REDUCES] for n in (0, ALL_REDUCES - 1, ALL_REDUCES)]
    assert small[0] == 0 and 1 < some[0] <= CHUNK
    for report in (each[str(some[0])] for each in told[:2]):
        assert report["verify"]["holds"] and report["verify"]["proofs"]
        rows = [c["decision"] for c in report["collectives"] if c["kind"] == "all_reduce"]
        assert len(rows) == ALL_REDUCES and sum(row in REWRITTEN for row in rows) == ALL_REDUCES - 1


def test_a_killed_rank_ends_the_other_with_an_error(two_ranks: tuple[Done, Path]) -> None:
    done, _ = two_ranks
    assert done.codes == [1, -signal.SIGKILL]
    assert re.search(r"RuntimeError: .*gloo.*(closed|reset) by peer", done.logs[0][-4000:])


def test_a_plan_of_another_model_is_one_line_of_each_rank_in_the_first_step(folder: Path, tmp_path: Path) -> None:
    """In a server that is SGLang's warm-up request."""
    Plan((AxisPlan("tp", 2, "s0", "another", "tp", "gloo", ()),)).save(tmp_path / "plan.json")
    done = run(tmp_path, job(folder, ARRIVALS[:1], {"plan": str(tmp_path / "plan.json")}), 2)
    assert done.codes == [1, 1] and not done.told
    for log in done.logs:
        (said,) = re.findall(r"^.*PlanError: .*$", log, re.MULTILINE)
        assert re.search(r"the plan is of another graph \(another, this one is \w+\): make a new plan$", said)


def test_nothing_is_said_to_be_wrong(two_ranks: tuple[Done, Path]) -> None:
    for log in two_ranks[0].logs:
        assert "runs as it came" not in log and "left alone" not in log and "NEVER called" not in log
