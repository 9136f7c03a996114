"""Annotate: what one mesh axis's passes must know of a graph before anything is placed.

Token dims by dataflow (from the vocabulary gather's indices, from positions counted up to T and from what the axis
all-reduces), replication by dataflow from the graph inputs' facts, and each op's class from the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.declared_ops import stated
from cpcompile.passes import npu_ops
from cpcompile.passes.collectives import (
    NATIVE,
    AllReduce,
    bound,
    find_all_reduces,
    group_name_of,
    is_collective,
    is_wait,
    op_name,
)
from cpcompile.passes.existing_moves import find_gathers, gathers_rows, own_rows, taken_from
from cpcompile.passes.fused_attention import FUSED, is_random
from cpcompile.passes.group_relations import IDEMPOTENT, GroupRelations
from cpcompile.passes.op_call import UNUSED, Call, Mixing, RowWise
from cpcompile.passes.picked_rows import picks_of
from cpcompile.passes.placement_rules import classify
from cpcompile.passes.token_counts import Further, reduced_tokens, token_inputs, why_no_tokens
from cpcompile.passes.token_layout import Expr, Shape, TokenDim, row_dim, value_shapes

# Ops of these namespaces are pure functions of their arguments: same arguments, same result on every rank.
PURE_NAMESPACES = frozenset({"aten", "prims", "transformers", "cpcompile", "vllm_ir"})


@dataclass
class Annotation:
    """What is known of a graph with respect to one axis.

    Args:
        axis: the mesh axis.
        tokens: the token count T as an expression, None where the graph carries no tokens.
        shapes: shapes of every node's outputs.
        layouts: token dim of every node's outputs, where known.
        classes: row-wise or mixing, with reasons, for every call.
        replicated: nodes whose whole value is the same on every rank of the axis.
        all_reduces: the axis's sum all-reduces, by their ``wait_tensor`` node.
        gathers: the axis's all-gathers of token rows: ``wait_tensor`` node → the node that starts it.
        own_rows: nodes that are this rank's rows of a whole value → that value.
        varying: symbols of sizes and integers that differ between the ranks.
        further: the count that T is, where the graph moves the rows of another one already.
    """

    axis: Axis
    tokens: Expr | None
    shapes: dict[fx.Node, tuple[Shape, ...]]
    layouts: dict[fx.Node, tuple[TokenDim | None, ...]]
    classes: dict[fx.Node, RowWise | Mixing]
    replicated: set[fx.Node]
    all_reduces: dict[fx.Node, AllReduce]
    gathers: dict[fx.Node, fx.Node] = field(default_factory=dict)
    own_rows: dict[fx.Node, fx.Node] = field(default_factory=dict)
    varying: set[sympy.Symbol] = field(default_factory=set)
    further: Further | None = None

    def __post_init__(self) -> None:
        """Relations go with the axis."""
        self.groups = GroupRelations(self.axis)

    def gathered(self, wait: fx.Node) -> fx.Node:
        """What the all-gather that ends in ``wait`` gathers: this rank's rows."""
        return self.gathers[wait].all_input_nodes[0]


def annotate(
    gm: fx.GraphModule,
    axis: Axis,
    facts: Mapping[str, bool],
    rank_dependent: Collection[str] = (),
    varying: Collection[sympy.Symbol] = (),
    further: Further | None = None,
) -> Annotation:
    """Annotate ``gm`` for ``axis``.

    Args:
        gm: a canonical functional ATen graph.
        axis: the mesh axis.
        facts: graph input name → whether every rank of the axis holds the same value; absent means no.
        rank_dependent: names of nodes whose constants differ between ranks.
        varying: symbols of sizes and integers that differ between ranks.
        further: the count to annotate for, where the graph has been placed for another one.
    """
    shapes = {node: value_shapes(node) for node in gm.graph.nodes}
    groups = GroupRelations(axis)
    found = find_all_reduces(gm)
    all_reduces = {ar.wait: ar for ar in found if groups.is_axis(ar.group_name) and ar.reduce_op == "sum"}
    if further is not None:
        all_reduces = {wait: ar for wait, ar in all_reduces.items() if wait.name in further.sums}
    tokens, layouts = _seeds(gm, shapes, all_reduces, further)
    # After a placement the graph has gathers of our own, which stay.
    gathers = find_gathers(gm, groups) if further is None else {}
    parts = {wait: shapes[start.all_input_nodes[0]][0] for wait, start in gathers.items()}
    if tokens is None:
        tokens = next((shapes[w][0][0] for w, part in parts.items() if gathers_rows(shapes[w][0], part, None)), None)
    gathers = {w: s for w, s in gathers.items() if tokens is not None and gathers_rows(shapes[w][0], parts[w], tokens)}
    known = Annotation(
        axis, tokens, shapes, layouts, {}, set(), all_reduces, gathers, varying=set(varying), further=further
    )
    sized: set[sympy.Basic] = set()
    for node in gm.graph.find_nodes(op="placeholder"):
        if facts.get(node.name) is False and not shapes[node]:
            known.varying |= _numbers(node, ())  # a number of each rank's own
    starts = {ar.start for ar in all_reduces.values()}
    for node in gm.graph.nodes:
        if node in starts:
            known.classes[node] = Mixing("is an all-reduce of this axis")
        elif node in all_reduces:
            _seed_all_reduce(known, all_reduces[node])
        elif node in gathers:
            layouts[node] = (TokenDim(0),)
            known.classes[node] = RowWise({}, (TokenDim(0),))
        elif op_name(node.target) == "aten::arange" and shapes[node] == ((known.tokens,),):
            layouts[node] = (TokenDim(0),)  # positions: whole on every rank, and each rank can take its own
        elif npu_ops.is_row_result(node) and shapes[node][0][:1] == (known.tokens,):
            layouts[node] = (TokenDim(0),)  # as positions are
        elif node.op == "call_function" and known.tokens is not None:
            outcome = _reduced(node, known) or classify(node, known.tokens, layouts, shapes)
            if isinstance(outcome, Mixing):
                outcome = picks_of(Call(node, known.tokens, layouts, shapes)) or outcome
            known.classes[node] = outcome
            if isinstance(outcome, RowWise) and any(outcome.outputs):
                layouts[node] = outcome.outputs
            elif _takes_own_rows(node, known):
                known.own_rows[node] = taken_from(node)  # type: ignore[assignment]
        numbers = _numbers(node, shapes[node])
        if not numbers & known.varying and _is_replicated(node, known, facts, rank_dependent):
            known.replicated.add(node)
        elif node.op == "call_function":
            known.varying |= numbers - sized  # a size that was read off values which differ
        sized |= numbers
    return known


def _seeds(
    gm: fx.GraphModule,
    shapes: Mapping[fx.Node, tuple[Shape, ...]],
    all_reduces: Mapping[fx.Node, AllReduce],
    further: Further | None,
) -> tuple[Expr | None, dict[fx.Node, tuple[TokenDim | None, ...]]]:
    """The token count to place, and where the ids that have it hold their tokens."""
    inputs = list(token_inputs(gm.graph))
    if further is not None:
        mine = [(ids, dim) for ids, dim in inputs if shapes[ids][0][dim] == further.count]
        return further.count, {ids: (TokenDim(dim),) for ids, dim in mine}
    first = next(((ids, dim, shapes[ids][0][dim]) for ids, dim in inputs), None)
    tokens = reduced_tokens(first and first[2], [shapes[wait][0] for wait in all_reduces])
    return tokens, {} if first is None or tokens != first[2] else {first[0]: (TokenDim(first[1]),)}


def _numbers(node: fx.Node, shapes: Sequence[Shape]) -> set[Any]:
    """The symbols in the sizes of a node's results, or in the number that it is."""
    value = node.meta.get("val")
    sizes = [size for shape in shapes for size in shape]
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        sizes.append(value.node.expr)
    return {symbol for size in sizes for symbol in size.free_symbols}


def repeats_attention(known: Annotation) -> bool | None:
    """Whether every rank of the axis computes all of attention; None where no attention is seen.

    Attention is a product of two values that depend on tokens, but not row by row as tokens with their experts' weights
    are; or it is an op of this project's own.
    """
    from_tokens: set[fx.Node] = set()
    found = []
    for node in known.shapes:
        operands = [n for n in node.all_input_nodes if n in from_tokens]
        if operands or known.layouts.get(node):
            from_tokens.add(node)
        outcome = known.classes.get(node)
        demands = outcome.operands if isinstance(outcome, RowWise) else {}
        in_step = all(isinstance(demands.get(n), TokenDim) for n in operands)
        product = op_name(node.target) in PRODUCTS_OF_TOKENS or npu_ops.base_name(node.target) in npu_ops.ATTENTION
        if len(operands) > 1 and product and not in_step:
            found.append(node)
    return all(node in known.replicated for node in found) if found else None


def _takes_own_rows(node: fx.Node, known: Annotation) -> bool:
    source = taken_from(node)
    layout = known.layouts.get(source, (None,))[0] if source is not None else None
    if source is None or layout is None or known.tokens is None:
        return False
    return own_rows(node, known.axis, known.tokens, known.shapes[source][0], layout)


PRODUCTS_OF_TOKENS = frozenset(
    {"aten::mm", "aten::bmm"}
    | {f"cpcompile::{n}attention" for n in ("sparse_", "paged_sparse_", "paged_")}
    | FUSED.keys()
)


def _reduced(node: fx.Node, known: Annotation) -> RowWise | Mixing | None:
    """What an all-reduce that is not this axis's sum, and its wait, do to rows; None where the table knows.

    The greatest of values that are all the same is that value: on rows, nothing need be reduced.
    """
    if is_wait(node) and is_collective(source := node.all_input_nodes[0]):
        outcome, layout = known.classes.get(source), known.layouts.get(source, (None,))[0]
        spared = isinstance(outcome, RowWise) and outcome.identity and layout is not None
        return RowWise({source: layout}, (layout,), identity=True) if spared else None
    if node.target is not NATIVE.all_reduce.default:
        return None
    value, reduce_op, _ = bound(node)
    group, layout = group_name_of(node), known.layouts.get(value, (None,))[0]
    copies = reduce_op in IDEMPOTENT and value in known.replicated and known.groups.lies_inside(group)
    if copies and layout is not None:
        return RowWise({value: layout}, (layout,), identity=True)
    why = known.groups.why_rows_meet(group)
    return Mixing(why) if why else None


def _seed_all_reduce(known: Annotation, ar: AllReduce) -> None:
    """Tokens of a reduced value lie where they lay in its input, else in its row dim."""
    layout = (known.layouts.get(ar.input) or (None,))[0]
    shape = known.shapes[ar.wait][0]
    if layout is None:
        layout = row_dim(shape, known.tokens)
    if layout is None:
        known.classes[ar.wait] = Mixing(why_no_tokens(known, ar.wait))
        return
    if known.tokens is None:
        known.tokens = shape[layout.dim]
    known.layouts[ar.wait] = (layout,)
    known.classes[ar.wait] = RowWise({}, (layout,))


def _is_replicated(
    node: fx.Node, known: Annotation, facts: Mapping[str, bool], rank_dependent: Collection[str]
) -> bool:
    if node.name in rank_dependent or node.op == "output":
        return False
    if node.op == "placeholder":
        return facts.get(node.name, False)
    if node.op == "get_attr":
        return True
    if node in known.all_reduces or node in known.gathers:
        return True
    if known.further is not None:
        return node.name in known.further.same  # of the moves that were put in, this rank's rows are in arguments
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return False  # what an op inside reads besides its arguments (a cache, weights of its own) is not known
    if isinstance(node.target, torch._ops.OpOverload):
        namespace = node.target.namespace
        if namespace == "_c10d_functional":
            return _collective_is_replicated(node, known)
        pure = (
            namespace in PURE_NAMESPACES
            or stated(op_name(node.target)) is not None
            or npu_ops.base_name(node.target) in npu_ops.PURE
        )
        if not pure or is_random(node):
            return False
    outcome = known.classes.get(node)
    unused = {n for n, d in outcome.operands.items() if d is UNUSED} if isinstance(outcome, RowWise) else set()
    return all(n in known.replicated for n in node.all_input_nodes if n not in unused)


def _collective_is_replicated(node: fx.Node, known: Annotation) -> bool:
    """A reduction, gather or broadcast in which all ranks of the axis take part gives all of them the same.

    So do reductions of replicated values where every rank meets the same ones. A scatter or all-to-all gives each rank
    something else, and of other gathers nothing is said.
    """
    name = op_name(node.target).removeprefix("_c10d_functional::")
    operand = node.all_input_nodes[0]
    if name == "wait_tensor":
        return operand in known.replicated
    if name not in ("all_reduce", "all_gather_into_tensor", "broadcast"):
        return False
    group = group_name_of(node)
    kept = name == "all_reduce" and operand in known.replicated and known.groups.keeps_replication(group)
    return kept or known.groups.covers(group)
