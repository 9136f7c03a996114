"""Time and memory of lowering full-size models to GE graphs, and their growth with depth. Needs torch_npu, no NPU.

``python -m bench.lower_time [--layers 2,8,16,32,61] [--ranks 16] [--models v3,v32] [--tokens 16384] [--json FILE]``.
Each case is a process of its own on the meta device: rank 0's graph for every T, and then the one for ``--tokens``
alone. Memory is the most that the process holds, over what it held when the model was traced.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CASES = {"v3": "DeepSeek-V3", "v32": "DeepSeek-V3.2"}
HEADINGS = ("model", "layers", "nodes", "trace, s", "rewrite, s", "T", "lowering, s", "CPU s per layer")
MORE_HEADINGS = ("GE ops", "unsupported", "graph, MiB", "over the trace, GiB")


def measure(kind: str, layers: int, ranks: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Lower one full-size model of ``layers`` layers at TP ``ranks``: a row for any T, and one for ``tokens``.

    Times in seconds, memory in GiB; ``lowering_s`` is of the GE graph alone, ``rewrite_s`` of the plan and its proof.
    CPU seconds are what is compared where other work shares the machine.
    """
    import logging

    from cpcompile.explanation import compile_trace
    from cpcompile.lowering.targets import prepare
    from cpcompile.model_spec import trace_target
    from cpcompile.options import Options

    logging.getLogger("transformers").setLevel(logging.ERROR)
    prepare("ge-export")
    with tempfile.TemporaryDirectory() as folder:
        _config(kind, layers).save_pretrained(folder)
        trace_s, context = _timed(lambda: trace_target(folder, {"tp": ranks}))
        began = time.perf_counter()
        with context as found:
            trace_s += time.perf_counter() - began
            nodes, traced = len(found.trace.gm.graph.nodes), _resident("VmHWM")
            given = {"profile": "ascend-a3", "sparse_attention": kind == "v32", "replicated": found.replicated}
            rewrite_s, compiled = _timed(lambda: compile_trace(found.trace, Options.parse(given)))
            peak = _resident("VmHWM")
            for static in (False, True):
                row: dict[str, Any] = {
                    "model": CASES[kind],
                    "layers": layers,
                    "ranks": ranks,
                    "nodes": nodes,
                    "trace_s": trace_s,
                }
                row |= {"rewrite_s": rewrite_s, "tokens": tokens if static else "any"}
                row |= _lowered(compiled, found.trace.inputs, tokens, static, Path(folder) / "out")
                row["over_trace_gib"] = max(peak, row.pop("peak")) - traced
                yield {**row, "trace_gib": traced}


def _config(kind: str, layers: int) -> Any:
    from transformers import DeepseekV3Config, DeepseekV32Config

    config = DeepseekV3Config if kind == "v3" else DeepseekV32Config
    kinds = (["dense"] * 3 + ["sparse"] * layers)[:layers]
    more = {"mlp_layer_types": kinds} if kind == "v32" else {"first_k_dense_replace": min(3, layers - 1)}
    return config(num_hidden_layers=layers, dtype="bfloat16", **more)


def _lowered(compiled: Any, inputs: Any, tokens: int, static: bool, folder: Path) -> dict[str, Any]:
    from cpcompile.lowering.ascend.whole_model import lower_rank
    from cpcompile.lowering.targets import Settings

    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    busy = time.process_time()
    seconds, done = _timed(lambda: lower_rank(compiled, inputs, tokens, static, folder, Settings()))
    return {
        "lowering_s": seconds,
        "lowering_cpu_s": time.process_time() - busy,
        "ge_ops": sum(done.summary.ops.values()),
        "unsupported": len(done.unsupported),
        "mib": done.summary.bytes / 2**20,
        "peak": _resident("VmHWM"),
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _resident(name: str) -> float:
    """``VmHWM`` or ``VmRSS`` of this process, in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def _worker(connection: Any, *case: Any) -> None:
    for row in measure(*case):
        connection.send(row)


def main() -> int:
    """Run the cases one after another and print a table; 1 if an op could not be lowered."""
    parser = argparse.ArgumentParser(prog="python -m bench.lower_time", description=__doc__)
    parser.add_argument("--layers", default="2,8,16,32,61")
    parser.add_argument("--models", default="v3,v32")
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"| {' | '.join(HEADINGS + MORE_HEADINGS)} |\n{'|---' * len(HEADINGS + MORE_HEADINGS)}|", flush=True)
    rows: list[dict[str, Any]] = []
    for kind in arguments.models.split(","):
        for layers in map(int, arguments.layers.split(",")):
            context = mp.get_context("spawn")
            receiver, sender = context.Pipe(duplex=False)
            case = (sender, kind, layers, arguments.ranks, arguments.tokens)
            process = context.Process(target=_worker, args=case)
            process.start()
            sender.close()
            for _ in range(2):
                rows.append(row := receiver.recv())
                print(_line(row), flush=True)
            process.join()
            if arguments.json:
                arguments.json.write_text(json.dumps(rows, indent=1))
    return 1 if any(row["unsupported"] for row in rows) else 0


def _line(row: dict[str, Any]) -> str:
    cells = [row["model"], row["layers"], row["nodes"], f"{row['trace_s']:.1f}", f"{row['rewrite_s']:.1f}"]
    cells += [row["tokens"], f"{row['lowering_s']:.1f}", f"{row['lowering_cpu_s'] / row['layers']:.2f}", row["ge_ops"]]
    cells += [row["unsupported"], f"{row['mib']:.1f}", f"{row['over_trace_gib']:.2f}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    raise SystemExit(main())
