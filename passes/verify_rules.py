"""The static proof's own table of what ops do to rows: which compute each output row from the same input rows.

Written independently of the planner's table, so that one mistake does not hide in both. An op that is not here
proves nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
import torch.fx as fx

from cpcompile.declared_ops import stated
from cpcompile.passes.collectives import op_name
from cpcompile.passes.verify_arguments import is_random
from cpcompile.passes.verify_call import ALONE, ALONG, Call, Rule, along, pointwise
from cpcompile.passes.verify_index import Rows, times
from cpcompile.passes.verify_products import matmul
from cpcompile.passes.verify_writes import (
    among,
    embedding,
    index,
    index_put,
    looks_up,
    numbered_write,
    searches,
    select_scatter,
)


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


def stack(call: Call) -> Rows | str:
    """Operands of one shape, all split alike, beside each other in a new dim."""
    splits = {call.rows.get(node) for node in call.shapes}
    rows = next(iter(splits))
    if len(splits) != 1 or rows is None or len(set(call.shapes.values())) != 1:
        return "its operands are not all split alike"
    (made,) = call.dims("dim", len(call.out[0]))
    return rows.shifted(1) if made <= rows.dim else rows


def repeat(call: Call) -> Rows | str:
    """All elements several times over: as many blocks of the same rows."""
    split = call.first()
    if split is None:
        return ALONE
    rows = split[1].shifted(len(call.out[0]) - len(split[0]))
    counts = call.arg("repeats")
    assert isinstance(counts, list | tuple)
    count = counts[rows.dim]
    if not isinstance(count, int) or count < 1:
        return "it repeats rows a number of times that is not known"
    return dataclasses.replace(rows, outer=times(rows.outer, count))


def before(last: int) -> Rule:
    """Row-wise in all but the last dims."""

    def rule(call: Call) -> Rows | str:
        split = call.first()
        if split is None:
            return ALONE
        return split[1] if split[1].dim < len(split[0]) - last else ALONG

    return rule


def roll(call: Call) -> Rows | str:
    """Along the dims that it names, or along all elements."""
    return along("dims")(call) if call.arg("dims") else ALONG


def extreme(call: Call) -> Rows | str:
    """``max`` and ``min`` of two operands, or over dims."""
    return pointwise(call) if call.arg("other") is not None else reduction(call)


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


def experts(call: Call) -> Rows | str:
    """Rows of the tokens, of their experts' ids and of their weights; all of both tables."""
    rows = [call.rows.get(node) for node in call.node.args[:3]]  # type: ignore[arg-type]
    if rows[0] is None or rows[0].dim != 0 or len(call.rows) != 3 or any(r != rows[0] for r in rows):
        return "its tokens, their experts and weights are not split alike"
    return rows[0]


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
    **{f"aten::{n}": matmul for n in ("mm", "bmm", "mv", "addmm", "baddbmm", "linear")},
    **{f"aten::{n}": along("dim") for n in ("_softmax", "softmax", "_log_softmax", "_safe_softmax", "log_softmax")},
    **{f"aten::{n}": along("dim") for n in ("cumsum", "cumprod", "cummax", "cummin", "logcumsumexp")},
    **{f"aten::{n}": along("dim") for n in ("sort", "argsort", "topk", "glu")},
    **{f"aten::{n}": along("dim") for n in ("slice", "split", "split_with_sizes", "chunk")},
    "aten::flip": along("dims"),
    "aten::roll": roll,
    "aten::repeat": repeat,
    "aten::view_as_real": before(0),  # a pair is made of each number, in a new last dim
    "aten::view_as_complex": before(1),
    **{f"aten::{n}": before(2) for n in ("tril", "triu")},
    **{f"aten::{n}": in_step for n in ("cat", "gather", "scatter", "scatter_add", "scatter_reduce", "slice_scatter")},
    "aten::stack": stack,
    **{f"aten::{n}": reduction for n in ("sum", "mean", "amax", "amin", "any", "all", "prod", "argmax", "argmin")},
    **{f"aten::{n}": reduction for n in ("logsumexp", "var", "std", "var_mean", "std_mean", "aminmax", "median")},
    **{f"aten::{n}": reduction for n in ("count_nonzero", "linalg_vector_norm", "norm", "mode", "kthvalue")},
    **{f"aten::{n}": extreme for n in ("max", "min")},
    **{f"aten::{n}": norm for n in ("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")},
    **{f"aten::{n}": dropping for n in ("select", "unbind")},
    "aten::expand": expand,
    "aten::embedding": embedding,
    "aten::index": index,
    "aten::index_put": index_put,
    **{f"aten::index_{n}": numbered_write for n in ("copy", "add", "fill")},
    "aten::select_scatter": select_scatter,
    "aten::searchsorted": searches,
    "aten::bucketize": among("boundaries"),
    "aten::isin": among("test_elements"),
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
    **{f"aten::{n}": pointwise for n in ("copy", "masked_fill", "where", "lift_fresh_copy", "fill", "floor_divide")},
    **{f"aten::{n}": pointwise for n in ("polar", "complex", "_conj", "_conj_physical", "_neg_view")},
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

ADDITIVE = frozenset({"aten::add", "aten::sub", "aten::cat", "aten::stack"})
HOMOGENEOUS = frozenset({"aten::mul", "aten::div", "aten::neg", "aten::mm", "aten::bmm", "aten::linear", "aten::sum"})
HOMOGENEOUS |= {"aten::mean", "aten::slice", "aten::select", "aten::split", "aten::split_with_sizes", "aten::expand"}
HOMOGENEOUS |= {"aten::mv", "aten::unbind", "aten::flip", "aten::roll", "aten::repeat", "aten::tril", "aten::triu"}
HOMOGENEOUS |= {f"aten::{n}" for n in ("view_as_real", "view_as_complex", "_conj", "_conj_physical", "_neg_view")}


def on_trust(call: Call) -> Rows | str:
    """What a user states of an opaque op: rows of the arguments that the statement names, and of no others."""
    told = stated(op_name(call.node.target))
    assert told is not None and isinstance(call.node.target, torch._ops.OpOverload)
    names = [argument.name for argument in call.node.target._schema.arguments]
    wanted = {value for p in told.rows if isinstance(value := call.arg(names[p]) if p < len(names) else None, fx.Node)}
    whole = {
        value for p, name in enumerate(names) if p not in told.rows and isinstance(value := call.arg(name), fx.Node)
    }
    splits = set(call.rows.values())
    if (
        set(call.rows) != wanted
        or wanted & whole
        or len(splits) != 1
        or splits != {r for r in splits if r.dim == told.dim}
    ):
        return f"it is stated to be row-wise in dim {told.dim} of arguments {told.rows}, and others are split"
    extents = {shape[told.dim] for shape in [*(call.shapes[n] for n in wanted), *call.out[: told.out]]}
    return splits.pop() if len(extents) == 1 else "it is stated to be row-wise, and its results have other rows"


def results_by_rows(node: fx.Node, count: int) -> int:
    """How many of the call's ``count`` results are split by rows; the rest cannot be told of rows."""
    told = stated(op_name(node.target))
    return told.out if told is not None else RESULTS_BY_ROWS.get(op_name(node.target), count)


def rows_of(call: Call) -> Rows | str:
    """The dim by which the results are split, or why the op cannot run on rows."""
    target = call.node.target
    if not isinstance(target, torch._ops.OpOverload):
        return "it is not in the table of row-wise ops"
    rule = RULES.get(op_name(target))
    if rule is None and target.namespace in ("aten", "prims") and torch.Tag.pointwise in target.tags:
        rule = pointwise
    if rule is None and stated(op_name(target)) is not None:
        rule = on_trust
    if rule is None or is_random(call.node):
        return "it is not in the table of row-wise ops"
    return rule(call)


def is_linear(node: fx.Node, partial: Collection[fx.Node], tensors: Collection[fx.Node]) -> bool:
    """Whether ``node`` of sums is the sum of ``node`` of the summands, in the operands ``partial``."""
    name = op_name(node.target)
    if name in ADDITIVE:
        # A whole or constant summand would be counted once per rank.
        return set(partial) == set(tensors) and (name in ("aten::cat", "aten::stack") or node.args[1] in tensors)
    if name == "aten::div" and (node.args[0] not in partial or node.kwargs.get("rounding_mode")):
        return False
    if name == "aten::linear" and any(a is not None for a in [*node.args[2:], node.kwargs.get("bias")]):
        return False
    return name in HOMOGENEOUS and len(partial) == 1 and sum(a in partial for a in node.args) == 1
