"""npu SwiGLU: the gated half of a projection times its other half -> torch_npu's op."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, only_user
from cpcompile.passes.npu_ops import missing_ops
from cpcompile.passes.token_layout import size_expr

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


@dataclass(frozen=True)
class NpuSwiglu:
    """``silu(gate) * up`` -> ``npu_swiglu``, where ``gate`` and ``up`` are the halves of one value's last dim.

    Refuses, with the reason, a gate and its factor that come from two products of one input, as transformers' models
    have them. Of ``[T, I]`` each, the activation and the product move 5 T I elements, or 3 T I where GE fuses the two,
    and ``npu_swiglu`` of their join 3 T I: joining them first moves another 4 T I, joining the weights in the graph
    4 H I at every call, and joining them once ahead of it holds them twice, where a reload reaches one of the two. A
    model that has them as one weight gets the op.
    """

    name = "npu-swiglu"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for gate in gm.graph.find_nodes(op="call_function", target=aten.silu.default):
            product = only_user(gate)
            if product is None or product.target is not aten.mul.Tensor:
                result.refuse(gate, "the gate does not multiply one value")
                continue
            whole = missing_ops(("npu_swiglu",)) or _whole(gate, product)
            if isinstance(whole, str):
                result.refuse(gate, whole)
                continue
            product.replace_all_uses_with(emit(product, torch.ops.npu.npu_swiglu.default, whole, -1))
            erase(product)
            result.rewrites += 1
        return result.finish(gm)


def _whole(gate: fx.Node, product: fx.Node) -> fx.Node | str:
    up = next((arg for arg in product.args if arg is not gate), None)
    first, second = _half(gate.args[0]), _half(up)
    if first is None or second is None or first[0] is not second[0]:
        if _is_product(gate.args[0]) and _is_product(up):
            return (
                "gate and factor are products of two weights: joining either costs more than the op saves; "
                "give the model one weight for both"
            )
        return "gate and factor are not the halves of one value"
    if (first[1], second[1]) != (0, 1):
        return "the gate is not the first half, or its factor not the second"
    return first[0]


def _is_product(node: object) -> bool:
    """Whether ``node`` is a matmul, perhaps with its dims told apart."""
    while isinstance(node, fx.Node) and node.target in _VIEWS:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in (aten.mm.default, aten.bmm.default, aten.addmm.default)


def _half(node: object) -> tuple[fx.Node, int] | None:
    """The value that ``node`` is half of, along the last dim, and which."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is operator.getitem:
        parts, index = node.args
        if not isinstance(parts, fx.Node) or parts.target not in (aten.split.Tensor, aten.split_with_sizes.default):
            return None
        given = arguments(parts)
        whole, dim, which = given["self"], given["dim"], index
    elif node.target is aten.slice.Tensor:
        given = arguments(node)
        whole, dim = given["self"], given["dim"]
        which = 1 if given["start"] else 0
        width = whole.meta["val"].shape[-1]
        if given["step"] != 1 or given["start"] not in (None, 0, width // 2):
            return None
    else:
        return None
    value = whole.meta["val"]
    last = dim % value.ndim == value.ndim - 1
    if not last or size_expr(value.shape[-1]) != 2 * size_expr(node.meta["val"].shape[-1]) or which not in (0, 1):
        return None
    return whole, 1 if which else 0
