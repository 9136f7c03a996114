"""What a model means decides its plan, not how it is written; and every spelling's numbers are the whole model's."""

from __future__ import annotations

import functools
from dataclasses import replace

import blocks
import dialect_ops  # noqa: F401 registers the stand-ins
import pytest
import torch
from blocks import HIDDEN, LATENT, LAYERS, Block, Spelling, trace_block
from conftest import SharedRanks

from cpcompile.pipeline import Compiled

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


# Two reductions and two gathers a layer: the latent before the running sum, the hidden row before the MLP.
PLAN = sorted(
    [("scatter", "reduce_scatter", send(HIDDEN))] * 2 * LAYERS
    + [("gather", "all_gather", send(LATENT)), ("gather", "all_gather", send(HIDDEN))] * LAYERS
)


def test_the_plan_of_the_plain_spelling() -> None:
    """The first layer's input is whole already: nothing has been reduced. The last gather is of the final norm."""
    plan = plan_of(Spelling())
    print(plan)


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


EVERY = list(dict.fromkeys(s for family in FAMILIES.values() for s in family)) + [Spelling(summed="twice")]


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
