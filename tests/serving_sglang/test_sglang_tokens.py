"""Real SGLang on two gloo ranks with this backend says what one rank, two uncompiled ranks and transformers say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folder import LAYERS, VOCAB, make_folder
from ranks import Done, run

LENGTHS, NEW_TOKENS, TOLERANCE = (6, 10, 18, 31, 65), 16, 1e-4
# Two prompts arrive together, the others while these decode.
STEPS = (0, 0, 3, 5, 9)
ALL = 1 + 2 * LAYERS
PLAIN = {"TORCH_COMPILE_DISABLE": "1"}  # SGLang compiles its router with inductor, which takes half a minute


def prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()  # type: ignore[no-any-return]


ARRIVALS = [(prompt(length), step) for length, step in zip(LENGTHS, STEPS, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), "v3")


def job(folder: Path, options: Any = None, **more: Any) -> dict[str, Any]:
    flags = {"--model-path": str(folder)}
    if options is not None:
        flags["--json-model-override-args"] = json.dumps({"cpcompile": options})
    return {"flags": flags, "arrivals": ARRIVALS, "new_tokens": NEW_TOKENS, **more}


def checked(done: Done) -> Done:
    assert not any(done.codes), "\n".join(log[-4000:] for log in done.logs)
    return done


@pytest.fixture(scope="module")
def two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    work = tmp_path_factory.mktemp("two")
    options = {"strategy": "tp", "dump_dir": str(work / "dump")}
    return checked(run(work, job(folder, options), 2)), work / "dump"


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [a["tokens"] for a in found] == [a["tokens"] for a in expected]
    assert all(len(a["tokens"]) == NEW_TOKENS for a in found)
    for mine, theirs in zip(found, expected, strict=True):
        assert (torch.tensor(mine["logprobs"]) - torch.tensor(theirs["logprobs"])).abs().max() <= TOLERANCE


@torch.no_grad()
def transformers_says(folder: Path) -> list[dict[str, Any]]:
    """Greedy tokens of each prompt, the whole sequence read again for each of them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for ids, _ in ARRIVALS:
        tokens: list[int] = []
        chosen: list[float] = []
        for _ in range(NEW_TOKENS):
            scores = model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
            tokens.append(int(scores.argmax()))
            chosen.append(float(scores.max()))
        answers.append({"tokens": tokens, "logprobs": chosen})
    return answers


def test_tokens_are_those_of_transformers(folder: Path, two_ranks: tuple[Done, Path]) -> None:
    expected = transformers_says(folder)
    for rank in two_ranks[0].told:
        same(rank["answers"], expected)


def test_tokens_are_those_of_one_rank_uncompiled(folder: Path, two_ranks: tuple[Done, Path], tmp_path: Path) -> None:
    plain = checked(run(tmp_path, job(folder), 1, **PLAIN))
    for rank in two_ranks[0].told:
        same(rank["answers"], plain.told[0]["answers"])


@pytest.fixture(scope="module")
def two_plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return checked(run(tmp_path_factory.mktemp("plain"), job(folder, drop=True), 2, **PLAIN))


def test_tokens_are_those_of_two_ranks_uncompiled(two_plain: Done, two_ranks: tuple[Done, Path]) -> None:
    assert not [log for log in two_plain.logs if "cpcompile:" in log]
    for rank in two_ranks[0].told:
        same(rank["answers"], two_plain.told[0]["answers"])


def test_without_all_reduces_the_tokens_are_others(two_plain: Done) -> None:
    expected, found = (
        [token for answer in two_plain.told[0][name] for token in answer["tokens"]] for name in ("answers", "dropped")
    )
    assert sum(a == b for a, b in zip(found, expected, strict=True)) < len(expected) // 4


@pytest.mark.parametrize("rank", [0, 1])
def test_every_all_reduce_is_rewritten_but_where_there_is_one_token(rank: int, two_ranks: tuple[Done, Path]) -> None:
    done, dump = two_ranks
    told = [
        next(iter(json.loads(path.read_text()).values()))
        for path in sorted((dump / f"rank_{rank}").glob("graph_*/report.json"))
    ]
    lines = re.findall(r"(\d+) of (\d+) all-reduces rewritten", done.logs[rank])
    # Some thirty steps of 1 to 75 tokens: prefill of several requests and of one, decode, decode of one.
    assert lines == [(str(ALL), str(ALL))] * 3 + [("0", str(ALL))]
    for report in told[:3]:
        assert report["verify"]["holds"] and report["verify"]["proofs"]
        assert sum(c["decision"] == "scatter" for c in report["collectives"]) == ALL


def test_nothing_is_said_to_be_wrong(two_ranks: tuple[Done, Path]) -> None:
    for log in two_ranks[0].logs:
        assert "runs as it came" not in log and "left alone" not in log and "NEVER called" not in log
