"""Inline composites: row orders as one op of this project -> the ATen ops that it is made of."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cpcompile import layout_ops
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import emit, erase
from cpcompile.passes.token_layout import Expr, size_expr

COMPOSITES = (layout_ops.own_rows, layout_ops.deal_rows, layout_ops.collect_rows)


@dataclass(frozen=True)
class InlineComposites:
    """``cpcompile::own_rows``, ``deal_rows``, ``collect_rows`` -> views, slices, copies.

    Refuses nothing.
    """

    name = "inline-composites"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        symbols = _symbols(gm)
        for node in list(gm.graph.nodes):
            if node.op == "call_function" and node.target in COMPOSITES:
                node.replace_all_uses_with(_Recorder(node, symbols).run())
                erase(node)
                result.rewrites += 1
        return result.finish(gm)


def _symbols(gm: fx.GraphModule) -> dict[sympy.Symbol, tuple[fx.Node, int | None]]:
    """Where the graph's inputs say each symbol: a size itself, or a dim of a tensor."""
    found: dict[Any, tuple[fx.Node, int | None]] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.setdefault(size_expr(value), (node, None))
        elif isinstance(value, torch.Tensor):
            for dim, size in enumerate(value.shape):
                found.setdefault(size_expr(size), (node, dim))
    return found


class _Recorder(TorchDispatchMode):
    """Runs a composite on its fake operands and emits what it calls ahead of its node."""

    def __init__(self, node: fx.Node, symbols: dict[sympy.Symbol, tuple[fx.Node, int | None]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.node, self.symbols = node, symbols
        self.nodes: dict[int, fx.Node] = {}
        self.alive: list[Any] = []
        self.sizes: dict[Expr, fx.Node] = {}

    def run(self) -> fx.Node:
        """The node of the composite's result."""
        for operand in self.node.all_input_nodes:
            self._note(operand.meta["val"], operand)
        args, kwargs = fx.node.map_arg((self.node.args, self.node.kwargs), lambda n: n.meta["val"])
        mode = next(v.fake_mode for v in self.alive if isinstance(v, FakeTensor))
        quiet = mode.shape_env.suppress_guards() if mode.shape_env else contextlib.nullcontext()
        assert callable(self.node.target)
        with mode, quiet, self:
            return self.nodes[id(self.node.target(*args, **kwargs))]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.constant_pad_nd.default:
            # torch_npu takes the op's decomposition away, and what is left does not take sizes that are expressions.
            with self:
                return _padded(*args)
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, torch.Tensor):
            return result  # a question about a tensor
        made_args, made_kwargs = tree_map(self._argument, (args, kwargs or {}))
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.call_function(func, made_args, made_kwargs)
        made.meta.update({k: self.node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in self.node.meta})
        self._note(result, made)
        made.meta["val"] = result
        return result

    def _note(self, value: Any, node: fx.Node) -> None:
        self.alive.append(value)  # so that no other value gets its id
        self.nodes[id(value)] = node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.nodes[id(value)]
        if isinstance(value, torch.SymInt):
            return self._size(size_expr(value))
        return value

    def _size(self, expr: Expr) -> int | fx.Node:
        if expr.is_number:
            return int(expr)
        if expr not in self.sizes:
            with self.node.graph.inserting_before(self.node):
                tracer = fx.proxy.GraphAppendingTracer(self.node.graph)
                bindings = {s: fx.Proxy(self._symbol(s), tracer) for s in expr.free_symbols}
                self.sizes[expr] = sympy_interp(PythonReferenceAnalysis, bindings, expr).node
            self._describe(self.sizes[expr])
        return self.sizes[expr]

    def _symbol(self, symbol: Any) -> fx.Node:
        node, dim = self.symbols[symbol]
        return node if dim is None else emit(self.node, torch.ops.aten.sym_size.int, node, dim)

    def _describe(self, node: fx.Node) -> None:
        """The values of a size and of what it was computed from."""
        if "val" not in node.meta:
            for source in node.all_input_nodes:
                self._describe(source)
            args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
            assert callable(node.target)
            node.meta["val"] = node.target(*args)


def _padded(x: torch.Tensor, pads: Sequence[Any], value: float = 0) -> torch.Tensor:
    """``constant_pad_nd`` as concatenations."""
    for pair, (before, behind) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = x.ndim - 1 - pair
        parts = [x]
        for count, place in ((before, 0), (behind, 2)):
            if not isinstance(count, int) or count:
                parts.insert(place, x.new_full((*x.shape[:dim], count, *x.shape[dim + 1 :]), value))
        x = torch.cat(parts, dim) if len(parts) > 1 else x
    return x
