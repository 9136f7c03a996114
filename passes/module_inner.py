"""What lies inside a shared module: an MLP's columns between its products, and a lookup in some rows of a table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from cpcompile.passes.collectives import arguments, op_name
from cpcompile.passes.module_columns import KEEPS_ROWS, InnerColumns
from cpcompile.passes.module_roles import HALVING
from cpcompile.passes.row_groups import RowGroup
from cpcompile.passes.token_layout import ONE, shape_of, size_expr

aten = torch.ops.aten


@dataclass
class InnerValues:
    """Columns of all ranks' rows, ``[P*N, I/P]``: ``env`` holds the copy of every node between an MLP's products.

    Args:
        columns: which columns each has.
        group: the ranks and their rows.
        env: what is there so far; the first products are put in by the caller.
    """

    columns: InnerColumns
    group: RowGroup
    env: dict[fx.Node, Any] = field(default_factory=dict)

    def copy(self, node: fx.Node, graph: fx.Graph) -> None:
        """Copy ``node`` to ``graph``: views that shape the rows are dropped, numbers of columns divided."""
        source = node.all_input_nodes[0]
        if op_name(node.target) in KEEPS_ROWS:
            self.env[node] = self.env[source]
            return
        copy = graph.node_copy(node, self.env.__getitem__)
        copy.meta = {**node.meta, "val": self._part(node.meta["val"])}
        divided = self.columns.divided.get(node)
        if divided is not None:
            given = {**arguments(node), "self": self.env[source], "dim": 1, **divided}
            copy.args, copy.kwargs = tuple(given.values()), {}
        elif op_name(node.target) in HALVING:
            copy.args = (self.env[source], 1)
        self.env[node] = copy

    def _part(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return type(value)(self._part(v) for v in value)
        return self.group.emitter.fake((self.group.every, size_expr(value.shape[-1]) / self.group.axis.size), value)


def masked_lookup(node: fx.Node, part: fx.Node, every: fx.Node, group: RowGroup) -> fx.Node:
    """Rows of a table for the ids ``every`` of all ranks, ``[P*N, H]``: zero for ids in other ranks' parts of it.

    Args:
        node: the original's lookup; its ids lie in the table.
        part: this rank's rows of the table.
        every: ``[P*N]``.
        group: the ranks that share the table.
    """
    table, ids = node.args[:2]
    assert isinstance(table, fx.Node) and isinstance(ids, fx.Node)
    emit, value, like = group.emitter, ids.meta["val"], node.meta["val"]
    width = shape_of(like)[-1]
    own, shape = int(shape_of(table.meta["val"])[0]) // group.axis.size, (group.every,)
    local = emit.call(aten.sub.Tensor, (every, own * group.axis.rank), value, shape)
    inside = emit.call(aten.clamp.default, (local, 0, own - 1), value, shape)
    lookup = (part, inside, *node.args[2:])
    found = emit.call(aten.embedding.default, lookup, like, (*shape, width), None, **node.kwargs)
    elsewhere = emit.call(aten.ne.Tensor, (local, inside), value, shape, torch.bool)
    column = emit.call(aten.unsqueeze.default, (elsewhere, 1), value, (*shape, ONE), torch.bool)
    return emit.call(aten.masked_fill.Scalar, (found, column, 0), like, (*shape, width))


def reshaped_from(own: fx.Node) -> fx.Node:
    """What ``own``, ``[R, K]``, is a mere reshaping of: equal reshapings of one value have equal rows."""
    while op_name(own.target) in KEEPS_ROWS and _form(own) == _form(own.all_input_nodes[0]):
        own = own.all_input_nodes[0]
    return own


def _form(node: fx.Node) -> object:
    value = node.meta["val"]
    return shape_of(value)[-1:], value.dtype
