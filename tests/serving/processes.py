"""Starting vLLM in processes of its own, and waiting for them with a limit."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
LIMIT_S = 600.0
COMPILED = {"mode": "DYNAMO_TRACE_ONCE", "backend": "cpcompile"}
# The reference attention on every CPU: with AMX vLLM would take its kernels for that, which know bfloat16 alone.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "attention_backend": "CPU_MLA",
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "seed": 0,
}
IN_PIECES = {"mode": "VLLM_COMPILE"}
#: What vLLM finds out about a model's class, for which it starts a process: once for all starts of this one.
_MODEL_CLASSES = tempfile.TemporaryDirectory()


@dataclass(frozen=True)
class Done:
    """What a job's ranks wrote, and everything that they printed."""

    told: list[dict[str, Any]]
    log: str
    code: int


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """One thread per rank; nothing of one test is found by another."""
    alone = {"OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    # vLLM's sparse_attn_indexer returns an argument: a warning of torch's, which is an error where CI is set.
    aliasing = {"TORCHINDUCTOR_ERROR_ON_CUSTOM_OP_ALIASING": "0"}
    paths = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
    return {**os.environ, **alone, **aliasing, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **more}


def command(script: str, *args: str, ranks: int = 1) -> list[str]:
    """How to start ``script`` on ``ranks`` ranks of this host."""
    if ranks == 1:
        return [sys.executable, str(HERE / script), *args]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port", str(free_port())]
    return [sys.executable, *launch, str(HERE / script), *args]


def run(folder: Path, job: Mapping[str, Any], ranks: int = 1, **env: str) -> Done:
    """Run ``generate.py``; the caller looks at the exit code."""
    out = folder / "out"
    (folder / "job.json").write_text(json.dumps({**job, "out": str(out)}))
    with (folder / "log").open("w") as log:
        process = start(command("generate.py", str(folder / "job.json"), ranks=ranks), folder, log, **env)
        try:
            code = process.wait(LIMIT_S)
        finally:
            end(process)
    written = [Path(f"{out}.{rank}") for rank in range(ranks)]
    told = [json.loads(path.read_text()) for path in written if path.exists()]
    return Done(told, (folder / "log").read_text(errors="replace"), code)


@contextlib.contextmanager
def start_ranks(folder: Path, job: Mapping[str, Any]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """``generate.py`` on two ranks, rank r printing to ``log.r``; torchrun would end the others with the first."""
    (folder / "job.json").write_text(json.dumps({**job, "out": str(folder / "out")}))
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    try:
        for rank in ("0", "1"):
            given = command("generate.py", str(folder / "job.json"))
            with (folder / f"log.{rank}").open("w") as log:
                processes.append(start(given, folder, log, RANK=rank, LOCAL_RANK=rank, **where))
        yield processes
    finally:
        for process in processes:
            end(process)


def start(given: list[str], folder: Path, log: IO[str], **env: str) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own, which ``end`` ends with all that it has started."""
    environ = environment(VLLM_CACHE_ROOT=str(folder / "cache"), **env)
    (folder / "cache").mkdir(exist_ok=True)
    if not (folder / "cache" / "modelinfos").exists():
        (folder / "cache" / "modelinfos").symlink_to(_MODEL_CLASSES.name)
    return subprocess.Popen(
        given, stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=folder, start_new_session=True
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill ``process`` and what it has started, if any of it is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
