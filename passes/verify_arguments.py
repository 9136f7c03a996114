"""How the static proof reads one call: its arguments with sizes computed, whether it has effects, what it does to dims.

Sizes are computed from the graph inputs' own, and never taken from what a pass wrote next to a node.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

import torch
import torch.fx as fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.utils._sympy.functions import FloorDiv, Max, Min

from cpcompile.axes import Axis
from cpcompile.passes import collectives
from cpcompile.passes.verify_index import Dims, Shape, plain, product, regroup, same, shape

View: TypeAlias = tuple[int, Dims]
Argument: TypeAlias = Any  # A size, a tuple, a node that stands for a tensor, or another constant.

ARITHMETIC: Mapping[object, Callable[..., Any]] = {
    **{f: f for f in (operator.add, operator.sub, operator.mul, operator.neg)},
    operator.floordiv: lambda a, b: a // b if isinstance(a, int) and isinstance(b, int) else FloorDiv(a, b),
    torch.sym_min: lambda a, b: Min(a, b),
    torch.sym_max: lambda a, b: Max(a, b),
}
NO_DATA = frozenset(f"aten::new_{n}" for n in ("ones", "zeros", "empty", "full", "empty_strided"))
# Alike in every row of a dim that their size argument alone makes.
REPEATING = (NO_DATA - {"aten::new_empty_strided"}) | {"aten::expand"}
VIEWS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape"})
REORDERED = frozenset(f"aten::{n}" for n in ("permute", "t", "transpose", "unsqueeze", "squeeze"))
IDENTITIES = frozenset({"aten::clone", "aten::contiguous", "aten::alias", "aten::detach"})
RESHAPES = VIEWS | IDENTITIES | REORDERED | {"aten::slice", "aten::constant_pad_nd"}
BY_STORAGE = frozenset({"aten::as_strided", "aten::as_strided_copy", "aten::as_strided_scatter"})
LAST = torch.iinfo(torch.int64).max


class Refused(Exception):
    """A value or call about which nothing can be proven; the most specific reason is told."""

    def __init__(self, message: str, specific: int = 0) -> None:
        """``message`` says why; of several reasons the one with the largest ``specific`` is told."""
        super().__init__(message)
        self.specific = specific


# Thousands of calls are of some tens of ops.
op_name = functools.lru_cache(maxsize=4096)(collectives.op_name)


def reshaped(node: fx.Node, args: Mapping[str, Argument], dims: Dims, split: bool = False) -> Dims | None:
    """Digits after an op that only reorders or regroups dims, None for other ops.

    Args:
        node: the call.
        args: its arguments.
        dims: digits of its first operand.
        split: the operand holds only some rows, so that a dim may have size 1 here and not in the original.
    """
    name, ndim = op_name(node.target), len(dims)
    if name in VIEWS:
        sizes = args.get("size", args.get("shape"))
        return None if sizes is None else regroup(dims, tuple(sizes))  # without sizes it is a view as another dtype
    if name in IDENTITIES:
        return dims
    if name == "aten::constant_pad_nd":
        return None if any(args["pad"]) else dims
    if name == "aten::permute":
        return tuple(dims[d] for d in args["dims"])
    if name == "aten::t":
        return dims[::-1]
    if name == "aten::transpose":
        order = list(range(ndim))
        order[args["dim0"]], order[args["dim1"]] = order[args["dim1"]], order[args["dim0"]]
        return tuple(dims[d] for d in order)
    if name == "aten::unsqueeze":
        at = args["dim"] % (ndim + 1)
        return (*dims[:at], (), *dims[at:])
    if name == "aten::squeeze" and "dim" in args:
        given = args["dim"] if isinstance(args["dim"], tuple) else (args["dim"],)
        gone = {d % ndim for d in given}
        if split and any(dims[d] for d in gone):
            raise Refused("expected to squeeze dims of size 1; found one that holds rows", 2)
        return tuple(dim for d, dim in enumerate(dims) if d not in gone or dim)
    if name == "aten::slice" and args["step"] == 1 and (args["start"] or 0) == 0:
        end = args["end"]
        return dims if end is None or end == LAST or same(end, shape(dims)[args["dim"]]) else None
    return None


class Arguments:
    """Arguments of one graph's calls with sizes computed, not trusted; and which calls have effects, in which order."""

    def __init__(self, gm: fx.GraphModule, axis: Axis) -> None:
        """Find the calls of ``gm`` that have effects."""
        self.axis = axis
        self.sizes: dict[fx.Node, Any] = {}
        self.effects: dict[fx.Node, int] = {}
        self.epoch: dict[fx.Node, int] = {}
        self.mutated: list[fx.Node] = []
        writes = 0
        for node in gm.graph.nodes:
            if is_random(node) or is_mutable(node) or sees_more(node):
                self.effects[node] = len(self.effects)
            if is_mutable(node):
                writes += 1
                self.mutated += [_root(n) for n in _written(node)]
            if writes:
                self.epoch[node] = writes

    def visit_size(self, node: fx.Node, shape_of_node: Callable[[fx.Node], Shape]) -> bool:
        """Compute ``node`` if it is a size; returns whether it is."""
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, int | torch.SymInt):
            self.sizes[node] = plain(value)
        elif op_name(node.target) == "aten::sym_size":
            self.sizes[node] = shape_of_node(node.args[0])[node.args[1]]  # type: ignore[arg-type,index]
        elif op_name(node.target) == "aten::sym_numel":
            self.sizes[node] = product(shape_of_node(node.args[0]))  # type: ignore[arg-type]
        elif node.target in ARITHMETIC and all(not isinstance(a, fx.Node) or a in self.sizes for a in node.args):
            result = ARITHMETIC[node.target](*(self.resolve(a) for a in node.args))
            self.sizes[node] = result if isinstance(result, float) else plain(result)
        else:
            return False
        return True

    def resolve(self, value: Any) -> Argument:
        """``value`` with sizes for size nodes; tensors stay nodes."""
        if isinstance(value, fx.Node):
            return self.sizes.get(value, value)
        if isinstance(value, list | tuple):
            return tuple(self.resolve(v) for v in value)
        return plain(value) if isinstance(value, torch.SymInt) else value

    def arguments(self, node: fx.Node) -> Mapping[str, Argument]:
        """All arguments by name."""
        if not isinstance(node.target, OpOverload):
            return {}
        given = node.args
        found = {}
        for index, argument in enumerate(node.target._schema.arguments):
            value = given[index] if index < len(given) else node.kwargs.get(argument.name, argument.default_value)
            found[argument.name] = self.resolve(value)
        return found

    def reads_no_data(self, node: fx.Node) -> bool:
        """Whether the op takes only dtype and device from its tensor operand."""
        return op_name(node.target) in NO_DATA

    def key(
        self, node: fx.Node, at: Mapping[fx.Node, View], volatile: Collection[int], sizes: Shape | None = None
    ) -> object:
        """What calls with the same results have in common.

        Args:
            node: the call.
            at: its tensor operands.
            volatile: contents that calls change in place.
            sizes: the whole result's sizes in the place of an argument that names them.
        """
        name = op_name(node.target)
        when = self.epoch.get(node, 0) if any(content in volatile for content, _ in at.values()) else 0
        args: tuple[Any, ...] = node.args
        if name == "aten::expand":
            source = args[0]
            ndim, given = len(at[source][1]), sizes or self.resolve(args[1])
            old = (1,) * (len(given) - ndim) + shape(at[source][1])
            args = (source, [o if s == -1 else s for s, o in zip(given, old, strict=True)])
        elif name == "aten::slice":
            found = self.arguments(node)
            extent = shape(at[node.args[0]][1])[found["dim"]]  # type: ignore[index]
            last = found["end"]
            end = extent if last is None or last == LAST else last
            args = (node.args[0], found["dim"] % len(at[node.args[0]][1]), found["start"] or 0, end, found["step"])  # type: ignore[index]
        elif self.reads_no_data(node):
            value = node.args[0].meta["val"]  # type: ignore[union-attr]
            args = (value.dtype, value.device, sizes or args[1], *args[2:])
        frozen = tuple([self.frozen(a, at) for a in args])
        kwargs = tuple([(k, self.frozen(v, at)) for k, v in sorted(node.kwargs.items())])
        if name.startswith("_c10d_functional::"):
            frozen = tuple(self.axis.members(a, self.axis.me) or a if isinstance(a, str) else a for a in frozen)
        if name in BY_STORAGE:
            frozen += tuple(_storage(n) for n in node.all_input_nodes if isinstance(n.meta["val"], torch.Tensor))
        return (node.target, frozen, kwargs, self.effects.get(node), when)

    def constant(self, value: object) -> object:
        """A graph output that is no tensor, for comparison."""
        return self.frozen(value, {}) if not isinstance(value, fx.Node) or value in self.sizes else value.name

    def frozen(self, value: Any, at: Mapping[fx.Node, View]) -> object:
        """An argument for comparison: the views that tensors are, and numbers with their types."""
        if isinstance(value, fx.Node):
            if value in at:
                return at[value]
            if value in self.sizes:
                return ("number", self.sizes[value])
            raise Refused(f"nothing is known of {value}")
        if isinstance(value, list | tuple):
            return tuple([self.frozen(v, at) for v in value])
        # 1, 1.0 and True are equal in Python and not as arguments; nan differs from itself.
        if isinstance(value, bool | float | complex):
            return (type(value).__name__, repr(value))
        return ("number", plain(value)) if isinstance(value, int) or hasattr(value, "is_Integer") else value


def communicates(node: fx.Node) -> bool:
    """Whether ``node`` starts or awaits a functional collective."""
    return op_name(node.target).startswith("_c10d_functional::")


def is_mutable(node: fx.Node) -> bool:
    """Whether ``node`` writes into an operand."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def sees_more(node: fx.Node) -> bool:
    """Whether ``node`` calls an op of vLLM's, itself or functionalised.

    Those read and write caches and metadata that are not among their arguments, so that their calls must stay in order.
    """
    op = node.args[0] if isinstance(node.target, HigherOrderOperator) and node.args else node.target
    return isinstance(op, OpOverload) and op.namespace == "vllm"


def is_random(node: fx.Node) -> bool:
    """Whether ``node`` draws random numbers: not where all that it draws is what to drop, and it drops nothing."""
    if not isinstance(node.target, OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.args[index] if index < len(node.args) else node.kwargs.get("dropout_p", argument.default_value)
            return bool(given != 0)
    return True


def aliases(node: fx.Node) -> bool:
    """Whether a result of the op shares memory with an operand."""
    if not isinstance(node.target, OpOverload):
        return node.target is operator.getitem
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _written(node: fx.Node) -> list[fx.Node]:
    assert isinstance(node.target, OpOverload)
    found = []
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            found += [v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, fx.Node)]
    return found


def _root(node: fx.Node) -> fx.Node:
    while node.op == "call_function" and aliases(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _storage(node: fx.Node) -> tuple[object, ...]:
    value = node.meta["val"]
    return tuple(plain(s) for s in (*value.stride(), value.storage_offset()))
