"""Other models in real SGLang on two gloo ranks with no option: one in every run, all by ``make matrix-sglang``."""

from __future__ import annotations

from pathlib import Path

import pytest
from answers import checked, job
from expected import TWICE, by_graph, chosen, right, same
from model_folder import ALL_REDUCES, KINDS, LONGEST, make_folder
from ranks import run

PROMPT = max(len(ids) for ids, _ in TWICE)
#: All-reduces that stay in large steps: V3.2's first one, as the first indexer takes the hidden state whole.
KEPT = {"v32": 1}


@pytest.mark.parametrize("kind", chosen(KINDS, "glm4_moe"))
def test_tokens_are_those_uncompiled_and_large_steps_are_rewritten(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", kind, hidden_size=1024)
    given = job(folder, TWICE, {}, plain=True)
    given["flags"]["--context-length"] = str(LONGEST)
    done = checked(run(tmp_path, given, 2))
    if kind != "kimi_k2":  # which transformers does not know
        right(folder, [ids for ids, _ in TWICE], done.told[0]["answers"])
    for rank, (told, log) in enumerate(zip(done.told, done.logs, strict=True)):
        same(told["answers"], told["plain"])
        same(told["answers"], done.told[0]["answers"])
        tokens = [answer["tokens"] for answer in told["answers"]]
        assert tokens[:2] == tokens[2:]
        compiled, after = told["runs"]
        assert 0 < compiled == after
        graphs = by_graph(log, rank)  # a step of one token has one with a single interval
        assert all(intervals[0] == (0, 0, ALL_REDUCES) for intervals in graphs)
        large = [intervals[-1] for intervals in graphs if len(intervals) > 1]
        counts = [ALL_REDUCES - KEPT.get(kind, 0), ALL_REDUCES]
        assert large and all(first <= PROMPT and found == counts for first, *found in large), graphs
        assert "runs as it came" not in log and "left alone" not in log and "NEVER called" not in log
