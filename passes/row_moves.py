"""Ops that move whole rows about: done to a product's rows before it, they do the same to its result.

``[R, H]`` is viewed with H kept last, padded, and its dims exchanged; the same with K for H orders the ``[R, K]`` rows
of the operand, because a product ``[R, K] x [K, H]`` works on each row alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.collectives import arguments, op_name, sizes
from cpcompile.passes.graph_emitter import GraphEmitter
from cpcompile.passes.token_layout import Expr, Shape, shape_of

aten = torch.ops.aten

_VIEWS = frozenset(f"aten::{n}" for n in ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "alias", "detach"))
_COPIES = frozenset({"aten::clone", "aten::contiguous"})
_ORDERS = frozenset({"aten::permute", "aten::transpose"})
_PAD = "aten::constant_pad_nd"


@dataclass(frozen=True)
class RowMoves:
    """Repeats moves of a product's rows on its operand.

    Args:
        emitter: of the graph under construction.
        env: copies of the nodes that amounts of padding come from.
        like: the operand.
        width: K, the size of its rows.
    """

    emitter: GraphEmitter
    env: Mapping[fx.Node, fx.Node]
    like: torch.Tensor
    width: Expr

    @staticmethod
    def refusal(node: fx.Node, source: fx.Node) -> str:
        """Why ``node`` does more to ``source`` than to move rows; empty if it does not."""
        name, old, new = op_name(node.target), sizes(source), sizes(node)
        if name not in _VIEWS | _COPIES | _ORDERS | {_PAD} or not old or not new:
            return "is no move of rows"
        if old[-1] != new[-1] or len(new) < 2:
            return "regroups columns"
        if name in _ORDERS and _order(node)[-1] != len(new) - 1:
            return "moves columns: rows do not lead"
        if name == _PAD and (any(arguments(node)["pad"][:2]) or arguments(node)["value"] != 0):
            return "pads with other than rows of zeros"
        return ""

    @staticmethod
    def keeps_order(node: fx.Node) -> bool:
        """Whether the move leaves rows in their order and adds none."""
        return op_name(node.target) in _VIEWS | _COPIES

    def replay(self, moves: Sequence[fx.Node], rows: fx.Node, shape: Shape) -> tuple[fx.Node, Shape]:
        """``moves`` of a product, done to the row-major ``rows`` of ``shape``; row-major again, and its shape."""
        for move in moves:
            old, shape = shape, (*shape_of(move.meta["val"])[:-1], self.width)
            name = op_name(move.target)
            if name in _VIEWS:
                rows = self.emitter.reshape(rows, self.like, old, shape)
            elif name == _PAD:
                pad = fx.node.map_arg(arguments(move)["pad"], lambda n: self.env[n])
                rows = self.emitter.call(aten.constant_pad_nd.default, (rows, pad, 0), self.like, shape)
            elif name in _ORDERS:
                rows = self.emitter.call(aten.permute.default, (rows, _order(move)), self.like, shape)
                rows = self.emitter.contiguous(rows, self.like, shape)
        return rows, shape


def _order(node: fx.Node) -> list[int]:
    """Which dim of its operand each dim of a transposition is."""
    given = arguments(node)
    order = list(range(len(node.meta["val"].shape)))
    if "dims" in given:
        return [d % len(order) for d in given["dims"]]
    a, b = given["dim0"], given["dim1"]
    order[a], order[b] = order[b], order[a]
    return order
