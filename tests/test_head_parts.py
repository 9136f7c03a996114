"""Heads in a product's columns: their dims and columns past views, permutations and cuts, by what each element is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_ge_forms import traced
from torch import Tensor

from cpcompile.passes.head_parts import head_parts, is_laid_out

TOKENS, HEADS, WIDTH = 5, 3, 8
aten = torch.ops.aten
# What is made of the product [T, N W], and its dims and columns where those are followed up to what reads it.
FORMS: list[tuple[Callable[[Tensor], Tensor], str, tuple[int, int]]] = [
    (lambda q: q.view(-1, HEADS, WIDTH), "TNC", (0, 8)),
    (lambda q: q.view(1, -1, HEADS, WIDTH).transpose(1, 2), "1NTC", (0, 8)),
    (lambda q: q.view(-1, HEADS, WIDTH).permute(1, 0, 2)[..., 3:], "NTC", (3, 8)),
    (lambda q: q.view(-1, HEADS, WIDTH).split([2, 6], -1)[1][..., 1:4].unsqueeze(2), "TN1C", (3, 6)),
    (lambda q: q.view(-1, HEADS, 1, WIDTH).squeeze(2)[..., :4].contiguous(), "TNC", (0, 4)),
    (lambda q: q.view(-1, HEADS, WIDTH).permute(2, 0, 1), "CTN", (0, 8)),
    (lambda q: aten.expand(q.view(-1, HEADS, WIDTH), [TOKENS, HEADS, WIDTH]), "TNC", (0, 8)),
]


@pytest.mark.parametrize(("form", "dims", "columns"), FORMS)
def test_parts_are_followed(form: Callable[[Tensor], Tensor], dims: str, columns: tuple[int, int]) -> None:
    gm = traced(lambda x, w: form(x @ w).sin(), torch.randn(TOKENS, 2), torch.randn(2, HEADS * WIDTH), mode="fake")
    (up,) = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    ((user, part),) = head_parts(up)
    assert user.target is aten.sin.default and (part.dims, (part.start, part.end)) == (dims, columns)
    # And so it is: of a product whose elements are their own numbers.
    numbers = torch.arange(TOKENS * HEADS * WIDTH).view(TOKENS, HEADS, WIDTH)[..., slice(*columns)]
    order = ["TNC".index(mark) for mark in dims if mark != "1"]
    assert torch.equal(form(torch.arange(TOKENS * HEADS * WIDTH).view(TOKENS, -1)).squeeze(), numbers.permute(order))


ENDS: list[Callable[[Tensor], Tensor]] = [
    lambda q: q.view(-1, WIDTH),  # tokens and heads are one dim
    lambda q: q.view(-1, 2 * HEADS, WIDTH // 2).view(-1, HEADS, 2, WIDTH // 2),  # heads told apart twice
    lambda q: q.view(-1, HEADS, WIDTH)[:, :1],
    lambda q: q.view(-1, HEADS, WIDTH)[..., ::2],
    lambda q: q.view(-1, HEADS, WIDTH)[..., -3:],
    lambda q: q.view(-1, HEADS, WIDTH).select(1, 0),
    lambda q: q.view(HEADS, TOKENS, WIDTH),  # other rows
    lambda q: q.view(-1, WIDTH, HEADS).flatten(1).view(-1, HEADS, WIDTH),
]


@pytest.mark.parametrize("form", ENDS)
def test_others_are_where_it_ends(form: Callable[[Tensor], Tensor]) -> None:
    gm = traced(lambda x, w: form(x @ w).sin(), torch.randn(TOKENS, 2), torch.randn(2, HEADS * WIDTH), mode="fake")
    (up,) = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    found = [user.target for user, _ in head_parts(up)]
    assert found and aten.sin.default not in found


@pytest.mark.parametrize(("tokens", "heads"), [(1, 3), (5, 1), (1, 1)])
def test_dims_of_one_element_are_any(tokens: int, heads: int) -> None:
    gm = traced(
        lambda x, w: (x @ w).view(tokens, heads, WIDTH).transpose(0, 1).sin(),
        torch.randn(tokens, 2),
        torch.randn(2, heads * WIDTH),
        mode="fake",
    )
    (up,) = gm.graph.find_nodes(op="call_function", target=aten.mm.default)
    ((_, part),) = head_parts(up)
    assert is_laid_out(part.dims, "NTC") and (part.dims == "NTC") == (tokens > 1 and heads > 1)


def test_other_layouts_do_not_fit() -> None:
    assert is_laid_out("TN1C", "TN1C") and not any(is_laid_out(dims, "TN1C") for dims in ("TNC", "NT1C", "TNTC"))
