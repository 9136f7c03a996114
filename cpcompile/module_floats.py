"""Numbers that a module holds (an epsilon, a scale) as constants of the graph, under ``dynamic=True`` as well."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx
from torch._dynamo.symbolic_convert import TensorifyState
from torch.fx.experimental.symbolic_shapes import guard_scalar


def fix_module_floats(gm: fx.GraphModule) -> None:
    """Put their values in the place of a module's own Python floats, which dynamo made inputs of the graph.

    With ``dynamic=True`` dynamo passes every float as a tensor of its own: nothing says that a scale is the same on
    all ranks, or what it is. Without, it takes floats for constants and compiles again where one changes, and so does
    this for those that a module holds, with dynamo's own guard. Floats that the caller passes stay inputs.

    Args:
        gm: dynamo's graph, changed in place; the inputs stay, without users.
    """
    for node, value in list(_floats(gm)):
        for user in list(node.users):
            user.replace_all_uses_with(guard_scalar(value))  # type: ignore[arg-type]  # fx takes a number
            gm.graph.erase_node(user)
        TensorifyState.specialize(value.node._expr.name)  # else AOTAutograd has dynamo trace once more for it
    gm.recompile()


def _floats(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, torch.SymFloat]]:
    """Inputs that are a module's floats, and their symbols."""
    for node in gm.graph.find_nodes(op="placeholder"):
        source = getattr(node, "_dynamo_source", None)
        value = getattr(node.meta.get("example_value"), "item_memo", None)
        if source is None or not source.guard_source.is_unspecialized_nn_module():
            continue
        read = all(user.op == "call_method" and user.target == "item" for user in node.users)
        if isinstance(value, torch.SymFloat) and hasattr(value.node._expr, "name") and value.node.has_hint() and read:
            yield node, value
