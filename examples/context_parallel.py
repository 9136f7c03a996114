"""Context parallelism: every rank holds the whole model and computes its part of the tokens.

Run it with ``torchrun --nproc-per-node 2 examples/context_parallel.py``. It prints which rows each rank computes, what
the ranks exchange, and how far every rank's logits are from the same model uncompiled; non-zero if they differ.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from demo import TOLERANCE, build, largest_error, show
from torch.distributed.device_mesh import init_device_mesh

from cpcompile.layouts import TokenLayout

TOKEN_COUNTS = (64, 17, 5)


def span(rows: Sequence[int]) -> str:
    """Consecutive rows in words."""
    return f"tokens {rows[0]} to {rows[-1]}" if rows else "no tokens"


def main() -> int:
    """One rank of as many as torchrun started."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    whole, model = build(), build()
    folder = tempfile.mkdtemp()
    # Nothing in the graph says that there are other ranks: the axis is given. "cp" splits at every token count.
    options: Any = {"strategy": "cp", "axes": {"cp": mesh}, "dump_dir": folder}
    compiled: Any = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
    errors: list[Any] = [None] * ranks
    dist.all_gather_object(errors, largest_error(whole, compiled, TOKEN_COUNTS))
    if rank == 0:
        for tokens in TOKEN_COUNTS:
            layout = TokenLayout("contiguous", ranks, (tokens,))
            print(f"T = {tokens}:", ", ".join(f"rank {r} computes {span(layout.owned(r))}" for r in range(ranks)))
        for report in json.loads(Path(folder, "rank_0/graph_0/report.json").read_text()).values():
            show(report)
        for number, error in enumerate(errors):
            print(f"rank {number}: largest relative error {error:.1e} over T = {TOKEN_COUNTS} against the whole model")
    dist.destroy_process_group()
    return 0 if max(errors) <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
