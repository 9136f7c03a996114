"""What a second start of vLLM saves: two CPU ranks, a small random model, the same cache for both starts.

``.venv-vllm/bin/python -m bench.second_start [--layers 3,16] [--models v3]``. The time is what vLLM logs as
"init engine": profiling (with compilation), key-value cache and warm-up, of rank 0.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "serving"))

import model_folder
import processes

TIMED = re.compile(r"init engine \(.*\) took ([\d.]+) s")


def measure(kind: str, layers: int) -> tuple[float, float]:
    """Seconds of the first and of the second start."""
    deeper: dict[str, Any] = {"num_hidden_layers": layers}
    if kind == "v32":
        deeper["mlp_layer_types"] = ["dense"] + ["sparse"] * (layers - 1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = {
            "model": str(model_folder.make_folder(folder / "model", kind, **deeper)),
            "tensor_parallel_size": 2,
            "compilation_config": processes.COMPILED,
            "additional_config": {"cpcompile": {"strategy": "tp", "require": ["*"]}},
        }
        job = {"engines": {kind: engine}, "arrivals": [([5, 6, 7, 8, 9], 0)], "new_tokens": 4}
        first, second = (processes.run(folder, job, ranks=2) for _ in range(2))
    for done, said in ((first, "no saved code"), (second, "took the code of an earlier start")):
        if done.code or said not in done.log:
            sys.exit(f"expected a start that says {said!r}, found:\n{done.log[-3000:]}")
    assert first.told[0][kind]["answers"] == second.told[0][kind]["answers"]
    return _seconds(first.log), _seconds(second.log)


def _seconds(log: str) -> float:
    return max(float(found) for found in TIMED.findall(log))


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", default="3")
    parser.add_argument("--models", default="v3")
    given = parser.parse_args()
    print("| model | layers | first start, s | second, s | ratio |\n|---|---|---|---|---|")
    for kind in given.models.split(","):
        for layers in map(int, given.layers.split(",")):
            first, second = measure(kind, layers)
            print(f"| {kind} | {layers} | {first:.1f} | {second:.1f} | {second / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
