"""What a mask or its arithmetic can mean: integers linear in the indices, conjunctions of conditions, numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy
import torch
import torch.fx as fx

from cpcompile.passes.token_layout import ONE, Expr, Shape

# What is added to a masked score is at most this: PyTorch's own number for cuDNN's kernel, and the least of float16. By
# how much it is under the scores of the keys that are seen, its share of the softmax is 0 in every dtype.
HIDDEN = torch.finfo(torch.float16).min

Order: TypeAlias = Sequence["int | None"]


@dataclass(frozen=True)
class Affine:
    """An integer tensor: ``offset + sum_d steps[d] * index[d]``. As a condition: that this is at least 0."""

    steps: tuple[Expr, ...]
    offset: Expr

    def moved(self, order: Order) -> Affine:
        """With dim ``order[d]`` at ``d``; None is a new dim along which nothing changes."""
        return Affine(tuple(sympy.S.Zero if d is None else self.steps[d] for d in order), self.offset)

    def plus(self, other: Affine, factor: int = 1) -> Affine:
        """Sum with ``factor * other``, of as many dims."""
        steps = tuple(a + factor * b for a, b in zip(self.steps, other.steps, strict=True))
        return Affine(steps, self.offset + factor * other.offset)


@dataclass(frozen=True)
class Among:
    """Condition that the last index is among the top-k indices: ``dims[d]`` is the scores' dim that ``d`` runs over."""

    topk: fx.Node
    dims: tuple[int | None, ...]

    def moved(self, order: Order) -> Among:
        """As for ``Affine``."""
        return Among(self.topk, tuple(None if d is None else self.dims[d] for d in order))


Condition: TypeAlias = "Affine | Among"


@dataclass(frozen=True)
class Shown:
    """True, or 0 where additive, where all conditions hold; else false, or ``HIDDEN`` or less. Negated: the reverse."""

    conditions: frozenset[Condition] = frozenset()
    negated: bool = False
    additive: bool = False

    def moved(self, order: Order) -> Shown:
        """As for ``Affine``."""
        return replace(self, conditions=frozenset(c.moved(order) for c in self.conditions))


@dataclass(frozen=True)
class Number:
    """The same number everywhere."""

    value: float

    def moved(self, order: Order) -> Number:
        """Itself."""
        return self


Meaning: TypeAlias = "Affine | Shown | Number | None"


def normal(found: Meaning, shape: Shape | None) -> Meaning:
    """Steps along dims of size 1 are 0; linear conditions that always or never hold are no conditions."""
    if isinstance(found, Affine):
        assert shape is not None
        return Affine(
            tuple(sympy.S.Zero if n == ONE else s for s, n in zip(found.steps, shape, strict=True)), found.offset
        )
    if not isinstance(found, Shown):
        return found
    kept: set[Condition] = set()
    for condition in found.conditions:
        if isinstance(condition, Affine):
            condition = normal(condition, shape)  # type: ignore[assignment]
            assert isinstance(condition, Affine)
            if not any(condition.steps) and condition.offset.is_number:
                if condition.offset < 0:
                    return Shown(negated=not found.negated) if not found.additive else None
                continue
        kept.add(condition)
    return replace(found, conditions=frozenset(kept))
