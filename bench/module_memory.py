"""Memory of one rank with and without shared modules: ``python -m bench.module_memory``. Two gloo ranks, float32, CPU.

Each row is a run of its own: what the weights take, and the process's resident memory, steady (after a step, freed
memory given back) and at its peak (loading included: the whole weights are there before they are cut).
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, DeepseekV3Config

from cpcompile.mesh import Sizes, rank_groups
from cpcompile.mesh.process_groups import ProcessGroups
from cpcompile.options import MODULE_SIZES

RANKS, MIB = 2, 2**20
CONFIG: dict[str, Any] = {
    "hidden_size": 1024, "vocab_size": 65536, "intermediate_size": 8192, "num_attention_heads": 32,
    "num_key_value_heads": 32, "v_head_dim": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "q_lora_rank": 256,
    "kv_lora_rank": 128, "num_hidden_layers": 4, "first_k_dense_replace": 3, "moe_intermediate_size": 256,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "n_shared_experts": 1,
}  # fmt: skip
RUNS = {
    "whole, uncompiled": None,
    "shared by 2, whole weights kept": {"release_weights": False},
    "shared by 2, released": {"release_weights": True},
}


def measure(rank: int, rendezvous: str, options: dict[str, Any] | None, results: Any) -> None:
    """One rank of one run."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(DeepseekV3Config(**CONFIG), dtype=torch.float32).eval()
    run: Any = model
    if options is not None:
        kinds: Any = dict.fromkeys(MODULE_SIZES.values(), RANKS)
        groups, sizes = ProcessGroups(rank_groups(Sizes(dp=RANKS, **kinds), "vllm")), dict.fromkeys(MODULE_SIZES, RANKS)
        given: Any = {"groups": groups, "finegrained_tp_config": sizes, **options}
        run = torch.compile(model, backend="cpcompile", options=given)
    with torch.no_grad():
        run(input_ids=torch.arange(8 + rank).unsqueeze(0), use_cache=False)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in model.parameters()}
    parts = sum(part.nbytes for part in _parts())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((rank, sum(storages.values()) + parts, _resident(), peak))
    dist.barrier()
    dist.destroy_process_group()


def _parts() -> list[torch.Tensor]:
    from cpcompile import weights

    return [part for entry in weights._entries.values() for part in entry.parts.values()]


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main() -> None:
    """Print the table of rank 0."""
    context = multiprocessing.get_context("spawn")
    print("| one of two ranks | weights, MiB | steady, MiB | peak, MiB |\n|---|---|---|---|")
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            results = context.Queue()
            work = [
                context.Process(target=measure, args=(rank, f"{folder}/rendezvous", options, results))
                for rank in range(RANKS)
            ]
            for process in work:
                process.start()
            found = sorted(results.get(timeout=900) for _ in work)
            for process in work:
                process.join()
        print(f"| {name} | " + " | ".join(f"{size / MIB:,.0f}" for size in found[0][1:]) + " |", flush=True)


if __name__ == "__main__":
    main()
