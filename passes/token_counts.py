"""Token counts of a graph: that of the model's ids, that of most all-reduces, and the further ones beside it.

Micro-batches, a prefix before the tokens, and decode rows beside a prefill each bring a count of their own. An axis is
placed for one count at a time: first for the one that most of its all-reduces have, then, on the graph that came of
that, for each further one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import sympy
import torch
import torch.fx as fx

from cpcompile.passes.token_layout import ONE, Expr, Shape, row_dim, size_expr, value_shapes

if TYPE_CHECKING:
    from cpcompile.passes.token_dims import Annotation

MOST_COUNTS = 8  # that are placed over one axis: each takes as long to plan and to prove as the graph is large


@dataclass(frozen=True)
class Further:
    """A further token count of a graph that has been placed for another one.

    Args:
        count: the count.
        sums: names of the all-reduces that have as many rows.
        same: names of the nodes that are whole, and the same on all ranks of the axis.
    """

    count: Expr
    sums: frozenset[str]
    same: frozenset[str]


def token_inputs(graph: fx.Graph) -> Iterator[tuple[fx.Node, int]]:
    """The graph inputs that hold token ids, and their token dims: the roots of the vocabulary gathers' indices.

    The last dim of size > 1 holds the tokens: ``[B, T]`` → 1, a decode step's ``[B, 1]`` → 0.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        root = node.args[1]
        while isinstance(root, fx.Node) and root.op == "call_function" and len(root.all_input_nodes) > 0:
            root = root.args[0] if isinstance(root.args[0], fx.Node) else root.all_input_nodes[0]
        if isinstance(root, fx.Node) and root.op == "placeholder" and isinstance(root.meta.get("val"), torch.Tensor):
            shape = value_shapes(root)[0]
            dims = [d for d, size in enumerate(shape) if size != ONE] or [len(shape) - 1]
            yield root, dims[-1]


def token_placeholder(gm: fx.GraphModule) -> tuple[fx.Node, int] | None:
    """The first graph input that holds token ids, and its token dim."""
    return next(token_inputs(gm.graph), None)


def reduced_tokens(tokens: Expr | None, reduced: Iterable[Shape]) -> Expr | None:
    """The token count of an axis: the inputs', or where most all-reduces lack that, what most of them have.

    After a rewrite over another axis this axis's all-reduces are of that axis's shards.
    """
    shapes = list(reduced)
    fitting = sum(tokens is not None and row_dim(shape, tokens) is not None for shape in shapes)
    if 2 * fitting >= len(shapes):
        return tokens
    counts = Counter(shape[place.dim] for shape in shapes if (place := row_dim(shape, None)) is not None)
    return counts.most_common(1)[0][0] if counts else tokens


def further_counts(known: Annotation) -> Mapping[Expr, frozenset[str]]:
    """Counts of the axis's all-reduces that were not placed → these, by name; in graph order, ``MOST_COUNTS`` at most.

    A count is the number of token ids of an input, or a size that changes with the inputs' sizes.
    """
    found: dict[Expr, set[str]] = {}
    for wait in known.all_reduces:
        if known.layouts.get(wait) is None and (count := _count_of(known, wait)) is not None:
            found.setdefault(count, set()).add(wait.name)
    return {count: frozenset(names) for count, names in list(found.items())[: MOST_COUNTS - 1]}


def why_no_tokens(known: Annotation, wait: fx.Node) -> str:
    """Why a reduced value is not placed with the others; one that has a further count is so afterwards."""
    rows = _rows(known.shapes[wait][0])
    if rows is None or known.tokens is None or (rows.is_number and _count_of(known, wait) is None):
        return "no dim of the reduced value holds the tokens"
    if not rows.free_symbols <= _input_sizes(known):
        return f"has {rows} rows, which only the data says: the inputs' sizes do not"
    return f"has {rows} rows, a further count of tokens beside {known.tokens}, and {MOST_COUNTS} at most are placed"


def _count_of(known: Annotation, wait: fx.Node) -> Expr | None:
    """The token count of a reduced value; None where none is known."""
    shape, graph = known.shapes[wait][0], wait.graph
    for ids, dim in token_inputs(graph):
        count = known.shapes[ids][0][dim]
        if count != ONE and row_dim(shape, count) is not None:
            return count
    rows = _rows(shape)
    return rows if rows is not None and not rows.is_number and rows.free_symbols <= _input_sizes(known) else None


def _rows(shape: Shape) -> Expr | None:
    place = row_dim(shape, None)
    return None if place is None else shape[place.dim]


def _input_sizes(known: Annotation) -> set[sympy.Basic]:
    """The symbols that the graph inputs bring, as sizes or as numbers."""
    found: set[sympy.Basic] = set()
    for node in known.shapes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            number = [(size_expr(value),)] if isinstance(value, torch.SymInt) else []
            found.update(size for shape in (*number, *known.shapes[node]) for size in shape)
    return found
