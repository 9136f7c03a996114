"""The static proof's own table of what ops do to rows: which compute each output row from the same input rows.

Written independently of the planner's table, so that one mistake does not hide in both. An op that is not here
proves nothing.
"""

from __future__ import annotations

import dataclasses
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


def _is_boolean(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def index(call: Call) -> Rows | str:
    """Rows of the numbers that index the first dims of a table of which every row is there."""
    table, numbers = call.arg("self"), call.arg("indices")
    if not isinstance(numbers, list | tuple) or table in call.rows:
        return "it looks rows up"
    if any(not isinstance(n, fx.Node) or _is_boolean(n) for n in numbers):
        return "it does not look up a row for each number"
    lead = call.out[0][: len(call.out[0]) - len(call.shapes[table]) + len(numbers)]  # type: ignore[index]
    return pointwise(Call(call.node, {n: call.shapes[n] for n in numbers}, call.rows, (lead,)))


def index_put(call: Call) -> Rows | str:
    """One value written wherever a mask over the leading dims says."""
    below, masks, value = call.arg("self"), call.arg("indices"), call.arg("values")
    assert isinstance(below, fx.Node) and isinstance(masks, list | tuple)
    if len(masks) != 1 or not isinstance(masks[0], fx.Node) or not _is_boolean(masks[0]) or call.shapes[value] != ():  # type: ignore[index]
        return "it writes to rows that it names"
    rows = call.rows.get(below)
    if rows is None:
        return "its mask is of rows and what it writes to is not"
    if rows.dim >= len(call.shapes[masks[0]]):
        return rows if set(call.rows) == {below} else "its mask is of other rows"
    return rows if call.rows.get(masks[0]) == rows else "its mask is not split as what it writes to"


def experts(call: Call) -> Rows | str:
    """Rows of the tokens, of their experts' ids and of their weights; all of both tables."""
    rows = [call.rows.get(node) for node in call.node.args[:3]]  # type: ignore[arg-type]
    if rows[0] is None or rows[0].dim != 0 or len(call.rows) != 3 or any(r != rows[0] for r in rows):
        return "its tokens, their experts and weights are not split alike"
    return rows[0]


def looks_up(call: Call) -> Rows | str:
    """``index_select``: rows of the indices from a whole table, or of a table along another dim."""
    table, index = call.arg("self"), call.arg("index")
    (dim,) = call.dims("dim", len(call.shapes[table]))  # type: ignore[index]
    if set(call.rows) == {index} and table is not index:
        return call.rows[index].shifted(dim)  # type: ignore[index]
    if set(call.rows) == {table} and table is not index:
        return ALONG if call.rows[table].dim == dim else call.rows[table]  # type: ignore[index]
    return "its table and its indices are both split"


def trailing(weight: str) -> Rule:
    """Pointwise but for the last dims, which the operand ``weight`` has, too, or the last one without a weight."""

    def rule(call: Call) -> Rows | str:
        gamma = call.arg(weight) if weight else None
        others = {n: s for n, s in call.shapes.items() if n is not gamma}
        if gamma in call.rows:
            return "its weight is split"
        one = tuple(call.out[:1])  # statistics beside the result differ in the dims worked along
        rows = pointwise(dataclasses.replace(call, shapes=others, out=one))
        if isinstance(rows, str):
            return rows
        if any(s[rows.dim] != one[0][rows.dim] for s in call.out):
            return "its results differ in rows"
        count = len(call.shapes[gamma]) if isinstance(gamma, fx.Node) else 1
        return rows if rows.dim < len(one[0]) - count else ALONG

    return rule


def attends(*whole: str, at: int = 1) -> Rule:
    """Rows of queries, dim ``at``, and of what goes with each, over keys of which every row is there."""

    def rule(call: Call) -> Rows | str:
        keys = {node for name in whole if isinstance(node := call.arg(name), fx.Node)}
        if keys & set(call.rows):
            return "every query reads every key"
        if set(call.rows) != set(call.shapes) - keys or set(call.rows.values()) != {Rows(at)}:
            return "its queries are not split alike, by their rows"
        return Rows(at)

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
    **{f"aten::{n}": along("dim") for n in ("slice", "split", "split_with_sizes", "chunk")},
    "aten::flip": along("dims"),
    **{f"aten::{n}": in_step for n in ("cat", "gather", "scatter", "scatter_add", "slice_scatter")},
    **{f"aten::{n}": reduction for n in ("sum", "mean", "amax", "amin", "any", "all", "prod", "argmax", "argmin")},
    "aten::logsumexp": reduction,
    **{f"aten::{n}": norm for n in ("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")},
    **{f"aten::{n}": dropping for n in ("select", "unbind")},
    "aten::expand": expand,
    "aten::embedding": embedding,
    "aten::index": index,
    "aten::index_put": index_put,
    "aten::constant_pad_nd": pad,
    "cpcompile::routed_experts": experts,
    **{
        f"aten::{n}": fused("attn_mask") for n in ("scaled_dot_product_attention", "_scaled_dot_product_attention_math")
    },
    "aten::_scaled_dot_product_flash_attention_for_cpu": fused("attn_mask"),
    "aten::_scaled_dot_product_flash_attention": fused(),
    **{f"aten::_scaled_dot_product_{n}_attention": fused("attn_bias") for n in ("efficient", "cudnn")},
    "aten::_scaled_dot_product_fused_attention_overrideable": fused("attn_bias"),
    "cpcompile::lightning_indexer": attends("key"),
    "cpcompile::sparse_attention": attends("key", "key_rope"),
    "cpcompile::paged_lightning_indexer": attends("key_cache", at=0),
    "cpcompile::paged_sparse_attention": attends("key_cache", "rope_cache", at=0),
    "cpcompile::paged_attention": attends("key_cache", "rope_cache", at=0),
    "vllm_ir::rms_norm": trailing("weight"),
    "vllm_ir::fused_add_rms_norm": trailing("weight"),
    "npu::npu_rms_norm": trailing("gamma"),
    "npu::npu_add_rms_norm": trailing("gamma"),
    "npu::npu_interleave_rope": trailing(""),
    "npu::npu_rotary_mul": trailing(""),
    "aten::index_select": looks_up,
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
