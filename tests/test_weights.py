"""Parts of weights, when the weights' memory is released and comes back."""

from __future__ import annotations

import torch

from cpcompile.weights import is_released, part_of, release


def first_rows(weight: torch.Tensor) -> torch.Tensor:
    return part_of(weight, ("rows", 2), lambda whole: whole[:2].clone())


def test_a_part_is_made_once_and_outlives_the_weight() -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64), requires_grad=False)
    part = first_rows(weight)
    assert release(weight, lambda _: "print") == 64 * 64 * 4 and is_released(weight)
    assert first_rows(weight) is part


def test_new_contents_where_the_released_ones_lay_have_a_part_of_their_own() -> None:
    """Allocators give the same memory again, and a new ``data`` keeps the version."""
    weight = torch.nn.Parameter(torch.ones(64, 64), requires_grad=False)
    first_rows(weight)
    there, version = weight.data_ptr(), weight._version
    release(weight, lambda _: "print")
    loaded: list[torch.Tensor] = []
    while len(loaded) < 99 and (not loaded or loaded[-1].data_ptr() != there):
        loaded.append(torch.full((64, 64), 5.0))
    weight.data = loaded[-1]
    assert (weight.data_ptr(), weight._version) == (there, version)  # else this test shows nothing
    assert first_rows(weight).eq(5).all()
