"""What a model means decides its plan, not how it is written; and every spelling's numbers are the whole model's."""

from __future__ import annotations

import functools
from dataclasses import replace

import blocks
import dialect_ops  # noqa: F401 registers the stand-ins
import pytest
import torch
from blocks import HIDDEN, LATENT, LAYERS, Block, Spelling, trace_block, trace_rank
from conftest import SharedRanks
from simulate import fake_rank

from cpcompile.compiled import Compiled

RANKS, TOKENS, TOLERANCE = 4, 4096, 2e-5

FAMILIES = {
    "shape": [Spelling(shape=s) for s in (blocks.as_view, blocks.as_reshape, blocks.as_flatten)],
    "order of addition": [Spelling(residual_first=r) for r in (True, False)],
    "noise": [Spelling(), *(Spelling(after=noise) for noise in (blocks.sliced, blocks.joined, blocks.cloned))],
    "norm": [Spelling(norm=norm) for norm in (blocks.plain_norm, blocks.fused_norm, blocks.cast_norm)],
    "dialect": [
        Spelling(all_reduce=f)
        for f in (blocks.functional, blocks.in_place, blocks.coalesced, blocks.dtensor, blocks.vllm)
    ],
    "everything": [
        Spelling(),
        Spelling(blocks.in_place, blocks.fused_norm, blocks.as_reshape, blocks.sliced, False),
        Spelling(blocks.vllm, blocks.plain_norm, blocks.as_flatten, blocks.cloned, True),
        Spelling(blocks.dtensor, blocks.fused_norm, blocks.as_view, blocks.joined, False),
    ],
}


@functools.cache
def traced(spelling: Spelling, lead: tuple[int, ...] = (1,)) -> SharedRanks:
    return trace_block(spelling, RANKS, lead)


@functools.cache
def compiled(spelling: Spelling, lead: tuple[int, ...] = (1,)) -> list[Compiled]:
    found = traced(spelling, lead).compile(strategy="tp", profile="ascend-a3")
    assert all(not c.refused and c.proofs and c.rewritten for c in found)
    return found


def plan_of(spelling: Spelling, lead: tuple[int, ...] = (1,)) -> list[tuple[str, str, int]]:
    """Decision, what it becomes and elements for each token, of every collective; names left out."""
    rows = compiled(spelling, lead)[0].report(TOKENS).collectives
    batch = torch.Size(lead).numel()
    return sorted((c.decision, c.becomes.split(" of ")[0], c.elements_after // (batch * TOKENS)) for c in rows)


def send(width: int) -> int:
    return width * (RANKS - 1) // RANKS


# A layer: a reduction each for the residual, the latent gathered for the running sum, the hidden row for the MLP.
LAYER = [("scatter", "reduce_scatter", send(HIDDEN))] * 2 + [
    ("gather", "all_gather", send(w)) for w in (LATENT, HIDDEN)
]
LOGITS = ("gather", "all_gather", send(blocks.VOCAB))  # fewer than the hidden row: the output layer runs on shards


def test_the_plan_of_the_plain_spelling() -> None:
    assert plan_of(Spelling()) == sorted(LAYER * LAYERS + [LOGITS])


def test_every_rank_has_the_same_graph() -> None:
    derived = traced(Spelling()).traces[RANKS - 1]
    with fake_rank(RANKS - 1, RANKS) as mesh:
        real = trace_rank(Spelling(), mesh, RANKS - 1, RANKS)
    assert real.gm.print_readable(print_output=False) == derived.gm.print_readable(print_output=False)
    for a, b in zip(real.inputs, derived.inputs, strict=True):
        assert (a.name, a.kind) == (b.name, b.kind)
        assert a.kind != "parameter" or torch.equal(a.value, b.value)


@pytest.mark.parametrize(("family", "number"), [(f, i) for f, every in FAMILIES.items() for i in range(1, len(every))])
def test_the_plan_is_the_same_in_every_spelling(family: str, number: int) -> None:
    first, *others = FAMILIES[family]
    assert plan_of(others[number - 1]) == plan_of(first)


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_the_plan_is_the_same_for_every_layout(lead: tuple[int, ...]) -> None:
    assert plan_of(Spelling(), lead) == plan_of(Spelling())


def test_two_reductions_that_are_added_are_one() -> None:
    twice = plan_of(Spelling(summed="twice"))
    assert [row for row in twice if row[0] == "merge"] == [("merge", "part", 0)] * 2 * LAYERS
    moved = [(becomes, elements) for _, becomes, elements in twice if elements]
    assert moved == [(becomes, elements) for _, becomes, elements in plan_of(Spelling())]


def ids_of(lead: tuple[int, ...], tokens: int) -> torch.Tensor:
    return torch.randint(0, blocks.VOCAB, (*lead, tokens), generator=torch.Generator().manual_seed(tokens))


EVERY = [*list(dict.fromkeys(s for family in FAMILIES.values() for s in family)), Spelling(summed="twice")]


@pytest.mark.parametrize("spelling", EVERY, ids=range(len(EVERY)))
def test_every_rank_equals_the_whole_model(spelling: Spelling) -> None:
    check(spelling, (1,), [0, 1, RANKS - 1, RANKS, RANKS + 1, 4 * RANKS + 1])


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_every_layout_equals_the_whole_model(lead: tuple[int, ...]) -> None:
    check(Spelling(), lead, list(range(0, 4 * RANKS + 2)))


def check(spelling: Spelling, lead: tuple[int, ...], token_counts: list[int]) -> None:
    whole = Block(replace(spelling, all_reduce=blocks.functional))
    graphs = [c.variants[0].gm for c in compiled(spelling, lead)]
    for tokens in token_counts:
        ids = ids_of(lead, tokens)
        expected = whole(ids)
        for rank, (found,) in enumerate(traced(spelling, lead).run(graphs, ids)):
            assert found.shape == expected.shape
            assert (found - expected).norm() <= TOLERANCE * expected.norm(), f"T={tokens}, rank {rank}"
