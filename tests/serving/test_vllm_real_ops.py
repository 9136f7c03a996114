"""Our rules against vLLM's own ops: that they are there, with the arguments that we read, and compute what we say."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.fx as fx
import vllm.model_executor.layers.attention.mla_attention
import vllm.model_executor.layers.fused_moe.runner.moe_runner
import vllm.model_executor.layers.sparse_attn_indexer  # noqa: F401  these define the ops
from torch import Tensor
from vllm import ir
from vllm.distributed import parallel_state  # noqa: F401
from vllm.model_executor.layers.vocab_parallel_embedding import get_masked_input_and_mask

from cpcompile.passes.dialects import FUNCTIONAL
from cpcompile.passes.op_call import RowWise
from cpcompile.passes.placement_rules import classify
from cpcompile.passes.token_layout import TokenDim
from cpcompile.passes.verify_call import Call
from cpcompile.passes.verify_index import Rows
from cpcompile.passes.verify_rules import rows_of
from cpcompile.passes.vllm_ops import _READ_ELSEWHERE, OPAQUE

T, H = 7, 16
X, RESIDUAL, WEIGHT = (torch.randn(s, generator=torch.Generator().manual_seed(1)) for s in ((T, H), (T, H), (H,)))
NORMS = [
    (torch.ops.vllm_ir.rms_norm.default, (X, WEIGHT, 1e-6), {0}),
    (torch.ops.vllm_ir.rms_norm.default, (X, None, 1e-6, 8), {0}),
    (torch.ops.vllm_ir.fused_add_rms_norm.default, (X, RESIDUAL, WEIGHT, 1e-6), {0, 1}),
]


def op_of(name: str) -> Any:
    namespace, op = name.split("::")
    return getattr(getattr(torch.ops, namespace), op).default


@pytest.mark.parametrize(("op", "given", "rows"), NORMS)
def test_norms_are_row_wise_and_both_tables_say_so(op: Any, given: tuple[Any, ...], rows: set[int]) -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{k}") if isinstance(v, Tensor) else v for k, v in enumerate(given)]
    call = graph.call_function(op, tuple(nodes))
    whole = op(*given)
    results = whole if isinstance(whole, tuple) else (whole,)
    shapes = {n: tuple(map(sympy.Integer, v.shape)) for n, v in zip(nodes, given, strict=True) if isinstance(v, Tensor)}
    out = tuple(tuple(map(sympy.Integer, r.shape)) for r in results)
    layouts = {nodes[k]: (TokenDim(0),) for k in rows}
    placed = classify(call, sympy.Integer(T), layouts, {**{n: (s,) for n, s in shapes.items()}, call: out})
    assert isinstance(placed, RowWise) and placed.outputs == (TokenDim(0),) * len(results)
    assert {n for n, d in placed.operands.items() if d is not None} == {nodes[k] for k in rows}
    assert rows_of(Call(call, shapes, {nodes[k]: Rows(0) for k in rows}, out)) == Rows(0)
    for first, last in ((0, 4), (4, 7), (3, 4)):
        part = op(*(v[first:last] if k in rows else v for k, v in enumerate(given)))
        for mine, full in zip(part if isinstance(part, tuple) else (part,), results, strict=True):
            torch.testing.assert_close(mine, full[first:last], rtol=0, atol=0)


def test_a_norm_that_may_write_in_place_returns_what_the_plain_one_does() -> None:
    op = ir.ops.fused_add_rms_norm
    plain, maybe = op.torch_op, op.maybe_inplace.torch_op
    names = [[(a.name, str(a.type)) for a in o._schema.arguments] for o in (plain, maybe)]
    assert names[0] == names[1] and len(plain._schema.returns) == len(maybe._schema.returns)
    for mine, theirs in zip(
        plain(X, RESIDUAL, WEIGHT, 1e-6), maybe(X.clone(), RESIDUAL.clone(), WEIGHT, 1e-6), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", [n for n in FUNCTIONAL if n.startswith("vllm::")])
def test_collectives_have_the_arguments_that_we_read(name: str) -> None:
    assert tuple(str(a.type) for a in op_of(name)._schema.arguments) == FUNCTIONAL[name].signature


@pytest.mark.parametrize("name", OPAQUE)
def test_opaque_ops_are_there(name: str) -> None:
    assert op_of(name)


def test_what_is_read_elsewhere_is_written_in_place() -> None:
    for name in _READ_ELSEWHERE:
        written = {a.name for a in op_of(name)._schema.arguments if a.alias_info and a.alias_info.is_write}
        assert written == {"topk_indices_buffer", "candidate_blocks"}


def test_a_vocabulary_shard_sums_to_the_whole_lookup() -> None:
    """The masks of VocabParallelEmbedding: the ranks' lookups are summands, token by token."""
    table, ids = torch.randn(12, 4), torch.arange(12)
    total = torch.zeros(12, 4)
    for first in (0, 6):
        masked, outside = get_masked_input_and_mask(ids, first, first + 6, 0, 12, 12)
        total += table[first : first + 6][masked].masked_fill(outside.unsqueeze(-1), 0)
    torch.testing.assert_close(total, table, rtol=0, atol=0)
