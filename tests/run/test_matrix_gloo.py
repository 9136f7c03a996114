"""Models of transformers, sharded by its own plan, through ``torch.compile`` with no option but the axis, on two ranks.

Three calls of other T and other B each: the whole model's logits, and as many all-reduces rewritten as are written down
here. A core list runs with the other tests; ``make matrix`` runs all, ``CPCOMPILE_MATRIX=v3,llama`` some models.
"""

from __future__ import annotations

import os
import re
import time
import traceback
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from cousins import NAMES, config_of
from gloo_ranks import joined
from heard import Heard, hear
from models import build
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

WORLD, TOLERANCE = 2, 2e-5
SIZES = [(2, 512), (3, 600), (2, 450)]  # B, T: enough tokens that sharding them pays over gloo, by its own profile
HIDDEN = 1024


class Case(NamedTuple):
    """One model as a user compiles it."""

    model: str
    attention: str | None = None
    dynamic: bool | None = None
    axis: bool = True

    def __str__(self) -> str:
        named = "" if self.axis else ", no option at all"
        return f"{self.model}, attention {self.attention or 'default'}, dynamic={self.dynamic}{named}"


# Model → all-reduces rewritten and all-reduces at these sizes, whatever the attention and ``dynamic``. Of models that
# are not here, some must be rewritten in every call that compiles. Sharding qwen3_moe, transformers puts a hook for
# training on q_norm and k_norm, at which dynamo breaks in each layer, under no_grad too: no graph has two all-reduces,
# so there is nothing to gain between them. LongCat's experts run in Python, and so break it in many graphs, too.
REWRITTEN = {
    "v3": (3, 3),
    "v31": (3, 3),
    "kimi_k2": (3, 3),
    "v32": (5, 5),
    "v2_lite": (5, 5),
    "glm4_moe": (5, 5),
    "glm_moe_dsa": (5, 5),
    "longcat_flash": (0, 5),
    "llama": (4, 4),
    "mixtral": (4, 4),
    "qwen3_moe": (0, 2),
}
FORMS = [(attention, dynamic) for attention in (None, "eager") for dynamic in (None, True)]
ALL = [*(Case(model, *form) for model in NAMES for form in FORMS), Case("v3", axis=False)]
CORE = [Case("llama", axis=False), Case("v3", dynamic=True)]
LINE = re.compile(r"T (?:>= (\d+)|in \[(\d+), (\d+)\]).*: (\d+) of (\d+) all-reduces rewritten")


def at(tokens: int, heard: Heard) -> tuple[int, int]:
    """All-reduces rewritten at ``tokens`` tokens, and all-reduces, of every graph that was heard of."""
    done = total = 0
    for first, low, high, rewritten, of in LINE.findall("\n".join(heard.lines())):
        if int(first or low) <= tokens <= int(high or tokens):
            done, total = done + int(rewritten), total + int(of)
    return done, total


def made(case: Case) -> Any:
    config = config_of(case.model, hidden_size=HIDDEN)
    if case.attention is not None:
        config._attn_implementation = case.attention
    return build(config)


def run(case: Case, mesh: DeviceMesh) -> tuple[list[tuple[int, int]], str]:
    """All-reduces rewritten and all-reduces of each call that compiled, and where logits differ from the whole model's.

    What is wrong on one rank is told at the end: ranks that leave at different calls would wait for each other.
    """
    whole, model = made(case), apply_tensor_parallelism(made(case), mesh)
    torch._dynamo.reset()
    options = {"axes": {"tp": mesh}} if case.axis else {}
    compiled = torch.compile(model, backend="cpcompile", dynamic=case.dynamic, options=options)
    found, told = [], ""
    with torch.no_grad():
        for batch, tokens in SIZES:
            ids = torch.randint(1, 96, (batch, tokens), generator=torch.Generator().manual_seed(tokens))
            with hear() as heard:
                logits = compiled(input_ids=ids, use_cache=False).logits
            expected = whole(input_ids=ids, use_cache=False).logits
            error = ((logits - expected).norm() / expected.norm()).item()
            if not error <= TOLERANCE:
                told += f"B={batch}, T={tokens}: {error:.1e} off; "
            if heard.told:
                found.append(at(tokens, heard))
    return found, told


def wrong(model: str, found: list[tuple[int, int]]) -> str:
    """What is wrong with the counts of all-reduces rewritten and of all-reduces, of each call that compiled."""
    if model in REWRITTEN:
        expected = REWRITTEN[model]
        return "" if found and set(found) == {expected} else f"{found} rewritten and in all; expected {expected} each"
    return "" if found and all(done > 0 for done, _ in found) else f"{found}: nothing is rewritten"


def run_rank(rank: int, folder: str, cases: list[Case]) -> None:
    with joined(rank, WORLD, folder):
        failed = run_all(rank, cases)
    assert not failed, "\n".join(failed)


def run_all(rank: int, cases: list[Case]) -> list[str]:
    """What failed of the cases, on any rank."""
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
    failed = []
    for case in cases:
        began = time.perf_counter()
        found: list[tuple[int, int]] = []
        try:
            found, told = run(case, mesh)
            told += wrong(case.model, found)
        except Exception as error:
            traceback.print_exc()
            told = f"{type(error).__name__}: {error}"
        everyone: list[Any] = [None] * WORLD
        dist.all_gather_object(everyone, told)  # the ranks stay in step
        failed += [f"{case}: rank {r}: {told}" for r, told in enumerate(everyone) if told]
        if rank == 0:
            print(f"{case}: {time.perf_counter() - began:.0f} s, {found} of all rewritten {told}", flush=True)
    return failed


def chosen(named: str) -> list[Case]:
    """The core list, all of the matrix, or that of some models."""
    return CORE if not named else [c for c in ALL if named == "all" or c.model in named.split(",")]


@pytest.mark.ranks
def test_default_options(tmp_path: Any) -> None:
    """One spawn for all cases."""
    mp.spawn(run_rank, (str(tmp_path), chosen(os.environ.get("CPCOMPILE_MATRIX", ""))), nprocs=WORLD)
