"""Every row of the op table against two oracles: the numbers of each shard, and DTensor's own sharding propagation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import sympy
import torch
import torch.distributed as dist
import torch.fx as fx
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpcompile.passes.placement_problem import _NUMERATOR_ONLY
from cpcompile.passes.placement_rules import RULES, UNUSED, Mixing, RowWise, classify, find_rule, op_name
from cpcompile.passes.token_layout import TokenDim

A = torch.ops.aten
C10D = torch.ops._c10d_functional


@dataclass(eq=False)
class X:
    """An operand: float64 normal, or int64 below ``high``, or bool; the same object twice is the same value."""

    shape: tuple[int, ...]
    kind: str = "float"
    high: int = 4

    def make(self, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        if self.kind == "float":
            return torch.randn(self.shape, generator=g, dtype=torch.float64)
        integers = torch.randint(0, 2 if self.kind == "bool" else self.high, self.shape, generator=g)
        return integers.bool() if self.kind == "bool" else integers


@dataclass(eq=False)
class Op:
    """One call: ``X`` among the arguments are its tensor operands."""

    target: torch._ops.OpOverload
    args: tuple[object, ...]
    kwargs: dict[str, object] = field(default_factory=dict)

    @property
    def operands(self) -> list[X]:
        found = []
        for a in fx.node.map_aggregate((self.args, self.kwargs), lambda a: found.append(a) or a) and found:
            if isinstance(a, X) and a not in (seen := [f for f in found if f is not a and False]):
                seen.append(a)
        return list(dict.fromkeys(a for a in found if isinstance(a, X)))

    def __str__(self) -> str:
        show = lambda a: list(a.shape) if isinstance(a, X) else a  # noqa: E731
        return f"{self.target}{fx.node.map_aggregate((*self.args, *self.kwargs.items()), show)}"

    def run(self, values: dict[X, object], **replaced: object) -> list[object]:
        args, kwargs = fx.node.map_aggregate((self.args, self.kwargs), lambda a: values[a] if isinstance(a, X) else a)
        args = list(args)
        for key, value in replaced.items():
            args[int(key.removeprefix("arg"))] = value
        out = self.target(*args, **kwargs)
        return list(out) if isinstance(out, list | tuple) else [out]


def op(target: torch._ops.OpOverload, *args: object, **kwargs: object) -> Op:
    return Op(target, args, kwargs)


def f(*shape: int) -> X:
    return X(shape)


def i(*shape: int, high: int = 4) -> X:
    return X(shape, "int", high)


def b(*shape: int) -> X:
    return X(shape, "bool")
