"""The static proof's own table of what ops do to rows: which compute each output row from the same input rows.

Written independently of the planner's table, so that one mistake does not hide in both. An op that is not here
proves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.collectives import op_name
from cpcompile.passes.verify_arguments import is_random
from cpcompile.passes.verify_index import Rows, Shape


@dataclass(frozen=True)
class Call:
    """A call on whole values, of which some are at hand as rows only.

    Args:
        node: the call in the rewritten graph.
        shapes: whole shape of every tensor operand.
        rows: the dim that is split, for operands of which only this rank's rows are there.
        out: whole shapes of the results.
    """

    node: fx.Node
    shapes: Mapping[fx.Node, Shape]
    rows: Mapping[fx.Node, Rows]
    out: tuple[Shape, ...]

    def arg(self, name: str) -> object:
        """An argument by its name in the op's schema."""
        assert isinstance(self.node.target, torch._ops.OpOverload)
        for index, argument in enumerate(self.node.target._schema.arguments):
            if argument.name == name:
                default = argument.default_value if argument.has_default_value() else None
                return self.node.args[index] if index < len(self.node.args) else self.node.kwargs.get(name, default)
        return None

    def dims(self, name: str, ndim: int) -> list[int]:
        """A dim or list of dims, counted from 0; ``[]`` where absent."""
        value = self.arg(name)
        listed = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        return [d + ndim if d < 0 else d for d in listed if isinstance(d, int)]

    def first(self) -> tuple[Shape, Rows] | None:
        """Shape and rows of the first operand if it alone is split."""
        operand = self.node.args[0]
        if not isinstance(operand, fx.Node) or set(self.rows) != {operand}:
            return None
        return self.shapes[operand], self.rows[operand]


Rule = Callable[[Call], Rows | str]
ALONE = "only its first operand may be split by rows"
ALONG = "it works along the rows"


def pointwise(call: Call) -> Rows | str:
    """Elementwise with broadcasting: what is not split has one row, or none."""
    out = call.out[0]
    found: Rows | None = None
    for node, rows in call.rows.items():
        here = rows.shifted(len(out) - len(call.shapes[node]))
        if call.shapes[node][rows.dim] != out[here.dim] or found not in (None, here):
            return "its operands are split along different dims"
        found = here
    assert found is not None
    for node, shape in call.shapes.items():
        dim = found.dim - (len(out) - len(shape))
        if node not in call.rows and dim >= 0 and shape[dim] != 1:
            return f"{node} has every row and other operands only this rank's"
    return found if all(shape == out for shape in call.out) else "its results differ in shape"


def matmul(call: Call) -> Rows | str:
    """Rows of the left operand, columns of the right one, or batches of both."""
    left, right = call.node.args[:2]
    if "addmm" in op_name(call.node.target):
        bias, left, right = call.node.args[:3]
        if bias in call.rows or len(call.shapes[bias]) != 1:  # type: ignore[index]
            return "only a bias of one row can be added to rows"
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    a, b = call.rows.get(left), call.rows.get(right)
    ndim, linear = len(call.shapes[left]), "linear" in op_name(call.node.target)
    if a is not None and a == b and a.dim == 0 and ndim == 3 and not linear and set(call.rows) == {left, right}:
        return a
    if a is not None and set(call.rows) == {left} and left is not right:
        batched = ndim == 3 and not linear and a.dim == 0
        return a if a.dim < ndim - 1 and not batched else ALONG
    if b is not None and set(call.rows) == {right} and ndim == len(call.shapes[right]) and not linear:
        return b if b.dim == ndim - 1 and "addmm" not in op_name(call.node.target) else ALONG
    return "it multiplies rows with rows"


def along(*names: str) -> Rule:
    """Row-wise as long as no dim that the op works along is that of the rows."""

    def rule(call: Call) -> Rows | str:
        split = call.first()
        if split is None:
            return ALONE
        ndim, rows = len(split[0]), split[1]
        return ALONG if any(rows.dim in call.dims(name, ndim) for name in names) else rows

    return rule


def in_step(call: Call) -> Rows | str:
    """``cat``, ``gather``, ``scatter``: operands run in step, so all are split alike; works along another dim."""
    splits = {call.rows.get(node) for node in call.shapes}
    lengths = {shape[r.dim] for node, shape in call.shapes.items() if (r := call.rows.get(node))}
    rows = next(iter(splits))
    if len(splits) != 1 or rows is None or len(lengths) != 1:
        return "its operands are not all split alike"
    ndim = len(call.out[0])
    if rows.dim in call.dims("dim", ndim) or any(len(shape) != ndim for shape in call.shapes.values()):
        return ALONG
    return rows


def reduction(call: Call) -> Rows | str:
    """Row-wise unless it reduces the rows away."""
    split = call.first()
    if split is None:
        return ALONE
    shape, rows = split
    reduced = call.dims("dim", len(shape)) or list(range(len(shape)))
    if rows.dim in reduced:
        return ALONG
    return rows if call.arg("keepdim") else rows.shifted(-sum(d < rows.dim for d in reduced))


def norm(call: Call) -> Rows | str:
    """Normalisation over trailing dims."""
    split = call.first()
    if split is None:
        return ALONE
    normalized = call.arg("normalized_shape")
    count = len(normalized) if isinstance(normalized, list | tuple) else 1
    return split[1] if split[1].dim < len(split[0]) - count else ALONG


def dropping(call: Call) -> Rows | str:
    """``select`` and ``unbind`` take a dim away."""
    rows = along("dim")(call)
    split = call.first()
    if isinstance(rows, str) or split is None:
        return rows
    return rows.shifted(-(call.dims("dim", len(split[0]))[0] < rows.dim))


def expand(call: Call) -> Rows | str:
    """Row-wise unless the rows are repeated."""
    split = call.first()
    if split is None:
        return ALONE
    rows = split[1].shifted(len(call.out[0]) - len(split[0]))
    return rows if call.out[0][rows.dim] == split[0][split[1].dim] else "it repeats the rows"


def embedding(call: Call) -> Rows | str:
    """Rows of the indices, with the whole table."""
    weight, indices = call.node.args[:2]
    assert isinstance(indices, fx.Node)
    return call.rows[indices] if set(call.rows) == {indices} and weight is not indices else "it looks rows up"


def attends(*whole: str) -> Rule:
    """Rows of queries, ``[B, rows, ...]``, and of what goes with each, over keys of which every row is there."""

    def rule(call: Call) -> Rows | str:
        keys = {node for name in whole if isinstance(node := call.arg(name), fx.Node)}
        if keys & set(call.rows):
            return "every query reads every key"
        if set(call.rows) != set(call.shapes) - keys or set(call.rows.values()) != {Rows(1)}:
            return "its queries are not split alike, by their rows"
        return Rows(1)

    return rule


def fused(mask: str = "") -> Rule:
    """Rows of queries, and of a mask that has one for each, over keys and values of which every row is there."""

    def rule(call: Call) -> Rows | str:
        query, bias = call.arg("query"), call.arg(mask) if mask else None
        assert isinstance(query, fx.Node)
        if call.arg("is_causal") is not False:
            return "it counts its queries from the first row"
        if call.arg("dropout_mask") is not None or call.arg("return_debug_mask"):
            return "it gives or takes a mask of dropped scores"
        split = {query}
        if isinstance(bias, fx.Node) and len(call.shapes[bias]) > 1 and call.shapes[bias][-2] != 1:
            split.add(bias)
        if query in (call.arg("key"), call.arg("value")) or set(call.rows) != split:
            return "every query reads every key and value, and its own row of the mask"
        if any(call.rows[node] != Rows(len(call.shapes[node]) - 2) for node in split):
            return "its queries are not split by their rows"
        return Rows(len(call.shapes[query]) - 2)

    return rule


def pad(call: Call) -> Rows | str:
    """Padding of other dims."""
    split = call.first()
    amounts = call.arg("pad")
    if split is None or not isinstance(amounts, list | tuple):
        return ALONE
    at = 2 * (len(split[0]) - 1 - split[1].dim)
    return split[1] if all(a == 0 for a in amounts[at : at + 2]) else ALONG


RULES: Mapping[str, Rule] = {
    **{f"aten::{n}": matmul for n in ("mm", "bmm", "addmm", "linear")},
    **{f"aten::{n}": along("dim") for n in ("_softmax", "softmax", "_log_softmax", "_safe_softmax", "log_softmax")},
    **{f"aten::{n}": along("dim") for n in ("cumsum", "cumprod", "sort", "argsort", "topk")},
    **{f"aten::{n}": along("dim") for n in ("slice", "split", "split_with_sizes", "chunk", "index_select")},
    "aten::flip": along("dims"),
    **{f"aten::{n}": in_step for n in ("cat", "gather", "scatter", "scatter_add", "slice_scatter")},
    **{f"aten::{n}": reduction for n in ("sum", "mean", "amax", "amin", "any", "all", "prod", "argmax", "argmin")},
    "aten::logsumexp": reduction,
    **{f"aten::{n}": norm for n in ("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")},
    **{f"aten::{n}": dropping for n in ("select", "unbind")},
    "aten::expand": expand,
    "aten::embedding": embedding,
    "aten::constant_pad_nd": pad,
    **{
        f"aten::{n}": fused("attn_mask") for n in ("scaled_dot_product_attention", "_scaled_dot_product_attention_math")
    },
    "aten::_scaled_dot_product_flash_attention_for_cpu": fused("attn_mask"),
    "aten::_scaled_dot_product_flash_attention": fused(),
    **{f"aten::_scaled_dot_product_{n}_attention": fused("attn_bias") for n in ("efficient", "cudnn")},
    "aten::_scaled_dot_product_fused_attention_overrideable": fused("attn_bias"),
    "cpcompile::lightning_indexer": attends("key"),
    "cpcompile::sparse_attention": attends("key", "key_rope"),
    **{f"aten::{n}": pointwise for n in ("zeros_like", "ones_like", "full_like", "empty_like", "_to_copy")},
    **{f"aten::{n}": pointwise for n in ("copy", "masked_fill", "where", "lift_fresh_copy")},
    # Over a group other than the axis's, which is taken to be another axis of the same mesh.
    "_c10d_functional::all_reduce": pointwise,
}

# How many of several results are split by rows; the rest cannot be told of rows.
RESULTS_BY_ROWS: Mapping[str, int] = {
    "aten::_scaled_dot_product_attention_math": 2,
    "aten::_scaled_dot_product_flash_attention_for_cpu": 2,
    "aten::_scaled_dot_product_flash_attention": 2,
    "aten::_scaled_dot_product_efficient_attention": 1,
    "aten::_scaled_dot_product_cudnn_attention": 1,
    "aten::_scaled_dot_product_fused_attention_overrideable": 1,
}

ADDITIVE = frozenset({"aten::add", "aten::sub", "aten::cat"})
HOMOGENEOUS = frozenset({"aten::mul", "aten::div", "aten::neg", "aten::mm", "aten::bmm", "aten::linear", "aten::sum"})
HOMOGENEOUS |= {"aten::mean", "aten::slice", "aten::select", "aten::split", "aten::split_with_sizes", "aten::expand"}


def rows_of(call: Call) -> Rows | str:
    """The dim by which the results are split, or why the op cannot run on rows."""
    target = call.node.target
    if not isinstance(target, torch._ops.OpOverload):
        return "it is not in the table of row-wise ops"
    rule = RULES.get(op_name(target))
    if rule is None and target.namespace in ("aten", "prims") and torch.Tag.pointwise in target.tags:
        rule = pointwise
    if rule is None or is_random(call.node):
        return "it is not in the table of row-wise ops"
    return rule(call)


def is_linear(node: fx.Node, partial: Collection[fx.Node], tensors: Collection[fx.Node]) -> bool:
    """Whether ``node`` of sums is the sum of ``node`` of the summands, in the operands ``partial``."""
    name = op_name(node.target)
    if name in ADDITIVE:
        # A whole or constant summand would be counted once per rank.
        return set(partial) == set(tensors) and (name == "aten::cat" or node.args[1] in tensors)
    if name == "aten::div" and (node.args[0] not in partial or node.kwargs.get("rounding_mode")):
        return False
    if name == "aten::linear" and any(a is not None for a in [*node.args[2:], node.kwargs.get("bias")]):
        return False
    return name in HOMOGENEOUS and len(partial) == 1 and sum(a in partial for a in node.args) == 1
