"""Collectives of GE: kernels that yield what they want to communicate and are sent this rank's result.

Prototypes: CANN's ``hcom_ops.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats. Semantics are HCCL's:
an all-gather joins and a reduce-scatter divides along dim 0, all-to-alls count elements. Their meaning over all ranks
is that of ``passes/lockstep_collectives.py``.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from cpcompile.lowering.ge.ops_matmul import product
from cpcompile.lowering.ge.ops_shape import ints, one
from cpcompile.lowering.ge.signatures import Tensors, expect, expect_default, expect_unfed, op
from cpcompile.passes.lockstep_collectives import ALL_TO_ALL

_C10D = torch.ops._c10d_functional
_HALF = "float16|bfloat16"
# HCCL takes bfloat16 too; the prototype that torchair repeats is older.
_REDUCED = "float32|float16|bfloat16|int8|int16|int32|int64"
# What HCCL calls a reduction, and the functional collective's name for it.
_REDUCTIONS: Mapping[str, str] = {"sum": "sum", "prod": "product", "max": "max", "min": "min"}


@dataclass(frozen=True)
class Collective:
    """What a kernel wants of its group: a functional collective, its operand, and its other arguments."""

    target: OpOverload
    operand: Tensor
    arguments: Mapping[str, Any]
    group: str


Talk = Generator[Any, Any, Any]
"""A kernel that communicates: yields a Collective for its result, or a group's name for the group's size."""


def _reduction(name: str) -> str:
    expect(name in _REDUCTIONS, f"attribute 'reduction': expected {', '.join(_REDUCTIONS)}, found {name!r}")
    return _REDUCTIONS[name]


def _gathered(x: Tensor, rank_size: int, group: str) -> Talk:
    result: Tensor = yield Collective(_C10D.all_gather_into_tensor.default, x, {"group_size": rank_size}, group)
    return result


def _scattered(x: Tensor, reduction: str, rank_size: int, group: str) -> Talk:
    arguments = {"reduce_op": _reduction(reduction), "group_size": rank_size}
    result: Tensor = yield Collective(_C10D.reduce_scatter_tensor.default, x, arguments, group)
    return result


def exchanged(parts: list[Tensor], received: list[int], group: str) -> Talk:
    """Send ``parts[i]`` to rank ``i`` and receive vectors of the lengths ``received``, as one."""
    sent = [part.numel() for part in parts]
    arguments = {"output_split_sizes": received, "input_split_sizes": sent}
    flat = torch.cat([part.reshape(-1) for part in parts])
    result: Tensor = yield Collective(ALL_TO_ALL, flat, arguments, group)
    return result


@op("HcomAllReduce", "T -> y:T", T=_REDUCED)
def hcom_all_reduce(x: Tensor, *, reduction: str, group: str, fusion: int = 1, fusion_id: int = -1) -> Talk:
    """The reduction of all ranks' operands, on every rank. Source: REG_OP(HcomAllReduce); HcclAllReduce."""
    return (yield Collective(_C10D.all_reduce.default, x, {"reduce_op": _reduction(reduction)}, group))


@op("HcomAllGather", "T -> y:T")
def hcom_all_gather(x: Tensor, *, rank_size: int, group: str, fusion: int = 0, fusion_id: int = -1) -> Talk:
    """All ranks' operands one after another along dim 0. Source: REG_OP(HcomAllGather); HcclAllGather."""
    return (yield from _gathered(x, rank_size, group))


@op("HcomReduceScatter", "T -> y:T", T=_REDUCED)
def hcom_reduce_scatter(
    x: Tensor, *, reduction: str, group: str, rank_size: int, fusion: int = 0, fusion_id: int = -1
) -> Talk:
    """This rank's part, along dim 0, of the reduction. Source: REG_OP(HcomReduceScatter); HcclReduceScatter."""
    return (yield from _scattered(x, reduction, rank_size, group))


@op("HcomBroadcast", "any -> *y:any")
def hcom_broadcast(x: Tensors, *, root_rank: int, group: str, fusion: int = 0, fusion_id: int = -1) -> Talk:
    """The operands of ``root_rank``, a rank within the group, on every rank. Source: REG_OP(HcomBroadcast)."""
    results = []
    for tensor in x:
        results.append((yield Collective(_C10D.broadcast.default, tensor, {"src": root_rank}, group)))
    return results


@op("HcomAllToAll", "T -> y:T")
def hcom_all_to_all(x: Tensor, *, group: str) -> Talk:
    """The ``i``-th of equal parts of the elements goes to rank ``i``. Source: REG_OP(HcomAllToAll); HcclAlltoAll."""
    size = yield group
    expect(x.numel() % size == 0, f"expected elements divisible by the group size {size}, found {list(x.shape)}")
    count = x.numel() // size
    result = yield from exchanged(list(x.reshape(-1).split(count)) if count else [x] * size, [count] * size, group)
    return result.view(x.shape)


@op("HcomAllToAllV", "T, int64, int64, int64, int64 -> recv_data:T")
def hcom_all_to_all_v(
    send_data: Tensor,
    send_counts: Tensor,
    send_displacements: Tensor,
    recv_counts: Tensor,
    recv_displacements: Tensor,
    *,
    group: str,
) -> Talk:
    """Elements ``send_displacements[i]``, ``send_counts[i]`` of them, go to rank ``i``; the result is one vector.

    Source: REG_OP(HcomAllToAllV); HcclAlltoAllV. Parts that are not received one after another are refused.
    """
    received = ints(recv_counts, "recv_counts")
    _consecutive(received, ints(recv_displacements, "recv_displacements"), "recv_displacements")
    starts, counts = ints(send_displacements, "send_displacements"), ints(send_counts, "send_counts")
    flat = send_data.reshape(-1)
    expect(
        all(s + c <= len(flat) for s, c in zip(starts, counts, strict=True)), f"sends more than {len(flat)} elements"
    )
    parts = [flat[start : start + count] for start, count in zip(starts, counts, strict=True)]
    return (yield from exchanged(parts, received, group))


@op("HcomAllToAllVC", "T, int64 -> recv_data:T")
def hcom_all_to_all_vc(
    send_data: Tensor, send_count_matrix: Tensor, *, rank: int, group: str, fusion: int = 0, fusion_id: int = -1
) -> Talk:
    """``send_count_matrix[i, j]`` elements go from rank ``i`` to rank ``j``, one part after another; one vector.

    Source: REG_OP(HcomAllToAllVC); HcclAlltoAllVC. ``rank`` is this one's place in the group.
    """
    size = yield group
    counts = send_count_matrix.tolist()
    expect(tuple(send_count_matrix.shape) == (size, size), f"send_count_matrix: expected {size} by {size}")
    expect(0 <= rank < size, f"attribute 'rank': expected a place among {size}, found {rank}")
    expect(sum(counts[rank]) == send_data.numel(), f"sends {counts[rank]} of {send_data.numel()} elements")
    parts = list(send_data.reshape(-1).split(counts[rank]))
    return (yield from exchanged(parts, [row[rank] for row in counts], group))


@op("HcomAllGatherV", "T, int64, int64, int64 -> y:T")
def hcom_all_gather_v(
    x: Tensor, send_count: Tensor, recv_counts: Tensor, recv_displacements: Tensor | None = None, *, group: str
) -> Talk:
    """All ranks' operands, of ``recv_counts`` rows, one after another along dim 0.

    Source: REG_OP(HcomAllGatherV); torchair's converter of ``npu_define.allgather_in_tensor_uneven``: it counts rows.
    """
    rows = ints(recv_counts, "recv_counts")
    count = one(send_count, "send_count")
    expect(x.shape[0] == count, f"input 'send_count': expected {x.shape[0]}, the size of dim 0, found {count}")
    if recv_displacements is not None and recv_displacements.numel():
        _consecutive(rows, ints(recv_displacements, "recv_displacements"), "recv_displacements")
    width = x[:1].numel() if x.shape[0] else x.new_empty((1, *x.shape[1:])).numel()
    result = yield from exchanged([x] * len(rows), [row * width for row in rows], group)
    return result.view(sum(rows), *x.shape[1:])


@op("HcomReduceScatterV", "T, int64, int64, int64 -> y:T", T=_REDUCED)
def hcom_reduce_scatter_v(
    x: Tensor,
    recv_count: Tensor,
    send_counts: Tensor,
    send_displacements: Tensor | None = None,
    *,
    reduction: str,
    group: str,
) -> Talk:
    """This rank's ``recv_count`` rows of the sum, whose parts for the ranks have ``send_counts`` rows.

    Source: REG_OP(HcomReduceScatterV); torchair's converter of ``npu_define.reduce_scatter_tensor_uneven``.
    """
    expect_default({"reduction": reduction}, reduction="sum")
    rows, mine = ints(send_counts, "send_counts"), one(recv_count, "recv_count")
    expect(sum(rows) == x.shape[0], f"input 'send_counts': expected {x.shape[0]} in all, found {rows}")
    if send_displacements is not None and send_displacements.numel():
        _consecutive(rows, ints(send_displacements, "send_displacements"), "send_displacements")
    width = x.new_empty((1, *x.shape[1:])).numel()
    result = yield from exchanged(list(x.split(rows)), [mine * width] * len(rows), group)
    total, *others = result.view(len(rows), mine, *x.shape[1:])
    for other in others:
        total = total + other
    return total


def _consecutive(counts: list[int], starts: list[int], name: str) -> None:
    expected = [sum(counts[:i]) for i in range(len(counts))]
    expect(starts == expected, f"input {name!r}: expected {expected}, found {starts}")


@op("AllGatherMatmul", "T, T, T -> y:T, gather_out:T", T=_HALF)
def all_gather_matmul(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    *,
    group: str,
    is_trans_a: bool = False,
    is_trans_b: bool = False,
    gather_index: int = 0,
    comm_turn: int = 0,
    rank_size: int = 0,
    is_gather_out: bool = True,
) -> Talk:
    """``all_gather(x1) @ x2 + bias`` and the gathered operand, empty unless ``is_gather_out``.

    Source: REG_OP(AllGatherMatmul); aclnnAllGatherMatmul. Gathering ``x2`` and a transposed ``x1`` are refused.
    """
    expect_default({"gather_index": gather_index, "is_trans_a": is_trans_a}, gather_index=0, is_trans_a=False)
    # The attribute may be left at 0: the communicator knows its size.
    gathered = yield Collective(_C10D.all_gather_into_tensor.default, x1, _sized(rank_size), group)
    return product(gathered, x2, False, is_trans_b, bias), gathered if is_gather_out else x1.new_empty(0)


@op("MatmulReduceScatter", "T, T, T -> y:T", T=_HALF)
def matmul_reduce_scatter(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    *,
    group: str,
    reduce_op: str = "sum",
    is_trans_a: bool = False,
    is_trans_b: bool = False,
    comm_turn: int = 0,
    rank_size: int = 0,
) -> Talk:
    """This rank's rows of the sum over ranks of ``x1 @ x2 + bias``.

    Source: REG_OP(MatmulReduceScatter); aclnnMatmulReduceScatter. A transposed ``x1`` is refused.
    """
    expect_default({"is_trans_a": is_trans_a, "reduce_op": reduce_op}, is_trans_a=False, reduce_op="sum")
    partial = product(x1, x2, False, is_trans_b, bias)
    arguments = {"reduce_op": "sum", **_sized(rank_size)}
    return (yield Collective(_C10D.reduce_scatter_tensor.default, partial, arguments, group))


@op("MatmulAllReduce", "T, T, T, T, any, any, any, any, any, any -> y:T", T=_HALF)
def matmul_all_reduce(
    x1: Tensor,
    x2: Tensor,
    bias: Tensor | None = None,
    x3: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    dequant_scale: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    comm_quant_scale_1: Tensor | None = None,
    comm_quant_scale_2: Tensor | None = None,
    *,
    group: str,
    reduce_op: str = "sum",
    is_trans_a: bool = False,
    is_trans_b: bool = False,
    comm_turn: int = 0,
    antiquant_group_size: int = 0,
    group_size: int = 0,
    y_dtype: int = 28,
    comm_quant_mode: int = 0,
    comm_mode: str = "ai_cpu",
) -> Talk:
    """The sum over ranks of ``x1 @ x2 + bias + x3``. Source: REG_OP(MatmulAllReduce); aclnnMatmulAllReduce.

    Quantised operands and a transposed ``x1`` are refused.
    """
    expect_unfed(antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset, dequant_scale=dequant_scale)
    expect_unfed(pertoken_scale=pertoken_scale, quant_scale_1=comm_quant_scale_1, quant_scale_2=comm_quant_scale_2)
    found = {"is_trans_a": is_trans_a, "reduce_op": reduce_op, "comm_quant_mode": comm_quant_mode}
    expect_default(found, is_trans_a=False, reduce_op="sum", comm_quant_mode=0)
    partial = product(x1, x2, False, is_trans_b, bias)
    partial = partial if x3 is None else (partial.float() + x3.float()).to(partial.dtype)
    return (yield Collective(_C10D.all_reduce.default, partial, {"reduce_op": "sum"}, group))


def _sized(rank_size: int) -> dict[str, int]:
    return {"group_size": rank_size} if rank_size else {}
