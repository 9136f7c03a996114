"""A rank that dies in the middle of a request takes the other with it, with an error and without a hang."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from model_folder import make_folder
from processes import COMPILED, HERE, end, free_port, start

AFTER_S = 60.0  # gloo tells a closed connection at once; the rest is Python's way out of vLLM


def test_the_other_rank_ends_with_an_error(tmp_path: Path) -> None:
    engine = {
        "model": str(make_folder(tmp_path / "model", "v3")),
        "tensor_parallel_size": 2,
        "compilation_config": COMPILED,
        "additional_config": {"cpcompile": {"strategy": "tp"}},
    }
    job = {"engines": {"v3": engine}, "arrivals": [([5, 6, 7], 0)], "new_tokens": 64, "die_at": 5}
    (tmp_path / "job.json").write_text(json.dumps({**job, "out": str(tmp_path / "out")}))
    port, processes = str(free_port()), []
    logs = [(tmp_path / f"log{rank}").open("w+") for rank in range(2)]
    try:
        for rank, log in enumerate(logs):
            numbers = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            given = [sys.executable, str(HERE / "generate.py"), str(tmp_path / "job.json")]
            processes.append(start(given, tmp_path, log, **numbers, **where))
        assert processes[1].wait(600) == -9, tail(tmp_path / "log1")
        code = processes[0].wait(AFTER_S)
    finally:
        for process in processes:
            end(process)
    said = tail(tmp_path / "log0")
    assert code == 1, said
    assert re.search(r"RuntimeError: .*gloo.*Connection (closed|reset) by peer", said), said
    assert not (tmp_path / "out.0").exists()


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-6000:]
