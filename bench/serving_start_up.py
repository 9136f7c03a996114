"""What compiling with this backend adds to vLLM's start-up, next to vLLM uncompiled and with inductor.

``python -m bench.serving_start_up [--rounds 3] [--models v3,v32] [--json FILE]`` in vLLM's environment, from the
repository's root. Two ranks on the CPU, the tests' small models; each start is a pair of processes of its own with
compile caches that are empty. Rounds are interleaved: figures of one run are to be compared with each other, not
with another machine's.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "serving"))

import processes
from model_folder import make_folder

processes.LIMIT_S = 3600.0  # inductor's compiler is slow
#: What vLLM is given; without a word of ours it compiles with inductor, once, and on a CPU not in pieces.
MODES: dict[str, dict[str, Any]] = {
    "NONE": {"enforce_eager": True},
    "inductor": {},
    "cpcompile": {"compilation_config": processes.COMPILED, "additional_config": {"cpcompile": {"strategy": "tp"}}},
}


def start_once(model: Path, mode: str) -> dict[str, float]:
    """Seconds from ``LLM(...)`` until it is ready, by the clock and of processor time, the latter of our backend too.

    The clock's of the slower rank, processor time of both ranks and the processes that they start.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = {"model": str(model), "tensor_parallel_size": 2, **MODES[mode]}
        # V3.2 has vLLM set this to 1, which would turn inductor off too.
        empty = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "VLLM_USE_BREAKABLE_CUDAGRAPH": "0"}
        done = processes.run(folder, {"engines": {mode: engine}, "arrivals": [], "new_tokens": 1}, ranks=2, **empty)
    if done.code != 0:
        raise RuntimeError(f"{mode} did not start:\n{done.log[-4000:]}")
    told = [rank[mode] for rank in done.told]
    called = [rank["backend_cpu_s"] > 0 for rank in told]
    assert called == [mode == "cpcompile"] * 2, called
    spent = {key: sum(rank[key] for rank in told) for key in ("start_up_cpu_s", "backend_cpu_s")}
    return {"start_up_s": max(rank["start_up_s"] for rank in told), **spent}


def median(runs: list[dict[str, float]], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.serving_start_up", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", default="v3,v32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    kinds = arguments.models.split(",")
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as root, contextlib.suppress(KeyboardInterrupt):  # tell what there is
        models = {kind: make_folder(Path(root) / kind, kind) for kind in kinds}
        for _ in range(arguments.rounds):
            for kind, mode in itertools.product(kinds, MODES):
                found.setdefault((kind, mode), []).append(start_once(models[kind], mode))
                print(kind, mode, found[kind, mode][-1], flush=True)
    print("| model | mode | starts | start-up, s | processor time, s | of mode NONE's | of it in our backend, s |")
    print("|---|---|---|---|---|---|---|")
    for (kind, mode), runs in found.items():
        clock, busy, ours = (median(runs, key) for key in ("start_up_s", "start_up_cpu_s", "backend_cpu_s"))
        ratio = busy / median(found[kind, "NONE"], "start_up_cpu_s")
        print(f"| {kind} | {mode} | {len(runs)} | {clock:.1f} | {busy:.1f} | {ratio:.2f} | {ours:.1f} |")
    if arguments.json:
        rows = [{"model": kind, "mode": mode, "runs": runs} for (kind, mode), runs in found.items()]
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
