"""Seeing through views: which earlier value an operand is, and in which order of dims, exactly.

Before: an operand behind views, transposes, expands, copies, casts and constant factors. After: the chain of nodes that
hold the same elements, each with its digits (``verify_index``) into the first one's and the factors between.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.collectives import bound, emit, op_name
from cpcompile.passes.verify_arguments import IDENTITIES, REORDERED, VIEWS
from cpcompile.passes.verify_index import Digit, Dims, Shape, plain, regroup, row_major, shape, tensor_shape

aten = torch.ops.aten
_FACTORS = frozenset({"aten::mul", "aten::div"})


@dataclass(frozen=True)
class Held:
    """A node with the same elements as another one, times ``factor``, at these digits."""

    node: fx.Node
    dims: Dims
    factor: float


@dataclass(frozen=True)
class Traced:
    """What an operand holds: nodes with the same elements, from the one that computes them to the operand."""

    chain: tuple[Held, ...]

    @property
    def source(self) -> fx.Node:
        """The node that computes the elements."""
        return self.chain[0].node

    @property
    def dims(self) -> Dims:
        """Digits of the operand."""
        return self.chain[-1].dims

    @property
    def factor(self) -> float:
        """The operand's elements are the source's times this."""
        return self.chain[-1].factor

    def split(self, sizes: Shape) -> Dims | None:
        """Digits of the operand as a row-major view to ``sizes``, None where there is no such view."""
        return regroup(self.dims, sizes)

    def holds(self, sizes: Shape) -> bool:
        """Whether the operand, viewed as ``sizes``, has the source's elements in order."""
        return self.split(sizes) == row_major(sizes)


def trace(node: fx.Node) -> Traced:
    """``node`` back to where its elements are computed."""
    steps = [(node, 1.0)]
    while (step := _before(steps[-1][0])) is not None:
        steps[-1] = (steps[-1][0], step[1])
        steps.append((step[0], 1.0))
    chain: list[Held] = []
    for after, factor in reversed(steps):
        dims = _moved(after, chain[-1].dims) if chain else None
        if dims is None:  # the start, or a view that cannot be followed: what it makes is a value of its own
            chain = [Held(after, row_major(tensor_shape(after.meta["val"])), 1.0)]
        else:
            chain.append(Held(after, dims, chain[-1].factor * factor))
    return Traced(tuple(chain))


def _before(node: fx.Node) -> tuple[fx.Node, float] | None:
    """What ``node`` is a view, cast or multiple of."""
    name = op_name(node.target)
    if node.target is aten.cat.default and (alone := _beside_nothing(node)) is not None:
        return alone, 1.0
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    source, value = node.args[0], node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    if name in VIEWS | REORDERED | IDENTITIES | {"aten::expand"} and node.target is not aten.view.dtype:
        return source, 1.0
    floats = value.dtype.is_floating_point and source.meta["val"].dtype.is_floating_point
    if name == "aten::_to_copy" and floats and source.meta["val"].device == value.device:
        return source, 1.0
    if name in _FACTORS and floats and not node.kwargs and len(node.args) == 2:
        number = node.args[1]
        if isinstance(number, int | float) and number:
            return source, float(number) if name == "aten::mul" else 1 / float(number)
    return None


def _beside_nothing(cat: fx.Node) -> fx.Node | None:
    """The one part that is not an empty vector: what a new cache is before anything is in it."""
    parts = [p for p in cat.args[0] if tensor_shape(p.meta["val"]) != (0,)]  # type: ignore[union-attr]
    return parts[0] if len(parts) == 1 and parts[0].meta["val"].dtype == cat.meta["val"].dtype else None  # type: ignore


def _moved(node: fx.Node, dims: Dims) -> Dims | None:
    """Digits of ``node``, given those of what it is a view of."""
    name, sizes = op_name(node.target), tensor_shape(node.meta["val"])
    if name in VIEWS:
        return regroup(dims, sizes)
    if name == "aten::expand":
        new: list[tuple[Digit, ...]] = [() if size == 1 else ((size, 0),) for size in sizes[: len(sizes) - len(dims)]]
        for size, old, digits in zip(sizes[len(new) :], shape(dims), dims, strict=True):
            new.append(digits if size == old else ((size, 0),))
        return tuple(new)
    if name in REORDERED:
        return _reordered(node, dims)
    return dims


def _reordered(node: fx.Node, dims: Dims) -> Dims:
    name, args, ndim = op_name(node.target), bound(node), len(dims)
    if name == "aten::permute":
        return tuple(dims[d] for d in args[1])
    if name == "aten::t":
        return dims[::-1]
    if name == "aten::transpose":
        order = list(range(ndim))
        order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
        return tuple(dims[d] for d in order)
    if name == "aten::unsqueeze":
        at = args[1] % (ndim + 1)
        return (*dims[:at], (), *dims[at:])
    named = range(ndim) if len(args) == 1 else args[1] if isinstance(args[1], list | tuple) else [args[1]]
    gone = {d % ndim for d in named}
    return tuple(dim for d, dim in enumerate(dims) if d not in gone or dim)


def piece(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """What ``node`` is a run of along the last dim, where the run starts and how long it is."""
    if node.target is operator.getitem:
        split, index = node.args
        if not isinstance(split, fx.Node) or op_name(split.target) != "aten::split_with_sizes":
            return None
        source, lengths, dim = bound(split)
        assert isinstance(index, int)
        start, length = sum(lengths[:index]), lengths[index]
    elif node.target is aten.slice.Tensor:
        source, dim, start, _, step = bound(node)
        length = tensor_shape(node.meta["val"])[dim]
        if step != 1:
            return None
    else:
        return None
    ndim = len(tensor_shape(source.meta["val"]))
    if dim % ndim != ndim - 1 or not isinstance(start, int) or not isinstance(length, int) or start < 0:
        return None
    return source, start, length


def joined(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that ``node`` is, side by side along the last dim: ``cat``, or written one after the other."""
    whole = tensor_shape(node.meta["val"])
    last = len(whole) - 1
    if node.target is aten.cat.default:
        parts, dim = bound(node)
        return tuple(parts) if dim % len(whole) == last and len(parts) == 2 else None
    if node.target is not aten.slice_scatter.default:
        return None
    below, right, dim, start, end, step = bound(node)
    if dim % len(whole) != last or step != 1 or end < whole[last]:
        return None
    if not isinstance(below, fx.Node) or below.target is not aten.slice_scatter.default:
        return None
    _, left, dim, first, end, step = bound(below)
    if dim % len(whole) != last or step != 1 or (first or 0) != 0 or end != start:
        return None
    return left, right


def permutation(dims: Dims, wanted: Dims) -> list[int | None] | None:
    """For each of ``wanted`` the dim of ``dims`` with the same digits, None for one of size 1; all are used."""
    order: list[int | None] = []
    for digits in wanted:
        if not digits:
            order.append(None)
        elif digits in dims:
            order.append(dims.index(digits))
        else:
            return None
    used = [d for d in order if d is not None]
    return order if len(set(used)) == len(used) == sum(bool(d) for d in dims) else None


@dataclass(frozen=True)
class Arranged:
    """A node and the order in which its dims are wanted; None is a new dim of size 1."""

    node: fx.Node
    order: list[int | None]

    def emit(self, like: fx.Node, order: Sequence[int] | None = None) -> fx.Node:
        """Insert what brings the dims into that order (or, of it, into ``order``) before ``like``."""
        wanted = self.order if order is None else [self.order[d] for d in order]
        node, ndim = self.node, len(self.node.meta["val"].shape)
        kept = [d for d in wanted if d is not None]
        gone = [d for d in range(ndim) if d not in kept]
        if ndim == len(wanted) and all(d == i or (d is None and i in gone) for i, d in enumerate(wanted)):
            return node
        if gone:
            node = emit(like, aten.squeeze.dims, node, gone)
            kept = [d - sum(g < d for g in gone) for d in kept]
        if kept != sorted(kept):
            node = emit(like, aten.permute.default, node, kept)
        for i, d in enumerate(wanted):
            if d is None:
                node = emit(like, aten.unsqueeze.default, node, i)
        return node


def arrange(traced: Traced, wanted: Dims) -> tuple[Arranged, float] | None:
    """The first node of the chain whose dims are ``wanted`` in some order, and the operand's factor over it."""
    for held in traced.chain:
        order = permutation(held.dims, wanted)
        if order is not None:
            return Arranged(held.node, order), traced.factor / held.factor
    return None


def size_node(graph: fx.Graph, size: object) -> int | fx.Node | None:
    """An int, or the graph input that holds this size; None if there is none."""
    wanted = plain(size)
    if isinstance(wanted, int):
        return wanted
    nodes: list[fx.Node] = graph.find_nodes(op="placeholder")
    inputs = ((n, n.meta.get("val")) for n in nodes)
    return next((n for n, v in inputs if isinstance(v, torch.SymInt) and plain(v) == wanted), None)
