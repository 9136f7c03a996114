"""On real GPUs: ``torchrun --nproc-per-node 2 -m bench.gpu``: rewritten against uncompiled and all-reduce programs.

One dense DeepSeek-V3 layer stack of real widths in bfloat16, tensor-parallel over all ranks with NCCL. Prints, per
token count, each program's median time as a ratio to the compiled graph with its all-reduces (``strategy="off"``) in
the same run, and the relative error of every rank's output against the unsharded model.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, DeepseekV3Config
from transformers.distributed.tensor_parallel import apply_tensor_parallelism


def build(layers: int) -> Any:
    """Dense V3 layers of real widths with a small vocabulary; alike on every rank."""
    config = DeepseekV3Config(num_hidden_layers=layers, first_k_dense_replace=layers, vocab_size=1024)
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def median_ms(run: Any, repeats: int = 15) -> float:
    """Median time of one call, by device events."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return float(statistics.median(times))


def main() -> int:
    """Compile and time every program at every token count; non-zero if an output is wrong."""
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    mesh = init_device_mesh("cuda", (dist.get_world_size(),), mesh_dim_names=("tp",))
    target = sys.argv[1] if len(sys.argv) > 1 else "inductor"
    whole, model = build(2), build(2)
    attention = "model.layers.*.self_attn."
    cut = {attention + "q_b_proj": "colwise", attention + "kv_b_proj": "colwise", attention + "o_proj": "rowwise"}
    model._tp_plan = {**model.tp_plan, **cut, "model.embed_tokens": "embedding_rowwise"}
    apply_tensor_parallelism(model, mesh)
    rows, good = [], True
    programs: dict[str, Any] = {"uncompiled": model}
    for strategy in ("off", "tp", "auto"):
        options: Any = {"strategy": strategy, "target": target, "axes": {"tp": mesh}}
        programs[strategy] = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
    for tokens in (4096, 4099, 16384):
        ids = torch.randint(0, 1024, (1, tokens), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
        torch._dynamo.mark_dynamic(ids, 1)
        with torch.no_grad():
            expected = whole(input_ids=ids, use_cache=False).logits.float()
            row: dict[str, Any] = {"T": tokens, "target": target}
            for name, program in programs.items():
                logits = program(input_ids=ids, use_cache=False).logits.float()
                row[f"error_{name}"] = ((logits - expected).norm() / expected.norm()).item()
                row[f"ms_{name}"] = median_ms(lambda p=program, i=ids: p(input_ids=i, use_cache=False))
            good = good and row["error_tp"] <= 1.25 * row["error_uncompiled"]
            good = good and row["error_auto"] <= 1.25 * row["error_uncompiled"]
            for name in ("uncompiled", "tp", "auto"):
                row[f"speed_{name}"] = row["ms_off"] / row[f"ms_{name}"]
        rows.append(row)
        if rank == 0:
            print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
