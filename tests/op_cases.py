"""Calls of every op in the table of token-wise ops, with the dims that may carry tokens."""

from __future__ import annotations

import npu_ops  # noqa: F401  defines the ops
import torch
import vllm_ops  # noqa: F401  defines the ops
from op_calls import Op, X, b, c, f, i, i32, op, rising
from torch._ops import OpOverload

import cpcompile.paged_ops  # noqa: F401  defines the ops

A = torch.ops.aten
SAME = f(6, 4, 8)
KEYS = f(2, 3, 6, 4)
FLASH = A._scaled_dot_product_flash_attention_for_cpu.default
SQUARE = f(6, 6)
CUBE = f(6, 6, 6)
SHAPE = [6, 4, 8]


def views(target: OpOverload) -> list[Op]:
    return [
        op("012", target, f(*SHAPE), SHAPE),
        op("012", target, f(*SHAPE), [24, 8]),  # [B, T, H] -> [B*T, H], and tokens that are outermost
        op("012", target, f(*SHAPE), [6, 32]),
        op("01", target, f(24, 8), [2, 12, 8]),  # 24 can be twice 12 tokens
        op("01", target, f(6, 32), [6, 16, 2]),
        op("01", target, f(6, 8), [1, 6, 1, 8]),
        op("012", target, f(6, 4, 8), [2, 12, 8]),
        op("0", target, f(6), [6, 1]),
    ]


def reductions(target: OpOverload, x: X, *tail: object) -> list[Op]:
    """Over one dim given as a number."""
    return [op("02", target, x, 1, *tail), op("01", target, x, -1, *tail), op("12", target, x, 0, *tail, True)]


def along(target: OpOverload, *tail: object) -> list[Op]:
    return [op("12", target, f(*SHAPE), 0, *tail), op("01", target, f(*SHAPE), -1, *tail)]


CASES: dict[str, list[Op]] = {
    "aten::view": [*views(A.view.default), op("", A.view.dtype, f(*SHAPE), torch.int64)],
    "aten::_unsafe_view": views(A._unsafe_view.default),
    "aten::reshape": views(A.reshape.default),
    "aten::expand": [
        op("02", A.expand.default, f(6, 1, 8), [6, 4, 8]),
        op("01", A.expand.default, f(6, 8), [4, 6, 8]),
        op("02", A.expand.default, f(6, 1, 8), [-1, 4, -1]),
    ],
    "aten::permute": [
        op("012", A.permute.default, f(*SHAPE), [2, 0, 1]),
        op("012", A.permute.default, f(*SHAPE), [-1, 0, -2]),
    ],
    "aten::transpose": [op("012", A.transpose.int, f(*SHAPE), 0, 1), op("012", A.transpose.int, f(*SHAPE), -1, 1)],
    "aten::t": [op("01", A.t.default, f(6, 8)), op("0", A.t.default, f(6))],
    "aten::unsqueeze": [op("01", A.unsqueeze.default, f(6, 8), d) for d in (0, 1, 2, -1, -2, -3)],
    "aten::squeeze": [
        op("02", A.squeeze.dim, f(6, 1, 8), 1),
        op("13", A.squeeze.dims, f(1, 6, 1, 8), [0, -2]),
        op("2", A.squeeze.dims, f(1, 6, 8), [0, 1]),  # dim 1 of a one-row shard would vanish, too
        op("", A.squeeze.default, f(1, 6, 8)),
    ],
    "aten::select": [
        op("12", A.select.int, f(*SHAPE), 0, 1),
        op("02", A.select.int, f(*SHAPE), 1, -1),
        op("01", A.select.int, f(*SHAPE), -1, 0),
    ],
    "aten::slice": [
        op("012", A.slice.Tensor, f(*SHAPE), 0, 0, 6),
        op("02", A.slice.Tensor, f(*SHAPE), 1, 1, 3),
        op("12", A.slice.Tensor, f(*SHAPE), 0, 1, 6),
        op("01", A.slice.Tensor, f(*SHAPE), -1, 0, 8, 2),
        op("012", A.slice.Tensor, f(*SHAPE)),
    ],
    "aten::split": [op("12", A.split.Tensor, f(*SHAPE), 4), op("01", A.split.Tensor, f(*SHAPE), 4, -1)],
    "aten::split_with_sizes": [
        op("12", A.split_with_sizes.default, f(*SHAPE), [2, 4]),
        op("01", A.split_with_sizes.default, f(*SHAPE), [3, 5], -1),
    ],
    "aten::chunk": [op("12", A.chunk.default, f(*SHAPE), 2), op("01", A.chunk.default, f(*SHAPE), 2, 2)],
    "aten::cat": [
        op("12", A.cat.default, [f(*SHAPE), f(2, 4, 8)]),
        op("01", A.cat.default, [f(*SHAPE), f(6, 4, 4), f(6, 4, 2)], -1),
        op("02", A.cat.default, [SAME, SAME], 1),
        op("", A.cat.default, [f(4, 6), f(0)], 0),  # a legacy empty operand of another rank
    ],
    "aten::unbind": [
        op("12", A.unbind.int, f(*SHAPE)),
        op("02", A.unbind.int, f(*SHAPE), 1),
        op("01", A.unbind.int, f(*SHAPE), -1),
    ],
    "aten::repeat": [
        op("02", A.repeat.default, f(6, 1, 8), [1, 4, 1]),
        op("012", A.repeat.default, f(*SHAPE), [2, 3, 1, 2]),
        op("", A.repeat.default, f(6), [0]),
    ],
    "aten::flip": [op("02", A.flip.default, f(*SHAPE), [1]), op("1", A.flip.default, f(*SHAPE), [0, -1])],
    "aten::roll": [
        op("02", A.roll.default, f(*SHAPE), [3], [1]),
        op("1", A.roll.default, f(*SHAPE), [1, 2], [0, -1]),
        op("", A.roll.default, f(*SHAPE), [1]),
    ],
    "aten::tril": [op("0", A.tril.default, f(6, 4, 8)), op("01", A.tril.default, f(6, 4, 8, 8), 1)],
    "aten::triu": [op("0", A.triu.default, f(6, 4, 8), 1), op("", A.triu.default, f(6, 6))],
    "aten::view_as_complex": [
        op("01", A.view_as_complex.default, f(6, 4, 2)),
        op("0", A.view_as_complex.default, f(2, 2), of=0),
    ],
    "aten::view_as_real": [op("01", A.view_as_real.default, c(6, 4)), op("0", A.view_as_real.default, c(6))],
    "aten::_conj": [op("01", A._conj.default, c(6, 4))],
    "aten::_conj_physical": [op("01", A._conj_physical.default, c(6, 4))],
    "aten::_neg_view": [op("01", A._neg_view.default, f(6, 4))],
    "aten::polar": [op("01", A.polar.default, f(6, 4), f(6, 1)), op("01", A.polar.default, f(6, 4), f(4))],
    "aten::complex": [op("01", A.complex.default, f(6, 4), f(6, 4))],
    "aten::floor_divide": [
        op("01", A.floor_divide.default, f(6, 4), f(6, 1)),
        op("01", A.floor_divide.Scalar, f(6, 4), 2),
    ],
    "aten::fill": [op("01", A.fill.Scalar, f(6, 4), 2.5), op("01", A.fill.Tensor, f(6, 4), f())],
    "aten::stack": [
        op("012", A.stack.default, [f(*SHAPE), f(*SHAPE)], -1),
        op("012", A.stack.default, [f(*SHAPE), f(*SHAPE)]),
        op("012", A.stack.default, [SAME, f(*SHAPE), SAME], 1),
        op("012", A.stack.default, [f(*SHAPE)], -2),
    ],
    "aten::select_scatter": [
        op("02", A.select_scatter.default, f(*SHAPE), f(6, 8), 1, 2),
        op("12", A.select_scatter.default, f(*SHAPE), f(4, 8), 0, -1),
        op("01", A.select_scatter.default, f(6, 4, 8), f(6, 4), -1, 0),
        op("01", A.select_scatter.default, f(6, 4, 8), f(6, 4), -1, 0, of=1),
    ],
    "aten::slice_scatter": [
        op("12", A.slice_scatter.default, f(*SHAPE), f(2, 4, 8), 0, 1, 3),
        op("12", A.slice_scatter.default, f(*SHAPE), f(*SHAPE)),
        op("01", A.slice_scatter.default, f(*SHAPE), f(6, 4, 2), -1, 6, 8),
    ],
    "aten::sum": [
        op("02", A.sum.dim_IntList, f(*SHAPE), [1]),
        op("0", A.sum.dim_IntList, f(*SHAPE), [1, -1], True),
        op("2", A.sum.dim_IntList, f(*SHAPE), [0, 1]),
        op("", A.sum.default, f(*SHAPE)),
        op("", A.sum.dim_IntList, f(*SHAPE), []),
        op("", A.sum.dim_IntList, f(*SHAPE), None),
    ],
    "aten::mean": [
        op("02", A.mean.dim, f(*SHAPE), [1]),
        op("01", A.mean.dim, f(*SHAPE), [-1], True),
        op("", A.mean.default, f(*SHAPE)),
    ],
    "aten::amax": [
        op("02", A.amax.default, f(*SHAPE), [1]),
        op("01", A.amax.default, f(*SHAPE), [-1], True),
        op("", A.amax.default, f(*SHAPE)),
    ],
    "aten::amin": [op("02", A.amin.default, f(*SHAPE), [1]), op("01", A.amin.default, f(*SHAPE), [-1], True)],
    "aten::any": [
        *reductions(A.any.dim, b(*SHAPE)),
        op("0", A.any.dims, b(*SHAPE), [1, 2]),
        op("", A.any.default, b(*SHAPE)),
        op("", A.any.dims, b(*SHAPE), None),
    ],
    "aten::all": [*reductions(A.all.dim, b(*SHAPE)), op("", A.all.default, b(*SHAPE))],
    "aten::prod": [*reductions(A.prod.dim_int, f(*SHAPE)), op("", A.prod.default, f(*SHAPE))],
    "aten::argmax": [*reductions(A.argmax.default, f(*SHAPE)), op("", A.argmax.default, f(*SHAPE))],
    "aten::argmin": [*reductions(A.argmin.default, f(*SHAPE)), op("", A.argmin.default, f(*SHAPE), None, True)],
    "aten::logsumexp": [
        op("02", A.logsumexp.default, f(*SHAPE), [1]),
        op("0", A.logsumexp.default, f(*SHAPE), [1, 2], True),
    ],
    "aten::var": [
        op("02", A.var.correction, f(*SHAPE), [1], correction=1),
        op("01", A.var.dim, f(*SHAPE), [-1], False, True),
        op("", A.var.default, f(*SHAPE), True),
        op("", A.var.correction, f(*SHAPE)),
    ],
    "aten::std": [op("02", A.std.correction, f(*SHAPE), [1], correction=0, keepdim=True)],
    "aten::var_mean": [op("01", A.var_mean.correction, f(*SHAPE), [2], correction=0, keepdim=True)],
    "aten::std_mean": [op("02", A.std_mean.correction, f(*SHAPE), [1])],
    "aten::aminmax": [op("02", A.aminmax.default, f(*SHAPE), dim=1), op("", A.aminmax.default, f(*SHAPE))],
    "aten::count_nonzero": [
        op("02", A.count_nonzero.default, i(*SHAPE), 1),
        op("0", A.count_nonzero.dim_IntList, i(*SHAPE), [1, -1]),
        op("", A.count_nonzero.default, i(*SHAPE)),
    ],
    "aten::median": [*reductions(A.median.dim, f(*SHAPE)), op("", A.median.default, f(*SHAPE))],
    "aten::mode": [op("01", A.mode.default, i(*SHAPE)), op("12", A.mode.default, i(*SHAPE), 0, True)],
    "aten::kthvalue": [op("01", A.kthvalue.default, f(*SHAPE), 2), op("02", A.kthvalue.default, f(*SHAPE), 3, 1, True)],
    "aten::linalg_vector_norm": [
        op("01", A.linalg_vector_norm.default, f(*SHAPE), 2, [-1], True),
        op("02", A.linalg_vector_norm.default, f(*SHAPE), 1, [1]),
        op("", A.linalg_vector_norm.default, f(*SHAPE)),
    ],
    "aten::norm": [
        op("01", A.norm.ScalarOpt_dim, f(*SHAPE), 2, [-1]),
        op("02", A.norm.ScalarOpt_dim, f(*SHAPE), 1, [1], True),
        op("", A.norm.Scalar, f(*SHAPE)),
    ],
    "aten::max": [
        *reductions(A.max.dim, f(*SHAPE)),
        op("01", A.max.other, f(6, 8), f(6, 1)),
        op("", A.max.default, f(*SHAPE)),
    ],
    "aten::min": [*reductions(A.min.dim, f(*SHAPE)), op("01", A.min.other, f(6, 8), f(8))],
    "aten::cumprod": along(A.cumprod.default),
    "aten::cummax": along(A.cummax.default),
    "aten::cummin": along(A.cummin.default),
    "aten::logcumsumexp": along(A.logcumsumexp.default),
    "aten::glu": [op("01", A.glu.default, f(*SHAPE)), op("02", A.glu.default, f(*SHAPE), 1)],
    "aten::_softmax": along(A._softmax.default, False),
    "aten::_log_softmax": along(A._log_softmax.default, False),
    "aten::_safe_softmax": along(A._safe_softmax.default),
    "aten::cumsum": along(A.cumsum.default),
    "aten::softmax": along(A.softmax.int),
    "aten::sort": [
        *along(A.sort.default, True),
        op("01", A.sort.default, f(*SHAPE)),
        op("12", A.sort.stable, f(*SHAPE), stable=True, dim=0),
    ],
    "aten::topk": [op("01", A.topk.default, f(*SHAPE), 3), op("02", A.topk.default, f(*SHAPE), 2, 1)],
    "aten::gather": [
        op("1", A.gather.default, f(4, 6), 0, i(3, 6)),
        op("0", A.gather.default, f(6, 4), -1, i(6, 2)),
        op("", A.gather.default, f(6, 4), 1, i(3, 2)),
    ],
    "aten::scatter": [
        op("0", A.scatter.src, f(6, 4), 1, i(6, 1), f(6, 1)),
        op("1", A.scatter.value, f(4, 6), 0, i(1, 6), 1.5),
        op("", A.scatter.src, f(6, 4), 1, i(3, 1), f(6, 1)),
        op("", A.scatter.src, f(6, 4), 1, i(6, 1), f(8, 1)),
    ],
    "aten::scatter_add": [
        op("0", A.scatter_add.default, f(6, 4), 1, i(6, 8), f(6, 8)),
        op("1", A.scatter_add.default, f(4, 6), 0, i(3, 6), f(3, 6)),
    ],
    "aten::scatter_reduce": [op("0", A.scatter_reduce.two, f(6, 4), 1, i(6, 8), f(6, 8), "amax")],
    "aten::index_copy": [
        op("02", A.index_copy.default, f(6, 4, 8), -2, i(1), f(6, 1, 8), of=2),
        op("", A.index_copy.default, f(10, 8), 0, i(6, high=1), f(6, 8), of=1),  # a cache written at the tokens' slots
    ],
    "aten::index_add": [
        op("02", A.index_add.default, f(6, 4, 8), 1, i(3), f(6, 3, 8), alpha=2),
        op("", A.index_add.default, f(10, 8), 0, i(6, high=10), f(6, 8), of=1),
    ],
    "aten::index_fill": [
        op("02", A.index_fill.int_Scalar, f(6, 4, 8), 1, i(3), 2.5),
        op("02", A.index_fill.int_Tensor, f(6, 4, 8), 1, i(3), f()),
    ],
    "aten::searchsorted": [
        op("01", A.searchsorted.Tensor, rising(5), f(6, 4), right=True, of=1),
        op("01", A.searchsorted.Tensor, rising(6, 4, 5), f(6, 4, 8), of=1),
        op("", A.searchsorted.Tensor, rising(6), f(4)),
        op("", A.searchsorted.Scalar, rising(6), 0.5),
    ],
    "aten::bucketize": [op("01", A.bucketize.Tensor, f(6, 4), rising(5)), op("", A.bucketize.Scalar, 0.5, rising(6))],
    "aten::isin": [
        op("01", A.isin.Tensor_Tensor, i(6, 4), i(3)),
        op("", A.isin.Tensor_Tensor, i(6, 4), i(10, 3), of=1),
        op("01", A.isin.Tensor_Scalar, i(6, 4), 2),
    ],
    "aten::native_layer_norm": [
        op("01", A.native_layer_norm.default, f(*SHAPE), [8], f(8), f(8), 1e-5),
        op("0", A.native_layer_norm.default, f(*SHAPE), [4, 8], None, None, 1e-5),
    ],
    "aten::layer_norm": [op("01", A.layer_norm.default, f(*SHAPE), [8], f(8), f(8))],
    "aten::rms_norm": [
        op("01", A.rms_norm.default, f(*SHAPE), [8], f(8)),
        op("0", A.rms_norm.default, f(*SHAPE), [4, 8]),
    ],
    "aten::_fused_rms_norm": [
        op("01", A._fused_rms_norm.default, f(*SHAPE), [8], f(8), 1e-6),
        op("0", A._fused_rms_norm.default, f(*SHAPE), [4, 8], f(4, 8), 1e-6),
    ],
    "aten::mm": [
        op("0", A.mm.default, f(6, 4), f(4, 8)),
        op("1", A.mm.default, f(6, 4), f(4, 8), of=1),
        op("", A.mm.default, SQUARE, SQUARE),
    ],
    "aten::bmm": [
        op("01", A.bmm.default, f(6, 4, 8), f(6, 8, 10)),
        op("02", A.bmm.default, f(6, 4, 8), f(6, 8, 10), of=1),
        op("", A.bmm.default, CUBE, CUBE),
        op("01", A.bmm.default, f(3, 6, 8), f(3, 8, 6)),  # queries and keys
        op("01", A.bmm.default, f(3, 6, 6), f(3, 6, 8)),  # scores and values
    ],
    "aten::linear": [
        op("01", A.linear.default, f(6, 4, 8), f(10, 8), f(10)),
        op("0", A.linear.default, f(6, 8), f(10, 8)),
        op("0", A.linear.default, f(6, 8), f(10, 8), bias=f(10)),
        op("", A.linear.default, f(6, 8), f(10, 8), of=1),
        op("", A.linear.default, SQUARE, SQUARE),
    ],
    "aten::addmm": [
        op("0", A.addmm.default, f(8), f(6, 4), f(4, 8), of=1),
        op("0", A.addmm.default, f(6, 8), f(6, 4), f(4, 8), of=1),
        op("1", A.addmm.default, f(8), f(6, 4), f(4, 8), of=2),
        op("1", A.addmm.default, f(6, 8), f(6, 4), f(4, 8), of=2),
        op("0", A.addmm.default, f(1, 8), f(6, 4), f(4, 8), of=1, beta=0.5),
        op("", A.addmm.default, SQUARE, SQUARE, f(6, 6)),
    ],
    "aten::baddbmm": [
        op("01", A.baddbmm.default, f(6, 4, 10), f(6, 4, 8), f(6, 8, 10), of=1),
        op("01", A.baddbmm.default, f(4, 1), f(6, 4, 8), f(6, 8, 10), of=1, alpha=0.5),
        op("02", A.baddbmm.default, f(1, 4, 10), f(6, 4, 8), f(6, 8, 10), of=2),
    ],
    "aten::mv": [op("0", A.mv.default, f(6, 4), f(4)), op("", A.mv.default, f(6, 4), f(4), of=1)],
    "aten::embedding": [
        op("01", A.embedding.default, f(10, 8), i(6, 4, high=10), of=1),
        op("", A.embedding.default, f(10, 8), i(6, 4, high=10)),
    ],
    "aten::index": [
        op("01", A.index.Tensor, f(10, 8), [i(6, 4, high=10)], of=1),
        op("0", A.index.Tensor, f(3, 5, 8), [i(6, 1, high=3), i(1, 4, high=5)], of=1),
        op("1", A.index.Tensor, f(3, 5), [i(6, 1, high=3), i(1, 4, high=5)], of=2),
        op("", A.index.Tensor, f(10, 8), [i(6, high=10)]),  # rows of a table of tokens
        op("", A.index.Tensor, f(10, 8), [None, i(6, high=8)], of=1),
        op("", A.index.Tensor, f(6, 8), [b(6)], of=1),
    ],
    "aten::index_put": [
        op("012", A.index_put.default, f(*SHAPE), [b(6, 4)], f()),
        op("012", A.index_put.default, f(*SHAPE), [b(*SHAPE)], f(), True),
        op("01", A.index_put.default, f(*SHAPE), [b(6, 4)], f(), of=1),
        op("", A.index_put.default, f(6, 8), [i(4, high=6)], f()),
        op("", A.index_put.default, f(6, 8), [b(6)], f(8)),
    ],
    "aten::index_select": [
        op("0", A.index_select.default, f(10, 8), 0, i(6, high=10), of=1),
        op("0", A.index_select.default, f(8, 10), 1, i(6, high=10), of=1),
        op("1", A.index_select.default, f(10, 8), 0, i(5, high=10)),
    ],
    "aten::constant_pad_nd": [
        op("01", A.constant_pad_nd.default, f(*SHAPE), [1, 2]),
        op("02", A.constant_pad_nd.default, f(*SHAPE), [0, 0, 1, 0], 2.5),
        op("12", A.constant_pad_nd.default, f(*SHAPE), [0, 0, 0, 0, 1, -1]),  # keeps the size and shifts the rows
    ],
    "aten::clone": [op("012", A.clone.default, f(*SHAPE))],
    "aten::alias": [op("012", A.alias.default, f(*SHAPE))],
    "aten::detach": [op("012", A.detach.default, f(*SHAPE))],
    "aten::contiguous": [op("012", A.contiguous.default, f(*SHAPE))],
    "aten::zeros_like": [op("012", A.zeros_like.default, f(*SHAPE))],
    "aten::ones_like": [op("012", A.ones_like.default, f(*SHAPE))],
    "aten::full_like": [op("012", A.full_like.default, f(*SHAPE), 2.5)],
    "aten::empty_like": [op("012", A.empty_like.default, f(*SHAPE))],
    "aten::_to_copy": [op("012", A._to_copy.default, f(*SHAPE), dtype=torch.float32)],
    "aten::masked_fill": [
        op("012", A.masked_fill.Scalar, f(*SHAPE), b(4, 1), 0.5),
        op("012", A.masked_fill.Tensor, f(*SHAPE), b(*SHAPE), f()),
    ],
    "aten::lift_fresh_copy": [op("012", A.lift_fresh_copy.default, f(*SHAPE))],
    "aten::copy": [op("012", A.copy.default, f(*SHAPE), f(4, 8))],
    "aten::add": [
        op("012", A.add.Tensor, f(*SHAPE), f(*SHAPE)),
        op("012", A.add.Tensor, f(*SHAPE), f(4, 1), alpha=2),
        op("02", A.add.Tensor, f(6, 1, 8), f(4, 8)),
        op("012", A.add.Tensor, f(*SHAPE), 2.0),
        op("012", A.add.Scalar, f(*SHAPE), 2.0),
        op("012", A.add.Tensor, SAME, SAME),
        op("01", A.add.Tensor, f(6, 6), f(6, 6)),  # tokens on different dims of the two
    ],
    "aten::sub": [op("012", A.sub.Tensor, f(*SHAPE), f(8)), op("012", A.sub.Scalar, f(*SHAPE), 1.0)],
    "aten::mul": [
        op("012", A.mul.Tensor, f(*SHAPE), f(6, 1, 8)),
        op("02", A.mul.Tensor, f(6, 1, 8), f(4, 8)),
        op("012", A.mul.Tensor, SAME, SAME),
        op("012", A.mul.Scalar, f(*SHAPE), 3.0),
    ],
    "aten::div": [
        op("012", A.div.Tensor, f(*SHAPE), f(6, 4, 1)),
        op("012", A.div.Tensor, SAME, SAME),
        op("012", A.div.Tensor_mode, f(*SHAPE), f(6, 4, 1), rounding_mode="floor"),
        op("012", A.div.Scalar, f(*SHAPE), 3.0),
    ],
    "aten::neg": [op("012", A.neg.default, f(*SHAPE))],
    "aten::new_ones": [op("012", A.new_ones.default, f(*SHAPE), [3, 4])],
    "aten::new_zeros": [op("012", A.new_zeros.default, f(*SHAPE), [3, 4])],
    "aten::new_empty": [op("012", A.new_empty.default, f(*SHAPE), [3, 4])],
    "aten::new_full": [op("012", A.new_full.default, f(*SHAPE), [3, 4], 1.5)],
    "aten::new_empty_strided": [op("012", A.new_empty_strided.default, f(*SHAPE), [3, 4], [4, 1])],
    "aten::sym_size": [op("012", A.sym_size.int, f(*SHAPE), 0)],
    "aten::sym_numel": [op("012", A.sym_numel.default, f(*SHAPE))],
    "aten::scaled_dot_product_attention": [
        op("2", A.scaled_dot_product_attention.default, f(2, 3, 6, 4), f(2, 3, 10, 4), f(2, 3, 10, 8)),
        op("2", A.scaled_dot_product_attention.default, f(2, 3, 6, 4), f(2, 3, 10, 4), f(2, 3, 10, 4), b(6, 10)),
        op("2", A.scaled_dot_product_attention.default, f(2, 3, 6, 4), f(2, 3, 6, 4), f(2, 3, 6, 4), f(2, 1, 6, 6)),
        op("2", A.scaled_dot_product_attention.default, f(2, 3, 6, 4), f(2, 3, 6, 4), f(2, 3, 6, 4), f(2, 1, 1, 6)),
        op("", A.scaled_dot_product_attention.default, f(2, 3, 6, 4), f(2, 3, 6, 4), f(2, 3, 6, 4), None, 0.0, True),
        op("", A.scaled_dot_product_attention.default, f(2, 3, 6, 4), f(2, 3, 6, 4), f(2, 3, 6, 4), None, 0.5),
        op("", A.scaled_dot_product_attention.default, KEYS, KEYS, f(2, 3, 6, 4)),
    ],
    "aten::_scaled_dot_product_attention_math": [
        op("2", A._scaled_dot_product_attention_math.default, f(2, 3, 6, 4), f(2, 3, 6, 4), f(2, 3, 6, 8), b(6, 6)),
        op("", A._scaled_dot_product_attention_math.default, f(2, 3, 6, 4), f(2, 3, 6, 4), KEYS, None, 0.0, True),
    ],
    "aten::_scaled_dot_product_flash_attention_for_cpu": [
        op("2", FLASH, f(2, 3, 6, 4), f(2, 3, 10, 4), f(2, 3, 10, 4), attn_mask=f(6, 10)),
        op("2", FLASH, f(2, 3, 6, 4), f(2, 3, 10, 4), f(2, 3, 10, 4), attn_mask=f(2, 1, 6, 10), scale=0.3),
        op("2", FLASH, f(2, 3, 6, 4), f(2, 3, 10, 4), f(2, 3, 10, 4)),
        op("", FLASH, f(2, 3, 6, 4), f(2, 3, 6, 4), f(2, 3, 6, 4), 0.0, True),
    ],
    # Not rows: ops that the pointwise tag lets in.
    "pointwise": [
        op("012", A.where.self, b(*SHAPE), f(4, 1), f(8)),
        op("01", A.pow.Tensor_Scalar, f(6, 8), 2),
        op("01", A.silu.default, f(6, 8)),
        op("01", A.rsqrt.default, f(6, 8)),
        op("01", A.sigmoid.default, f(6, 8)),
        op("01", A.clamp.default, f(6, 8), -1.0, 1.0),
        op("01", A.maximum.default, f(6, 8), f(8)),
        op("01", A.lt.Tensor, f(6, 8), f(6, 1)),
        op("01", A.addcmul.default, f(6, 8), f(6, 1), f(8)),
        op("01", A.frexp.Tensor, f(6, 8)),
        op("01", A.bitwise_and.Tensor, i(6, 8), i(6, 8)),
    ],
}
NPU, OWN, VLLM_IR = torch.ops.npu, torch.ops.cpcompile, torch.ops.vllm_ir
TABLE = (i32(6), i32(6, 3))  # key lengths and block table of rows
# Rows that DTensor knows nothing of.
OTHERS: dict[str, list[Op]] = {
    "npu::npu_rms_norm": [
        op("01", NPU.npu_rms_norm.default, f(6, 4, 8), f(8)),
        op("0", NPU.npu_rms_norm.default, f(6, 4, 8), f(4, 8)),
    ],
    "vllm_ir::rms_norm": [
        op("01", VLLM_IR.rms_norm.default, f(6, 4, 8), f(8), 1e-6),
        op("01", VLLM_IR.rms_norm.default, f(6, 4, 8), None, 1e-6, 4),
    ],
    "vllm_ir::fused_add_rms_norm": [
        op("0", VLLM_IR.fused_add_rms_norm.default, f(6, 8), f(6, 8), f(8), 1e-6),
        op("01", VLLM_IR.fused_add_rms_norm.default, f(6, 4, 8), f(6, 4, 8), None, 1e-6),
    ],
    "npu::npu_add_rms_norm": [op("01", NPU.npu_add_rms_norm.default, f(6, 4, 8), f(6, 4, 8), f(8))],
    "npu::npu_interleave_rope": [
        op("012", NPU.npu_interleave_rope.default, f(6, 4, 10, 8), f(6, 1, 1, 8), f(6, 1, 1, 8))
    ],
    "npu::npu_rotary_mul": [op("012", NPU.npu_rotary_mul.default, f(6, 4, 10, 8), f(6, 1, 1, 8), f(6, 1, 1, 8))],
    "cpcompile::paged_lightning_indexer": [
        op("0", OWN.paged_lightning_indexer.default, f(6, 3, 8), f(5, 2, 1, 8), f(6, 3), *TABLE, 4)
    ],
    "cpcompile::paged_sparse_attention": [
        op(
            "0", OWN.paged_sparse_attention.default,
            f(6, 3, 8), f(5, 2, 1, 8), i32(6, 1, 7), f(6, 3, 4), f(5, 2, 1, 4), *TABLE, 0.5,
        )
    ],
    "cpcompile::paged_attention": [
        op("0", OWN.paged_attention.default, f(6, 3, 8), f(5, 2, 1, 8), f(6, 3, 4), f(5, 2, 1, 4), *TABLE, 0.5)
    ],
}  # fmt: skip
