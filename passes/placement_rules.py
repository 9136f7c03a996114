"""The one table of what ops do to tokens: which are row-wise (each output row from the same input row), which linear.

An op that is not in the table mixes tokens, with that as the recorded reason; nothing is guessed. Every row says
where its knowledge comes from, and ``tests/test_placement_rules.py`` holds each aten row against DTensor's own
sharding propagation.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from cpcompile.declared_ops import stated
from cpcompile.passes.attention_rules import fused_attention, npu_norm, npu_rope, queries, routed, vllm_norm
from cpcompile.passes.collectives import op_name
from cpcompile.passes.fused_attention import FUSED, is_random
from cpcompile.passes.lookup_rules import (
    embedding,
    index_select,
    index_write,
    lookup,
    masked_write,
    searched,
    select_scatter,
)
from cpcompile.passes.op_call import Call, Layouts, Mixing, RowWise, Rule
from cpcompile.passes.product_rules import added_product, matmul
from cpcompile.passes.row_rules import (
    along,
    data_free,
    expand,
    extremum,
    first_operand,
    getitem,
    in_step,
    kept,
    norm,
    pad,
    permute,
    pointwise,
    reduction,
    repeat,
    select,
    slice_,
    squeeze,
    stack,
    t,
    trailing,
    transpose,
    unsqueeze,
    view,
)
from cpcompile.passes.stated_rules import stated_row_wise
from cpcompile.passes.token_layout import Expr, Shape
from cpcompile.passes.vllm_ops import why_whole


@dataclass(frozen=True)
class OpRule:
    """A row of the table.

    Args:
        rule: what the op does to token dims.
        source: where that is documented.
        linear: ``"additive"`` (a sum of partial operands is a partial result), ``"homogeneous"`` (linear in one
            operand, the others constant) or ``""``.
    """

    rule: Rule = field(repr=False)
    source: str
    linear: str = ""


_VIEW = "DTensor view ops"
_MATH = "DTensor math ops"
_TENSOR = "DTensor tensor ops"
_POINTWISE = "torch.Tag.pointwise"
_OWN = "own: reads no data"
_OWN_VIEW = "torch.view_as_complex: the last dim's two elements become one"
_ELEMENTWISE = "torch documentation: elementwise, without the tag"
_ROWS = "own: row-wise in the queries, given whole keys"
_NPU = "torch_npu 2.13 operator reference"

RULES: Mapping[str, OpRule] = {
    **{
        f"aten::{n}": OpRule(first_operand(view, size_arg=1), _VIEW, "homogeneous")
        for n in ("view", "_unsafe_view", "reshape")
    },
    "aten::expand": OpRule(expand, _VIEW, "homogeneous"),
    "aten::permute": OpRule(first_operand(permute), _VIEW, "homogeneous"),
    "aten::transpose": OpRule(first_operand(transpose), _VIEW, "homogeneous"),
    "aten::t": OpRule(first_operand(t), _VIEW, "homogeneous"),
    "aten::unsqueeze": OpRule(first_operand(unsqueeze), _VIEW, "homogeneous"),
    "aten::squeeze": OpRule(first_operand(squeeze), _VIEW, "homogeneous"),
    **{f"aten::{n}": OpRule(first_operand(select), _TENSOR, "homogeneous") for n in ("select", "unbind")},
    "aten::slice": OpRule(first_operand(slice_), _TENSOR, "homogeneous"),
    **{
        f"aten::{n}": OpRule(along(2, "dim", 0), _TENSOR, "homogeneous") for n in ("split", "split_with_sizes", "chunk")
    },
    "aten::repeat": OpRule(first_operand(repeat), _VIEW, "homogeneous"),
    "aten::flip": OpRule(along(1, "dims"), _TENSOR, "homogeneous"),
    "aten::roll": OpRule(along(2, "dims"), _TENSOR, "homogeneous"),
    **{f"aten::{n}": OpRule(trailing(2), _TENSOR, "homogeneous") for n in ("tril", "triu")},
    # Complex numbers as pairs in a last dim of 2, as rotary embeddings turn them.
    "aten::view_as_complex": OpRule(trailing(1), _OWN_VIEW, "homogeneous"),
    "aten::view_as_real": OpRule(first_operand(kept), _VIEW, "homogeneous"),
    **{f"aten::{n}": OpRule(pointwise, _POINTWISE, "homogeneous") for n in ("_conj", "_conj_physical", "_neg_view")},
    **{f"aten::{n}": OpRule(pointwise, _ELEMENTWISE) for n in ("polar", "complex", "floor_divide", "fill")},
    "aten::cat": OpRule(in_step(1, "dim", 0), _TENSOR, "additive"),
    "aten::stack": OpRule(stack, _TENSOR, "additive"),
    "aten::slice_scatter": OpRule(in_step(2, "dim", 0), _TENSOR),
    "aten::select_scatter": OpRule(select_scatter, _TENSOR),
    **{f"aten::{n}": OpRule(reduction(), _MATH, "homogeneous") for n in ("sum", "mean")},
    **{f"aten::{n}": OpRule(reduction(), _MATH) for n in ("amax", "amin", "any", "all", "prod", "argmax", "argmin")},
    **{f"aten::{n}": OpRule(reduction(), _MATH) for n in ("logsumexp", "var", "std", "var_mean", "std_mean")},
    **{f"aten::{n}": OpRule(reduction(), _MATH) for n in ("aminmax", "count_nonzero", "median")},
    **{f"aten::{n}": OpRule(reduction(2), _MATH) for n in ("linalg_vector_norm", "norm")},
    "aten::mode": OpRule(reduction(1, -1), _MATH),
    "aten::kthvalue": OpRule(reduction(2, -1), _MATH),
    **{f"aten::{n}": OpRule(extremum, _MATH) for n in ("max", "min")},
    **{f"aten::{n}": OpRule(along(1, "dim"), _MATH) for n in ("_softmax", "_log_softmax", "_safe_softmax", "cumsum")},
    **{f"aten::{n}": OpRule(along(1, "dim"), _MATH) for n in ("cumprod", "cummax", "cummin", "logcumsumexp")},
    "aten::softmax": OpRule(along(1, "dim"), _MATH),
    "aten::glu": OpRule(along(1, "dim", -1), _MATH),
    "aten::sort": OpRule(along(1, "dim", -1), _TENSOR),
    "aten::topk": OpRule(along(2, "dim", -1), _TENSOR),
    **{f"aten::{n}": OpRule(in_step(1, "dim"), _TENSOR) for n in ("gather", "scatter")},
    **{f"aten::{n}": OpRule(in_step(1, "dim"), _TENSOR) for n in ("scatter_add", "scatter_reduce")},
    **{f"aten::{n}": OpRule(index_write, _TENSOR) for n in ("index_copy", "index_add", "index_fill")},
    "aten::searchsorted": OpRule(searched(1), _TENSOR),
    **{f"aten::{n}": OpRule(searched(0), _TENSOR) for n in ("bucketize", "isin")},
    "aten::native_layer_norm": OpRule(first_operand(norm), _MATH),
    "aten::layer_norm": OpRule(first_operand(norm), _MATH),
    "aten::rms_norm": OpRule(first_operand(norm), _MATH),
    "aten::_fused_rms_norm": OpRule(first_operand(norm), _MATH),
    **{f"aten::{n}": OpRule(matmul, "DTensor matrix ops", "homogeneous") for n in ("mm", "bmm", "mv", "linear")},
    **{f"aten::{n}": OpRule(added_product, "DTensor matrix ops") for n in ("addmm", "baddbmm")},
    "aten::embedding": OpRule(embedding, "DTensor embedding ops"),
    "aten::index": OpRule(lookup, "DTensor index ops"),
    "aten::index_put": OpRule(masked_write, "DTensor index ops"),
    "aten::index_select": OpRule(index_select, _TENSOR),
    "aten::constant_pad_nd": OpRule(first_operand(pad), "DTensor tensor ops"),
    **{f"aten::{n}": OpRule(pointwise, _TENSOR, "homogeneous") for n in ("clone", "alias", "detach", "contiguous")},
    **{f"aten::{n}": OpRule(pointwise, _TENSOR) for n in ("zeros_like", "ones_like", "full_like", "empty_like")},
    **{f"aten::{n}": OpRule(pointwise, _POINTWISE) for n in ("_to_copy", "masked_fill", "lift_fresh_copy", "copy")},
    **{f"aten::{n}": OpRule(pointwise, _POINTWISE, "additive") for n in ("add", "sub")},
    **{f"aten::{n}": OpRule(pointwise, _POINTWISE, "homogeneous") for n in ("mul", "div", "neg")},
    **{
        f"aten::{n}": OpRule(data_free, _OWN)
        for n in ("new_ones", "new_zeros", "new_empty", "new_full", "new_empty_strided", "sym_size", "sym_numel")
    },
    "cpcompile::routed_experts": OpRule(routed, "own: row-wise in the tokens, given all experts"),
    "cpcompile::lightning_indexer": OpRule(queries(frozenset({1})), _ROWS),
    "cpcompile::sparse_attention": OpRule(queries(frozenset({1, 4})), _ROWS),
    "cpcompile::paged_lightning_indexer": OpRule(queries(frozenset({1}), 0), _ROWS),
    "cpcompile::paged_sparse_attention": OpRule(queries(frozenset({1, 4}), 0), _ROWS),
    "cpcompile::paged_attention": OpRule(queries(frozenset({1, 3}), 0), _ROWS),
    **{f"npu::{n}": OpRule(npu_norm, _NPU) for n in ("npu_rms_norm", "npu_add_rms_norm")},
    **{f"npu::{n}": OpRule(npu_rope, _NPU) for n in ("npu_interleave_rope", "npu_rotary_mul")},
    **{f"vllm_ir::{n}": OpRule(vllm_norm, "vLLM 0.32, vllm/ir/ops") for n in ("rms_norm", "fused_add_rms_norm")},
    **{name: OpRule(fused_attention, "torch.nn.functional.scaled_dot_product_attention") for name in FUSED},
    "getitem": OpRule(getitem, "own: picks one output", "homogeneous"),
    "_c10d_functional::all_reduce": OpRule(pointwise, "own: asked where its ranks hold the same rows", "homogeneous"),
    "_c10d_functional::wait_tensor": OpRule(pointwise, "own: identity", "homogeneous"),
}

_POINTWISE_RULE = OpRule(pointwise, _POINTWISE)
_STATED_RULE = OpRule(stated_row_wise, "the user's statement, cpcompile.row_wise")


def _keeps_linearity(node: fx.Node) -> bool:
    """Whether this call of a linear op is linear, too: no bias, rounding, scalar term, or product with itself."""
    name, args, kwargs = op_name(node.target), node.args, node.kwargs
    if name == "aten::linear":
        return (args[2] if len(args) > 2 else kwargs.get("bias")) is None and args[0] is not args[1]
    if name in ("aten::add", "aten::sub"):
        return isinstance(args[1], fx.Node) and isinstance(args[1].meta.get("val", torch.Tensor()), torch.Tensor)
    if name == "_c10d_functional::all_reduce":
        return args[1] in ("sum", "avg")
    if name in ("aten::mul", "aten::div", "aten::mm", "aten::bmm", "aten::mv"):
        return args[0] is not args[1] and kwargs.get("rounding_mode") is None
    return True


def find_rule(node: fx.Node) -> OpRule | None:
    """The table's row for ``node``, ``linear`` as this call has it, or None for an unknown, random or in-place op."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return RULES["getitem"]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if is_random(node) or node.target._schema.is_mutable:
        return None
    known = RULES.get(op_name(node.target))
    if stated(op_name(node.target)) is not None:
        return _STATED_RULE
    if known is None and torch.Tag.pointwise in node.target.tags:
        return _POINTWISE_RULE
    if known is not None and known.linear and not _keeps_linearity(node):
        return dataclasses.replace(known, linear="")
    return known


def classify(
    node: fx.Node, tokens: Expr, layouts: Layouts, shapes: Mapping[fx.Node, tuple[Shape, ...]]
) -> RowWise | Mixing:
    """Apply the table to one node, given the token dims of its operands.

    Returns ``Mixing`` with a reason where the op is unknown, mixes tokens, or no operand carries any.
    """
    known = find_rule(node)
    if known is None:
        return Mixing(why_whole(node) or f"{op_name(node.target)} is not in the table of token-wise ops")
    if known.rule is data_free:
        return data_free(Call(node, tokens, layouts, shapes))
    if not any(any(layouts.get(n, ())) for n in node.all_input_nodes):
        return Mixing("no operand carries tokens")
    return known.rule(Call(node, tokens, layouts, shapes))
