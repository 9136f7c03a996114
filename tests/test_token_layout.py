"""Token dims against index arithmetic: where the rows of a shard lie before and after a view."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sympy
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cpcompile.passes.token_layout import (
    ONE,
    Shape,
    TokenDim,
    product,
    quotient,
    row_dim,
    shape_of,
    size_expr,
    through_view,
    value_shapes,
)

B, T, H, K = (sympy.Symbol(n, positive=True, integer=True) for n in "BTHK")


def exprs(*sizes: int | sympy.Expr) -> Shape:
    return tuple(map(sympy.sympify, sizes))


def layout_of(dim: int, outer: int | sympy.Expr = 1, inner: int | sympy.Expr = 1) -> TokenDim:
    return TokenDim(dim, sympy.sympify(outer), sympy.sympify(inner))


def rows(index: np.ndarray, layout: TokenDim, tokens: int, row: int) -> np.ndarray:
    """The flat indices of one token's row, by memory order, as a sorted array."""
    outer, inner = int(layout.outer), int(layout.inner)
    head, tail = index.shape[: layout.dim], index.shape[layout.dim + 1 :]
    parted = index.reshape(math.prod(head) * outer, tokens, inner * math.prod(tail))
    return parted[:, row].ravel()


def brute(source: tuple[int, ...], target: tuple[int, ...], layout: TokenDim, tokens: int) -> list[TokenDim]:
    """Every token dim of ``target`` under which each token has the very elements that it has in ``source``."""
    before = np.arange(math.prod(source)).reshape(source)
    after = before.reshape(target)
    found = []
    for dim, size in enumerate(target):
        for outer in range(1, size + 1):
            if size % (outer * tokens):
                continue
            here = layout_of(dim, outer, size // (outer * tokens))
            if all(
                np.array_equal(rows(before, layout, tokens, t), rows(after, here, tokens, t)) for t in range(tokens)
            ):
                found.append(here)
    return found


@st.composite
def factorisations(draw: st.DrawFn, total: int) -> tuple[int, ...]:
    """A shape of ``total`` elements."""
    sizes = []
    while total > 1 and len(sizes) < 4:
        size = draw(st.sampled_from([d for d in range(1, total + 1) if total % d == 0]))
        sizes.append(size)
        total //= size
    return (*sizes, total) if total > 1 or not sizes else tuple(sizes)


@st.composite
def placed_views(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], TokenDim, int]:
    total = draw(st.sampled_from([4, 6, 8, 12, 16, 24, 30, 36, 48, 60, 72]))
    source, target = draw(factorisations(total)), draw(factorisations(total))
    dim = draw(st.integers(0, len(source) - 1))
    tokens = draw(st.sampled_from([d for d in range(1, source[dim] + 1) if source[dim] % d == 0]))
    rest = source[dim] // tokens
    outer = draw(st.sampled_from([d for d in range(1, rest + 1) if rest % d == 0]))
    return source, target, layout_of(dim, outer, rest // outer), tokens


@settings(max_examples=500, deadline=None)
@given(placed_views())
def test_through_view_is_index_arithmetic(case: tuple[tuple[int, ...], tuple[int, ...], TokenDim, int]) -> None:
    source, target, layout, tokens = case
    found = through_view(exprs(*source), exprs(*target), layout, sympy.Integer(tokens))
    possible = brute(source, target, layout, tokens)
    if found is None:
        assert tokens == 1 or not possible  # one token lies in any dim; which is a matter of taste
    else:
        assert found in possible
        assert target[found.dim] == found.size(sympy.Integer(tokens))


@settings(max_examples=150, deadline=None)
@given(placed_views())
def test_a_view_and_its_inverse(case: tuple[tuple[int, ...], tuple[int, ...], TokenDim, int]) -> None:
    source, target, layout, tokens = case
    assume(tokens > 1)  # one token lies in any dim
    there = through_view(exprs(*source), exprs(*target), layout, sympy.Integer(tokens))
    assume(there is not None)
    assert through_view(exprs(*target), exprs(*source), there, sympy.Integer(tokens)) == layout  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "layout", "target", "expected"),
    [
        ((B, T, H), layout_of(1), (B * T, H), layout_of(0, B)),
        ((B * T, H), layout_of(0, B), (B, T, H), layout_of(1)),
        ((B, T, H), layout_of(1), (B, T, 4, H / 4), layout_of(1)),
        ((B, T, 4 * H), layout_of(1), (B, T, 4, H), layout_of(1)),
        ((B, T, 4, H), layout_of(1), (B, T, 4 * H), layout_of(1)),
        ((B * T, 128), layout_of(0, B), (B, T, 8, 16), layout_of(1)),
        ((B, T, K), layout_of(1), (B * T * K,), layout_of(0, B, K)),
        ((B * T * K,), layout_of(0, B, K), (B * T, K), layout_of(0, B)),
        ((B * T * K,), layout_of(0, B, K), (B, T * K), layout_of(1, 1, K)),
        ((B * T * 8, 7168), layout_of(0, B, 8), (B * T, 8, 7168), layout_of(0, B)),
        ((T, 7168), layout_of(0), (1, T, 1, 7168), layout_of(1)),
        ((T, 8, 16), layout_of(0), (T * 8, 16), layout_of(0, 1, 8)),
        ((T * 8, 16), layout_of(0, 1, 8), (T * 4, 32), layout_of(0, 1, 4)),
        ((B, T), layout_of(1), (T, B), None),  # a view is no transpose
        ((T, H), layout_of(0), (H, T), None),
        ((T, 6), layout_of(0), (2, T * 3), None),  # the halves of the tokens
        ((2 * T, 6), layout_of(0, 2), (2, T, 6), layout_of(1)),
        ((2 * T, 6), layout_of(0, 1, 2), (2, T, 6), None),
        ((2 * T, 6), layout_of(0, 1, 2), (T, 2, 6), layout_of(0)),
    ],
    ids=str,
)
def test_symbolic_views(source: Shape, layout: TokenDim, target: Shape, expected: TokenDim | None) -> None:
    assert through_view(exprs(*source), exprs(*target), layout, T) == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.permutations(range(4)))
def test_what_holds_for_symbols_holds_for_numbers(b: int, t: int, k: int, order: list[int]) -> None:
    """A symbolic answer, with numbers put in, is one that index arithmetic allows."""
    factors = [B, T, K, sympy.Integer(2)]
    source, layout = (B, T, K, sympy.Integer(2)), layout_of(1)
    splits = sorted(order[:2])
    target = tuple(product(factors[i:j]) for i, j in zip([0, *splits], [*splits, 4], strict=True))
    found = through_view(source, target, layout, T)
    assert found is not None
    numbers = {B: b, T: t, K: k}
    at = TokenDim(found.dim, *(sympy.sympify(e).subs(numbers) for e in (found.outer, found.inner)))
    shapes = [tuple(int(s.subs(numbers)) for s in shape) for shape in (source, target)]
    assert at in brute(shapes[0], shapes[1], layout, t)


def test_empty_values() -> None:
    assert through_view(exprs(0, 8), exprs(0, 4, 2), layout_of(0), sympy.Integer(0)) is None
    assert through_view(exprs(0, 4), exprs(0, 2, 2), layout_of(1), sympy.Integer(4)) is None
    assert through_view(exprs(4, 0), exprs(4, 0, 2), layout_of(0), sympy.Integer(4)) == layout_of(0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (B * T, B, T),
        (sympy.Integer(12), sympy.Integer(4), sympy.Integer(3)),
        (sympy.Integer(12), sympy.Integer(5), None),
        (sympy.Integer(12), sympy.Integer(0), None),
        (T, sympy.Integer(2), None),
        (2 * T, sympy.Integer(2), T),
        (B, T, None),
    ],
)
def test_quotient_is_an_integer_for_all_values(a: sympy.Expr, b: sympy.Expr, expected: sympy.Expr | None) -> None:
    assert quotient(a, b) == expected


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [
        ((T, H), T, layout_of(0)),
        ((B, T, H), T, layout_of(1)),
        ((B * T, H), T, layout_of(0, B)),
        ((T, 1, H), T, layout_of(0)),  # a lone dim between is none
        ((1, T, H), None, layout_of(1)),
        ((B, 1, H), None, layout_of(0)),
        ((1, 1, H), None, layout_of(0)),
        ((B, K, H), T, None),
        ((T, 2, H), None, layout_of(0)),  # of [T, B, H], the size that changes
        ((T, 2, H), T, layout_of(0)),
        ((B, 8, H), sympy.Integer(8), layout_of(1)),  # a prompt of a fixed length
        ((T,), T, None),
    ],
    ids=str,
)
def test_row_dim(shape: Shape, tokens: sympy.Expr | None, expected: TokenDim | None) -> None:
    assert row_dim(exprs(*shape), tokens) == expected


def test_sizes_and_shifts() -> None:
    layout = layout_of(1, B, 8)
    assert layout.size(T) == 8 * B * T
    assert layout.shifted(-1) == layout_of(0, B, 8) and layout.shifted(2).dim == 3
    assert product(()) == ONE and product(exprs(2, T, 3)) == 6 * T


def test_shapes_of_fake_tensors_add_no_guard() -> None:
    env = ShapeEnv()
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
    value = FakeTensorMode(shape_env=env).from_tensor(torch.empty(12, 8), symbolic_context=context)
    before = len(env.guards)
    (t, h), (rows_, width) = shape_of(value), value.shape
    assert isinstance(t, sympy.Symbol) and h == 8
    assert size_expr(rows_ * 2 * width) == 16 * t
    node = torch.fx.Graph().placeholder("x")
    assert value_shapes(node) == ()
    node.meta["val"] = rows_
    assert value_shapes(node) == ()
    node.meta["val"] = (value, 3, None)
    assert value_shapes(node) == ((t, h), (), ())
    assert len(env.guards) == before


def test_symbols_of_a_trace_are_divided_like_integers() -> None:
    """Dynamo's symbols are positive integers: what the rules rely on for ``[B*T, H] -> [B, T, H]``."""
    env = ShapeEnv()
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.DYNAMIC, DimDynamic.STATIC])
    mode = FakeTensorMode(shape_env=env)
    value = mode.from_tensor(torch.empty(3, 12, 8), symbolic_context=context)
    with mode:
        flat = value.reshape(value.shape[0] * value.shape[1], 8)
    b, t, _ = shape_of(value)
    found = through_view(shape_of(value), shape_of(flat), layout_of(1), t)
    assert found == layout_of(0, b)
    assert through_view(shape_of(flat), shape_of(value), found, t) == layout_of(1)
