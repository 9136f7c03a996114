"""Compile time on the full-size configurations: passes against capture, and growth with depth.

``python -m bench [--layers 8,16,32,61] [--ranks 16] [--models v3,v32] [--json FILE]``. Each case is a process of its
own on the meta device: nothing is allocated, peak memory is the process's. Figures of one run are to be compared
with each other, not with another machine's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import resource
import time
from pathlib import Path
from typing import Any

CASES = {"v3": "DeepSeek-V3", "v32": "DeepSeek-V3.2"}


def measure(kind: str, layers: int, ranks: int) -> dict[str, Any]:
    """Explain one full-size model of ``layers`` layers at TP ``ranks``; times in seconds, memory in GiB."""
    import logging

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV32Config
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    from cpcompile.backend import exchange_for
    from cpcompile.capture import capture
    from cpcompile.options import Options
    from cpcompile.pipeline import compile_graph

    logging.getLogger("transformers").setLevel(logging.ERROR)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("tp",))
    kinds = (["dense"] * 3 + ["sparse"] * layers)[:layers]
    config = (
        DeepseekV3Config(num_hidden_layers=layers)
        if kind == "v3"
        else DeepseekV32Config(num_hidden_layers=layers, mlp_layer_types=kinds)
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    attention = "model.layers.*.self_attn."
    plan = {attention + "q_b_proj": "colwise", attention + "kv_b_proj": "colwise", attention + "o_proj": "rowwise"}
    model._tp_plan = {**model.tp_plan, **plan, "model.embed_tokens": "embedding_rowwise"}
    apply_tensor_parallelism(model, mesh)
    trace = capture(model, input_ids=torch.zeros(1, 16, dtype=torch.long, device="meta"), use_cache=False)
    options = Options.parse({"profile": "ascend-a3", "replicated": ["*"], "axes": {"tp": mesh}})
    before = len(trace.gm.graph.nodes)
    began = time.perf_counter()
    compiled = compile_graph(trace.gm, trace.inputs, options, lambda axis: exchange_for(axis, 60.0))
    passes = time.perf_counter() - began
    by_pass: dict[str, float] = {}
    for run in compiled.passes:
        by_pass[run.name] = by_pass.get(run.name, 0.0) + run.seconds
    report = compiled.report(16384).to_dict()
    captured = trace.seconds["dynamo"] + trace.seconds["aot"]
    return {
        "model": CASES[kind],
        "layers": layers,
        "ranks": ranks,
        "nodes": before,
        "dynamo_s": trace.seconds["dynamo"],
        "aot_s": trace.seconds["aot"],
        "passes_s": passes,
        "passes_by_name_s": by_pass,
        "ratio": passes / captured,
        "passes_us_per_node": passes / before * 1e6,
        "graphs": len({id(v.gm) for v in compiled.variants}),
        "intervals": [[v.first, v.last] for v in compiled.variants],
        "all_reduces": sum(c["kind"] == "all_reduce" for c in report["collectives"]),
        "proofs_hold": report["verify"]["holds"],
        "volume": report["volume"],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _worker(connection: Any, kind: str, layers: int, ranks: int) -> None:
    connection.send(measure(kind, layers, ranks))


def main() -> int:
    """Run the cases one after another and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--layers", default="8,16,32,61")
    parser.add_argument("--models", default="v3,v32")
    parser.add_argument("--ranks", type=int, default=16)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    print("| model | layers | nodes | dynamo + AOT, s | passes, s | ratio | µs per node | graphs | peak, GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for kind in arguments.models.split(","):
        for layers in map(int, arguments.layers.split(",")):
            context = mp.get_context("spawn")
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_worker, args=(sender, kind, layers, arguments.ranks))
            process.start()
            sender.close()
            row = receiver.recv()
            process.join()
            rows.append(row)
            print(
                f"| {row['model']} | {layers} | {row['nodes']} | {row['dynamo_s'] + row['aot_s']:.1f} "
                f"| {row['passes_s']:.1f} "
                f"| {row['ratio']:.2f} | {row['passes_us_per_node']:.0f} | {row['graphs']} | {row['peak_gib']:.2f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    return 0 if all(row["proofs_hold"] for row in rows) else 1
