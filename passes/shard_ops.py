"""Moving one value between placements, as ATen ops: reduce-scatter, all-gather, own rows, with padding for any T.

A value's rows are brought to ``[pre, T, post]``, padded with zeros to ``[pre, n*ceil(T/n), post]``, and scattered or
gathered along the middle. The pad rows are dropped after the gather; no op that mixes rows ever sees them.
Where the axis's layout is not contiguous, padding deals the rows in rank order, and dropping the pads undoes that.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence

import sympy
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._sympy.functions import FloorDiv

from cpcompile import layout_ops
from cpcompile.axes import Axis
from cpcompile.layouts import blocks_per_rank
from cpcompile.passes.graph_emitter import GraphEmitter
from cpcompile.passes.token_layout import ONE, Expr, Shape, TokenDim, product, quotient, size_expr

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


class ShardEmitter(GraphEmitter):
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
        super().__init__(graph, fake_mode, hints)
        self.axis, self.tokens = axis, tokens
        each = blocks_per_rank(axis.layout)
        self.local: Expr = each * FloorDiv(tokens + each * axis.size - 1, each * axis.size)
        self.padded: Expr = self.local * axis.size
        self.divisible = self.padded == tokens
        self.dealt = axis.layout != "contiguous"

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

    def _rows(self, shape: Shape, layout: TokenDim) -> tuple[Expr, Expr]:
        """``pre`` and ``post`` of ``[pre, T, post]``."""
        return product(shape[: layout.dim]) * layout.outer, layout.inner * product(shape[layout.dim + 1 :])

    def _middle_rows(self, node: fx.Node, like: torch.Tensor, shape: Shape, layout: TokenDim) -> fx.Node:
        """``node`` as ``[pre, T, post]``."""
        pre, post = self._rows(shape, layout)
        if not in_row_major(node, like):
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
            if not in_row_major(node, whole):
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


def in_row_major(node: fx.Node, like: torch.Tensor) -> bool:
    """Whether ``node`` of the new graph is row-major, which ``like`` need not be: what was moved before it is."""
    value = node.meta.get("val")
    return is_row_major(value if isinstance(value, torch.Tensor) else like)


def is_row_major(value: torch.Tensor) -> bool:
    """Whether a (fake) tensor is row-major; adds no guard."""
    step: Expr = ONE
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if size_expr(size) != ONE and size_expr(stride) != step:
            return False
        step = step * size_expr(size)
    return True
