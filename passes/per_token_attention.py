"""Per-token attention: npu attention over requests by cumulative lengths -> the same over rows, each with its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from cpcompile import paged_ops  # noqa: F401  registers the ops
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase
from cpcompile.passes.npu_ops import base_name, first_result, same_size, unify_rows
from cpcompile.passes.token_layout import size_expr
from cpcompile.passes.traced_views import size_node

aten, own = torch.ops.aten, torch.ops.cpcompile
ALL = (1 << 63) - 1
# The lower triangle that stands for a causal mask of any size: its contents are the op's contract.
CAUSAL_MASK = (2048, 2048)


class _Differs(Exception):
    """What keeps a call from being the per-token one."""


@dataclass(frozen=True)
class PerTokenAttention:
    """npu attention over requests -> ``cpcompile::paged_...`` over rows.

    ``npu_lightning_indexer`` -> ``paged_lightning_indexer``, ``npu_sparse_flash_attention`` ->
    ``paged_sparse_attention``, ``npu_fused_infer_attention_score`` as torchair has it, with lengths as tensors ->
    ``paged_attention``.

    Before: queries ``[T, H, D]`` of several requests (layout TND), of which row r belongs to the request whose
    cumulative query length is the first above r, and sees that request's keys up to its own place, counted from the
    end (``sparse_mode`` 3: the last query row sees every key).
    After: the same with each row's own key length and block table row, computed in the graph::

        request = sum(query_lengths <= r) - (query_lengths[-1] <= r)
        key_length = key_lengths[request] - (query_lengths[request] - 1 - r), 0 behind the last request
        table = block_table[request]

    so that the call no longer depends on which rows there are, and can run on any of them.

    Refuses, with the reason, whatever is not exactly this: other layouts, modes and windows, caches that are not paged,
    values other than the keys' latents, blocks of chosen keys, sinks, and results beyond the first.

    Sizes that these ops need to be alike and that the trace has as different symbols are guarded to be.

    Source: torch_npu 2.13, ``_op_plugin_docs.py``.
    """

    name = "per-token-attention"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result, builder = PassResult(), _Builder(gm.graph)
        unify_rows(gm)
        for node in list(gm.graph.nodes):
            form = FORMS.get(base_name(node.target))
            if form is None:
                continue
            try:
                builder.replace(node, form)
                result.rewrites += 1
            except _Differs as differs:
                result.refuse(node, f"{base_name(node.target)}: {differs}; it keeps its form and needs every row")
        return result.finish(gm)


@dataclass(frozen=True)
class _Form:
    """One op that is understood.

    Args:
        fixed: argument -> its only value that is understood. An argument that the release lacks is as fixed.
        tensors: argument -> its number of dims; each must be there.
        optional: tensors that may be there, too; no others.
        query_lengths: name of the cumulative query lengths.
        key_lengths: name of the key lengths.
        heads: the dim of the caches that has their heads.
        emit: makes the per-token call.
    """

    fixed: Mapping[str, object]
    tensors: Mapping[str, int]
    optional: frozenset[str]
    query_lengths: str
    key_lengths: str
    heads: int
    emit: Callable[[fx.Node, dict[str, Any], fx.Node, fx.Node], fx.Node]


def _indexer(like: fx.Node, given: dict[str, Any], lengths: fx.Node, table: fx.Node) -> fx.Node:
    operands = (given["query"], given["key"], given["weights"], lengths, table, given["sparse_count"])
    return emit(like, own.paged_lightning_indexer.default, *operands)


def _sparse_attention(like: fx.Node, given: dict[str, Any], lengths: fx.Node, table: fx.Node) -> fx.Node:
    names = ("query", "key", "sparse_indices", "query_rope", "key_rope")
    operands = (*(given[name] for name in names), lengths, table, given["scale_value"])
    return emit(like, own.paged_sparse_attention.default, *operands)


def _dense_attention(like: fx.Node, given: dict[str, Any], lengths: fx.Node, table: fx.Node) -> fx.Node:
    keys, rope = (emit(like, aten.transpose.int, given[name], 1, 2) for name in ("key", "key_rope"))  # heads last
    operands = (given["query"], keys, given["query_rope"], rope, lengths, table, given["scale"])
    return emit(like, own.paged_attention.default, *operands)


_COMMON = {"layout_query": "TND", "sparse_mode": 3, "pre_tokens": ALL, "next_tokens": ALL}
_MLA = {"query": 3, "key": 4, "query_rope": 3, "key_rope": 4, "block_table": 2}
FORMS: Mapping[str, _Form] = {
    "npu_lightning_indexer": _Form(
        {**_COMMON, "layout_key": "PA_BSND", "return_value": False},
        {"query": 3, "key": 4, "weights": 2, "block_table": 2},
        frozenset(),
        "actual_seq_lengths_query",
        "actual_seq_lengths_key",
        2,
        _indexer,
    ),
    "npu_sparse_flash_attention": _Form(
        {**_COMMON, "layout_kv": "PA_BSND", "attention_mode": 2, "sparse_block_size": 1, "return_softmax_lse": False},
        {**_MLA, "sparse_indices": 3},
        frozenset({"value"}),
        "actual_seq_lengths_query",
        "actual_seq_lengths_kv",
        2,
        _sparse_attention,
    ),
    # With lengths as tensors: torchair's ``air::``. Lists of integers, as in ``npu::``, say nothing of each row.
    "npu_fused_infer_attention_score": _Form(
        {
            "input_layout": "TND", "sparse_mode": 3, "num_key_value_heads": 1, "softmax_lse_flag": False,
            "pre_tokens": (1 << 31) - 1, "next_tokens": (1 << 31) - 1, "antiquant_mode": 0,
        },
        _MLA,
        frozenset({"value", "atten_mask"}),
        "actual_seq_lengths",
        "actual_seq_lengths_kv",
        1,
        _dense_attention,
    ),
}  # fmt: skip


@dataclass
class _Builder:
    """Emits the calls; those of one batch share their rows' lengths and tables."""

    graph: fx.Graph
    rows: dict[tuple[object, ...], tuple[fx.Node, fx.Node]] = field(default_factory=dict)

    def replace(self, node: fx.Node, form: _Form) -> None:
        """Put the per-token call in the place of ``node``."""
        given, result = arguments(node), first_result(node)
        if isinstance(result, str):
            raise _Differs(result)
        _check(given, form)
        lengths, table = self._rows(result, given, form)
        new = form.emit(result, given, lengths, table)
        result.replace_all_uses_with(new)
        erase(result)

    def _rows(self, like: fx.Node, given: dict[str, Any], form: _Form) -> tuple[fx.Node, fx.Node]:
        ends, keys, table = given[form.query_lengths], given[form.key_lengths], given["block_table"]
        query = given["query"].meta["val"]
        tokens = size_node(self.graph, query.shape[0])
        if tokens is None:
            raise _Differs(f"no graph input holds its number of rows {query.shape[0]}")
        requests = ends.meta["val"].shape[0]
        if not all(same_size(requests, t.meta["val"].shape[0]) for t in (keys, table)):
            raise _Differs(f"{ends}, {keys} and {table} differ in the number of requests")
        key = (ends, keys, table, size_expr(query.shape[0]), query.device)
        if key not in self.rows:
            self.rows[key] = _emit_rows(like, ends, keys, table, tokens, query.device)
        return self.rows[key]


def _check(given: dict[str, Any], form: _Form) -> None:
    for name, wanted in form.fixed.items():
        if given.get(name, wanted) != wanted:
            raise _Differs(f"expected {name}={wanted!r}, found {given[name]!r}")
    tensors = {**form.tensors, form.query_lengths: 1, form.key_lengths: 1}
    for name, ndim in tensors.items():
        value = given.get(name)
        if not isinstance(value, fx.Node):
            raise _Differs(f"expected a tensor {name}, found {value!r}")
        if value.meta["val"].ndim != ndim:
            raise _Differs(f"expected {ndim} dims of {name}, found {value.meta['val'].ndim}")
    for name, value in given.items():
        if isinstance(value, fx.Node) and name not in tensors and name not in form.optional:
            raise _Differs(f"expected no {name}, found {value}")
    for name in (n for n in ("key", "key_rope") if n in tensors):
        if given[name].meta["val"].shape[form.heads] != 1:
            raise _Differs(f"expected one head of {name}, found {given[name].meta['val'].shape[form.heads]}")
    if "value" in form.optional and given["value"] not in (None, given["key"]):
        raise _Differs(f"expected the keys' latents as values, found {given['value']}")
    if "atten_mask" in form.optional and _shape(given["atten_mask"]) != CAUSAL_MASK:
        raise _Differs(f"expected the atten_mask {list(CAUSAL_MASK)} that sparse_mode 3 takes, found another or none")
    for name in (form.query_lengths, form.key_lengths, "block_table"):
        if given[name].meta["val"].dtype not in (torch.int32, torch.int64):
            raise _Differs(f"expected {name} in int32, found {given[name].meta['val'].dtype}")


def _shape(value: object) -> tuple[object, ...]:
    return tuple(value.meta["val"].shape) if isinstance(value, fx.Node) else ()


def _emit_rows(
    like: fx.Node, ends: fx.Node, keys: fx.Node, table: fx.Node, tokens: int | fx.Node, device: torch.device
) -> tuple[fx.Node, fx.Node]:
    """Each row's key length ``[T]`` and block table row ``[T, M]``, both int32."""
    ends, keys, table = (_as_int32(like, node) for node in (ends, keys, table))
    row = emit(like, aten.arange.default, tokens, dtype=torch.int32, device=device)
    column = emit(like, aten.unsqueeze.default, row, 1)
    ended = emit(like, aten.ge.Tensor, column, emit(like, aten.unsqueeze.default, ends, 0))  # [T, B]
    request = emit(like, aten.sum.dim_IntList, ended, [1])
    # A row behind the last request takes that one's table.
    behind = emit(like, aten.ge.Tensor, row, emit(like, aten.select.int, ends, 0, -1))
    request = emit(like, aten.sub.Tensor, request, emit(like, aten._to_copy.default, behind, dtype=torch.int64))
    end = emit(like, aten.index_select.default, ends, 0, request)
    length = emit(like, aten.sub.Tensor, emit(like, aten.index_select.default, keys, 0, request), end)
    length = emit(like, aten.add.Tensor, emit(like, aten.add.Tensor, length, row), 1)
    length = emit(like, aten.clamp_min.default, length, 0)
    length = emit(like, aten.mul.Tensor, length, emit(like, aten.lt.Tensor, row, end))
    return length, emit(like, aten.index_select.default, table, 0, request)


def _as_int32(like: fx.Node, node: fx.Node) -> fx.Node:
    if node.meta["val"].dtype == torch.int32:
        return node
    return emit(like, aten._to_copy.default, node, dtype=torch.int32)
