"""One call of an op on random operands, as data: for oracles that run it whole and on rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch import Tensor
from torch._ops import OpOverload

from cpcompile.passes.token_layout import TokenDim


@dataclass(eq=False)
class X:
    """An operand: float64, complex128, int64 below ``high``, or bool. The same object twice is the same value."""

    shape: tuple[int, ...]
    kind: str = "float"
    high: int = 4

    def make(self, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        if self.kind in ("float", "complex", "sorted"):
            dtype = torch.complex128 if self.kind == "complex" else torch.float64
            value = torch.randn(self.shape, generator=g, dtype=dtype)
            return value.sort(-1).values if self.kind == "sorted" else value
        integers = torch.randint(0, 2 if self.kind == "bool" else self.high, self.shape, generator=g)
        return integers.bool() if self.kind == "bool" else integers.int() if self.kind == "int32" else integers


@dataclass(eq=False)
class Op:
    """One call. ``rows``: the dims of operand number ``of`` that may carry tokens."""

    rows: tuple[int, ...]
    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    of: int = 0
    operands: list[X] = field(init=False)

    def __post_init__(self) -> None:
        leaves: list[object] = []
        fx.node.map_aggregate((self.args, self.kwargs), leaves.append)
        self.operands = list(dict.fromkeys(a for a in leaves if isinstance(a, X)))

    def __str__(self) -> str:
        shown = fx.node.map_aggregate((self.args, self.kwargs), lambda a: a.shape if isinstance(a, X) else a)
        return f"{self.target}{shown}"

    def values(self, seed: int = 0) -> dict[X, Any]:
        return {x: x.make(seed + k) for k, x in enumerate(self.operands)}

    def run(self, values: Mapping[X, Any], sizes: tuple[int, list[int]] | None = None) -> list[Any]:
        """The outputs; ``sizes`` replaces the argument at that position."""
        args, kwargs = fx.node.map_aggregate((self.args, self.kwargs), lambda a: values[a] if isinstance(a, X) else a)
        if sizes is not None:
            args = (*args[: sizes[0]], sizes[1], *args[sizes[0] + 1 :])
        out = self.target(*args, **kwargs)
        return list(out) if isinstance(out, list | tuple) else [out]

    def node(self) -> tuple[fx.Node, dict[X, fx.Node], dict[fx.Node, tuple[tuple[sympy.Expr, ...], ...]]]:
        """The call in a graph, the nodes of its operands, and all shapes."""
        graph = fx.Graph()
        nodes = {x: graph.placeholder(f"x{k}") for k, x in enumerate(self.operands)}
        for x, value in self.values().items():
            nodes[x].meta["val"] = value
        args, kwargs = fx.node.map_aggregate((self.args, self.kwargs), lambda a: nodes[a] if isinstance(a, X) else a)
        node = graph.call_function(self.target, args, kwargs)
        outs = [o for o in self.run(self.values()) if isinstance(o, Tensor)]
        return node, nodes, {node: tuple(map(expr, outs)), **{n: (expr(x),) for x, n in nodes.items()}}


def expr(value: Tensor | X) -> tuple[sympy.Expr, ...]:
    return tuple(map(sympy.Integer, value.shape))


def op(rows: str, target: OpOverload, *args: object, of: int = 0, **kwargs: object) -> Op:
    return Op(tuple(map(int, rows)), target, args, kwargs, of)


def f(*shape: int) -> X:
    return X(shape)


def i(*shape: int, high: int = 4) -> X:
    return X(shape, "int", high)


def i32(*shape: int, high: int = 4) -> X:
    return X(shape, "int32", high)


def b(*shape: int) -> X:
    return X(shape, "bool")


def c(*shape: int) -> X:
    return X(shape, "complex")


def rising(*shape: int) -> X:
    return X(shape, "sorted")


def positions(x: X, tokens: int) -> list[TokenDim | None]:
    """Where ``tokens`` tokens can lie in ``x``: a dim of that size, or of twice that, folded on either side."""
    two = sympy.Integer(2)
    found: list[TokenDim | None] = [None, *(TokenDim(d) for d, size in enumerate(x.shape) if size == tokens)]
    for d, size in enumerate(x.shape):
        if size == 2 * tokens:
            found += [TokenDim(d, outer=two), TokenDim(d, inner=two)]
    return found


def take(value: Tensor, layout: TokenDim | None, tokens: int, rows: slice) -> Tensor:
    """The rows of some tokens, in memory of their own."""
    if layout is None:
        return value
    head, tail = value.shape[: layout.dim], value.shape[layout.dim + 1 :]
    parted = value.reshape(*head, int(layout.outer), tokens, int(layout.inner), *tail)
    return parted[(*[slice(None)] * (layout.dim + 1), rows)].reshape(*head, -1, *tail).clone()


def blocks(tokens: int) -> list[slice]:
    """Contiguous shards for 2 and 3 ranks, and single rows."""
    return [
        slice(first, first + local)
        for local in sorted({-(-tokens // 2), -(-tokens // 3), 1})
        for first in range(0, tokens, local)
    ]
