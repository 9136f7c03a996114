"""Prompts and when they arrive, jobs of ``serve.py`` that answer them, and whether two answers are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from model_folder import VOCAB
from ranks import Done

LENGTHS, NEW_TOKENS, TOLERANCE = (6, 10, 18, 31, 65), 16, 1e-4
# Two prompts arrive together, the others while these decode.
STEPS = (0, 0, 3, 5, 9)
WHOLE = ("--disable-radix-cache",)
Arrival = tuple[list[int], int]  # a prompt and its step


def prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()  # type: ignore[no-any-return]


def arrivals() -> list[Arrival]:
    return [(prompt(length), step) for length, step in zip(LENGTHS, STEPS, strict=True)]


def job(folder: Path, arrivals: list[Arrival], options: Any = None, **more: Any) -> dict[str, Any]:
    """A job of ``serve.py``: without cuts and without the radix cache, unless ``more`` says otherwise."""
    flags = {"--model-path": str(folder)}
    if options is not None:
        flags["--json-model-override-args"] = json.dumps({"cpcompile": options})
    return {"flags": flags, "switches": WHOLE, "arrivals": arrivals, "new_tokens": NEW_TOKENS, **more}


def checked(done: Done) -> Done:
    assert not any(done.codes), "\n".join(log[-4000:] for log in done.logs)
    return done


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [a["tokens"] for a in found] == [a["tokens"] for a in expected]
    assert all(len(a["tokens"]) == NEW_TOKENS for a in found)
    for mine, theirs in zip(found, expected, strict=True):
        assert (torch.tensor(mine["logprobs"]) - torch.tensor(theirs["logprobs"])).abs().max() <= TOLERANCE


@torch.no_grad()
def transformers_says(folder: Path, arrivals: list[Arrival], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Greedy tokens after each prompt and each beginning of its answer that was found: the answer's, if it is right."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for (ids, _), answer in zip(arrivals, found, strict=True):
        read = torch.tensor([ids + answer["tokens"][:-1]])
        scores = model(input_ids=read, use_cache=False).logits[0, len(ids) - 1 :].log_softmax(-1)
        answers.append({"tokens": scores.argmax(-1).tolist(), "logprobs": scores.max(-1).values.tolist()})
    return answers
