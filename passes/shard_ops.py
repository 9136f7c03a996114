"""Moving one value between placements, as ATen ops: reduce-scatter, all-gather, own rows, with padding for any T.

A value's rows are brought to ``[pre, T, post]``, padded with zeros to ``[pre, n*ceil(T/n), post]``, and scattered or
gathered along the middle. The pad rows are dropped after the gather; no op that mixes rows ever sees them.
Where the axis's layout is not contiguous, padding deals the rows in rank order, and dropping the pads undoes that.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from cpcompile import layout_ops
from cpcompile.axes import Axis
from cpcompile.layouts import blocks_per_rank
from cpcompile.passes.token_layout import ONE, Expr, Shape, TokenDim, product, quotient, size_expr

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


class ShardEmitter:
    """Emits shard-moving ops into ``graph`` for one axis.

    Args:
        graph: the graph under construction; its placeholders are already there.
        axis: the mesh axis.
        tokens: the token count T.
        fake_mode: mode of the graph's fake tensors, None to leave out ``meta["val"]``.
        hints: sizes of the traced example.
    """

    def __init__(
        self,
        graph: fx.Graph,
        axis: Axis,
        tokens: Expr,
        fake_mode: FakeTensorMode | None,
        hints: Mapping[sympy.Symbol, int],
    ) -> None:
        self.graph, self.axis, self.tokens = graph, axis, tokens
        each = blocks_per_rank(axis.layout)
        self.local: Expr = each * FloorDiv(tokens + each * axis.size - 1, each * axis.size)
        self.padded: Expr = self.local * axis.size
        self.divisible = self.padded == tokens
        self.dealt = axis.layout != "contiguous"
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

    def fake(self, shape: Shape, like: torch.Tensor, strides: Sequence[Expr] | None = None) -> torch.Tensor | None:
        """A fake tensor of ``shape`` (row-major unless ``strides``) with the dtype and device of ``like``."""
        if self._fake_mode is None:
            return None
        if strides is None:
            strides = [product(shape[dim + 1 :]) for dim in range(len(shape))]
        # Layers repeat: one fake tensor stands for every value of its kind.
        key = (shape, tuple(strides), like.dtype, like.device)
        if key not in self._fakes:
            self._fakes[key] = self._new_fake(shape, strides, like)
        return self._fakes[key]

    def _new_fake(self, shape: Shape, strides: Sequence[Expr], like: torch.Tensor) -> torch.Tensor:
        assert self._fake_mode is not None
        sizes, steps = [self.symint(s) for s in shape], [self.symint(s) for s in strides]
        with self._fake_mode, self._shape_env.suppress_guards() if self._shape_env else self._fake_mode:
            return torch.empty_strided(sizes, steps, dtype=like.dtype, device=like.device)

    def local_fake(self, value: torch.Tensor, layout: TokenDim) -> torch.Tensor | None:
        """The fake tensor of this rank's rows of ``value``: strides shrink with the token dim."""
        sizes = [size_expr(s) for s in value.shape]
        strides = [size_expr(s) for s in value.stride()]
        whole, local = sizes[layout.dim], layout.size(self.local)
        extent = strides[layout.dim] * whole
        for dim, stride in enumerate(strides):
            above = quotient(stride, extent) if dim != layout.dim else None
            if above is not None and not stride.is_zero:
                strides[dim] = above * strides[layout.dim] * local
        sizes[layout.dim] = local
        return self.fake(tuple(sizes), value, strides)

    def call(
        self, target: Callable[..., Any], args: tuple[Any, ...], like: torch.Tensor, shape: Shape, **kwargs: Any
    ) -> fx.Node:
        """Append a call whose result is a row-major tensor of ``shape``."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update(self.meta)
        node.meta["val"] = self.fake(shape, like)
        return node

    def reshape(self, node: fx.Node, like: torch.Tensor, old: Shape, new: Shape) -> fx.Node:
        """A row-major ``node`` of shape ``old`` as ``new``."""
        if old == new:
            return node
        return self.call(aten.view.default, (node, [self.size(s) for s in new]), like, new)

    def contiguous(self, node: fx.Node, like: torch.Tensor, shape: Shape) -> fx.Node:
        """``node`` in row-major memory."""
        return self.call(aten.clone.default, (node,), like, shape, memory_format=torch.contiguous_format)

    def _rows(self, shape: Shape, layout: TokenDim) -> tuple[Expr, Expr]:
        """``pre`` and ``post`` of ``[pre, T, post]``."""
        return product(shape[: layout.dim]) * layout.outer, layout.inner * product(shape[layout.dim + 1 :])

    def _middle_rows(self, node: fx.Node, like: torch.Tensor, shape: Shape, layout: TokenDim) -> fx.Node:
        """``node`` as ``[pre, T, post]``."""
        pre, post = self._rows(shape, layout)
        if not is_row_major(like):
            node = self.contiguous(node, like, shape)
        return self.reshape(node, like, shape, (pre, self.tokens, post))

    def _padded_rows(self, node: fx.Node, like: torch.Tensor, shape: Shape, layout: TokenDim) -> fx.Node:
        """``node`` as ``[pre, n*ceil(T/n), post]``, each rank's rows one after another, pad rows zero."""
        pre, post = self._rows(shape, layout)
        node = self._middle_rows(node, like, shape, layout)
        if self.dealt:
            args = (node, 1, self.axis.size, self.axis.layout)
            return self.call(layout_ops.deal_rows, args, like, (pre, self.padded, post))
        if self.divisible:
            return node
        rows = (0, 0, 0, self.size(self.padded - self.tokens))
        return self.call(aten.constant_pad_nd.default, (node, list(rows), 0), like, (pre, self.padded, post))

    def own_rows(self, node: fx.Node, like: torch.Tensor, shape: Shape, layout: TokenDim) -> fx.Node:
        """R → S: this rank's rows of a whole value. No communication."""
        pre, post = self._rows(shape, layout)
        mine = (pre, self.local, post)
        if self.dealt:
            node = self._middle_rows(node, like, shape, layout)
            args = (node, 1, self.axis.rank, self.axis.size, self.axis.layout)
            node = self.call(layout_ops.own_rows, args, like, mine)
            return self.reshape(node, like, mine, local_shape(shape, layout, self.local))
        node = self._padded_rows(node, like, shape, layout)
        first, last = self.local * self.axis.rank, self.local * (self.axis.rank + 1)
        node = self.call(aten.slice.Tensor, (node, 1, self.size(first), self.size(last)), like, mine)
        if pre != ONE:
            node = self.contiguous(node, like, mine)
        return self.reshape(node, like, mine, local_shape(shape, layout, self.local))

    def scatter(self, node: fx.Node, like: torch.Tensor, shape: Shape, layout: TokenDim) -> fx.Node:
        """P → S: sum over the axis, each rank keeping its rows."""
        pre, post = self._rows(shape, layout)
        size = self.axis.size
        node = self._padded_rows(node, like, shape, layout)
        if pre == ONE:
            node = self.reshape(node, like, (pre, self.padded, post), (self.padded, post))
        else:
            node = self._swap(node, like, (pre, sympy.Integer(size), self.local, post))
            node = self.reshape(
                node, like, (sympy.Integer(size), pre, self.local, post), (pre * size, self.local, post)
            )
        mine = (self.local, post) if pre == ONE else (pre, self.local, post)
        node = self.call(c10d.reduce_scatter_tensor.default, (node, "sum", size, self.axis.group_name), like, mine)
        node = self.call(c10d.wait_tensor.default, (node,), like, mine)
        return self.reshape(node, like, mine, local_shape(shape, layout, self.local))

    def gather(self, parts: Sequence[tuple[fx.Node, torch.Tensor, Shape, TokenDim]]) -> list[fx.Node]:
        """S → R: all rows of several values of one dtype and ``pre``, by one all-gather.

        Args:
            parts: per value its shard, a tensor like the whole value, the whole shape, and where its tokens lie.
        """
        like = parts[0][1]
        pre = self._rows(parts[0][2], parts[0][3])[0]
        rows, widths = [], []
        for node, whole, shape, layout in parts:
            post = self._rows(shape, layout)[1]
            if not is_row_major(whole):
                node = self.contiguous(node, whole, local_shape(shape, layout, self.local))
            rows.append(self.reshape(node, whole, local_shape(shape, layout, self.local), (pre, self.local, post)))
            widths.append(post)
        width = sum(widths, sympy.Integer(0))
        node = rows[0]
        if len(rows) > 1:
            node = self.call(aten.cat.default, (rows, 2), like, (pre, self.local, width))
        node = self._gather_rows(node, like, pre, width)
        if len(rows) == 1:
            return [self.reshape(node, like, (pre, self.tokens, width), parts[0][2])]
        split = self.call(aten.split_with_sizes.default, (node, [self.size(w) for w in widths], 2), like, ())
        split.meta["val"] = [self.fake((pre, self.tokens, w), like) for w in widths]
        found = []
        for index, (w, (_, whole, shape, _)) in enumerate(zip(widths, parts, strict=True)):
            piece = self.call(operator.getitem, (split, index), like, (pre, self.tokens, w))
            # A piece of a wider row is strided; the graph may view it in ways that only row-major memory allows.
            piece = self.contiguous(piece, like, (pre, self.tokens, w))
            found.append(self.reshape(piece, whole, (pre, self.tokens, w), shape))
        return found

    def _gather_rows(self, node: fx.Node, like: torch.Tensor, pre: Expr, width: Expr) -> fx.Node:
        """``[pre, ceil(T/n), width]`` of every rank as ``[pre, T, width]``."""
        size = sympy.Integer(self.axis.size)
        if pre == ONE:
            node = self.reshape(node, like, (pre, self.local, width), (self.local, width))
        gathered = (self.padded, width) if pre == ONE else (pre * size, self.local, width)
        node = self.call(
            c10d.all_gather_into_tensor.default, (node, self.axis.size, self.axis.group_name), like, gathered
        )
        node = self.call(c10d.wait_tensor.default, (node,), like, gathered)
        if pre != ONE:
            node = self._swap(node, like, (size, pre, self.local, width))
            node = self.reshape(node, like, (pre, size, self.local, width), (pre, self.padded, width))
        dim, whole = (0, (self.tokens, width)) if pre == ONE else (1, (pre, self.tokens, width))
        if self.dealt:
            args = (node, dim, self.axis.size, self.axis.layout, self.size(self.tokens))
            node = self.call(layout_ops.collect_rows, args, like, whole)
        if not self.dealt and not self.divisible:
            node = self.call(aten.slice.Tensor, (node, dim, 0, self.size(self.tokens)), like, whole)
        if pre != ONE and (self.dealt or not self.divisible):
            node = self.contiguous(node, like, whole)
        if pre == ONE:
            node = self.reshape(node, like, (self.tokens, width), (pre, self.tokens, width))
        return node

    def all_reduce(self, node: fx.Node, like: torch.Tensor, shape: Shape) -> fx.Node:
        """P → R: sum over the axis, whole on every rank."""
        node = self.call(c10d.all_reduce.default, (node, "sum", self.axis.group_name), like, shape)
        return self.call(c10d.wait_tensor.default, (node,), like, shape)

    def _swap(self, node: fx.Node, like: torch.Tensor, shape: Shape) -> fx.Node:
        """View a row-major ``node`` as ``shape`` of four dims and exchange the first two, in memory too."""
        a, b, c, d = shape
        node = self.call(aten.view.default, (node, [self.size(s) for s in shape]), like, shape)
        swapped = self.call(aten.permute.default, (node, [1, 0, 2, 3]), like, (b, a, c, d))
        return self.contiguous(swapped, like, (b, a, c, d))


def local_shape(shape: Shape, layout: TokenDim, local: Expr) -> Shape:
    """``shape`` with ``local`` tokens in the token dim."""
    return (*shape[: layout.dim], layout.size(local), *shape[layout.dim + 1 :])


def is_row_major(value: torch.Tensor) -> bool:
    """Whether a (fake) tensor is row-major; adds no guard."""
    step: Expr = ONE
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if size_expr(size) != ONE and size_expr(stride) != step:
            return False
        step = step * size_expr(size)
    return True
