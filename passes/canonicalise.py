"""One spelling of every collective: ``wait_tensor(_c10d_functional.all_reduce(x, "sum", group))``, used directly."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import (
    NATIVE,
    bound,
    emit,
    erase,
    is_contiguous,
    is_wait,
    only_user,
    op_name,
    sizes,
    strides,
)
from cpcompile.passes.dialects import (
    COALESCED,
    FUNCTIONAL,
    opaque_reason,
    rewrite_functional,
    rewrite_in_place,
    split_coalesced,
)
from cpcompile.passes.round_trip import collapse_round_trip

aten = torch.ops.aten
_AUTO_FUNCTIONALIZED = (torch.ops.higher_order.auto_functionalized, torch.ops.higher_order.auto_functionalized_v2)


@dataclass(frozen=True)
class Canonicalise:
    """Every dialect of all-reduce -> ``all_reduce(x, "sum", group)``, ``wait_tensor``; what hides it -> gone.

    Before -> after:
        - in place: ``AR, wait, copy(x, w)`` -> ``AR, wait``; likewise any copy that changes neither dtype nor layout;
        - coalesced, vLLM and SGLang ops (``dialects.py``) -> native collectives with a wait each;
        - ``all_gather(reduce_scatter(x))`` over one group and dim, with no other user -> ``all_reduce(x)``;
        - views, slices, expands and clones that change nothing -> gone; ``view(view(x))`` -> ``view(x)``.

    Refuses:
        - reductions other than sum, in-place forms, an all-reduce without its own wait;
        - a copy of an all-reduce into another memory layout, device or shape;
        - any other op with an all-reduce in its name, naming the op.

    Source: ``reference/dialects`` traces of torch 2.13, vLLM 0.32 and SGLang 0.5.23.
    """

    name = "canonicalise"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place; no guard is added to its symbolic shapes."""
        rewrites = 0
        while True:
            result = _Sweep(gm.graph).run()
            rewrites += result.rewrites
            if not result.rewrites:
                break
        return PassResult(rewrites, result.refusals).finish(gm)


@dataclass
class _Sweep:
    """One walk over the graph, front to back. What a walk uncovers behind itself is left to the next one."""

    graph: fx.Graph
    result: PassResult = field(default_factory=PassResult)
    waits: dict[fx.Node, fx.Node] = field(default_factory=dict)
    shared: set[fx.Node] = field(default_factory=set)
    written: set[fx.Node] = field(default_factory=set)

    def run(self) -> PassResult:
        ends = [node for node in self.graph.nodes if node.op == "output" or _is_mutable(node)]
        self.shared = {_memory(value) for end in ends for value in end.all_input_nodes}
        self.written = {_memory(value) for end in ends if end.op != "output" for value in end.all_input_nodes}
        for node in self.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
        return self.result

    def _visit(self, node: fx.Node) -> None:
        rule = _RULES.get(node.target)
        if rule is not None:
            rule(self, node)
        elif node.target in COALESCED:
            split_coalesced(node, self.result)
        elif node.target in _AUTO_FUNCTIONALIZED:
            rewrite_in_place(node, self.result)
        elif op_name(node.target) in FUNCTIONAL:
            rewrite_functional(node, self.result)
        elif reason := opaque_reason(node.target):
            self.result.refuse(node, reason)

    def replace(self, node: fx.Node, value: fx.Node) -> None:
        """Use ``value`` instead of ``node``."""
        node.replace_all_uses_with(value)
        erase(node)
        self.result.rewrites += 1

    def replace_memory(self, node: fx.Node, value: fx.Node) -> None:
        """Use ``value`` instead of its copy ``node``, unless a write to one could then be seen in the other.

        ``shared`` is the memory that the graph returns or writes to, ``written`` the memory that it writes to.
        """
        root = _memory(value)
        if root in self.written or (node in self.shared and (root in self.shared or root.op != "call_function")):
            return
        if node in self.shared:
            self.shared.add(root)
        self.replace(node, value)


def _memory(node: fx.Node) -> fx.Node:
    """The node that allocated the memory of ``node``."""
    while node.op == "call_function" and (
        getattr(node.target, "is_view", False) or node.target in (operator.getitem, aten._unsafe_view.default)
    ):
        source = node.args[0]
        assert isinstance(source, fx.Node), f"{node}: expected a view of a node, found {source!r}"
        node = source
    return node


def _is_mutable(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def _copy(sweep: _Sweep, node: fx.Node) -> None:
    """``copy(dst, src)`` -> ``src``, or ``_to_copy(src, dtype)``."""
    _move(sweep, node, bound(node)[1])


def _slice_scatter(sweep: _Sweep, node: fx.Node) -> None:
    """``slice_scatter(dst, src)`` over all of ``dst`` -> ``src``."""
    source = bound(node)[1]
    if sizes(source) is not None and sizes(source) == sizes(node):
        _move(sweep, node, source)


def _move(sweep: _Sweep, node: fx.Node, source: fx.Node) -> None:
    """Forward ``source``, which ``node`` moves into other memory of the same shape."""
    if sizes(source) is None or sizes(node) is None:
        return
    found, wanted = source.meta["val"], node.meta["val"]
    if sizes(source) != sizes(node) or found.device != wanted.device:
        reason = "the result of a collective is copied into another shape or device; copy it as a separate tensor"
    elif not _read_in_any_layout(node) and (
        strides(source) != strides(node) or (is_wait(source) and not is_contiguous(source))
    ):
        reason = "a tensor that is not contiguous is communicated in place; make it contiguous first"
    elif found.dtype != wanted.dtype:
        sweep.replace(node, emit(node, aten._to_copy.default, source, dtype=wanted.dtype))
        return
    else:
        sweep.replace_memory(node, source)
        return
    if is_wait(source):
        sweep.result.refuse(node, reason)


def _read_in_any_layout(node: fx.Node) -> bool:
    """Whether all users only copy the elements of ``node`` into memory whose strides do not depend on it."""
    return all(
        user.target in _COPIES_SECOND and user.args[0] is not node and node in user.args[1:2] for user in node.users
    )


def _clone(sweep: _Sweep, node: fx.Node) -> None:
    """``clone(x)`` -> ``x``, where the strides stay."""
    source = bound(node)[0]
    if sizes(source) is not None and sizes(node) is not None and strides(source) == strides(node):
        sweep.replace_memory(node, source)


def _alias(sweep: _Sweep, node: fx.Node) -> None:
    """``alias(x)``, ``detach(x)`` -> ``x``."""
    sweep.replace(node, bound(node)[0])


def _same_shape(sweep: _Sweep, node: fx.Node) -> bool:
    """A view, slice or expand to the very same shape -> its input."""
    source = bound(node)[0]
    if sizes(source) is None or sizes(source) != sizes(node):
        return False
    sweep.replace(node, source)
    return True


def _view(sweep: _Sweep, node: fx.Node) -> None:
    """``_unsafe_view`` -> ``view`` (their kernels are one); ``view(view(x))`` -> ``view(x)``."""
    if _same_shape(sweep, node):
        return
    if node.target is aten._unsafe_view.default:
        node.target = aten.view.default
        sweep.result.rewrites += 1
    inner = bound(node)[0]
    if inner.target is aten.view.default and only_user(inner) is node:
        node.update_arg(0, inner.args[0])
        erase(inner)
        sweep.result.rewrites += 1


def _view_dtype(sweep: _Sweep, node: fx.Node) -> None:
    """A view as the very same dtype -> its input."""
    source = bound(node)[0]
    if source.meta["val"].dtype == node.meta["val"].dtype:
        sweep.replace(node, source)


def _all_reduce(sweep: _Sweep, node: fx.Node) -> None:
    reduce_op = bound(node)[1]
    if reduce_op != "sum":
        reason = f"all_reduce with {reduce_op!r}: expected 'sum'; reduce by sum and scale or select after it"
        sweep.result.refuse(node, reason)
    elif not node.users or not all(map(is_wait, node.users)):
        sweep.result.refuse(node, "all_reduce is not followed by wait_tensor alone; wait for it before it is used")


def _wait(sweep: _Sweep, node: fx.Node) -> None:
    """A second wait for one collective -> the first."""
    first = sweep.waits.setdefault(bound(node)[0], node)
    if first is not node:
        node.replace_all_uses_with(first)
        erase(node)
        sweep.result.rewrites += 1


def _all_gather(sweep: _Sweep, node: fx.Node) -> None:
    sweep.result.rewrites += collapse_round_trip(node)


#: Ops that write their second argument into a copy of their first.
_COPIES_SECOND = (aten.copy.default, aten.slice_scatter.default, aten.select_scatter.default)

_RULES: dict[Any, Callable[[_Sweep, fx.Node], object]] = {
    aten.copy.default: _copy,
    aten.slice_scatter.default: _slice_scatter,
    aten.clone.default: _clone,
    aten.alias.default: _alias,
    aten.detach.default: _alias,
    aten.slice.Tensor: _same_shape,
    aten.expand.default: _same_shape,
    aten.reshape.default: _same_shape,
    aten.view.default: _view,
    aten.view.dtype: _view_dtype,
    aten._unsafe_view.default: _view,
    NATIVE.all_reduce.default: _all_reduce,
    NATIVE.all_gather_into_tensor.default: _all_gather,
    NATIVE.wait_tensor.default: _wait,
}
