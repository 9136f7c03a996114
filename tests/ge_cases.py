"""What the cases of the GE interpreter's op types are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        return torch.randint(-9, 9, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def i64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def scalar(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@dataclass
class Case:
    """One op on some inputs, and what it gives: exactly, unless there is a tolerance."""

    type: str
    inputs: dict[str, Any]
    expected: Tensor | tuple[Tensor, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    within: float = 0.0


X, Y = rand(3, 4), rand(3, 1, seed=1)
A, B = rand(2, 3, 4), rand(5, 4)
POSITIVE = rand(3, 4).abs() + 0.1
BF, BG = rand(3, 4, dtype=torch.bfloat16), rand(3, 4, dtype=torch.bfloat16, seed=5)
INT, JNT = rand(3, 4, dtype=torch.int64), rand(3, 4, dtype=torch.int64, seed=3)
YES, NO = rand(3, 4, dtype=torch.bool), rand(3, 4, dtype=torch.bool, seed=7)
CUBE = rand(2, 3, 4, seed=2)
GAMMA, BETA = rand(4, seed=9) + 1, rand(4, seed=11)


def pair(op_type: str, function: Callable[..., Tensor], a: Tensor = X, b: Tensor = Y) -> Case:
    return Case(op_type, {"x1": a, "x2": b}, function(a, b))


def single(op_type: str, function: Callable[..., Tensor], x: Tensor = X, **attrs: Any) -> Case:
    return Case(op_type, {"x": x}, function(x), attrs)
