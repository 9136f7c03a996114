"""Appending typed calls to a graph under construction: sizes as expressions, fake results, no guards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cpcompile.passes.token_layout import Expr, Shape, product, size_expr

aten = torch.ops.aten


class GraphEmitter:
    """Appends calls to ``graph`` whose results have shapes that the caller knows.

    Args:
        graph: the graph under construction; its placeholders are already there.
        fake_mode: mode of the graph's fake tensors, None to leave out ``meta["val"]``.
        hints: sizes of the traced example.
    """

    def __init__(self, graph: fx.Graph, fake_mode: FakeTensorMode | None, hints: Mapping[sympy.Symbol, int]) -> None:
        self.graph = graph
        self._fake_mode, self._hints = fake_mode, hints
        self._shape_env: ShapeEnv | None = fake_mode.shape_env if fake_mode else None
        self._symbols: dict[sympy.Symbol, fx.Node | tuple[fx.Node, int]] = {}
        self._sizes: dict[Expr, fx.Node] = {}
        self._symints: dict[Expr, int | torch.SymInt] = {}
        self._fakes: dict[tuple[Any, ...], torch.Tensor] = {}
        self.meta: dict[str, Any] = {}

    def bind(self, node: fx.Node) -> None:
        """Note the symbols that a placeholder defines: a SymInt, or plain symbols among a tensor's sizes."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and isinstance(value.node.expr, sympy.Symbol):
            self._symbols[value.node.expr] = node
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                symbol = size_expr(size)
                if isinstance(symbol, sympy.Symbol) and symbol not in self._symbols:
                    self._symbols[symbol] = (node, dim)

    def size(self, expr: Expr) -> int | fx.Node:
        """``expr`` as an argument: an int, or a node that computes it from the graph's inputs."""
        if expr.is_number:
            return int(expr)
        if expr not in self._sizes:
            bindings = {
                s: fx.Proxy(self._symbol(s), fx.proxy.GraphAppendingTracer(self.graph)) for s in expr.free_symbols
            }
            first = len(self.graph.nodes)
            result = sympy_interp(PythonReferenceAnalysis, bindings, expr).node
            for node in list(self.graph.nodes)[first:]:
                self._describe_size(node)
            self._sizes[expr] = result
        return self._sizes[expr]

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        found = self._symbols[symbol]
        if isinstance(found, tuple):
            found = self.graph.call_function(aten.sym_size.int, found)
            found.meta["val"] = self.symint(symbol)
            self._symbols[symbol] = found
        return found

    def _describe_size(self, node: fx.Node) -> None:
        args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
        if self._shape_env is not None:
            with self._shape_env.suppress_guards():
                node.meta["val"] = node.target(*args, **node.kwargs)  # type: ignore[operator]

    def any_tensor(self) -> torch.Tensor:
        """A tensor of the graph, for its device: one of several dims, as what a host computes for itself has none."""
        values = (node.meta.get("val") for node in self.graph.nodes)
        return next(value for value in values if isinstance(value, torch.Tensor) and value.dim() > 1)

    def new_size(self, target: Callable[..., Any], args: tuple[Any, ...]) -> Expr:
        """Append a call that reads a size from data, and return the symbol that stands for it from then on."""
        assert self._shape_env is not None, "sizes from data need a graph that was traced with a ShapeEnv"
        node = self.graph.call_function(target, args)
        value = self._shape_env.create_unbacked_symint()
        self._shape_env.pending_fresh_unbacked_symbols.clear()
        node.meta.update({**self.meta, "val": value})
        symbol: Expr = value.node.expr
        self._symbols[symbol] = node
        return symbol

    def symint(self, expr: Expr) -> int | torch.SymInt:
        """``expr`` as a size of a fake tensor; adds no guard."""
        if expr.is_number:
            return int(expr)
        if expr not in self._symints:
            assert self._shape_env is not None
            known = all(symbol in self._hints for symbol in expr.free_symbols)
            hint = int(expr.subs(self._hints)) if known else None
            self._symints[expr] = self._shape_env.create_symintnode(expr, hint=hint)
        return self._symints[expr]

    def fake(
        self,
        shape: Shape,
        like: torch.Tensor,
        strides: Sequence[Expr] | None = None,
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor | None:
        """A fake tensor of ``shape``, row-major unless ``strides``, of ``dtype`` or that of ``like``, on its device."""
        if self._fake_mode is None:
            return None
        if strides is None:
            strides = [product(shape[dim + 1 :]) for dim in range(len(shape))]
        # Layers repeat: one fake tensor stands for every value of its kind.
        key = (shape, tuple(strides), dtype or like.dtype, like.device)
        if key not in self._fakes:
            self._fakes[key] = self._new_fake(shape, strides, dtype or like.dtype, like.device)
        return self._fakes[key]

    def _new_fake(
        self, shape: Shape, strides: Sequence[Expr], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        assert self._fake_mode is not None
        sizes, steps = [self.symint(s) for s in shape], [self.symint(s) for s in strides]
        with self._fake_mode, self._shape_env.suppress_guards() if self._shape_env else self._fake_mode:
            return torch.empty_strided(sizes, steps, dtype=dtype, device=device)

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        like: torch.Tensor,
        shape: Shape,
        result: torch.dtype | None = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Append a call whose result is a row-major tensor of ``shape``, of dtype ``result`` or that of ``like``."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta)
        node.meta["val"] = self.fake(shape, like, dtype=result)
        return node

    def reshape(self, node: fx.Node, like: torch.Tensor, old: Shape, new: Shape) -> fx.Node:
        """A row-major ``node`` of shape ``old`` as ``new``."""
        if old == new:
            return node
        return self.call(aten.view.default, (node, [self.size(s) for s in new]), like, new)

    def contiguous(self, node: fx.Node, like: torch.Tensor, shape: Shape) -> fx.Node:
        """``node`` in row-major memory."""
        return self.call(aten.clone.default, (node,), like, shape, memory_format=torch.contiguous_format)
