"""A rank that dies in the middle of a request takes the other with it, with an error and without a hang."""

from __future__ import annotations

import re
from pathlib import Path

from model_folder import make_folder
from processes import COMPILED, start_ranks

AFTER_S = 60.0  # gloo tells a closed connection at once; the rest is Python's way out of vLLM


def test_the_other_rank_ends_with_an_error(tmp_path: Path) -> None:
    engine = {
        "model": str(make_folder(tmp_path / "model", "v3")),
        "tensor_parallel_size": 2,
        "compilation_config": COMPILED,
        "additional_config": {"cpcompile": {"strategy": "tp"}},
    }
    job = {"engines": {"v3": engine}, "arrivals": [([5, 6, 7], 0)], "new_tokens": 64, "die_at": 5}
    with start_ranks(tmp_path, job) as processes:
        assert processes[1].wait(600) == -9, tail(tmp_path / "log.1")
        code = processes[0].wait(AFTER_S)
    said = tail(tmp_path / "log.0")
    assert code == 1, said
    assert re.search(r"RuntimeError: .*gloo.*Connection (closed|reset) by peer", said), said
    assert not (tmp_path / "out.0").exists()


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:]
