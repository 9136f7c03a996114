"""Rows of the ranks that share a module's weight: brought together, multiplied, and handed back, as ATen ops.

Every rank of the group holds ``[R, K]``: its own rows, padded with zeros to the ``N`` rows that all ranks agree on. The
rows of all ranks one after another are ``[P*N, ...]``. Where all ranks hold the same rows (inside tensor parallelism),
nothing needs to be brought together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.graph_emitter import GraphEmitter
from cpcompile.passes.shard_ops import is_row_major
from cpcompile.passes.token_layout import ONE, Expr, Shape
from cpcompile.passes.weight_cuts import CutRefused

aten = torch.ops.aten
c10d = torch.ops._c10d_functional


EXCHANGE, EQUAL = "exchange", "equal"


class RowCounts:
    """The numbers of rows N that ranks which may hold different numbers agree on, by one small exchange in a step.

    Args:
        emitter: of the graph under construction.
        group_tokens: ``"exchange"``: the most rows of any rank, by an all-reduce; ``"equal"``: all hold as many; a
            number: N.
        wanted: what will be asked for: a role, its ranks, and R of one of its modules. What is exchanged has one number
            per role, whatever R is: ranks may have been compiled for other numbers of rows.
        idle: this rank has no rows at all in this step.

    Raises:
        CutRefused: a static R is more than ``group_tokens``.
    """

    def __init__(
        self,
        emitter: GraphEmitter,
        group_tokens: str | int,
        wanted: Sequence[tuple[str, Axis, Expr]],
        idle: bool = False,
    ) -> None:
        self.emitter, self.group_tokens, self.idle = emitter, group_tokens, idle
        self.wanted: dict[Axis, dict[str, Expr]] = {}
        for role, axis, rows in wanted:
            of_role = self.wanted.setdefault(_largest(axis, [a for _, a, _ in wanted]), {})
            of_role[role] = sympy.Max(of_role.get(role, rows), rows)
        self.found: dict[str, Expr] = {}
        self.limited: tuple[Expr, ...] = ()
        if isinstance(group_tokens, int):
            self.limited = tuple(dict.fromkeys(rows for _, _, rows in wanted))
            many = next((rows for rows in self.limited if rows.is_number and rows > group_tokens), None)
            if many is not None:
                raise CutRefused(f"a step has {many} rows, more than group_tokens={group_tokens}")

    def padded(self, role: str, rows: Expr) -> Expr:
        """N for a module of ``role`` with R = ``rows``."""
        if isinstance(self.group_tokens, int):
            return sympy.Integer(self.group_tokens)
        if self.group_tokens == EQUAL:
            return rows
        if role not in self.found:
            self._agree(next(axis for axis, roles in self.wanted.items() if role in roles))
        return self.found[role]

    def _agree(self, axis: Axis) -> None:
        """One all-reduce of every number that is asked for over ``axis``."""
        every, emit = self.wanted[axis], self.emitter
        like, shape = emit.any_tensor(), (sympy.Integer(len(every)),)
        options = {"dtype": torch.int64, "device": like.device}
        own = [0 if self.idle else emit.size(rows) for rows in every.values()]
        ones = [emit.call(aten.full.default, ([1], rows), like, (ONE,), torch.int64, **options) for rows in own]
        counts = ones[0] if len(ones) == 1 else emit.call(aten.cat.default, (ones,), like, shape, torch.int64)
        most = emit.call(c10d.all_reduce.default, (counts, "max", axis.group_name), like, shape, torch.int64)
        most = emit.call(c10d.wait_tensor.default, (most,), like, shape, torch.int64)
        for index, role in enumerate(every):
            one = emit.call(aten.select.int, (most, 0, index), like, (), torch.int64)
            self.found[role] = emit.new_size(aten._local_scalar_dense.default, (one,))


def _largest(axis: Axis, axes: Sequence[Axis]) -> Axis:
    """Of ``axes``, the one with the most ranks that has those of ``axis``: what it agrees on, its parts agree on."""
    return max((a for a in axes if set(axis.ranks) <= set(a.ranks)), key=lambda a: len(a.ranks))


@dataclass(frozen=True)
class RowGroup:
    """Moves rows among the ranks of ``axis``.

    Args:
        emitter: of the graph under construction.
        axis: the ranks that share the weight, P of them.
        rows: R, this rank's rows.
        padded: N, what every rank pads to; R where all ranks are known to have as many.
        same: all ranks hold the same rows.
        idle: this rank has no rows in this step: it multiplies those of the others, and what it sends is zero.
    """

    emitter: GraphEmitter
    axis: Axis
    rows: Expr
    padded: Expr
    same: bool
    idle: bool = False

    @property
    def every(self) -> Expr:
        """Rows that this rank multiplies: those of all ranks."""
        return self.rows if self.same else self.padded * self.axis.size

    def gather(self, own: fx.Node | None, like: torch.Tensor, width: Sequence[Expr]) -> fx.Node:
        """``[R, *width]`` of every rank as ``[P*N, *width]``."""
        if self.same and own is not None:
            return own
        own = self._padded(own, like, width)
        return self._collective(c10d.all_gather_into_tensor, (own, self.axis.size), like, (self.every, *width))

    def columns(self, own: fx.Node | None, like: torch.Tensor, width: Expr) -> fx.Node:
        """``[R, K]`` of every rank as this rank's columns of all rows, ``[P*N, K/P]``: an all-to-all."""
        size, part = sympy.Integer(self.axis.size), width / self.axis.size
        if self.same:
            first = int(part) * self.axis.rank
            return self.emitter.call(aten.slice.Tensor, (own, 1, first, first + int(part)), like, (self.rows, part))
        own = self._padded(own, like, (width,))
        own = self.emitter.reshape(own, like, (self.padded, width), (self.padded, size, part))
        own = self._swapped(own, like, (self.padded, size, part))
        own = self.emitter.reshape(own, like, (size, self.padded, part), (self.every, part))
        return self._exchange(own, like, (self.every, part))

    def sum(self, parts: fx.Node, like: torch.Tensor, width: Expr) -> fx.Node:
        """Every rank's summand of ``[P*N, M]`` as this rank's rows of the sum, ``[R, M]``: a reduce-scatter."""
        if self.same:
            return self._collective(c10d.all_reduce, (parts, "sum"), like, (self.rows, width))
        args = (parts, "sum", self.axis.size)
        return self._unpadded(
            self._collective(c10d.reduce_scatter_tensor, args, like, (self.padded, width)), like, width
        )

    def own_rows(self, part: fx.Node, like: torch.Tensor, width: Expr) -> fx.Node:
        """Every rank's columns of all rows, ``[P*N, M/P]``, as all columns of this rank's rows, ``[R, M]``."""
        size, own = sympy.Integer(self.axis.size), width / self.axis.size
        if self.same:
            shape = (self.rows * size, own)
            whole = self._collective(c10d.all_gather_into_tensor, (part, self.axis.size), like, shape)
        else:
            whole = self._exchange(part, like, (self.every, own))
        whole = self.emitter.reshape(whole, like, (self.padded * size, own), (size, self.padded, own))
        whole = self._swapped(whole, like, (size, self.padded, own))
        whole = self.emitter.reshape(whole, like, (self.padded, size, own), (self.padded, width))
        return self._unpadded(whole, like, width)

    def _padded(self, own: fx.Node | None, like: torch.Tensor, width: Sequence[Expr]) -> fx.Node:
        if own is None:
            assert self.idle
            shape, options = (self.padded, *width), {"dtype": like.dtype, "device": like.device}
            zeros = ([self.emitter.size(s) for s in shape], 0)
            return self.emitter.call(aten.full.default, zeros, like, shape, None, **options)
        if not is_row_major(like):
            own = self.emitter.contiguous(own, like, (self.rows, *width))
        if self.padded == self.rows:
            return own
        extra = self.emitter.size(self.padded - self.rows)
        pad = [0, 0] * len(width) + [0, extra]
        return self.emitter.call(aten.constant_pad_nd.default, (own, pad, 0), like, (self.padded, *width))

    def _unpadded(self, rows: fx.Node, like: torch.Tensor, width: Expr) -> fx.Node:
        if self.padded == self.rows or self.idle:
            return rows
        last = self.emitter.size(self.rows)
        return self.emitter.call(aten.slice.Tensor, (rows, 0, 0, last), like, (self.rows, width))

    def _swapped(self, node: fx.Node, like: torch.Tensor, shape: Shape) -> fx.Node:
        """``node`` of ``shape`` with the first two dims exchanged, in memory too."""
        a, b, c = shape
        swapped = self.emitter.call(aten.permute.default, (node, [1, 0, 2]), like, (b, a, c))
        return self.emitter.contiguous(swapped, like, (b, a, c))

    def _exchange(self, node: fx.Node, like: torch.Tensor, shape: Shape) -> fx.Node:
        """Block i of dim 0 goes to rank i, and comes from rank i."""
        splits = [self.emitter.size(self.padded)] * self.axis.size
        return self._collective(c10d.all_to_all_single, (node, splits, splits), like, shape)

    def _collective(
        self, packet: torch._ops.OpOverloadPacket, args: tuple[object, ...], like: torch.Tensor, shape: Shape
    ) -> fx.Node:
        started = self.emitter.call(packet.default, (*args, self.axis.group_name), like, shape)
        return self.emitter.call(c10d.wait_tensor.default, (started,), like, shape)
