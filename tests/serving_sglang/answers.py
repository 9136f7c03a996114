"""The prompts of vLLM's tests as jobs of ``serve.py``, and what each of them gets from the transformers library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from expected import LENGTHS, NEW_TOKENS, STEPS, prompt
from ranks import Done

WHOLE = ("--disable-radix-cache",)
Arrival = tuple[list[int], int]  # a prompt and its step


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
