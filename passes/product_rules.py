"""How ATen's matrix products treat token dims."""

from __future__ import annotations

import torch.fx as fx

from cpcompile.passes.op_call import Call, Demand, Mixing, RowWise
from cpcompile.passes.token_layout import ONE, TokenDim


def matmul(call: Call) -> RowWise | Mixing:
    """``mm``, ``bmm``, ``mv`` and ``linear``: rows of the left operand (queries), or batches of both."""
    left, right, *rest = (a for a in [*call.node.args, *call.node.kwargs.values()] if isinstance(a, fx.Node))
    return _product(call, left, right, dict.fromkeys(rest))


def added_product(call: Call) -> RowWise | Mixing:
    """``addmm`` and ``baddbmm``: a product, and what is added to it broadcasts."""
    added, left, right = (a for a in call.node.args if isinstance(a, fx.Node))
    if added in (left, right):
        return Mixing("adds an operand to its own product")
    product = _product(call, left, right, {})
    if isinstance(product, Mixing):
        return product
    (found,) = product.outputs
    assert found is not None
    shape = call.shape(added)
    dim = found.dim - (len(call.out) - len(shape))
    if dim < 0 or (shape[dim] == ONE != call.out[found.dim]):
        return RowWise({added: None, **product.operands}, product.outputs)
    here = TokenDim(dim, found.outer, found.inner)
    if shape[dim] != call.out[found.dim] or call.layout(added) not in (None, here):
        return Mixing("what it adds carries its tokens on another dim")
    return RowWise({added: here, **product.operands}, product.outputs)


def _product(call: Call, left: fx.Node, right: fx.Node, others: dict[fx.Node, Demand]) -> RowWise | Mixing:
    a, b = call.layout(left), call.layout(right)
    ndim = len(call.shape(left))
    if left is right:
        return Mixing("multiplies a value with itself")
    batched = "bmm" in str(call.node.target)
    if a is not None and batched and a.dim == 0 and b in (None, a):
        return RowWise({left: a, right: a, **others}, (a,))
    if a is not None and a.dim < ndim - 1 and not (batched and a.dim == 0):
        # Of two operands with tokens the right one holds keys or values: a row of queries meets all of them.
        return RowWise({left: a, right: None, **others}, (a,))
    matrices = len(call.shape(right)) == ndim and "linear" not in str(call.node.target)
    if a is None and b is not None and b.dim == ndim - 1 and matrices:
        return RowWise({left: None, right: b, **others}, (b,)) if not others else Mixing("bias along the tokens")
    return Mixing("multiplies tokens with tokens")
