"""Reading and writing functional collectives: what every pass that touches ``_c10d_functional`` shares."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from cpcompile.passes.token_layout import ONE, Expr, Shape, shape_of, size_expr

NATIVE = torch.ops._c10d_functional

_KEPT_META = ("nn_module_stack", "stack_trace")


@dataclass(frozen=True)
class AllReduce:
    """The canonical all-reduce: ``wait_tensor(all_reduce(input, reduce_op, group_name))``.

    Args:
        start: the ``_c10d_functional.all_reduce`` node.
        wait: its one ``wait_tensor``; consumers use this node.
        input: the value that is reduced.
        group_name: name of the process group, as the graph has it.
        reduce_op: ``"sum"``, ``"avg"``, ``"max"``, ...
    """

    start: fx.Node
    wait: fx.Node
    input: fx.Node
    group_name: str
    reduce_op: str


def find_all_reduces(gm: fx.GraphModule) -> list[AllReduce]:
    """All-reduces of ``gm`` in graph order whose only user is a ``wait_tensor``: after ``Canonicalise``, all usable."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is NATIVE.all_reduce.default:
            value, reduce_op, _ = bound(node)
            wait = only_user(node)
            if wait is not None and is_wait(wait):
                found.append(AllReduce(node, wait, value, group_name_of(node), reduce_op))
    return found


def op_name(target: object) -> str:
    """``"vllm::all_reduce"`` for an op overload; the function's own name for other callables, ``""`` for a method."""
    if isinstance(target, OpOverload):
        return str(target._schema.name)
    if isinstance(target, HigherOrderOperator):
        return str(target.name())
    return str(getattr(target, "__name__", ""))


def is_wait(node: object) -> bool:
    """Whether ``node`` is a ``_c10d_functional.wait_tensor``."""
    return isinstance(node, fx.Node) and node.target is NATIVE.wait_tensor.default


def is_collective(node: object) -> bool:
    """Whether ``node`` communicates through ``_c10d_functional`` (the wait does not count)."""
    if not isinstance(node, fx.Node) or not isinstance(node.target, OpOverload):
        return False
    return node.target.namespace == "_c10d_functional" and not is_wait(node)


def group_name_of(node: fx.Node) -> str:
    """Name of the process group that collective ``node`` runs over."""
    group = arguments(node)["group_name"]
    return group if isinstance(group, str) else str(getattr(group, "group_name", group))


def bound(node: fx.Node) -> list[Any]:
    """Arguments of an op overload in the order of its schema, however the node spells them."""
    assert isinstance(node.target, OpOverload), f"{node}: not an op overload"
    arguments = node.target._schema.arguments
    rest = (node.kwargs.get(a.name, a.default_value) for a in arguments[len(node.args) :])
    return [*node.args, *rest]


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an op overload by the names of its schema, defaults filled in."""
    assert isinstance(node.target, OpOverload), f"{node}: not an op overload"
    return dict(zip([argument.name for argument in node.target._schema.arguments], bound(node), strict=True))


def only_user(node: fx.Node) -> fx.Node | None:
    """The one user of ``node``, or None where it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def sizes(node: object) -> Shape | None:
    """Sizes of the tensor that ``node`` produces, as expressions: comparing them adds no guard. None for no tensor."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return shape_of(value) if isinstance(value, torch.Tensor) else None


def strides(node: fx.Node) -> Shape:
    """Strides of the dims that are larger than 1: the ones that say where an element lies."""
    value = node.meta["val"]
    pairs = zip(shape_of(value), value.stride(), strict=True)
    return tuple(size_expr(stride) for size, stride in pairs if size != 1)


def is_row_major(shape: Sequence[Expr], stride: Sequence[Expr]) -> bool:
    """Whether ``stride`` is that of a contiguous tensor of ``shape``, as far as expressions show without a guard."""
    step = ONE
    for size, found in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if found != step:
                return False
            step = step * size
    return True


def is_contiguous(node: fx.Node) -> bool:
    """Whether the tensor that ``node`` produces is row-major."""
    value = node.meta["val"]
    return is_row_major(shape_of(value), [size_expr(stride) for stride in value.stride()])


def getitems(node: fx.Node) -> dict[int, fx.Node] | None:
    """Users of a tuple by index, or None where one is not a ``getitem`` or an index is read twice."""
    found: dict[int, fx.Node] = {}
    for user in node.users:
        if user.target is not operator.getitem or user.args[1] in found:
            return None
        found[user.args[1]] = user  # type: ignore[index]
    return found


def emit(like: fx.Node, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call before ``like``, with its meta: ``val`` by running ``target`` on fake tensors, the rest copied.

    Args:
        like: the node that the new one stands in for.
        target: op overload or Python function.
        *args: its arguments; nodes stand for their values.
        **kwargs: its keyword arguments.
    """
    graph = like.graph
    with graph.inserting_before(like):
        node = graph.call_function(target, args, kwargs)
    node.meta.update({key: like.meta[key] for key in _KEPT_META if key in like.meta})
    if all("val" in n.meta for n in node.all_input_nodes):
        node.meta["val"] = fake_value(node, like)
    return node


def emit_waited(like: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """Insert a collective and its wait before ``like``; returns the wait."""
    return emit(like, NATIVE.wait_tensor.default, emit(like, target, *args))


def erase(*nodes: fx.Node, collectives: bool = False) -> None:
    """Erase ``nodes``, which nobody may use any more, and then what only they used.

    Args:
        *nodes: users before what they use.
        collectives: among what only they used, erase collectives too. Else those stay: other ranks may wait in them.
    """
    pending = []
    for node in nodes:
        pending += node.all_input_nodes
        node.graph.erase_node(node)
    while pending:
        node = pending.pop()
        if node.op != "call_function" or node.users or node._erased:
            continue
        communicates = is_collective(node) or is_wait(node)
        if not collectives if communicates else node.is_impure():
            continue
        pending += node.all_input_nodes
        node.graph.erase_node(node)


def fake_value(node: fx.Node, like: fx.Node) -> Any:
    """What ``node`` gives on its operands' fake values; ``like`` is a node of its graph, for what has no operands."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    # A factory's operands are sizes: its tensor is as fake as the one it is made next to.
    fakes = (leaf for n in [*node.all_input_nodes, like] for leaf in tree_leaves(n.meta.get("val")))
    mode = next((fake.fake_mode for fake in fakes if isinstance(fake, FakeTensor)), None)
    assert callable(node.target)
    if mode is None:
        return node.target(*args, **kwargs)
    # A layout question about symbolic sizes must not narrow what the graph is compiled for.
    # As AOTAutograd traces: without its dispatcher, ops that are made of others may ask for sizes as numbers.
    quiet = mode.shape_env.suppress_guards() if mode.shape_env else contextlib.nullcontext()
    with mode, quiet, enable_python_dispatcher():
        return node.target(*args, **kwargs)
