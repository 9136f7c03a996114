"""Time and memory of lowering full-size models to GE graphs, and their growth with depth. Needs torch_npu, no NPU.

``python -m bench.lower_time [--models v3,v32,serving] [--layers 2,8,16,32,61] [--strategies off,tp,cp,modules]
[--ranks 16] [--tokens 16384] [--json FILE]``. A model is traced once for the strategies that start from one graph, in a
process of its own; each strategy is a fork of it: rank 0's graph for any T, and then the one for ``--tokens`` alone.
Memory is the most that the fork held, over what it began with.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.full_size import MODELS, STRATEGIES, compiled, traced

HEADINGS = ("model", "layers", "strategy", "T", "nodes", "trace", "rewrite", "lowering", "lowering per layer")
MORE_HEADINGS = ("GE ops", "unsupported", "graph, MiB", "over the trace, GiB")
Row = dict[str, Any]


def trace_and_lower(sender: Connection, kind: str, layers: int, names: Sequence[str], ranks: int, tokens: int) -> None:
    """Send two rows for each strategy, all of which start from one trace; a row with an ``error`` where one fails.

    Times are this process's CPU seconds: wall time says little where other work shares the machine.
    """
    _prepare()
    began = time.process_time()
    with traced(kind, layers, STRATEGIES[names[0]].axis, ranks) as found:
        row = {"kind": kind, "model": MODELS[kind], "layers": layers, "ranks": ranks}
        row |= {"nodes": len(found.trace.gm.graph.nodes), "trace_cpu_s": time.process_time() - began}
        row["trace_gib"] = _resident("VmHWM")
        for name in names:
            said = {**row, "strategy": name}
            process = mp.get_context("fork").Process(target=_strategy, args=(sender, said, found, tokens))
            process.start()
            process.join()
            if process.exitcode:
                sender.send({**said, "error": f"exit code {process.exitcode}"})


def _prepare() -> None:
    import logging

    from cpcompile.lowering.targets import prepare

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    prepare("ge-export")


def _strategy(sender: Connection, row: Row, found: Any, tokens: int) -> None:
    """Rewrite and lower, in a fork whose trace is its own."""
    before, strategy = _resident("VmRSS"), STRATEGIES[row["strategy"]]
    began = time.process_time()
    outcome = compiled(found, strategy)
    row |= {"rewrite_cpu_s": time.process_time() - began, "refused": outcome.refused}
    row["unproven"] = [failure for proof in outcome.proofs for failure in proof["failures"]]
    for static in (False, True):
        of = _lowered(outcome, found.trace.inputs, tokens, static)
        sender.send({**row, "tokens": tokens if static else "any", **of, "over_trace_gib": _resident("VmHWM") - before})


def _lowered(outcome: Any, inputs: Any, tokens: int, static: bool) -> Row:
    from cpcompile.lowering.ascend.whole_model import lower_rank
    from cpcompile.lowering.targets import Settings

    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        done = lower_rank(outcome, inputs, tokens, static, Path(folder), Settings())
    return {
        "lowering_cpu_s": time.process_time() - began,
        "ge_ops": sum(done.summary.ops.values()),
        "collectives": len(done.summary.collectives),
        "unsupported": sorted({f"{u.op} in {u.module}" for u in done.unsupported}),
        "kept": [f"{kept.role} {kept.module}: {kept.reason}" for kept in done.kept],
        "mib": done.summary.bytes / 2**20,
    }


def _resident(name: str) -> float:
    """``VmHWM`` (the most until now) or ``VmRSS`` of this process, in GiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 2**20


def rows(kind: str, layers: int, names: Sequence[str], ranks: int, tokens: int) -> Iterator[Row]:
    """All rows of one model, from a process for each trace."""
    for axis in dict.fromkeys(STRATEGIES[name].axis for name in names):
        of_axis = [name for name in names if STRATEGIES[name].axis == axis]
        receiver, sender = mp.get_context("spawn").Pipe(duplex=False)
        case = (sender, kind, layers, of_axis, ranks, tokens)
        process = mp.get_context("spawn").Process(target=trace_and_lower, args=case)
        process.start()
        sender.close()
        try:
            while True:
                yield receiver.recv()
        except EOFError:  # it has ended
            process.join()
        if process.exitcode:
            yield {"kind": kind, "model": MODELS[kind], "layers": layers, "strategy": of_axis[0], "error": "no trace"}


def main() -> int:
    """Print a table, case by case; 1 if a case failed, or an op could not be lowered."""
    parser = argparse.ArgumentParser(prog="python -m bench.lower_time", description=__doc__)
    parser.add_argument("--layers", default="2,8,16,32,61")
    parser.add_argument("--models", default="v3,v32")
    parser.add_argument("--strategies", default="tp")
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    print(f"| {' | '.join(HEADINGS + MORE_HEADINGS)} |\n{'|---' * len(HEADINGS + MORE_HEADINGS)}|", flush=True)
    found: list[Row] = []
    for kind in given.models.split(","):
        for layers in map(int, given.layers.split(",")):
            for row in rows(kind, layers, given.strategies.split(","), given.ranks, given.tokens):
                found.append(row)
                print(_line(row), flush=True)
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1))
    return 0 if found and all(lowered(row) for row in found) else 1


def lowered(row: Row) -> bool:
    """Whether the graph is there: rewritten, proven, and with a form for every op."""
    failed = row.get("error") or row["unsupported"] or row["unproven"] or row["kept"]
    return not failed and (row["strategy"] == "off" or not row["refused"])


def _line(row: Row) -> str:
    first = f"| {row['model']} | {row['layers']} | {STRATEGIES[row['strategy']].says}"
    if "error" in row:
        return f"{first} | FAILED: {row['error']} |"
    cells = [row["tokens"], row["nodes"], f"{row['trace_cpu_s']:.1f}", f"{row['rewrite_cpu_s']:.1f}"]
    cells += [f"{row['lowering_cpu_s']:.1f}", f"{row['lowering_cpu_s'] / row['layers']:.2f}", row["ge_ops"]]
    cells += [len(row["unsupported"]), f"{row['mib']:.1f}", f"{row['over_trace_gib']:.2f}"]
    failed = "" if lowered(row) else f" {row['unsupported']} {row['unproven']} {row['kept']} {row['refused']}"
    return f"{first} | {' | '.join(map(str, cells))} |{failed}"


if __name__ == "__main__":
    raise SystemExit(main())
