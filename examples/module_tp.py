"""Module tensor parallelism: data-parallel ranks share the weights of embedding, o_proj, dense MLP and lm_head.

Run it with ``torchrun --nproc-per-node 2 examples/module_tp.py``. The ranks have different numbers of tokens, one of
them none in one step. It prints what becomes of each module, the bytes of weights that a rank holds before and after,
and how far every rank's logits are from the same model uncompiled; non-zero if they differ.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from demo import TOLERANCE, build

import cpcompile
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.mesh.process_groups import ProcessGroups

STEPS = ((5, 3), (8, 0), (1, 9))  # tokens of even and odd ranks


@torch.no_grad()
def main() -> int:
    """One rank of as many as torchrun started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sizes = Sizes(dp=ranks, embedding=ranks, o_proj=ranks, mlp=ranks, lm_head=ranks)
    groups = ProcessGroups(rank_groups(sizes, "vllm"))
    whole, model = build(), build()
    names = ("embedding", "oproj", "mlp", "lmhead")
    folder = tempfile.mkdtemp()
    options: Any = {
        "groups": groups,
        "finegrained_tp_config": {f"{name}_tensor_parallel_size": ranks for name in names},
        "release_weights": True,
        "dump_dir": folder,
    }
    compiled: Any = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
    error = 0.0
    for tokens in STEPS:
        if tokens[rank % 2] == 0:
            cpcompile.idle_step(compiled)
            continue
        ids = torch.arange(tokens[rank % 2]).unsqueeze(0)
        found, expected = (m(input_ids=ids, use_cache=False).logits for m in (compiled, whole))
        error = max(error, ((found - expected).norm() / expected.norm()).item())
    if rank == 0:
        (report,) = json.loads(Path(folder, "rank_0/graph_0/report.json").read_text()).values()
        for row in report["modules"]:
            sizes_in_kib = f"{row['bytes_before'] / 1024:.1f} KiB -> {row['bytes_after'] / 1024:.1f} KiB"
            print(f"{row['module']:34} {row['role']:10} {row['decision']} {sizes_in_kib:24} {row['collectives']}")
    print(f"rank {rank}: largest relative error {error:.1e} over {len(STEPS)} steps against the whole model")
    groups.destroy()
    dist.destroy_process_group()
    return 0 if error <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
