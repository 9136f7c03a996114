"""The prompts of vLLM's tests as jobs of ``serve.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
