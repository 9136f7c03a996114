"""vLLM's own ops (0.32): forms of AOTAutograd's that must not run, and why the opaque ones need all rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload, OpOverloadPacket

from cpcompile.errors import TraceError
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import erase, getitems, op_name
from cpcompile.passes.token_layout import Expr, size_expr

_WRITES = "it writes keys to a cache that the layer holds, in the order of the tokens"
_ATTENDS = "it attends over a cache that the layer holds, by the whole batch's lengths"
_ROUTES = "its experts are this rank's part, and every token meets them"
#: Ops that see more than their arguments (caches, weights, metadata that a layer holds), and why they need every row.
OPAQUE: Mapping[str, str] = {
    "vllm::unified_kv_cache_update": _WRITES,
    "vllm::unified_mla_kv_cache_update": _WRITES,
    "vllm::unified_attention_with_output": _ATTENDS,
    "vllm::unified_mla_attention_with_output": _ATTENDS,
    "vllm::sparse_attn_indexer": "it writes and reads a cache that the layer holds, by the whole batch's lengths",
    "vllm::moe_forward": _ROUTES,
    "vllm::moe_forward_shared": _ROUTES,
    "_C::cpu_fused_moe": _ROUTES,
}
#: What stands for SGLang's modules in its graphs (``cpcompile/serving/sglang_hooks.py``).
_SGLANG: Mapping[str, str] = {
    "cpcompile_sglang::attention": "it writes and reads a cache that the batch holds, by the whole batch's lengths",
    "cpcompile_sglang::indexer": "it writes and scores keys in a cache of the batch's, by the whole batch's lengths",
    "cpcompile_sglang::experts": _ROUTES,
}

#: Ops that write to an argument which other ops read without naming it: a clone of it would go unread.
_READ_ELSEWHERE = frozenset({"vllm::sparse_attn_indexer"})
#: Op → an argument of which it reads the number of rows and the device, and those that it reads, with as many rows.
ROWS_ALONE: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "vllm::sparse_attn_indexer": ("hidden_states", ("weights", "k", "q_quant")),
}
_VIEW = ("size", "stride", "storage_offset", "slice_dim", "slice_start", "slice_end")  # words of auto_functionalized_v2
_MAYBE_IN_PLACE = "maybe_inplace"
_ALIASES = (torch.ops.aten.alias.default, torch.ops.aten.detach.default)
_AUTO_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized_v2


def inner_op(node: fx.Node) -> object:
    """The op that ``node`` calls, itself or functionalised."""
    return node.args[0] if node.target is _AUTO_FUNCTIONALIZED else node.target


def why_whole(node: fx.Node) -> str:
    """Why a call of an op that is in no table needs all rows."""
    name = op_name(inner_op(node))
    reason = OPAQUE.get(name) or _SGLANG.get(name)
    return f"{name}: {reason}" if reason else ""


@dataclass(frozen=True)
class VllmOps:
    """Calls of vLLM's ops -> forms that mean what vLLM meant.

    Before -> after:
        - ``auto_functionalized(vllm_ir.f.maybe_inplace, x)`` whose ``x`` nobody reads afterwards -> ``vllm_ir.f(x)``;
        - ``auto_functionalized(vllm.sparse_attn_indexer, buffer)`` of a graph input -> the op itself, which writes the
          input: attention reads that buffer, and does not name it among its arguments;
        - ``vllm.sparse_attn_indexer(hidden_states, ..., weights)``, which counts the rows of the hidden states and
          reads none -> ``vllm.sparse_attn_indexer(weights, ..., weights)``, which needs whole what it reads alone.

    Refuses: a ``maybe_inplace`` whose operand is read afterwards, which stays as it is and needs all rows; an operand
    whose rows are counted, where none that is read has as many.
    """

    name = "vllm-ops"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place.

        Raises:
            TraceError: a buffer that is read elsewhere is written through a view, which cannot be run rightly.
        """
        result = PassResult()
        for node in gm.graph.find_nodes(op="call_function", target=_AUTO_FUNCTIONALIZED):
            op = node.args[0]
            if not isinstance(op, OpOverload):
                continue
            if op.namespace == "vllm_ir" and op._overloadname == _MAYBE_IN_PLACE:
                _out_of_place(node, op, result)
            elif op_name(op) in _READ_ELSEWHERE:
                _in_place(node, op, result)
        count_rows_of_what_is_read(gm.graph, result)
        return result.finish(gm)


def count_rows_of_what_is_read(graph: fx.Graph, result: PassResult) -> None:
    """Give ops of :data:`ROWS_ALONE` an operand that they read, in the place of the one whose rows they count.

    Args:
        graph: of AOTAutograd, or of dynamo.
        result: counts what was changed, and takes what was refused.
    """
    for node in graph.nodes:
        op = inner_op(node) if node.op == "call_function" else None
        op = op.default if isinstance(op, OpOverloadPacket) else op  # so in dynamo's graphs
        if not isinstance(op, OpOverload) or op_name(op) not in ROWS_ALONE:
            continue
        counted, others = ROWS_ALONE[op_name(op)]
        read = [operand for name in others if isinstance(operand := _operand(node, op, name)[0], fx.Node)]
        now, place = _operand(node, op, counted)
        if now in read:
            continue
        rows = _rows(now)
        alike = next((operand for operand in read if _rows(operand) == rows), None)
        if alike is None or rows is None:
            result.refuse(node, f"{op_name(op)}: no operand that it reads has as many rows as {counted}")
            continue
        if isinstance(place, int):
            node.update_arg(place, alike)
        else:
            node.update_kwarg(place, alike)
        result.rewrites += 1


def _operand(node: fx.Node, op: OpOverload, name: str) -> tuple[Any, int | str]:
    """An argument of ``op``, which ``node`` calls, itself or functionalised; and its place or its name among them."""
    place = [argument.name for argument in op._schema.arguments].index(name)
    if node.target is not _AUTO_FUNCTIONALIZED and place < len(node.args):
        return node.args[place], place
    return node.kwargs.get(name), name


def _rows(node: fx.Node) -> tuple[Expr, torch.device] | None:
    """Number of rows and device; None where that is not known."""
    value = node.meta.get("val", node.meta.get("example_value"))
    return (size_expr(value.shape[0]), value.device) if isinstance(value, torch.Tensor) and value.ndim else None


def _given(node: fx.Node, op: OpOverload) -> dict[str, Any] | None:
    """The arguments of ``op`` by name; None where one that it writes to is a view."""
    bases: Any = node.kwargs["_all_bases"]
    found: dict[str, Any] = {}
    for argument in op._schema.arguments:
        prefix = f"_{argument.name}_"
        if prefix + "base_index" not in node.kwargs:
            found[argument.name] = node.kwargs.get(argument.name, argument.default_value)
            continue
        index = node.kwargs[prefix + "base_index"]
        if any(prefix + part in node.kwargs for part in _VIEW):
            return None
        found[argument.name] = None if index is None else bases[index]
    return found


def _out_of_place(node: fx.Node, op: OpOverload, result: PassResult) -> None:
    given, parts, count = _given(node, op), getitems(node), len(op._schema.returns)
    if given is None or parts is None or any(part.users for index, part in parts.items() if index >= count):
        result.refuse(node, f"{op_name(op)}: an operand that it may write to is read afterwards")
        return
    plain = getattr(torch.ops.vllm_ir, op_name(op).partition("::")[2]).default
    _replace_results(parts, _call(node, plain, given), count)
    erase(*(part for part in parts.values() if node in part.all_input_nodes), node)
    result.rewrites += 1


def _in_place(node: fx.Node, op: OpOverload, result: PassResult) -> None:
    written: Any = node.kwargs["_all_bases"]
    bases = [_same_memory(base) for base in written]
    if all(base.op != "placeholder" for base in bases):
        return  # made in the graph: whoever reads it names it
    given, parts = _given(node, op), getitems(node)
    if given is None or parts is None:
        raise TraceError(f"{node}: expected {op_name(op)} to write to a whole graph input, found a view of one")
    given = {name: _same_memory(v) if isinstance(v, fx.Node) and v in written else v for name, v in given.items()}
    count = max(1, len(op._schema.returns))
    _replace_results(parts, _call(node, op, given), count)
    for index, part in parts.items():
        if index >= count:
            part.replace_all_uses_with(bases[index - count])
    erase(*parts.values(), node)
    result.rewrites += 1


def _same_memory(node: fx.Node) -> fx.Node:
    while node.target in _ALIASES:
        node = node.all_input_nodes[0]
    return node


def _call(like: fx.Node, op: OpOverload, given: Mapping[str, Any]) -> fx.Node:
    """A call of ``op`` before ``like``, whose first results are those of ``like``."""
    with like.graph.inserting_before(like):
        node = like.graph.call_function(op, tuple(given.values()))
    count = len(op._schema.returns)
    values = like.meta["val"]
    node.meta = {**like.meta, "val": values[0] if count <= 1 else tuple(values[:count])}
    return node


def _replace_results(parts: Mapping[int, fx.Node], new: fx.Node, count: int) -> None:
    for index, part in parts.items():
        if index < count and part.users:
            if count > 1:
                part.update_arg(0, new)
            else:
                part.replace_all_uses_with(new)
