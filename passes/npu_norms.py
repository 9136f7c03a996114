"""npu norms: RMSNorm as a model writes it out, with the residual's sum before it -> torch_npu's ops."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import NATIVE, arguments, emit, erase, only_user, sizes
from cpcompile.passes.npu_ops import missing_ops

aten = torch.ops.aten
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class NpuNorms:
    """``x * rsqrt(mean(x^2) + eps) * gamma`` -> ``npu_rms_norm``; with ``x = a + b``, ``npu_add_rms_norm``.

    Before: powers, mean, root and products, in float32 where the values are of another dtype, cast back before or after
    ``gamma``.
    After: one op, which rounds once; the sum, where others read it, is one of its results.

    The weight may come behind a gather of the normed rows: it is then applied before.

    Refuses, with the reason, other arithmetic around the root, and where torch_npu does not have an op.
    """

    name = "npu-norms"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        place = {node: number for number, node in enumerate(gm.graph.nodes)}
        for root in gm.graph.find_nodes(op="call_function", target=aten.rsqrt.default):
            found = missing_ops(("npu_rms_norm", "npu_add_rms_norm")) or _match(root)
            if isinstance(found, str):
                result.refuse(root, found)
                continue
            _replace(found, place)
            result.rewrites += 1
        return result.finish(gm)


@dataclass(frozen=True)
class _Norm:
    """What a root is part of: ``out``, or each of ``products`` behind it, is the norm of ``x`` times ``gamma``."""

    x: fx.Node
    gamma: fx.Node
    epsilon: float
    out: fx.Node
    products: tuple[fx.Node, ...]


def _match(root: fx.Node) -> _Norm | str:
    shifted = root.args[0]
    if not _calls(shifted, aten.add.Tensor, aten.add.Scalar) or not isinstance(shifted.args[1], float):
        return "no constant is added under the root"
    mean, epsilon = shifted.args[0], shifted.args[1]
    if not _calls(mean, aten.mean.dim):
        return "what is under the root is no mean"
    square = arguments(mean)["self"]
    wide = _squared(square)
    if wide is None:
        return "the mean is not of squares"
    last = wide.meta["val"].ndim - 1
    if [dim % (last + 1) for dim in arguments(mean)["dim"]] != [last] or not arguments(mean)["keepdim"]:
        return "the mean is not over the last dim"
    scaled = only_user(root)
    if scaled is None or not _calls(scaled, aten.mul.Tensor) or set(scaled.args) != {wide, root}:
        return "the root does not scale what it is of"
    return _weighted(wide, scaled, epsilon)


def _weighted(wide: fx.Node, scaled: fx.Node, epsilon: float) -> _Norm | str:
    """The products with ``gamma`` behind ``scaled``, which is in the dtype of ``wide``."""
    x = wide
    if _calls(wide, aten._to_copy.default) and wide.kwargs.keys() == {"dtype"}:
        x = arguments(wide)["self"]
    dtype = x.meta["val"].dtype
    if dtype not in _DTYPES or wide.meta["val"].dtype != torch.float32:
        return f"the norm is of {dtype} in {wide.meta['val'].dtype}: expected a result of float32 arithmetic"
    out = _cast(scaled, dtype)
    moved = out
    while (products := _products(moved)) is None:
        user = only_user(moved)
        if user is None or not _moves_rows(user):
            return "the normed values are read without a weight"
        moved = user
    gamma = products[0][1]
    if sizes(gamma) != (sizes(x) or ())[-1:] or any(other is not gamma for _, other in products):
        return "what the normed values are multiplied with is no weight of the last dim"
    ends = [_cast(product, dtype) for product, _ in products]
    if any(end.meta["val"].dtype != dtype or sizes(end) != sizes(moved) for end in ends):
        return f"the norm of {dtype} is {ends[0].meta['val'].dtype}"
    if moved is not out and (out.meta["val"].dtype != dtype or gamma.op != "placeholder"):
        return "the weight is not there yet where the normed values move"
    return _Norm(x, gamma, epsilon, out, tuple(ends))


def _cast(node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """``node`` in ``dtype``, where that is all that is read of it."""
    user = only_user(node)
    if user is not None and _calls(user, aten._to_copy.default) and user.kwargs == {"dtype": dtype}:
        return user
    return node


def _products(node: fx.Node) -> list[tuple[fx.Node, fx.Node]] | None:
    """The users of ``node`` and what each multiplies it with, if that is all they do."""
    found = []
    for user in node.users:
        other = next((arg for arg in user.args if arg is not node), None)
        if not _calls(user, aten.mul.Tensor) or not isinstance(other, fx.Node) or other.meta["val"].ndim != 1:
            return None
        found.append((user, other))
    return found or None


def _moves_rows(node: fx.Node) -> bool:
    """Whether ``node`` moves whole rows, so that a weight of the last dim may as well be applied before."""
    source = node.all_input_nodes[0]
    if not _calls(node, *_MOVES) or (sizes(node) or (0,))[-1:] != (sizes(source) or (1,))[-1:]:
        return False
    if node.target is not aten.slice.Tensor:
        return True
    ndim = node.meta["val"].ndim
    return bool(arguments(node)["dim"] % ndim < ndim - 1)


_MOVES = (
    NATIVE.all_gather_into_tensor.default, NATIVE.wait_tensor.default, aten.view.default, aten.reshape.default,
    aten._unsafe_view.default, aten.clone.default, aten.slice.Tensor,
)  # fmt: skip


def _replace(norm: _Norm, place: dict[fx.Node, int]) -> None:
    npu, x = torch.ops.npu, norm.x
    residual = _is_residual(x) and place.get(norm.gamma, -1) < place.get(x, -1)
    moves = _products(norm.out) is None  # then the norm goes where the rows come from
    at = x if residual else norm.out if moves else norm.products[0]
    if residual:
        made = emit(at, npu.npu_add_rms_norm.default, *x.args, norm.gamma, norm.epsilon)
    else:
        made = emit(at, npu.npu_rms_norm.default, x, norm.gamma, norm.epsilon)
    normed = emit(at, operator.getitem, made, 0)
    if not moves:
        for product in norm.products:
            product.replace_all_uses_with(normed)
            erase(product)
    else:
        for product in norm.products:
            weighted = product if _calls(product, aten.mul.Tensor) else product.all_input_nodes[0]
            moved = next(arg for arg in weighted.all_input_nodes if arg is not norm.gamma)
            product.replace_all_uses_with(moved)
            product.graph.erase_node(product)
            if weighted is not product:
                weighted.graph.erase_node(weighted)
        norm.out.replace_all_uses_with(normed)
        erase(norm.out)
    if residual:
        total = emit(x, operator.getitem, made, 2)
        if not x._erased:  # where no one else reads the sum, it went with the norm
            x.replace_all_uses_with(total, delete_user_cb=lambda user: user is not made)
            erase(x)
        if not total.users:
            total.graph.erase_node(total)


def _is_residual(x: fx.Node) -> bool:
    """A plain sum of two values of one shape and dtype."""
    if not _calls(x, aten.add.Tensor) or x.kwargs or not all(isinstance(arg, fx.Node) for arg in x.args):
        return False
    dtypes = {arg.meta["val"].dtype for arg in x.all_input_nodes}
    return all(sizes(arg) == sizes(x) for arg in x.args) and dtypes == {x.meta["val"].dtype}


def _squared(node: object) -> fx.Node | None:
    if not _calls(node, aten.pow.Tensor_Scalar, aten.mul.Tensor):
        return None
    x, other = node.args[:2]
    wanted = 2 if node.target is aten.pow.Tensor_Scalar else x
    return x if isinstance(x, fx.Node) and other == wanted else None


def _calls(node: object, *targets: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
