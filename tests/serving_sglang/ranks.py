"""Starting SGLang's ranks in processes of their own, and waiting for them with a limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import free_port

HERE = Path(__file__).resolve().parent
LIMIT_S = 600.0


@dataclass(frozen=True)
class Done:
    """What a job's ranks wrote, everything that each printed, and how each ended."""

    told: list[dict[str, Any]]
    logs: list[str]
    codes: list[int]


def run(folder: Path, job: dict[str, Any], ranks: int, **env: str) -> Done:
    """Run ``serve.py`` on ``ranks`` ranks; the caller looks at the exit codes."""
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE), str(HERE.parent / "serving")])
    # A rank is bound to cores of its own where there is no node of memory for each.
    cores = "|".join(str(rank % (os.cpu_count() or 1)) for rank in range(ranks))
    alone = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "SGLANG_CPU_OMP_THREADS_BIND": cores, "PYTHONPATH": paths}
    written = folder / "job.json"
    written.write_text(json.dumps({**job, "ranks": ranks, "port": free_port(), "out": str(folder / "out")}))
    logs = [folder / f"log.{rank}" for rank in range(ranks)]
    processes = []
    try:
        for rank, log in enumerate(logs):
            with log.open("w") as to:
                command = [sys.executable, str(HERE / "serve.py"), str(written), str(rank)]
                environ = {**os.environ, **alone, **env}
                processes.append(
                    subprocess.Popen(command, stdout=to, stderr=to, env=environ, cwd=folder, start_new_session=True)
                )
        codes = [process.wait(LIMIT_S) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    out = [folder / f"out.{rank}" for rank in range(ranks)]
    told = [json.loads(path.read_text()) for path in out if path.exists()]
    return Done(told, [log.read_text(errors="replace") for log in logs], codes)
