"""Where a graph all-reduces: every place, of any spelling and kind, also in graphs inside it; and why it must stay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch._ops import HigherOrderOperator, OpOverload

from cpcompile.passes.collectives import NATIVE, arguments, find_all_reduces, op_name
from cpcompile.passes.describe import module_of
from cpcompile.passes.dialects import opaque_reason


@dataclass(frozen=True)
class Site:
    """One all-reduce.

    Args:
        name: the node of its value, after those of the ops that hold its graph: ``cond.true_graph_0.wait_tensor``.
        group: name of its process group; empty where the op does not say.
        module: the module that it comes from.
        reason: why no axis can move it; empty where one may.
    """

    name: str
    group: str
    module: str
    reason: str = ""


def find_sites(gm: fx.GraphModule) -> list[Site]:
    """Every all-reduce of ``gm``, in graph order."""
    return list(_sites(gm, "", ""))


def _sites(gm: fx.GraphModule, prefix: str, inside: str) -> Iterator[Site]:
    waits = {ar.start: ar for ar in find_all_reduces(gm)}
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node in waits:
            found = waits[node]
            reason = inside or ("" if found.reduce_op == "sum" else f"it reduces by {found.reduce_op!r}, not by a sum")
            yield Site(prefix + found.wait.name, found.group_name, module_of(node), reason)
        elif reason := _why_not_read(node):
            yield Site(prefix + node.name, _group(node), module_of(node), inside or reason)
        for name, graph in _graphs(gm, node):
            yield from _sites(graph, f"{prefix}{node.name}.{name}.", _INSIDE.format(op_name(node.target)))


_INSIDE = "it is in control flow, inside {}: only all-reduces of the graph itself are moved"


def _why_not_read(node: fx.Node) -> str:
    """Why the passes do not take a call for an all-reduce that they could move; empty where it is none."""
    if node.target is NATIVE.all_reduce.default:
        return "it is not waited for once, before its value is used"
    if node.target is NATIVE.all_reduce_coalesced.default:
        return "its list of results is used whole: reduce the tensors one by one"
    target: Any = node.target
    inner = node.args[0] if isinstance(target, HigherOrderOperator) and node.args else target
    return opaque_reason(inner if isinstance(inner, OpOverload) else target) or ""


def _group(node: fx.Node) -> str:
    group = arguments(node).get("group_name", "") if isinstance(node.target, OpOverload) else ""
    return group if isinstance(group, str) else str(getattr(group, "group_name", ""))


def _graphs(gm: fx.GraphModule, node: fx.Node) -> Iterator[tuple[str, fx.GraphModule]]:
    """The graphs that an op holds: the branches of ``cond``, the body of ``while_loop``."""
    for operand in node.all_input_nodes:
        if operand.op == "get_attr" and isinstance(graph := getattr(gm, str(operand.target), None), fx.GraphModule):
            yield str(operand.target), graph
