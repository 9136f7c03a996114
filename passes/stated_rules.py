"""How an op treats token dims of which the user has stated that it is row-wise."""

from __future__ import annotations

import torch
import torch.fx as fx

from cpcompile.declared_ops import RowWiseOp, stated
from cpcompile.passes.collectives import op_name
from cpcompile.passes.op_call import Call, Mixing, RowWise


def stated_row_wise(call: Call) -> RowWise | Mixing:
    """The rows that the statement names run in step; all other operands stay whole."""
    op = stated(op_name(call.node.target))
    assert op is not None
    rows = _arguments(call.node, op, rows=True)
    others = [n for n in _arguments(call.node, op, rows=False) if n in rows]
    places = {place for n in rows if (place := call.layout(n)) is not None}
    if not rows or others:
        return Mixing(f"what is stated of {op.name} does not fit its operands")
    if len(places) != 1 or next(iter(places)).dim != op.dim:
        return Mixing(f"{op.name} is stated to be row-wise in dim {op.dim}, and its tokens lie elsewhere")
    (found,) = places
    results = call.shapes[call.node]
    made = results[: op.out]
    if len(made) < op.out or any(len(shape) <= op.dim for shape in [*made, *map(call.shape, rows)]):
        return Mixing(f"what is stated of {op.name} does not fit its operands")
    counts = {shape[op.dim] for shape in [*made, *map(call.shape, rows)]}
    if len(counts) != 1:
        return Mixing(f"operands and results of {op.name} have different token counts")
    outputs = tuple(found if number < op.out else None for number in range(len(results)))
    return RowWise({**dict.fromkeys(call.tensors), **dict.fromkeys(rows, found)}, outputs)


def _arguments(node: fx.Node, op: RowWiseOp, rows: bool) -> list[fx.Node]:
    """The tensors among the arguments that are, or are not, at the positions of rows."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: list[fx.Node] = []
    for position, argument in enumerate(node.target._schema.arguments):
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        if (position in op.rows) == rows:
            fx.node.map_arg(value, found.append)
    return found
