"""What the passes know of torch_npu's ops: which are pure, which operands have a row for each token, how calls read.

Ops are known by name alone, in whatever namespace a framework registers them (``npu``, ``custom``, ``_C_ascend``), and
arguments by the names of the schema at hand: releases differ in their order and number.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import guard_or_false

from cpcompile.passes.collectives import arguments, getitems, op_name
from cpcompile.passes.token_layout import size_expr

# Attention: products of tokens with tokens.
ATTENTION = frozenset({"npu_sparse_flash_attention", "npu_fused_infer_attention_score", "npu_mla_prolog"})

# Functions of their arguments alone: same arguments, same results, on every rank. The ``_functional`` and underscored
# forms are what functionalisation makes of one another.
PURE = frozenset(
    {
        "npu_lightning_indexer", "npu_sparse_flash_attention",
        "npu_fused_infer_attention_score", "npu_fused_infer_attention_score_v2",
        "npu_mla_prolog", "npu_mla_prolog_v2", "npu_mla_prolog_v3_functional",
        "npu_kv_rmsnorm_rope_cache", "npu_kv_rmsnorm_rope_cache_v2_functional",
        "npu_scatter_nd_update", "npu_scatter_pa_kv_cache_functional",
        "npu_rms_norm", "npu_add_rms_norm", "npu_interleave_rope", "npu_rotary_mul",
    }
)  # fmt: skip

# Op -> arguments whose dims 0 are alike, or 1. Their meta functions do not compare them, so that in a traced graph the
# sizes may be different symbols.
ROWS: Mapping[str, tuple[str, ...]] = {
    "npu_interleave_rope": ("x", "cos", "sin"),
    "npu_rotary_mul": ("input", "r1", "r2"),
    "npu_scatter_nd_update": ("updates", "indices"),
    "npu_scatter_pa_kv_cache_functional": ("key", "slot_mapping"),
    "npu_kv_rmsnorm_rope_cache": ("kv", "cos", "sin", "index"),
    "npu_kv_rmsnorm_rope_cache_v2_functional": ("kv", "cos", "sin", "index"),
    "npu_mla_prolog": ("token_x", "rope_sin", "rope_cos", "cache_index"),
    "npu_mla_prolog_v2": ("token_x", "rope_sin", "rope_cos", "cache_index"),
    "npu_mla_prolog_v3_functional": ("token_x", "rope_sin", "rope_cos", "cache_index"),
    "npu_lightning_indexer": ("query", "weights"),
    "npu_sparse_flash_attention": ("query", "sparse_indices", "query_rope"),
}

# Op that writes caches, and so needs every row -> its other results: a row for each token in dim 0 where that has
# their number, which a rank may take its own of.
ROW_RESULTS: Mapping[str, range] = {
    "npu_kv_rmsnorm_rope_cache": range(2, 4),
    "npu_kv_rmsnorm_rope_cache_v2_functional": range(2),
    "npu_mla_prolog": range(2),
    "npu_mla_prolog_v2": range(2),
    "npu_mla_prolog_v3_functional": range(5),
}


def base_name(target: object) -> str:
    """``npu_rms_norm`` for ``npu::npu_rms_norm``; empty for a target that is no op."""
    return op_name(target).rpartition("::")[2] if isinstance(target, torch._ops.OpOverload) else ""


def first_result(node: fx.Node) -> fx.Node | str:
    """What stands for a call's first result, of one or of several, or why the others are needed."""
    if isinstance(node.meta["val"], torch.Tensor):
        return node
    parts = getitems(node)
    if parts is None or parts.keys() != {0}:
        return "more than its first result is read"
    return parts[0]


def is_row_result(node: fx.Node) -> bool:
    """Whether ``node`` reads one of ``ROW_RESULTS``."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return False
    return node.args[1] in ROW_RESULTS.get(base_name(node.args[0].target), ())


def unify_rows(gm: fx.GraphModule) -> None:
    """Guard that the sizes which ``ROWS`` says are alike are one size, where the traced example has it so."""
    for node in gm.graph.nodes:
        names = ROWS.get(base_name(node.target), ())
        given = arguments(node) if names else {}
        values = [given[n].meta.get("val") for n in names if isinstance(given.get(n), fx.Node)]
        sizes = [v.shape[0] for v in values if isinstance(v, torch.Tensor) and v.ndim]
        for size in sizes[1:]:
            if size_expr(size) != 1:
                same_size(sizes[0], size)


def same_size(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    """Whether two sizes are equal: known to be, or in the traced example, and then guarded."""
    return size_expr(a) == size_expr(b) or bool(guard_or_false(a == b))


def missing_ops(names: Iterable[str], namespace: str = "npu") -> str:
    """Which of ``names`` torch_npu, as it is loaded, does not have; ``""`` where it has all."""
    library = getattr(torch.ops, namespace)
    missing = [name for name in names if not hasattr(library, name)]
    return f"there is no op {namespace}::{missing[0]}: import torch_npu" if missing else ""
