"""The tests' prompts, when they arrive, and what each of them gets from the transformers library."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from model_folder import VOCAB
from processes import Done

LENGTHS, NEW_TOKENS, TOLERANCE = (6, 10, 18, 31, 65), 16, 1e-4
# Two prompts arrive together, the others while these decode: steps of prefill alone, of both, and of decode alone.
STEPS = (0, 0, 3, 5, 9)


def prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()


ARRIVALS = [(prompt(length), step) for length, step in zip(LENGTHS, STEPS, strict=True)]
# While all of these decode: the longest again, one that starts as it does, and one that does not fit into a step.
LONG, BRANCH = 100, prompt(65)[:40] + prompt(30)
ARRIVALS += [(prompt(65), 11), (BRANCH, 11), (prompt(LONG), 11)]

# A short and a long prompt, the second while the first decodes; and, when nobody decodes, both again in one step.
# So long that it pays to shard the norms alone, which is all that there is in models whose attention is not MLA.
TWICE = [(prompt(6), 0), (prompt(480), 3), (prompt(6), 24), (prompt(480), 24)]


def chosen(kinds: Iterable[str], core: str) -> tuple[str, ...]:
    """Models to run: ``core``, or what ``CPCOMPILE_MODELS`` says, of which "all" are ``kinds``."""
    named = os.environ.get("CPCOMPILE_MODELS", core)
    return tuple(kinds) if named == "all" else tuple(named.split(","))


def job(engines: dict[str, Any]) -> dict[str, Any]:
    return {"engines": engines, "arrivals": ARRIVALS, "new_tokens": NEW_TOKENS, "plain_router": True}


def tokens_of(steps: list[dict[str, tuple[int, int]]]) -> set[int]:
    """Tokens of each step."""
    return {sum(count for _, count in step.values()) for step in steps}


def rewritten(log: str, rank: int) -> list[tuple[int, ...]]:
    """What a rank of two logged of each interval of token counts: the least, all-reduces rewritten, all of them."""
    line = rf"cpcompile: T (?:in \[|>= )(\d+).*, rank {rank} of 2 of axis tp: (\d+) of (\d+) all-reduces rewritten"
    return [tuple(map(int, found)) for found in re.findall(line, log)]


def by_graph(log: str, rank: int) -> list[list[tuple[int, ...]]]:
    """``rewritten``, a list for each graph: the intervals of a graph begin with that of no tokens."""
    graphs: list[list[tuple[int, ...]]] = []
    for interval in rewritten(log, rank):
        if interval[0] == 0:
            graphs.append([])
        graphs[-1].append(interval)
    return graphs


def checked(done: Done) -> Done:
    assert done.code == 0, done.log[-4000:]
    return done


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [a["tokens"] for a in found] == [a["tokens"] for a in expected]
    assert all(len(a["tokens"]) == NEW_TOKENS for a in found)
    for mine, theirs in zip(found, expected, strict=True):
        difference = torch.tensor(mine["logprobs"]) - torch.tensor(theirs["logprobs"])
        assert difference.abs().max() <= TOLERANCE


@torch.no_grad()
def transformers_says(folder: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Greedy tokens of each prompt, the whole sequence read again for each of them."""
    model = _load(folder)
    answers = []
    for ids in prompts:
        tokens: list[int] = []
        chosen: list[float] = []
        for _ in range(new_tokens):
            scores = model(input_ids=torch.tensor([[*ids, *tokens]]), use_cache=False).logits[0, -1].log_softmax(-1)
            tokens.append(int(scores.argmax()))
            chosen.append(float(scores.max()))
        answers.append({"tokens": tokens, "logprobs": chosen})
    return answers


@torch.no_grad()
def right(folder: Path, prompts: Sequence[Sequence[int]], found: list[dict[str, Any]]) -> None:
    """Check that transformers goes on with each answer's next token, behind the prompt and all that comes before it."""
    model = _load(folder)
    expected = []
    for ids, answer in zip(prompts, found, strict=True):
        read = torch.tensor([[*ids, *answer["tokens"][:-1]]])
        scores = model(input_ids=read, use_cache=False).logits[0, len(ids) - 1 :].log_softmax(-1)
        expected.append({"tokens": scores.argmax(-1).tolist(), "logprobs": scores.max(-1).values.tolist()})
    same(found, expected)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
