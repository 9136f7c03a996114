"""``torch.compile(model, backend="cpcompile")`` on two real gloo ranks: numbers, recompilations, refusals."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from blocks import VOCAB, Block, Spelling
from cached_models import Cached, Packed, mark_prefix, positions_of
from gloo_ranks import in_turn, joined
from heard import hear
from models import CACHES_LATENTS, TINY, build, shard, tiny_config
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

WORLD, TOLERANCE = 2, 2e-5


def ids_of(tokens: int, vocab: int = VOCAB) -> torch.Tensor:
    ids = torch.randint(0, vocab, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    if tokens > 1:
        torch._dynamo.mark_dynamic(ids, 1)
    return ids


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


def block(mesh: DeviceMesh, **options: Any) -> tuple[Block, Any]:
    """This rank's part of the hand-written model, plain and compiled."""
    model = Block(Spelling(), mesh, mesh.get_local_rank(), WORLD)
    torch._dynamo.reset()
    counters.clear()
    return model, torch.compile(model, backend="cpcompile", options=options, fullgraph=True)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def real_models(mesh: DeviceMesh, folder: str) -> None:
    """Every T >= 2 runs the one graph that was compiled, and every rank has the logits. V3 is in the matrix."""
    whole, model = build(tiny_config("v32")), shard(build(tiny_config("v32")), mesh)
    torch._dynamo.reset()
    counters.clear()
    options = {"strategy": "tp", "require": ["*o_proj", "*down_proj", "*embed_tokens"]}
    compiled = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
    with hear() as heard, torch.no_grad():
        for tokens in (9, 2, 3, 4, 5, 6, 7, 8, 16, 33):
            ids = ids_of(tokens, TINY["vocab_size"])
            close(compiled(input_ids=ids, use_cache=False).logits, whole(input_ids=ids, use_cache=False).logits)
        assert graphs() == 1 and heard.warnings() == []


def context_parallelism(mesh: DeviceMesh, folder: str) -> None:
    """Whole models on every rank, split by tokens: 50 prompt lengths run the one graph. An example's test has V3."""
    whole, model = build(tiny_config("v32")), build(tiny_config("v32"))
    torch._dynamo.reset()
    counters.clear()
    options = {"strategy": "cp", "axes": {"cp": mesh}}
    compiled = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
    with hear() as heard, torch.no_grad():
        for tokens in range(2, 52):
            ids = ids_of(tokens, TINY["vocab_size"])
            close(compiled(input_ids=ids, use_cache=False).logits, whole(input_ids=ids, use_cache=False).logits)
    assert graphs() == 1 and heard.warnings() == []


def layouts(mesh: DeviceMesh, folder: str) -> None:
    """Whichever rows a rank holds, its caller sees all of them in token order."""
    whole, model = build(tiny_config("v3", layers=1)), build(tiny_config("v3", layers=1))
    for layout in ("sp", "zigzag"):  # interleave: with caches, below
        torch._dynamo.reset()
        counters.clear()
        options = {"strategy": "cp", "axes": {"cp": mesh}, "require": ["*self_attn*"], "layout": layout}
        compiled = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
        with hear() as heard, torch.no_grad():
            for tokens in (17, 2, 3, 4, 5, 8, 1023):
                ids = ids_of(tokens, TINY["vocab_size"])
                close(compiled(input_ids=ids, use_cache=False).logits, whole(input_ids=ids, use_cache=False).logits)
        assert graphs() == 1 and heard.warnings() == []


def caches_and_batches(mesh: DeviceMesh, folder: str) -> None:
    """Three chunks and four decode steps from the caches are one shot; several requests in a row are each alone."""
    config = tiny_config("v32", layers=1, index_n_heads=32)  # no two scores of keys are equal
    whole, model = build(config), build(config)
    torch._dynamo.reset()
    ids = ids_of(47, TINY["vocab_size"])
    options = {"strategy": "cp", "axes": {"cp": mesh}, "replicated": ["*past*"], "layout": "interleave"}
    chunked = torch.compile(Cached(model), backend="cpcompile", options=options, fullgraph=True)
    caches: list[torch.Tensor] = []
    at = 0
    with hear() as heard, torch.no_grad():
        for tokens in (17, 2, 24, 1, 1, 1, 1):
            now = ids[:, at : at + tokens].contiguous()
            if tokens > 1:
                torch._dynamo.mark_dynamic(now, 1)
            logits, *caches = chunked(now, *mark_prefix(caches))
            at += tokens
            expected, *expected_caches = Cached(whole)(ids[:, :at])
            for mine, theirs in zip([logits, *caches], [expected[:, -tokens:], *expected_caches], strict=True):
                close(mine, theirs)
            # A single token has a graph of its own, with nothing to split.
            dense = [w for w in heard.warnings() if "its cache holds each head's keys and not latents" in w]
            assert tokens == 1 or heard.warnings() == dense
        assert bool(dense) != CACHES_LATENTS
    with hear() as heard, torch.no_grad():
        packed = torch.compile(Packed(model), backend="cpcompile", options=options, fullgraph=True)
        for lengths in ((1, 5, 8), (9, 8)):
            now, positions = ids[:, : sum(lengths)].contiguous(), positions_of(lengths)
            for given in (now, positions):
                torch._dynamo.mark_dynamic(given, 1)
            alone = [whole(input_ids=part, use_cache=False).logits for part in now.split(lengths, 1)]
            close(packed(now, positions), torch.cat(alone, 1))
    (line,) = heard.warnings()  # no op of ours takes the mask of several requests in a row
    assert "sparse attention runs dense in 1 of 1" in line and "its mask is not known to be causal" in line, line


def every_token_count(mesh: DeviceMesh, folder: str) -> None:
    """T = 0 and 1 get graphs of their own, by dynamo's rule; ``auto`` changes between its variants without another."""
    _model, compiled = block(mesh, profile="ascend-a3", dump_dir=folder)
    whole = Block()
    for tokens in (2, 3, 5, 4096, 1 << 16, 7):
        close(compiled(ids_of(tokens)), whole(ids_of(tokens)))
    assert graphs() == 1
    for tokens in (1, 0):
        close(compiled(ids_of(tokens)), whole(ids_of(tokens)))
    assert graphs() == 3


def mistakes(mesh: DeviceMesh, folder: str) -> None:
    expect("unknown option 'stratgy' (did you mean 'strategy'?)", block(mesh, stratgy="tp")[1])
    expect("require='*o_porj': nothing of that name was rewritten", block(mesh, strategy="tp", require=["*o_porj"])[1])
    expect("no process group is called 'nope'", block(mesh, axes={"tp": "nope"})[1])
    expect("cannot read the plan", block(mesh, plan=f"{folder}/nope.json")[1])
    # None of these left the ranks out of step.
    _, compiled = block(mesh, strategy="tp")
    close(compiled(ids_of(5)), Block()(ids_of(5)))


def expect(message: str, compiled: Callable[[torch.Tensor], Any]) -> None:
    with pytest.raises(Exception, match=re.escape(message)):
        compiled(ids_of(5))


def training(mesh: DeviceMesh, folder: str) -> None:
    """A graph that is differentiated is left alone, with a warning."""
    model, compiled = block(mesh, strategy="tp", require=["*"])
    whole = Block()
    for each in (model, whole):
        each.final.requires_grad_(True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, expected = compiled(ids_of(5)), whole(ids_of(5))
    assert [w for w in caught if "it runs unmodified; call the model under torch.no_grad()" in str(w.message)]
    close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    close(model.final.grad, whole.final.grad)


def different_options(mesh: DeviceMesh, folder: str) -> None:
    """Ranks that decide differently run the graph as it came, and say so."""
    with hear() as heard:
        _model, compiled = block(mesh, profile=("ascend-a3", "pcie")[mesh.get_local_rank()])
        close(compiled(ids_of(5)), Block()(ids_of(5)))
    assert any(
        "the ranks of axis" in line and "made different plans: give all of them the same options" in line
        for line in heard.warnings()
    )


def inductor(mesh: DeviceMesh, folder: str) -> None:
    _model, compiled = block(mesh, strategy="tp", target="inductor")
    for tokens in (5, 8, 2):
        close(compiled(ids_of(tokens)), Block()(ids_of(tokens)))
    assert graphs() == 1


SCENARIOS = [
    every_token_count, mistakes, training, different_options, inductor, real_models,
    context_parallelism,
    layouts,
    caches_and_batches,
]  # fmt: skip


def run_rank(rank: int, folder: str) -> None:
    with joined(rank, WORLD, folder):
        in_turn(SCENARIOS, init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",)), folder)


@pytest.mark.ranks
def test_two_ranks(tmp_path: Any) -> None:
    """One spawn for all scenarios."""
    mp.spawn(run_rank, (str(tmp_path),), nprocs=WORLD)
