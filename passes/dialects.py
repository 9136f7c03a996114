"""Frameworks' own collectives as ``_c10d_functional`` calls: one table per spelling, recognised by op name alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._ops import HigherOrderOperator
from torch.utils._sympy.functions import FloorDiv

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import (
    NATIVE,
    bound,
    emit,
    emit_waited,
    erase,
    getitems,
    is_contiguous,
    is_row_major,
    op_name,
    sizes,
    strides,
)
from cpcompile.passes.token_layout import Expr, Shape, product, size_expr

aten = torch.ops.aten

#: Native op with a list of tensors -> the op that does the same for one.
COALESCED = {
    NATIVE.all_reduce_coalesced.default: NATIVE.all_reduce.default,
    NATIVE.all_gather_into_tensor_coalesced.default: NATIVE.all_gather_into_tensor.default,
    NATIVE.reduce_scatter_tensor_coalesced.default: NATIVE.reduce_scatter_tensor.default,
}

#: All-reduces that cannot be taken apart, and what the user can do. Keyed by the op's name, whole or without namespace.
OPAQUE = {
    "c10d_functional::all_reduce": "capture the graph through AOTAutograd, which makes it native",
    "_c10d_functional::all_reduce_": "use _c10d_functional.all_reduce and the value that it returns",
    "npu_mm_all_reduce_base": "compile the matmul and torch.distributed.all_reduce as two ops",
    "maybe_pad_and_reduce": "its group is not in the graph: turn FlashComm 1 off",
    "maybe_all_gather_and_maybe_unpad": "its group is not in the graph: turn FlashComm 1 off",
}
_OTHERWISE = "use torch.distributed.all_reduce in its place"


@dataclass(frozen=True)
class Dialect:
    """One op of a framework.

    Args:
        signature: types of the arguments, as the schema prints them.
        rewrite: puts the native collective in the place of a node; returns the new value, or why it cannot.
    """

    signature: tuple[str, ...]
    rewrite: Callable[..., fx.Node | str]


def opaque_reason(target: object) -> str | None:
    """Why an op with a foreign all-reduce is left alone, and the remedy; None for any other op."""
    name = op_name(target)
    remedy = OPAQUE.get(name) or OPAQUE.get(name.rpartition("::")[2])
    if remedy is None and not any(word in name.lower() for word in ("all_reduce", "allreduce")):
        return None
    return f"{name} is not understood: {remedy or _OTHERWISE}"


def split_coalesced(node: fx.Node, result: PassResult) -> None:
    """``getitem(all_reduce_coalesced([a, b], ...), i)`` -> ``all_reduce(a, ...)``; gather and scatter alike."""
    tensors, *rest = bound(node)
    parts = getitems(node)
    if parts is None:
        result.refuse(node, f"{op_name(node.target)}: its list is used whole; expected one getitem per tensor")
        return
    for index, part in parts.items():
        part.replace_all_uses_with(emit(node, COALESCED[node.target], tensors[index], *rest))  # type: ignore[index]
    erase(*parts.values(), node)
    result.rewrites += 1


def rewrite_functional(node: fx.Node, result: PassResult) -> None:
    """``vllm::all_reduce(x, group)`` and its kin -> native collective and wait."""
    new = _checked(node.target, FUNCTIONAL) or FUNCTIONAL[op_name(node.target)].rewrite(node, *bound(node))
    if isinstance(new, str):
        result.refuse(node, new)
        return
    node.replace_all_uses_with(new)
    erase(node)
    result.rewrites += 1


def rewrite_in_place(node: fx.Node, result: PassResult) -> None:
    """``getitem(auto_functionalized_v2(sglang::inplace_all_reduce, ...), 1)`` -> native collective and wait."""
    op = node.args[0]
    if op_name(op) not in IN_PLACE:
        if reason := opaque_reason(op):
            result.refuse(node, reason)
        return
    found = _checked(op, IN_PLACE) or _mutation(node, op)
    new = found if isinstance(found, str) else IN_PLACE[op_name(op)].rewrite(found)
    if isinstance(new, str):
        result.refuse(node, f"{op_name(op)}: {new}" if isinstance(found, Mutation) else new)
        return
    assert isinstance(found, Mutation)
    found.out.replace_all_uses_with(new)
    erase(*node.users, node)
    result.rewrites += 1


def _checked(op: Any, table: dict[str, Dialect]) -> str | None:
    expected = table[op_name(op)].signature
    found = tuple(str(argument.type) for argument in op._schema.arguments)
    if found == expected:
        return None
    return f"{op_name(op)}: expected arguments {', '.join(expected)}, found {', '.join(found)}; {_OTHERWISE}"


def _laid_out(like: fx.Node, value: fx.Node, base: fx.Node) -> fx.Node:
    """``value`` with the strides of ``like``: a native collective returns row-major memory, a framework's need not."""
    if strides(value) == strides(like):
        return value
    return emit(like, aten.copy.default, base, value)


def _all_reduce(node: fx.Node, tensor: fx.Node, group: str, *_: Any) -> fx.Node:
    return _laid_out(node, emit_waited(node, NATIVE.all_reduce.default, tensor, "sum", group), tensor)


def _all_gather(node: fx.Node, tensor: fx.Node, dim: int, size: int, group: str) -> fx.Node:
    moved, back = _to_front(node, tensor, dim)
    return back(emit_waited(node, NATIVE.all_gather_into_tensor.default, moved, size, group))


def _reduce_scatter(node: fx.Node, tensor: fx.Node, dim: int, size: int, group: str) -> fx.Node | str:
    shape = sizes(tensor)
    assert shape is not None, f"{tensor}: no fake tensor in its meta"
    if shape[dim].is_Integer and shape[dim] % size:
        return f"{op_name(node.target)}: dim {dim} has size {shape[dim]}, not a multiple of {size} ranks; pad it"
    moved, back = _to_front(node, tensor, dim)
    return back(emit_waited(node, NATIVE.reduce_scatter_tensor.default, moved, "sum", size, group))


def _to_front(like: fx.Node, tensor: fx.Node, dim: int) -> tuple[fx.Node, Callable[[fx.Node], fx.Node]]:
    """``tensor`` with ``dim`` moved to the front, where native collectives work, and how to move it back."""
    ndim = tensor.meta["val"].ndim
    dim %= ndim
    if dim == 0:
        return tensor, lambda value: value
    order = [dim, *(d for d in range(ndim) if d != dim)]

    def permuted(value: fx.Node, dims: list[int]) -> fx.Node:
        view = emit(like, aten.permute.default, value, dims)
        return emit(like, aten.clone.default, view, memory_format=torch.contiguous_format)

    return permuted(tensor, order), lambda value: permuted(value, [order.index(d) for d in range(ndim)])


@dataclass(frozen=True)
class Mutation:
    """What an auto-functionalised op writes: ``out`` is ``base`` after the op has written to ``view`` of it.

    Args:
        node: the ``auto_functionalized`` node.
        base: the tensor that is written to, before.
        out: the getitem that holds it after.
        view: what part of ``base`` the op sees, in the words of ``auto_functionalized_v2``; empty for all of it.
        inputs: the op's other arguments, in the order of its schema.
    """

    node: fx.Node
    base: fx.Node
    out: fx.Node
    view: dict[str, Any]
    inputs: list[Any]


def _mutation(node: fx.Node, op: Any) -> Mutation | str:
    """Read ``auto_functionalized`` (v1) or ``_v2``: torch/_higher_order_ops/auto_functionalize.py."""
    mutated, *others = [argument.name for argument in op._schema.arguments]
    prefix = f"_{mutated}_"
    index: Any = node.kwargs.get(prefix + "base_index", 0)
    bases: Any = node.kwargs.get("_all_bases", [node.kwargs.get(mutated)])
    view = {k.removeprefix(prefix): v for k, v in node.kwargs.items() if k.startswith(prefix)}
    view.pop("base_index", None)
    parts = getitems(node)
    # Without returns of its own the op gives (None, *bases).
    out = (parts or {}).get(1 + index)
    if parts is None or out is None or any(part.users for part in parts.values() if part is not out):
        return f"{op_name(op)}: expected getitem {1 + index} to be the only value that is used; {_OTHERWISE}"
    return Mutation(node, bases[index], out, view, [node.kwargs[name] for name in others])


def _sees_all(mutation: Mutation) -> bool:
    """Whether the op sees every element of the base once, in memory order."""
    view = mutation.view
    if not view or "alias" in view:
        return True
    shape = sizes(mutation.base)
    if "storage_offset" not in view or shape is None or not is_contiguous(mutation.base):
        return False
    seen, stride = (tuple(map(_size, view[key])) for key in ("size", "stride"))
    return product(seen) == product(shape) and is_row_major(seen, stride)


def _size(size: Any) -> Expr:
    return size_expr(size.meta["val"] if isinstance(size, fx.Node) else size)


def _in_place_all_reduce(mutation: Mutation) -> fx.Node | str:
    node, base, (group,) = mutation.node, mutation.base, mutation.inputs
    if _sees_all(mutation):
        return _laid_out(mutation.out, emit_waited(node, NATIVE.all_reduce.default, base, "sum", group), base)
    if "slice_dim" not in mutation.view:
        return "works on a strided part of a larger tensor; make that part contiguous first"
    where = [mutation.view[key] for key in ("slice_dim", "slice_start", "slice_end")]
    part = emit(node, aten.slice.Tensor, base, *where)
    reduced = emit_waited(node, NATIVE.all_reduce.default, part, "sum", group)
    return emit(node, aten.slice_scatter.default, base, reduced, *where)


def _in_place_all_gather(mutation: Mutation) -> fx.Node | str:
    tensor, group = mutation.inputs
    ranks = _group_size(sizes(mutation.base), sizes(tensor))
    return _filled(mutation, ranks, NATIVE.all_gather_into_tensor.default, tensor, ranks, group)


def _in_place_reduce_scatter(mutation: Mutation) -> fx.Node | str:
    tensor, group = mutation.inputs
    ranks = _group_size(sizes(tensor), sizes(mutation.base))
    return _filled(mutation, ranks, NATIVE.reduce_scatter_tensor.default, tensor, "sum", ranks, group)


def _filled(mutation: Mutation, ranks: int | None, target: Callable[..., Any], *args: Any) -> fx.Node | str:
    """A collective that fills its whole output buffer, as a value."""
    if ranks is None:
        return "the number of ranks does not follow from the shapes; use torch.distributed's own op in its place"
    if not _sees_all(mutation) or not is_contiguous(mutation.base):
        return "writes to a part of a larger tensor; give it an output tensor of its own"
    return emit_waited(mutation.node, target, *args)


def _group_size(whole: Shape | None, part: Shape | None) -> int | None:
    """``n`` where ``whole`` is ``[n*p, ...]`` and ``part`` is ``[p, ...]``."""
    if not whole or not part or whole[1:] != part[1:]:
        return None
    if isinstance(part[0], FloorDiv) and part[0].args[0] == whole[0]:
        ranks = part[0].args[1]
    else:
        ranks = whole[0] / part[0] if part[0] != 0 else None
    return int(ranks) if ranks is not None and ranks.is_Integer else None


#: Ops that return their result. vLLM: distributed/parallel_state.py; SGLang: distributed/parallel_state.py.
FUNCTIONAL = {
    "vllm::all_reduce": Dialect(("Tensor", "str"), _all_reduce),
    "vllm::all_gather": Dialect(("Tensor", "int", "int", "str"), _all_gather),
    "vllm::reduce_scatter": Dialect(("Tensor", "int", "int", "str"), _reduce_scatter),
    "sglang::outplace_all_reduce": Dialect(("Tensor", "str", "str"), _all_reduce),
}

#: Ops that write to their first argument and return nothing.
IN_PLACE = {
    "sglang::inplace_all_reduce": Dialect(("Tensor", "str"), _in_place_all_reduce),
    "sglang::reg_all_gather_into_tensor": Dialect(("Tensor", "Tensor", "str"), _in_place_all_gather),
    "sglang::reg_reduce_scatter_tensor": Dialect(("Tensor", "Tensor", "str"), _in_place_reduce_scatter),
}


def is_of_a_server(node: fx.Node) -> bool:
    """Whether ``node`` calls a collective of vLLM's or SGLang's, itself or functionalised."""
    op = node.args[0] if isinstance(node.target, HigherOrderOperator) and node.args else node.target
    return op_name(op) in FUNCTIONAL or op_name(op) in IN_PLACE
