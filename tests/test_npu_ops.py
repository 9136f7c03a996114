"""What is known of torch_npu's ops: by both tables, by name, and that sizes which they want alike are made one."""

from __future__ import annotations

from typing import Any

import npu_ops as stand_ins  # noqa: F401  defines the ops
import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.capture import capture
from cpcompile.passes import verify_numbering, verify_rules
from cpcompile.passes.collectives import arguments
from cpcompile.passes.npu_ops import PURE, ROW_RESULTS, ROWS, base_name, first_result, unify_rows
from cpcompile.passes.token_layout import shape_of
from cpcompile.passes.verify_call import Call
from cpcompile.passes.verify_index import Rows, tensor_shape

npu, own = torch.ops.npu, torch.ops.cpcompile


def rotate(x: Tensor, cos: Tensor, slots: Tensor, cache: Tensor) -> Tensor:
    return npu.npu_scatter_nd_update(cache, slots, npu.npu_interleave_rope(x, cos, cos)[:, 0, 0])


def traced(slots: int = 6) -> fx.GraphModule:
    operands = (torch.zeros(6, 1, 1, 4), torch.zeros(6, 1, 1, 4), torch.zeros(slots, 1, dtype=torch.int32))
    for value in operands:
        torch._dynamo.mark_dynamic(value, 0)
    return capture(rotate, *operands, torch.zeros(10, 4)).gm


def sizes(gm: fx.GraphModule) -> set[Any]:
    values = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    return {shape_of(v)[0] for v in values if isinstance(v, Tensor)} - {10}


def test_rows_of_one_op_are_of_one_size() -> None:
    gm = traced()
    assert len(sizes(gm)) == 3
    unify_rows(gm)
    assert len(sizes(gm)) == 1


def test_sizes_that_differ_stay_apart() -> None:
    gm = traced(slots=5)
    unify_rows(gm)
    assert len(sizes(gm)) == 2


def test_both_tables_know_the_same_pure_ops() -> None:
    assert PURE == verify_numbering.PURE_NPU
    assert ROW_RESULTS.keys() <= ROWS.keys() <= PURE


def test_ops_are_known_in_any_namespace() -> None:
    assert base_name(torch.ops.air.npu_fused_infer_attention_score.default) == "npu_fused_infer_attention_score"
    assert base_name(len) == base_name("output") == ""


def test_arguments_and_results_of_a_call() -> None:
    gm = make_fx(lambda x, gamma: npu.npu_rms_norm(x, gamma)[0], tracing_mode="fake")(torch.ones(2, 3), torch.ones(3))
    (call,) = gm.graph.find_nodes(op="call_function", target=npu.npu_rms_norm.default)
    x, gamma = gm.graph.find_nodes(op="placeholder")
    assert arguments(call) == {"input": x, "gamma": gamma, "epsilon": 1e-6}
    gm.graph.eliminate_dead_code()
    result = first_result(call)
    assert isinstance(result, fx.Node) and result.args == (call, 0)


# ---- the proof's rules ---------------------------------------------------------------------------------------------

LENGTHS, TABLE = torch.zeros(6, dtype=torch.int32), torch.zeros(6, 3, dtype=torch.int32)
QUERY, KEYS, ROPE, ROPES = torch.zeros(6, 2, 8), torch.zeros(5, 4, 1, 8), torch.zeros(6, 2, 4), torch.zeros(5, 4, 1, 4)
X, COS = torch.zeros(6, 3, 2, 8), torch.zeros(6, 1, 1, 8)
CALLS = [
    (own.paged_lightning_indexer.default, (QUERY, KEYS, torch.zeros(6, 2), LENGTHS, TABLE, 4), {1}),
    (
        own.paged_sparse_attention.default,
        (QUERY, KEYS, torch.zeros(6, 1, 4, dtype=torch.int32), ROPE, ROPES, LENGTHS, TABLE, 0.5),
        {1, 4},
    ),
    (own.paged_attention.default, (QUERY, KEYS, ROPE, ROPES, LENGTHS, TABLE, 0.5), {1, 3}),
    (npu.npu_rms_norm.default, (torch.zeros(6, 8), torch.zeros(8)), {1}),
    (npu.npu_add_rms_norm.default, (torch.zeros(6, 8), torch.zeros(6, 8), torch.zeros(8)), {2}),
    (npu.npu_interleave_rope.default, (X, COS, COS.clone()), set()),
    (npu.npu_rotary_mul.default, (X, COS, COS.clone()), set()),
    (torch.ops.aten.index_select.default, (torch.zeros(7, 3), 0, torch.zeros(6, dtype=torch.int64)), {0}),
]


def judge(op: Any, given: tuple[Any, ...], split: dict[int, int]) -> Rows | str:
    """Of the call on whole operands, of which those numbered ``split`` are at hand by rows of that dim."""
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{k}") if isinstance(v, Tensor) else v for k, v in enumerate(given)]
    call = graph.call_function(op, tuple(nodes))
    out = op(*given)
    results = tuple(tensor_shape(v) for v in (out if isinstance(out, tuple) else (out,)))
    shapes = {n: tensor_shape(v) for n, v in zip(nodes, given, strict=True) if isinstance(v, Tensor)}
    return verify_rules.rows_of(Call(call, shapes, {nodes[k]: Rows(d) for k, d in split.items()}, results))


@pytest.mark.parametrize(("op", "given", "whole"), CALLS)
def test_the_proof_wants_rows_of_all_but_what_each_row_reads(op: Any, given: tuple[Any, ...], whole: set[int]) -> None:
    tensors = [k for k, v in enumerate(given) if isinstance(v, Tensor)]
    rows = {k: 0 for k in tensors if k not in whole}
    assert judge(op, given, rows) == Rows(0)
    for k in whole:
        assert isinstance(judge(op, given, {**rows, k: 0}), str)
    for k in rows:
        rest = {n: 0 for n in rows if n != k}
        assert not rest or isinstance(judge(op, given, rest), str)
        last = given[k].ndim - 1
        assert last == 0 or isinstance(judge(op, given, {**rows, k: last}), str)


@pytest.mark.parametrize("op", [npu.npu_interleave_rope.default, npu.npu_rotary_mul.default])
def test_what_is_rotated_is_not_split(op: Any) -> None:
    assert isinstance(judge(op, (X, COS, COS.clone()), {0: 3, 1: 3, 2: 3}), str)
    assert judge(op, (X, COS, COS.clone()), {0: 1}) == Rows(1)


def test_what_is_normalised_is_not_split() -> None:
    two = (torch.zeros(6, 4, 8), torch.zeros(4, 8))
    assert judge(npu.npu_rms_norm.default, two, {0: 0}) == Rows(0)
    assert isinstance(judge(npu.npu_rms_norm.default, two, {0: 1}), str)


def test_a_table_may_be_split_along_another_dim() -> None:
    given = (torch.zeros(7, 3), 0, torch.zeros(6, dtype=torch.int64))
    assert judge(torch.ops.aten.index_select.default, given, {0: 1}) == Rows(1)
    assert isinstance(judge(torch.ops.aten.index_select.default, given, {0: 0}), str)
