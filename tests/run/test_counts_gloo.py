"""Several token counts in one graph on two gloo ranks: all of them are placed, and the numbers are eager's.

Through ``torch.compile`` as a user calls it, each model twice with other lengths of all its parts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_ranks import joined
from heard import hear
from several_counts import CASES, WORLD, ids_of

TOLERANCE = 2e-5


def as_eager(name: str, rank: int, marked: bool, options: dict[str, Any]) -> list[str]:
    """Compare at every call; return of each compilation how many all-reduces are rewritten in steps of many tokens."""
    case = CASES[name]
    model = case.model(dist.group.WORLD, rank)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="cpcompile", options=options or None, fullgraph=True)
    with hear() as heard, torch.no_grad():
        for shapes in case.calls:
            ids = ids_of(shapes)
            for one, dim in zip(ids, case.dims, strict=True):
                if marked:
                    torch._dynamo.mark_dynamic(one, dim)
            for mine, theirs in zip(compiled(*ids), model(*ids), strict=True):
                assert mine.shape == theirs.shape
                assert (mine - theirs).norm() <= TOLERANCE * theirs.norm(), (name, options, rank, shapes)
    assert not heard.warnings(), (name, heard.told)
    told = [line for line in heard.lines() if "all-reduces rewritten" in line]
    return [line.rpartition(": ")[2] for line in told if "T in [" not in line]


def run_rank(rank: int, folder: str) -> None:
    with joined(rank, WORLD, folder):
        for name, case in CASES.items():
            every = f"{case.all_reduces} of {case.all_reduces} all-reduces rewritten"
            assert as_eager(name, rank, True, {}) == [every], name
            if name in ("two micro-batches", "prefill and decode"):
                assert as_eager(name, rank, True, {"strategy": "tp"}) == [every], name
        # As a user starts: the first call's lengths are static, and other ones make a second graph.
        assert as_eager("two micro-batches", rank, False, {}) == ["4 of 4 all-reduces rewritten"] * 2


@pytest.mark.ranks
def test_two_ranks(tmp_path: Any) -> None:
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
