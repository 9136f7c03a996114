"""Index arithmetic of the static proof: where every element of a tensor comes from, exactly and without patterns.

A tensor is described by its dims, each a sequence of ``(size, stride)`` digits into the row-major elements of some
content; a view regroups the digits and a permutation reorders the dims. A content that is split by rows is
``[pre, extent, post]``: the extent is T tokens, L of them on this rank (``ceil(T/n)``, an even number if each rank has
two blocks), or ``N = n*L`` with padding, each rank's rows one after another.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from cpcompile.passes.token_layout import shape_of, size_expr

Size: TypeAlias = int | sympy.Expr
Shape: TypeAlias = tuple[Size, ...]
Digit: TypeAlias = tuple[Size, Size]
Dims: TypeAlias = tuple[tuple[Digit, ...], ...]


@dataclass(frozen=True)
class Rows:
    """The dim that is split by rows, ``outer * T * inner`` in size."""

    dim: int
    outer: Size = 1
    inner: Size = 1

    def shifted(self, by: int) -> Rows:
        """The same rows ``by`` dims further to the right."""
        return Rows(self.dim + by, self.outer, self.inner)


def plain(size: object) -> Size:
    """An ``int``, ``SymInt`` or expression as an ``int`` where it is one, else as an expression."""
    if isinstance(size, int):
        return size
    expr = size if isinstance(size, sympy.Expr) else size_expr(size)
    return int(expr) if expr.is_Integer else expr


def tensor_shape(value: torch.Tensor) -> Shape:
    """Shape of a (fake) tensor; adds no guard."""
    return tuple([int(s) if s.is_Integer else s for s in shape_of(value)])


@functools.lru_cache(maxsize=65536)
def _times(a: Size, b: Size) -> Size:
    return plain(sympy.expand(a * b))  # one form, whatever the order: cached and new keys make sums


def times(a: Size, b: Size) -> Size:
    """``a * b``."""
    return a * b if type(a) is int and type(b) is int else _times(a, b)


@functools.lru_cache(maxsize=65536)
def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for all values of their symbols, as far as expanding shows."""
    return a == b or sympy.expand(a - b) == 0


@functools.lru_cache(maxsize=65536)
def divide(a: Size, b: Size) -> Size | None:
    """``a / b`` where ``b`` is a factor of ``a``, else None."""
    if b == 0:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    ratio = sympy.sympify(a) / b
    numerator, denominator = (sympy.cancel(ratio) if ratio.has(sympy.Add) else ratio).as_numer_denom()
    return plain(numerator) if denominator == 1 else None


def product(sizes: Iterable[Size]) -> Size:
    """The product of ``sizes``; 1 for none."""
    return functools.reduce(times, sizes, 1)


@functools.lru_cache(maxsize=65536)
def row_major(shape: Shape) -> Dims:
    """The digits of a tensor whose elements are its content in order."""
    dims: list[tuple[Digit, ...]] = []
    stride: Size = 1
    for size in reversed(shape):
        dims.append(() if size == 1 else ((size, stride),))
        stride = times(stride, size)
    return tuple(reversed(dims))


@functools.lru_cache(maxsize=65536)
def shape(dims: Dims) -> Shape:
    """Sizes of the dims."""
    return tuple(product(size for size, _ in dim) for dim in dims)


def merged(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """The same digits with neighbours that run on made one, and those of size 1 left out."""
    found: list[Digit] = []
    for size, stride in digits:
        if size == 1:
            continue
        if found and found[-1][1] == times(size, stride):
            size = times(found.pop()[0], size)
        found.append((size, stride))
    return tuple(found)


@functools.lru_cache(maxsize=65536)
def is_row_major(dims: Dims) -> bool:
    """Whether the tensor's elements are its content in order."""
    flat = merged(digit for dim in dims for digit in dim)
    return not flat or (len(flat) == 1 and flat[0][1] == 1)


@functools.lru_cache(maxsize=65536)
def is_permuted(dims: Dims) -> bool:
    """Whether the tensor has each element of its content once, in whatever order."""
    pending = [digit for dim in dims for digit in dim]
    stride: Size = 1
    while pending:
        found = next((digit for digit in pending if digit[1] == stride), None)
        if found is None:
            return False
        pending.remove(found)
        stride = times(stride, found[0])
    return True


@functools.lru_cache(maxsize=65536)
def regroup(dims: Dims, sizes: Shape) -> Dims | None:
    """The digits after a row-major view to ``sizes`` (one may be -1), None where digits would have to be cut apart."""
    if -1 in sizes:
        at = sizes.index(-1)
        rest = divide(product(shape(dims)), product([*sizes[:at], *sizes[at + 1 :]]))
        if rest is None:
            return None
        sizes = (*sizes[:at], rest, *sizes[at + 1 :])
    pending = list(merged(digit for dim in dims for digit in dim))[::-1]
    found = []
    for size in sizes:
        group: list[Digit] = []
        while size != 1:
            if size == 0 or not pending:
                return None
            have, stride = pending.pop()
            left, kept = divide(size, have), divide(have, size)
            if left is not None:
                group.append((have, stride))
                size = left
            elif kept is not None:
                group.append((size, times(stride, kept)))
                pending.append((kept, stride))
                size = 1
            else:
                return None
        found.append(merged(group))
    return None if pending else tuple(found)


def _cut(digits: Sequence[Digit], at: Size) -> list[Digit]:
    """The digits with every one that runs across stride ``at`` made two."""
    found: list[Digit] = []
    for size, stride in digits:
        low = divide(at, stride)
        high = None if low is None else divide(size, low)
        if low is None or high is None or low == 1 or high == 1:
            found.append((size, stride))
        else:
            found += [(high, at), (low, stride)]
    return found


@dataclass(frozen=True)
class Split:
    """How rows are split: ``tokens`` T over ``ranks`` n, ``local`` L each, ``padded`` N = n*L in all.

    ``layout`` says which rows those are; where it is contiguous, they lie in N as they lie in T.
    """

    tokens: Size
    ranks: int
    rank: int
    local: Size
    padded: Size
    layout: str = "contiguous"

    @staticmethod
    def of(tokens: sympy.Expr, ranks: int, rank: int, layout: str = "contiguous") -> Split:
        """``tokens`` over ``ranks``, seen from ``rank``."""
        local = plain(FloorDiv(tokens + ranks - 1, ranks))
        if layout == "zigzag":
            local = times(2, plain(FloorDiv(tokens + 2 * ranks - 1, 2 * ranks)))
        return Split(plain(tokens), ranks, rank, local, times(local, ranks), layout)

    @property
    def unpadded(self) -> bool:
        """Whether N holds the rows of T and no others, in their order."""
        return self.layout == "contiguous" and same(self.padded, self.tokens)

    def rescale(self, dims: Dims, old: Size, new: Size, post: Size) -> Dims | None:
        """Digits in ``[pre, old, post]`` as digits in ``[pre, new, post]``; those within a row block stay.

        None where a digit belongs neither to ``pre`` nor to the block.
        """
        found = []
        block = times(old, post)
        for dim in dims:
            digits = []
            for size, stride in _cut(dim, block):
                above = divide(stride, block)
                if above is not None:
                    stride = times(above, times(new, post))
                elif divide(block, times(size, stride)) is None:
                    return None
                digits.append((size, stride))
            found.append(tuple(digits))
        return tuple(found)

    def rows_apart(self, dims: Dims, at: int, old: Size, new: Size) -> tuple[Dims, Size, Size] | None:
        """The digits with ``new`` rows for the ``old`` ones of dim ``at``, ``pre`` and ``post``; others lie anywhere.

        None where that dim holds more than rows, or some element of the content is there twice or not at all.
        """
        if len(dims[at]) != 1 or dims[at][0][0] != old or not is_permuted(dims):
            return None
        post = dims[at][0][1]
        rest, pre = self.rescale(dims, old, new, post), divide(product(shape(dims)), times(old, post))
        if rest is None or pre is None:
            return None
        return (*rest[:at], ((new, post),), *rest[at + 1 :]), pre, post

    def wholes(self, dims: Dims, post: Size) -> tuple[tuple[Dims, Rows], ...]:
        """What a shard in ``[pre, L, post]`` may be rows of: the digits of the whole, and the dim of its rows.

        One answer, or none where rows are interleaved; where L is 1 its digit could be anywhere, and every place
        is true.
        """
        return _wholes(self, dims, post)

    def gathered(self, dims: Dims, post: Size) -> Dims | None:
        """All ranks' ``[pre, L, post]`` along dim 0."""
        wide = self.rescale(dims, self.local, self.padded, post)
        if wide is None or not wide:
            return None
        return (merged(((self.ranks, times(self.local, post)), *wide[0])), *(merged(d) for d in wide[1:]))

    def scattered(self, dims: Dims) -> tuple[Dims, Size] | None:
        """The rank's part of dim 0, and what ``post`` must be if these are its rows of ``[pre, N, post]``."""
        if not dims or not dims[0]:
            return None
        size, stride = dims[0][0]
        rest = divide(size, self.ranks)
        post = None if rest is None else divide(times(stride, rest), self.local)
        if rest is None or post is None:
            return None
        block = times(self.local, post)
        left = (((rest, stride), *dims[0][1:]) if rest != 1 else dims[0][1:], *dims[1:])
        found = []
        for dim in left:
            digits = []
            for digit, step in _cut(_cut(dim, times(self.padded, post)), block):
                above = divide(step, times(self.padded, post))
                if above is not None:
                    step = times(above, block)
                elif divide(block, times(digit, step)) is None:
                    return None
                digits.append((digit, step))
            found.append(merged(digits))
        return tuple(found), post


@functools.lru_cache(maxsize=65536)
def _wholes(split: Split, dims: Dims, post: Size) -> tuple[tuple[Dims, Rows], ...]:
    wide = split.rescale(dims, split.local, split.tokens, post)
    if wide is None:
        return ()
    places = []
    cut = [_cut(dim, post) for dim in wide]
    for d, digits in enumerate(cut):
        if split.local == 1:
            places += [(d, k, k) for k in range(len(digits) + 1)]
        else:
            places += [(d, k, k + 1) for k, digit in enumerate(digits) if digit == (split.local, post)]
    if split.local != 1 and len(places) != 1:
        return ()
    found = []
    for d, first, last in places:
        before, after = cut[d][:first], cut[d][last:]
        whole = [merged(dim) for dim in cut]
        whole[d] = merged([*before, (split.tokens, post), *after])
        found.append((tuple(whole), Rows(d, product(s for s, _ in before), product(s for s, _ in after))))
    return tuple(found)
