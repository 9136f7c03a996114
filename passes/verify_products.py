"""The static proof's rules for matrix products."""

from __future__ import annotations

import torch.fx as fx

from cpcompile.passes.collectives import op_name
from cpcompile.passes.verify_call import ALONG, Call
from cpcompile.passes.verify_index import Rows


def matmul(call: Call) -> Rows | str:
    """Rows of the left factor, columns of the right one, or batches of both; what is added is split as the product."""
    name = op_name(call.node.target)
    begin = int(name in ("aten::addmm", "aten::baddbmm"))
    added = call.arg("self") if begin else call.arg("bias")
    left, right = call.node.args[begin : begin + 2]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    split = {n: rows for n, rows in call.rows.items() if n in (left, right)}
    rows = _factors(call, left, right, split, "linear" in name)
    if isinstance(rows, str) or not isinstance(added, fx.Node):
        return rows
    shape = call.shapes[added]
    dim = rows.dim - (len(call.out[0]) - len(shape))
    one = dim < 0 or shape[dim] == 1
    if call.rows.get(added) != (None if one else rows.shifted(dim - rows.dim)):
        return "what it adds to a product is not split as the product is"
    return rows if one or shape[dim] == call.out[0][rows.dim] else "what it adds to a product has other rows"


def _factors(call: Call, left: fx.Node, right: fx.Node, split: dict[fx.Node, Rows], linear: bool) -> Rows | str:
    """Rows of the product of ``left`` and ``right``, of which those in ``split`` are split."""
    a, b = split.get(left), split.get(right)
    ndim = len(call.shapes[left])
    alike = ndim == len(call.shapes[right]) and not linear
    if left is right:
        return "it multiplies rows with rows"
    if a is not None and b is not None:
        batches = a == b and a.dim == 0 and ndim == 3 and alike
        return a if batches else "it multiplies rows with rows"
    if a is not None:
        return a if a.dim < ndim - 1 and not (ndim == 3 and alike and a.dim == 0) else ALONG
    if b is not None:
        return b if alike and b.dim == ndim - 1 else ALONG
    return "it multiplies rows with rows"
