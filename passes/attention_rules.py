"""How attention, routed experts and torch_npu's ops treat token dims, for the table in ``placement_rules``."""

from __future__ import annotations

import operator

import torch.fx as fx

from cpcompile.passes.collectives import arguments, op_name
from cpcompile.passes.fused_attention import FUSED
from cpcompile.passes.op_call import Call, Demand, Mixing, RowWise, Rule
from cpcompile.passes.row_rules import broadcast_rows, pointwise
from cpcompile.passes.token_layout import ONE, TokenDim


def routed(call: Call) -> RowWise | Mixing:
    """Tokens, their experts' ids and weights in step; every row needs all experts."""
    tokens, tables = call.tensors[:3], call.tensors[3:]
    places = {call.layout(n) for n in tokens}
    rows = places.pop()
    if places or rows is None or rows.dim != 0 or len(tables) != 2 or any(call.layout(n) for n in tables):
        return Mixing("its tokens, ids and weights are not split alike, by their rows")
    return RowWise({**dict.fromkeys(tokens, rows), **dict.fromkeys(tables)}, (rows,))


def queries(keys: frozenset[int], dim: int = 1) -> Rule:
    """Row-wise in the queries, rows in ``dim``, and in all but the operands numbered ``keys``, which stay whole."""

    def rule(call: Call) -> RowWise | Mixing:
        rows_at = TokenDim(dim)
        operands = [n for n in call.node.args if isinstance(n, fx.Node) and call.shapes.get(n)]
        whole = {operands[i] for i in keys}
        rows = [n for i, n in enumerate(operands) if i not in keys]
        if whole & set(rows):
            return Mixing("one value is queries and keys")
        if call.layout(operands[0]) != rows_at or any(call.layout(n) not in (None, rows_at) for n in rows):
            return Mixing("the tokens are not the rows of the queries")
        if any(call.shape(n)[dim] != call.out[dim] for n in rows):
            return Mixing("nothing says that its operands have as many tokens")
        return RowWise({**dict.fromkeys(whole, None), **dict.fromkeys(rows, rows_at)}, (rows_at,))

    return rule


def npu_norm(call: Call) -> RowWise | Mixing:
    """Normalisation over the trailing dims that the weight, the last operand, has; one or two operands of rows."""
    *rows, gamma = call.tensors
    aligned = broadcast_rows(call, call.out, rows)
    if isinstance(aligned, Mixing):
        return aligned
    found, demands = aligned
    if found.dim >= len(call.out) - len(call.shape(gamma)):
        return Mixing("normalises over the tokens")
    return RowWise({**demands, gamma: None}, (found,) * len(call.shapes[call.node]))


def vllm_norm(call: Call) -> RowWise | Mixing:
    """Normalisation of the last dim, one or two operands of rows; the weight may be missing."""
    weight = arguments(call.node)["weight"]
    rows = [n for n in call.tensors if n is not weight]
    aligned = broadcast_rows(call, call.out, rows)
    if isinstance(aligned, Mixing):
        return aligned
    found, demands = aligned
    if found.dim == len(call.out) - 1 or any(call.shape(n) != call.out for n in rows):
        return Mixing("normalises over the tokens, or its operands differ in shape")
    whole: dict[fx.Node, Demand] = {weight: None} if isinstance(weight, fx.Node) else {}
    return RowWise({**demands, **whole}, (found,) * len(call.shapes[call.node]))


def npu_rope(call: Call) -> RowWise | Mixing:
    """Rotation of the last dim, with broadcasting."""
    found = pointwise(call)
    if isinstance(found, RowWise) and found.outputs[0] is not None and found.outputs[0].dim == len(call.out) - 1:
        return Mixing("rotates the tokens")
    return found


def fused_attention(call: Call) -> RowWise | Mixing:
    """Row-wise in the queries and the mask's rows, given whole keys and values."""
    args, op = arguments(call.node), FUSED[op_name(call.node.target)]
    query, mask = args["query"], args.get(op.mask)
    place, rows = TokenDim(len(call.shape(query)) - 2), call.layout(query)
    if args.get("is_causal"):
        return Mixing("is causal by the numbers of its rows: give it a mask")
    if args.get("return_debug_mask") or args.get("dropout_mask") is not None:
        return Mixing("returns or takes a mask of dropped scores")
    if rows != place or query in (args["key"], args["value"], mask):
        return Mixing("the tokens are not the rows of the queries alone")
    demands: dict[fx.Node, Demand] = {query: place, args["key"]: None, args["value"]: None}
    if mask is not None:
        ndim = len(call.shape(mask))
        here = TokenDim(ndim - 2) if ndim > 1 and call.shape(mask)[-2] != ONE else None
        if here is not None and call.layout(mask) not in (None, here):
            return Mixing("the mask's tokens are not the rows of the queries")
        demands[mask] = here
    if any(
        isinstance(u.args[1], int) and u.args[1] >= op.rows for u in call.node.users if u.target is operator.getitem
    ):
        return Mixing("more is read of it than has a row for each query")
    count = len(call.shapes[call.node])
    return RowWise(demands, tuple(place if i < op.rows else None for i in range(count)))
