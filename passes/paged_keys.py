"""Paged keys: sparse attention over whole keys -> the same over caches in blocks, one row of a table for each query."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from cpcompile import ops, paged_ops  # noqa: F401  registers the ops
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase
from cpcompile.passes.token_layout import size_expr

aten, own = torch.ops.aten, torch.ops.cpcompile


@dataclass(frozen=True)
class PagedKeys:
    """``cpcompile::lightning_indexer``, ``cpcompile::sparse_attention`` -> ``cpcompile::paged_...``.

    Before: queries ``[B, S, H, D]`` over keys ``[B, K, 1, D]``, of which each row sees those below its length.
    After: queries ``[B * S, H, D]`` over blocks ``[B * ceil(K / block), block, 1, D]`` of the same keys, zeros behind
    the last: the form whose kernels take a length for each row.

    Args:
        block: keys in a block; the kernels want a multiple of 16, at most 1024.

    Refuses nothing.
    """

    block: int = 128
    name = "paged-keys"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result, builder = PassResult(), _Builder(self.block)
        for node in list(gm.graph.nodes):
            form = FORMS.get(node.target) if node.op == "call_function" else None
            if form is not None:
                node.replace_all_uses_with(form(builder, node))
                erase(node)
                result.rewrites += 1
        return result.finish(gm)


@dataclass
class _Builder:
    """Emits blocks and tables; ops over the same keys share them."""

    block: int
    paged: dict[fx.Node, fx.Node] = field(default_factory=dict)
    tables: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)

    def size(self, at: fx.Node, value: fx.Node, dim: int) -> Any:
        size = value.meta["val"].shape[dim]
        return size if isinstance(size, int) else emit(at, aten.sym_size.int, value, dim)

    def count(self, at: fx.Node, keys: Any) -> Any:
        """Blocks that hold ``keys`` keys."""
        if isinstance(keys, int):
            return -(-keys // self.block)
        return emit(at, operator.floordiv, emit(at, operator.add, keys, self.block - 1), self.block)

    def cache(self, at: fx.Node, key: fx.Node) -> fx.Node:
        """``[B, K, 1, D]`` -> ``[B * M, block, 1, D]``."""
        if key not in self.paged:
            keys = self.size(at, key, 1)
            blocks = self.count(at, keys)
            if isinstance(keys, int):
                behind: Any = blocks * self.block - keys
            else:
                behind = emit(at, operator.sub, emit(at, operator.mul, blocks, self.block), keys)
            batch, width = self.size(at, key, 0), int(key.meta["val"].shape[3])
            zeros = emit(at, aten.new_zeros.default, key, [batch, behind, 1, width])
            padded = emit(at, aten.cat.default, [key, zeros], 1)
            self.paged[key] = emit(at, aten.reshape.default, padded, [-1, self.block, 1, width])
        return self.paged[key]

    def table(self, at: fx.Node, query: fx.Node, key: fx.Node) -> fx.Node:
        """``[B * S, M]`` int32: request ``b`` has blocks ``b * M ... b * M + M - 1``."""
        shape = (*query.meta["val"].shape[:2], key.meta["val"].shape[1])
        known = tuple(size_expr(size) for size in shape)
        if known not in self.tables:
            batch, rows, keys = self.size(at, query, 0), self.size(at, query, 1), self.size(at, key, 1)
            blocks, device = self.count(at, keys), query.meta["val"].device
            every = blocks if batch == 1 else self._product(at, batch, blocks)
            numbers = emit(at, aten.arange.start_step, 0, every, 1, dtype=torch.int32, device=device)
            each = emit(at, aten.reshape.default, numbers, [batch, 1, blocks])
            wide = emit(at, aten.expand.default, each, [batch, rows, blocks])
            flat = rows if batch == 1 else self._product(at, batch, rows)
            self.tables[known] = emit(at, aten.reshape.default, wide, [flat, blocks])
        return self.tables[known]

    def _product(self, at: fx.Node, a: Any, b: Any) -> Any:
        return a * b if isinstance(a, int) and isinstance(b, int) else emit(at, operator.mul, a, b)

    def rows(self, at: fx.Node, value: fx.Node) -> fx.Node:
        """``[B, S, ...]`` -> ``[B * S, ...]``."""
        shape = value.meta["val"].shape
        return emit(at, aten.reshape.default, value, [-1, *(int(size) for size in shape[2:])])

    def back(self, at: fx.Node, made: fx.Node) -> fx.Node:
        """``[B * S, ...]`` -> the shape of what ``at`` gives."""
        query = at.args[0]
        assert isinstance(query, fx.Node)
        shape = [self.size(at, query, 0), self.size(at, query, 1), *map(int, at.meta["val"].shape[2:])]
        return emit(at, aten.reshape.default, made, shape)


def _indexer(builder: _Builder, at: fx.Node) -> fx.Node:
    given = arguments(at)
    made = emit(
        at, own.paged_lightning_indexer.default, builder.rows(at, given["query"]), builder.cache(at, given["key"]),
        builder.rows(at, given["weights"]), builder.rows(at, given["key_lengths"]),
        builder.table(at, given["query"], given["key"]), given["sparse_count"],
    )  # fmt: skip
    return builder.back(at, made)


def _attention(builder: _Builder, at: fx.Node) -> fx.Node:
    given = arguments(at)
    made = emit(
        at, own.paged_sparse_attention.default, builder.rows(at, given["query"]), builder.cache(at, given["key"]),
        builder.rows(at, given["sparse_indices"]), builder.rows(at, given["query_rope"]),
        builder.cache(at, given["key_rope"]), builder.rows(at, given["key_lengths"]),
        builder.table(at, given["query"], given["key"]), given["scale"],
    )  # fmt: skip
    return builder.back(at, made)


FORMS: Mapping[object, Callable[[_Builder, fx.Node], fx.Node]] = {
    own.lightning_indexer.default: _indexer,
    own.sparse_attention.default: _attention,
}
