"""Hand-written inference code on two real gloo ranks: caches in buffers, complex rotations, in-place collectives."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import own_code
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_ranks import joined
from heard import Heard, hear
from own_code import Model, Sizes
from test_weights_gloo import WORLD, close

WIDE = {"dim": 1024, "batch": 4, "length": 260}  # at 4 x 256 tokens sharding pays over gloo, at 4 x 1 it does not


class Form(NamedTuple):
    """A model, the tokens of its prompt, and of how many all-reduces how many are rewritten for it: in one graph."""

    sizes: Sizes
    prompt: int = 7
    rewritten: str = "0 of 3"


FORMS = {
    "absorbed": Form(Sizes()),
    "naive": Form(Sizes(absorb=False)),
    "indexer": Form(Sizes(indexer=True)),
    "wide": Form(Sizes(**WIDE), 256, "3 of 3"),
}


def prefill_and_three_steps(form: Form) -> None:
    """No option: eager's logits and caches, two graphs in which every all-reduce is found, rewritten where it pays."""
    said = steps(form, fullgraph=True)
    told = [["sparse attention runs dense in 1 of 1" in line for line in s.warnings()] for s in said]
    assert told == ([[True], [True], [], []] if form.sizes.indexer else [[]] * 4), [s.warnings() for s in said]
    assert [s.rewritten() for s in said] == [[form.rewritten], ["0 of 3"], [], []]


def routed_in_python() -> None:
    """Dynamo breaks where the experts' token counts reach Python, which is said once."""
    said = steps(Form(Sizes(experts=8)), fullgraph=False)
    (line,) = [line for s in said for line in s.warnings()]
    assert "dynamo breaks the model" in line and f"{own_code.__file__}:" in line, line
    counts = [count for s in said for count in s.rewritten()]
    assert counts and all(count.startswith("0 of ") for count in counts), counts


def steps(form: Form, fullgraph: bool) -> list[Heard]:
    """The prompt, then three tokens: as eager and as the whole model. What is said at each step."""
    rank, sizes, heard = dist.get_rank(), form.sizes, []
    torch._dynamo.reset()
    model, plain, whole = Model(sizes, rank, WORLD), Model(sizes, rank, WORLD), Model(sizes)
    compiled = torch.compile(model, backend="cpcompile", fullgraph=fullgraph)
    shape = (sizes.batch, form.prompt + 3)
    ids, at = torch.randint(0, sizes.vocab, shape, generator=torch.Generator().manual_seed(1)), 0
    for tokens in (form.prompt, 1, 1, 1):
        now = ids[:, at : at + tokens]
        with hear() as said:
            logits = compiled(now, at)
        heard.append(said)
        close(logits, plain(now, at))
        close(logits, whole(now, at))
        at += tokens
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)
    return heard


def run_rank(rank: int, folder: str) -> None:
    with joined(rank, WORLD, folder), torch.no_grad():
        for name, form in FORMS.items():
            began = time.perf_counter()
            prefill_and_three_steps(form)
            print(f"rank {rank}: {name} {time.perf_counter() - began:.1f} s", flush=True)
        routed_in_python()


@pytest.mark.ranks
def test_two_ranks(tmp_path: Any) -> None:
    """One spawn for all forms."""
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
