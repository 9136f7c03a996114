"""Hand-written inference code on two real gloo ranks: caches in buffers, complex rotations, in-place collectives."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from own_code import Model, Sizes
from test_weights_gloo import WORLD, close, lines

FORMS = {"absorbed": Sizes(), "naive": Sizes(absorb=False), "indexer": Sizes(indexer=True)}


def prefill_and_three_steps(sizes: Sizes) -> None:
    """No option: eager's logits and caches, two graphs, in which every all-reduce is found; none is worth rewriting."""
    rank, rewritten = dist.get_rank(), []
    torch._dynamo.reset()
    model, plain, whole = Model(sizes, rank, WORLD), Model(sizes, rank, WORLD), Model(sizes)
    compiled = torch.compile(model, backend="cpcompile", fullgraph=True)
    ids = torch.randint(0, sizes.vocab, (sizes.batch, 10), generator=torch.Generator().manual_seed(1))
    at = 0
    for tokens in (7, 1, 1, 1):
        now = ids[:, at : at + tokens]
        with lines() as said:
            logits = compiled(now, at)
        assert said.warnings() == []
        rewritten.append(said.rewritten())
        close(logits, plain(now, at))
        close(logits, whole(now, at))
        at += tokens
    assert rewritten == [["0 of 3"], ["0 of 3"], [], []], rewritten
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor_{rank}"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    with torch.no_grad():
        for form, sizes in FORMS.items():
            began = time.perf_counter()
            prefill_and_three_steps(sizes)
            print(f"rank {rank}: {form} {time.perf_counter() - began:.1f} s", flush=True)
    dist.destroy_process_group()


@pytest.mark.ranks
def test_two_ranks(tmp_path: Any) -> None:
    """One spawn for all forms."""
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
