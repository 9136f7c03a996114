"""FlashComm 2 on simulated ranks: the model's answer, fewer rows, more columns, the volume of the formula."""

from __future__ import annotations

import pytest
import torch
from conftest import case
from flash import REDUCED, SCATTERED, close, flash, run

IDS = torch.Generator().manual_seed(0)


def ids_of(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 96, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


SIZES = [(4, 1), (4, 2), (8, 1), (8, 2), (8, 4)]


@pytest.mark.parametrize("form", [SCATTERED, REDUCED])
@pytest.mark.parametrize(("size", "otp"), SIZES)
def test_every_rank_equals_the_model(size: int, otp: int, form: str) -> None:
    graphs = flash("v3", size, otp, form)
    assert not graphs[0].refused and len(graphs[0].products) == 2
    counts = range(1, 4 * size + 2) if size == 4 else (1, 5, 8, 9, 4 * size + 1)
    for tokens in counts:
        expected = case("v3", size).logits(ids_of(tokens))
        for rank, found in enumerate(run("v3", size, otp, form, ids_of(tokens), graphs)):
            close(found, expected, (tokens, rank))
