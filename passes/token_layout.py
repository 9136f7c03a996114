"""Where the tokens of a value lie: one tensor dim, factored as ``outer * T * inner`` in row-major order.

``[B, T, H]`` has its tokens at ``TokenDim(1)``, its flattening ``[B*T, H]`` at ``TokenDim(0, outer=B)``, and the
``[B*T*k]`` expert slots of a router at ``TokenDim(0, outer=B, inner=k)``. A shard over ``n`` ranks has
``ceil(T/n)`` in the place of ``T``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
import torch.fx as fx

Expr: TypeAlias = sympy.Expr
Shape: TypeAlias = tuple[Expr, ...]
ONE: Expr = sympy.Integer(1)


@dataclass(frozen=True)
class TokenDim:
    """The tensor dim that carries tokens, and what else is folded into it."""

    dim: int
    outer: Expr = ONE
    inner: Expr = ONE

    def size(self, tokens: Expr) -> Expr:
        """Size of the dim when it holds ``tokens`` tokens."""
        return self.outer * tokens * self.inner

    def shifted(self, by: int) -> TokenDim:
        """The same tokens ``by`` dims further to the right."""
        return TokenDim(self.dim + by, self.outer, self.inner)


def size_expr(size: object) -> Expr:
    """The sympy expression of an ``int`` or ``SymInt``."""
    if isinstance(size, torch.SymInt):
        expr: Expr = size.node.expr
        return expr
    return sympy.Integer(size)


def shape_of(value: torch.Tensor) -> Shape:
    """The shape of a (fake) tensor as sympy expressions; adds no guard."""
    return tuple(size_expr(s) for s in value.shape)


def value_shapes(node: fx.Node) -> tuple[Shape, ...]:
    """Shapes of the tensors that ``node`` returns; ``()`` where it returns none."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (shape_of(value),)
    if isinstance(value, list | tuple):
        return tuple(shape_of(v) if isinstance(v, torch.Tensor) else () for v in value)
    return ()


def product(sizes: Sequence[Expr]) -> Expr:
    """The product of ``sizes``; 1 for none."""
    return functools.reduce(lambda a, b: a * b, sizes, ONE)


def quotient(a: Expr, b: Expr) -> Expr | None:
    """``a / b`` if that is an integer for all values of the symbols, else None."""
    if b.is_zero:
        return None
    q = a / b
    return q if q.is_integer and q.is_nonnegative is not False else None


@functools.lru_cache(maxsize=65536)
def through_view(source: Shape, target: Shape, layout: TokenDim, tokens: Expr) -> TokenDim | None:
    """Where ``layout`` of a value of shape ``source`` lies after a row-major view to ``target``.

    The token factor must end up whole inside one dim: what precedes and what follows it in memory order keep
    their products. Returns None where the view splits or interleaves the tokens.
    """
    before = product(source[: layout.dim]) * layout.outer
    after = layout.inner * product(source[layout.dim + 1 :])
    prefix = ONE
    for dim, size in enumerate(target):
        outer = quotient(before, prefix)
        inner = quotient(size, outer * tokens) if outer is not None and not outer.is_zero else None
        if outer is not None and inner is not None and inner * product(target[dim + 1 :]) == after:
            return TokenDim(dim, outer, inner)
        prefix = prefix * size
    return None


def counted(expr: Expr, tokens: Expr, count: Expr) -> Expr:
    """``expr`` with ``count`` for T where T is a symbol, a multiple of one (of what each rank brings), or a sum."""
    for symbol in sorted(tokens.free_symbols, key=str):
        rest = tokens - symbol
        if (tokens / symbol).is_number:
            return expr.subs(symbol, count * symbol / tokens)
        if tokens.is_Add and symbol not in rest.free_symbols:
            return sympy.expand(expr.subs(symbol, count - rest))
    return expr


def row_dim(shape: Shape, tokens: Expr | None) -> TokenDim | None:
    """The token dim of a ``[..., T, H]`` value about which nothing else is known: its last row dim of size > 1.

    A size that changes from call to call goes before one that does not (``[T, B, H]``; ``[B, 4, H]`` of drafts), unless
    the tokens are known not to change. With ``tokens`` known, the dim must hold a multiple of them (``[B*T, H]`` has
    ``outer = B``).
    """
    dims = [dim for dim in range(len(shape) - 2, -1, -1) if dim == 0 or shape[dim] != ONE]
    if tokens is None or not tokens.is_number:
        dims.sort(key=lambda dim: bool(shape[dim].is_number))
    if not dims:
        return None
    outer = ONE if tokens is None else quotient(shape[dims[0]], tokens)
    return None if outer is None else TokenDim(dims[0], outer)
