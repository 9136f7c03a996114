"""npu attention: the per-token ops of this project -> torch_npu's ops, one call with one row for each token."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from cpcompile import paged_ops  # noqa: F401  registers the ops
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase
from cpcompile.passes.token_layout import size_expr

aten, own = torch.ops.aten, torch.ops.cpcompile


@dataclass(frozen=True)
class NpuAttention:
    """``cpcompile::paged_...`` -> torch_npu's ops, and torchair's ``air::npu_fused_infer_attention_score``.

    Before: each row with its own key length and block table row.
    After: a batch of as many requests as there are rows, of one query each: cumulative query lengths ``1, 2, ..., T``,
    the rows' key lengths and block tables as the requests'. A request's only query sees all its keys, with or without a
    causal mask.

    The two calls of zigzag context parallelism (``prev`` and ``next``, each with lengths of its own) are a case of
    this: what differs between them is the key length of each row.

    Refuses, with the reason, where torch_npu does not have the op.
    """

    name = "npu-attention"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result, builder = PassResult(), _Builder()
        for node in list(gm.graph.nodes):
            if node.target not in CALLS:
                continue
            missing = builder.replace(node)
            if missing:
                result.refuse(node, missing)
            else:
                result.rewrites += 1
        return result.finish(gm)


def _indexer(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "query": given["query"], "key": given["key_cache"], "weights": given["weights"],
        "sparse_count": given["sparse_count"], "actual_seq_lengths_key": given["key_lengths"],
        "layout_query": "TND", "layout_key": "PA_BSND", "sparse_mode": 3,
    }  # fmt: skip


def _sparse_attention(given: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "query": given["query"], "key": given["key_cache"], "value": given["key_cache"],
        "sparse_indices": given["sparse_indices"], "query_rope": given["query_rope"], "key_rope": given["rope_cache"],
        "scale_value": given["scale"], "actual_seq_lengths_kv": given["key_lengths"], "sparse_block_size": 1,
        "layout_query": "TND", "layout_kv": "PA_BSND", "sparse_mode": 3, "attention_mode": 2,
    }  # fmt: skip


def _dense_attention(given: Mapping[str, Any]) -> dict[str, Any]:
    cache = given["key_cache"].meta["val"]
    return {
        "query": given["query"], "key": given["key_cache"], "value": given["key_cache"],
        "query_rope": given["query_rope"], "key_rope": given["rope_cache"], "scale": given["scale"],
        "actual_seq_lengths_kv": given["key_lengths"], "num_heads": given["query"].meta["val"].shape[1],
        "num_key_value_heads": 1, "input_layout": "TND", "block_size": cache.shape[1], "sparse_mode": 0,
    }  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """What stands for an op: its library and name, its arguments but for query lengths and table, and their dtype."""

    library: str
    name: str
    made: Callable[[Mapping[str, Any]], dict[str, Any]]
    query_lengths: str
    dtype: torch.dtype = torch.int32
    heads_first: bool = False


CALLS: Mapping[object, _Call] = {
    own.paged_lightning_indexer.default: _Call("npu", "npu_lightning_indexer", _indexer, "actual_seq_lengths_query"),
    own.paged_sparse_attention.default: _Call(
        "npu", "npu_sparse_flash_attention", _sparse_attention, "actual_seq_lengths_query"
    ),
    own.paged_attention.default: _Call(
        "air", "npu_fused_infer_attention_score", _dense_attention, "actual_seq_lengths", torch.int64, heads_first=True
    ),
}


@dataclass
class _Builder:
    """Emits the calls; those of one number of rows share their query lengths."""

    ends: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)

    def replace(self, node: fx.Node) -> str:
        """Put torch_npu's call in the place of ``node``; says why where it cannot."""
        call = CALLS[node.target]
        packet = getattr(getattr(torch.ops, call.library), call.name, None)
        if packet is None:
            return f"there is no op {call.library}::{call.name}: import torch_npu or torchair"
        given = arguments(node)
        made = {**call.made(given), "block_table": given["block_table"]}
        made[call.query_lengths] = self._query_lengths(node, given["query"], call.dtype)
        for name, value in made.items():
            if call.heads_first and name in (
                "key",
                "value",
                "key_rope",
            ):  # [blocks, size, 1, D] -> [blocks, 1, size, D]
                made[name] = emit(node, aten.transpose.int, value, 1, 2)
            elif name.endswith(("lengths_kv", "lengths_key")) and call.dtype != torch.int32:
                made[name] = emit(node, aten._to_copy.default, value, dtype=call.dtype)
        new = _emit_by_schema(node, packet.default, made)
        node.replace_all_uses_with(new)
        erase(node)
        return ""

    def _query_lengths(self, like: fx.Node, query: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``1, 2, ..., T``."""
        value = query.meta["val"]
        key = (size_expr(value.shape[0]), value.device, dtype)
        if key not in self.ends:
            rows = emit(like, aten.sym_size.int, query, 0)
            behind = emit(like, operator.add, rows, 1)
            self.ends[key] = emit(like, aten.arange.start, 1, behind, dtype=dtype, device=value.device)
        return self.ends[key]


def _emit_by_schema(like: fx.Node, target: torch._ops.OpOverload, given: Mapping[str, Any]) -> fx.Node:
    """The first result of ``target`` with those of ``given`` that this release of it has, by position or name."""
    args, kwargs = [], {}
    for argument in target._schema.arguments:
        if argument.kwarg_only:
            if argument.name in given:
                kwargs[argument.name] = given[argument.name]
        else:
            args.append(given[argument.name])
    new = emit(like, target, *args, **kwargs)
    return new if len(target._schema.returns) == 1 else emit(like, operator.getitem, new, 0)
