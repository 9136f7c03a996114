"""The main job: compile a small random DeepSeek-V3.2 on two gloo ranks and check every rank against the whole model.

Run it with ``python examples/demo.py``. It prints every collective before and after, and exits non-zero if any
rank's output differs from the same model uncompiled and unsharded.
"""

from __future__ import annotations

import json
import logging
import multiprocessing as mp
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import AutoModelForCausalLM, DeepseekV32Config
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

RANKS = 2
TOKEN_COUNTS = (16, 33, 7)
TOLERANCE = 2e-5


def build() -> Any:
    """A small random V3.2 in float32, alike in every process."""
    config = DeepseekV32Config(
        vocab_size=256, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, q_lora_rank=64, kv_lora_rank=32, qk_rope_head_dim=16,
        qk_nope_head_dim=16, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        n_shared_experts=1, mlp_layer_types=["dense", "sparse", "sparse"], index_n_heads=4, index_head_dim=32,
        index_topk=12,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def shard(model: Any, mesh: DeviceMesh) -> Any:
    """Tensor-parallel by the library's own plan, with the embedding sharded as well."""
    model._tp_plan = {**model.tp_plan, "model.embed_tokens": "embedding_rowwise"}
    return apply_tensor_parallelism(model, mesh)


def show(report: dict[str, Any]) -> None:
    """Print the table of every collective of one rank, from the report that the backend dumped."""
    table = Table(title="every collective of rank 0: elements that the rank sends for T tokens")
    for column in ("module", "decision", "becomes", "before", "after", "reason"):
        table.add_column(column, overflow="fold")
    for row in report["collectives"]:
        numbers = row["elements_before_in_t"], row["elements_after_in_t"]
        table.add_row(row["module"], row["decision"], row["becomes"], *numbers, row["reason"])
    console = Console(width=150)
    console.print(table)
    volume, proofs = report["volume"], report["verify"]["proofs"]
    console.print(f"volume at T = {report['tokens']}: {volume['before']} -> {volume['after']} elements per rank")
    console.print(
        f"proofs: {sum(p['holds'] for p in proofs)} of {len(proofs)} rewritten graphs proven equal to the original"
    )


def largest_error(whole: Any, compiled: Any, token_counts: Sequence[int]) -> float:
    """Largest relative error of the compiled model's logits against the whole model's."""
    worst = 0.0
    for tokens in token_counts:
        ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        torch._dynamo.mark_dynamic(ids, 1)
        with torch.no_grad():
            expected = whole(input_ids=ids, use_cache=False).logits
            found = compiled(input_ids=ids, use_cache=False).logits
        worst = max(worst, ((found - expected).norm() / expected.norm()).item())
    return worst


def run_rank(rank: int, folder: str) -> None:
    """One rank: shard, compile, run, compare."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",))
    whole, model = build(), shard(build(), mesh)
    # "tp" scatters at every token count, so that a run of a few tokens shows what a large step does.
    options: Any = {"strategy": "tp", "axes": {"tp": mesh}, "require": ["*o_proj"], "dump_dir": folder}
    compiled: Any = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
    torch.save(largest_error(whole, compiled, TOKEN_COUNTS), f"{folder}/error_{rank}")
    dist.destroy_process_group()


def main() -> int:
    """Run both ranks and judge them."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [mp.get_context("spawn").Process(target=run_rank, args=(rank, folder)) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            print(f"a rank failed: exit codes {[process.exitcode for process in ranks]}")
            return 1
        errors = [torch.load(f"{folder}/error_{rank}") for rank in range(RANKS)]
        for report in json.loads(Path(folder, "rank_0/graph_0/report.json").read_text()).values():
            show(report)
    for rank, error in enumerate(errors):
        print(f"rank {rank}: largest relative error {error:.1e} over T = {TOKEN_COUNTS} against the whole model")
    good = all(error <= TOLERANCE for error in errors)
    print("every rank equals the whole model" if good else f"DIFFERENT: expected at most {TOLERANCE}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
