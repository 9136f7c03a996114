"""Annotate: what one mesh axis's passes must know of a graph before anything is placed.

Token dims by dataflow (from the vocabulary gather's indices, from positions counted up to T and from what the axis
all-reduces), replication by dataflow from the graph inputs' facts, and each op's class from the table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
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
from cpcompile.passes.token_layout import ONE, Expr, Shape, TokenDim, row_dim, value_shapes

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

    def __post_init__(self) -> None:
        """Relations go with the axis."""
        self.groups = GroupRelations(self.axis)

    def gathered(self, wait: fx.Node) -> fx.Node:
        """What the all-gather that ends in ``wait`` gathers: this rank's rows."""
        return self.gathers[wait].all_input_nodes[0]


def token_placeholder(gm: fx.GraphModule) -> tuple[fx.Node, int] | None:
    """The graph input that holds token ids, and its token dim: the root of the first vocabulary gather's indices.

    The last dim of size > 1 holds the tokens: ``[B, T]`` → 1, a decode step's ``[B, 1]`` → 0.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        root = node.args[1]
        while isinstance(root, fx.Node) and root.op == "call_function" and len(root.all_input_nodes) > 0:
            root = root.args[0] if isinstance(root.args[0], fx.Node) else root.all_input_nodes[0]
        if isinstance(root, fx.Node) and root.op == "placeholder" and isinstance(root.meta.get("val"), torch.Tensor):
            shape = value_shapes(root)[0]
            dims = [d for d, size in enumerate(shape) if size != ONE] or [len(shape) - 1]
            return root, dims[-1]
    return None


def annotate(
    gm: fx.GraphModule,
    axis: Axis,
    facts: Mapping[str, bool],
    rank_dependent: Collection[str] = (),
    varying: Collection[sympy.Symbol] = (),
) -> Annotation:
    """Annotate ``gm`` for ``axis``.

    Args:
        gm: a canonical functional ATen graph.
        axis: the mesh axis.
        facts: graph input name → whether every rank of the axis holds the same value; absent means no.
        rank_dependent: names of nodes whose constants differ between ranks.
        varying: symbols of sizes and integers that differ between ranks.
    """
    shapes = {node: value_shapes(node) for node in gm.graph.nodes}
    groups = GroupRelations(axis)
    found = find_all_reduces(gm)
    all_reduces = {ar.wait: ar for ar in found if groups.is_axis(ar.group_name) and ar.reduce_op == "sum"}
    layouts: dict[fx.Node, tuple[TokenDim | None, ...]] = {}
    ids = token_placeholder(gm)
    tokens = None if ids is None else shapes[ids[0]][0][ids[1]]
    reduced = _reduced_tokens(tokens, [shapes[wait][0] for wait in all_reduces])
    if ids is not None and reduced == tokens:
        layouts[ids[0]] = (TokenDim(ids[1]),)
    tokens = reduced
    gathers = find_gathers(gm, groups)
    parts = {wait: shapes[start.all_input_nodes[0]][0] for wait, start in gathers.items()}
    if tokens is None:
        tokens = next((shapes[w][0][0] for w, part in parts.items() if gathers_rows(shapes[w][0], part, None)), None)
    gathers = {w: s for w, s in gathers.items() if tokens is not None and gathers_rows(shapes[w][0], parts[w], tokens)}
    known = Annotation(axis, tokens, shapes, layouts, {}, set(), all_reduces, gathers, varying=set(varying))
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


def _numbers(node: fx.Node, shapes: Sequence[Shape]) -> set[Any]:
    """The symbols in the sizes of a node's results, or in the number that it is."""
    value = node.meta.get("val")
    sizes = [size for shape in shapes for size in shape]
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        sizes.append(value.node.expr)
    return {symbol for size in sizes for symbol in size.free_symbols}


def _reduced_tokens(tokens: Expr | None, reduced: Iterable[Shape]) -> Expr | None:
    """The token count of this axis: the inputs', or where most all-reduces lack that, what most of them have.

    After a rewrite over another axis this axis's all-reduces are of that axis's shards.
    """
    shapes = list(reduced)
    fitting = sum(tokens is not None and row_dim(shape, tokens) is not None for shape in shapes)
    if 2 * fitting >= len(shapes):
        return tokens
    counts = Counter(shape[place.dim] for shape in shapes if (place := row_dim(shape, None)) is not None)
    return counts.most_common(1)[0][0] if counts else tokens


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
        known.classes[ar.wait] = Mixing(_why_no_tokens(known, shape))
        return
    if known.tokens is None:
        known.tokens = shape[layout.dim]
    known.layouts[ar.wait] = (layout,)
    known.classes[ar.wait] = RowWise({}, (layout,))


def _why_no_tokens(known: Annotation, shape: Shape) -> str:
    """Why a reduced value is not placed: it may be of tokens, but of another count (a second micro-batch, a prefix)."""
    place = row_dim(shape, None)
    rows = None if place is None else shape[place.dim]
    if rows is None or known.tokens is None or rows.is_number or known.tokens.is_number:
        return "no dim of the reduced value holds the tokens"
    return (
        f"has {rows} rows, and the graph is placed for {known.tokens} tokens, one count at a time: "
        "compile the parts that have other counts on their own"
    )


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
