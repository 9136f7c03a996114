"""Every row of the op table against two oracles: the numbers of each shard, and DTensor's own sharding propagation."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import pytest
import sympy
import torch
import torch.distributed as dist
import torch.fx as fx
import vllm_ops  # noqa: F401  defines the ops
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpcompile.passes.collectives import op_name
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.op_call import UNUSED, Mixing, RowWise
from cpcompile.passes.placement_rules import RULES, classify, find_rule
from cpcompile.passes.token_layout import TokenDim

A = torch.ops.aten
C10D = torch.ops._c10d_functional
RANKS = 2


@dataclass(eq=False)
class X:
    """An operand: float64, or int64 below ``high``, or bool. The same object twice is the same value."""

    shape: tuple[int, ...]
    kind: str = "float"
    high: int = 4

    def make(self, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        if self.kind == "float":
            return torch.randn(self.shape, generator=g, dtype=torch.float64)
        integers = torch.randint(0, 2 if self.kind == "bool" else self.high, self.shape, generator=g)
        return integers.bool() if self.kind == "bool" else integers.int() if self.kind == "int32" else integers


@dataclass(eq=False)
class Op:
    """One call. ``rows``: the dims of operand number ``of`` that may carry tokens."""

    rows: tuple[int, ...]
    target: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    of: int = 0
    operands: list[X] = field(init=False)

    def __post_init__(self) -> None:
        leaves: list[object] = []
        fx.node.map_aggregate((self.args, self.kwargs), leaves.append)
        self.operands = list(dict.fromkeys(a for a in leaves if isinstance(a, X)))

    def __str__(self) -> str:
        shown = fx.node.map_aggregate((self.args, self.kwargs), lambda a: a.shape if isinstance(a, X) else a)
        return f"{self.target}{shown}"

    def values(self, seed: int = 0) -> dict[X, Any]:
        return {x: x.make(seed + k) for k, x in enumerate(self.operands)}

    def run(self, values: Mapping[X, Any], sizes: tuple[int, list[int]] | None = None) -> list[Any]:
        """The outputs; ``sizes`` replaces the argument at that position."""
        args, kwargs = fx.node.map_aggregate((self.args, self.kwargs), lambda a: values[a] if isinstance(a, X) else a)
        if sizes is not None:
            args = (*args[: sizes[0]], sizes[1], *args[sizes[0] + 1 :])
        out = self.target(*args, **kwargs)
        return list(out) if isinstance(out, list | tuple) else [out]

    def node(self) -> tuple[fx.Node, dict[X, fx.Node], dict[fx.Node, tuple[tuple[sympy.Expr, ...], ...]]]:
        """The call in a graph, the nodes of its operands, and all shapes."""
        graph = fx.Graph()
        nodes = {x: graph.placeholder(f"x{k}") for k, x in enumerate(self.operands)}
        for x, value in self.values().items():
            nodes[x].meta["val"] = value
        args, kwargs = fx.node.map_aggregate((self.args, self.kwargs), lambda a: nodes[a] if isinstance(a, X) else a)
        node = graph.call_function(self.target, args, kwargs)
        outs = [o for o in self.run(self.values()) if isinstance(o, Tensor)]
        return node, nodes, {node: tuple(map(expr, outs)), **{n: (expr(x),) for x, n in nodes.items()}}


def expr(value: Tensor | X) -> tuple[sympy.Expr, ...]:
    return tuple(map(sympy.Integer, value.shape))


def op(rows: str, target: OpOverload, *args: object, of: int = 0, **kwargs: object) -> Op:
    return Op(tuple(map(int, rows)), target, args, kwargs, of)


def f(*shape: int) -> X:
    return X(shape)


def i(*shape: int, high: int = 4) -> X:
    return X(shape, "int", high)


def i32(*shape: int, high: int = 4) -> X:
    return X(shape, "int32", high)


def b(*shape: int) -> X:
    return X(shape, "bool")


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
        op("", A.addmm.default, f(6, 8), f(6, 4), f(4, 8), of=1),
        op("", A.addmm.default, f(8), f(6, 4), f(4, 8), of=2),
    ],
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
        op("01", A.max.other, f(6, 8), f(6, 1)),
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
EVERY = {**CASES, **OTHERS}
CALLS = [pytest.param(name, call, id=str(call)) for name, calls in EVERY.items() for call in calls]
UNDEFINED = {"aten::empty_like", "aten::new_empty", "aten::new_empty_strided"}  # nothing to compare but shapes
SIZES = {"aten::sym_size", "aten::sym_numel"}  # the rewrite computes the whole value's size; there is no tensor

Layouts = dict[X, "TokenDim | None"]


@dataclass(frozen=True)
class Claim:
    tokens: int
    layouts: Layouts
    outcome: RowWise | Mixing
    demands: dict[X, Any]


def positions(x: X, tokens: int) -> list[TokenDim | None]:
    """Where ``tokens`` tokens can lie in ``x``: a dim of that size, or of twice that, folded on either side."""
    two = sympy.Integer(2)
    found: list[TokenDim | None] = [None, *(TokenDim(d) for d, size in enumerate(x.shape) if size == tokens)]
    for d, size in enumerate(x.shape):
        if size == 2 * tokens:
            found += [TokenDim(d, outer=two), TokenDim(d, inner=two)]
    return found


def claims(call: Op) -> Iterator[Claim]:
    """What the table says of ``call`` for every token count and every place of the tokens in its operands."""
    node, nodes, shapes = call.node()
    sizes = {s for x in call.operands for s in x.shape if s > 1}
    for tokens in sorted(sizes | {s // 2 for s in sizes if s % 2 == 0 and s > 2}):
        for places in itertools.product(*(positions(x, tokens) for x in call.operands)):
            if not any(places):
                continue
            layouts = dict(zip(call.operands, places, strict=True))
            known = {nodes[x]: (place,) for x, place in layouts.items() if place is not None}
            outcome = classify(node, sympy.Integer(tokens), known, shapes)
            demands = {x: outcome.operands.get(n) for x, n in nodes.items()} if isinstance(outcome, RowWise) else {}
            yield Claim(tokens, layouts, outcome, demands)


def take(value: Tensor, layout: TokenDim | None, tokens: int, rows: slice) -> Tensor:
    """The rows of some tokens, in memory of their own."""
    if layout is None:
        return value
    head, tail = value.shape[: layout.dim], value.shape[layout.dim + 1 :]
    parted = value.reshape(*head, int(layout.outer), tokens, int(layout.inner), *tail)
    return parted[(*[slice(None)] * (layout.dim + 1), rows)].reshape(*head, -1, *tail).clone()


def blocks(tokens: int) -> list[slice]:
    """Contiguous shards for 2 and 3 ranks, and single rows."""
    return [
        slice(first, first + local)
        for local in sorted({-(-tokens // 2), -(-tokens // 3), 1})
        for first in range(0, tokens, local)
    ]


def local_values(call: Op, claim: Claim, values: Mapping[X, Tensor], rows: slice) -> dict[X, Tensor]:
    """What each demand asks for; of an operand whose data is not read, something else of its dtype."""
    return {
        x: values[x].flatten()[:1] if d is UNUSED else take(values[x], d, claim.tokens, rows)
        for x, d in claim.demands.items()
    }


def local_sizes(call: Op, outcome: RowWise, count: int) -> tuple[int, list[int]] | None:
    if outcome.size_arg is None:
        return None
    sizes, layout = list(call.args[outcome.size_arg]), outcome.outputs[0]
    assert layout is not None
    sizes[layout.dim] = int(layout.size(sympy.Integer(count)))
    return outcome.size_arg, sizes


def row_wise(call: Op) -> Iterator[tuple[Claim, RowWise]]:
    return ((c, c.outcome) for c in claims(call) if isinstance(c.outcome, RowWise))


# Kernels of CUDA alone: their schemas are checked, in test_fused_attention.py, and not their numbers.
ON_CUDA = {f"aten::_scaled_dot_product_{n}_attention" for n in ("flash", "efficient", "cudnn", "fused")} - {
    "aten::_scaled_dot_product_fused_attention"
} | {"aten::_scaled_dot_product_fused_attention_overrideable"}

# The table


def test_every_row_has_cases() -> None:
    assert CASES.keys() - {"pointwise"} == {name for name in RULES if name.startswith("aten::")} - ON_CUDA
    assert OTHERS.keys() == {name for name in RULES if name.startswith(("npu::", "cpcompile::paged_", "vllm_ir::"))}
    for name, calls in EVERY.items():
        if name != "pointwise":
            assert {op_name(call.target) for call in calls} == {name}
            assert any(call.rows for call in calls), f"{name} is never row-wise"


def test_every_row_says_where_its_knowledge_comes_from() -> None:
    assert all(rule.source for rule in RULES.values())
    assert {rule.linear for rule in RULES.values()} == {"", "additive", "homogeneous"}


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_row_wise_in_the_dims_expected(name: str, call: Op) -> None:
    """Neither less nor more: a rule that gives up costs speed silently."""
    first = call.operands[call.of]
    places = [c.layouts[first] for c, _ in row_wise(call) if c.demands[first] is not None]
    found = {place.dim for place in places if place is not None}
    assert tuple(sorted(found)) == call.rows


@pytest.mark.parametrize(("name", "call"), [p for p in CALLS if p.values[0] not in SIZES])
def test_every_shard_computes_its_rows_of_the_whole(name: str, call: Op) -> None:
    values = call.values()
    whole = call.run(values)
    for claim, outcome in row_wise(call):
        assert len(outcome.outputs) == len(whole)
        for rows in blocks(claim.tokens):
            local = local_values(call, claim, values, rows)
            count = len(range(claim.tokens)[rows])
            sizes = local_sizes(call, outcome, count)
            got = [local[call.operands[0]]] if outcome.identity else call.run(local, sizes)
            for mine, full, layout in zip(got, whole, outcome.outputs, strict=True):
                want = take(full, layout, claim.tokens, rows)
                assert mine.shape == want.shape, (claim, rows)
                if name not in UNDEFINED:
                    torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12, equal_nan=True)


# Linear


def is_sum(call: Op, changed: list[X], scale: float = 1.0) -> bool:
    """Whether op(a1 + a2) = op(a1) + op(a2), where ``changed`` are the operands that are sums."""
    first, second = call.values(1), call.values(100)
    second |= {x: first[x] for x in call.operands if x not in changed}
    both = {x: first[x] + second[x] if x in changed else first[x] for x in call.operands}
    parts = zip(call.run(both), call.run(first), call.run(second), strict=True)
    return all(torch.allclose(s, a + b, rtol=1e-10, atol=1e-10) for s, a, b in parts)


def linear_of(call: Op) -> str:
    rule = find_rule(call.node()[0])
    return "" if rule is None else rule.linear


@pytest.mark.parametrize("name", [n for n, r in RULES.items() if r.linear and n.startswith("aten::")])
def test_a_linear_op_of_a_sum_is_the_sum_of_the_ops(name: str) -> None:
    linear = [(call, kind) for call in CASES[name] if any(True for _ in row_wise(call)) and (kind := linear_of(call))]
    assert linear
    for call, kind in linear:
        if kind == "additive":
            assert is_sum(call, call.operands)
            continue
        # A sum is divided, never divided by.
        operands = call.operands[:1] if name == "aten::div" else call.operands
        for operand in operands:
            assert is_sum(call, [operand]), f"{call} is not linear in its operand {operand.shape}"


@pytest.mark.parametrize(
    "call",
    [
        op("", A.linear.default, f(6, 8), f(10, 8), f(10)),
        op("", A.linear.default, f(6, 8), f(10, 8), bias=f(10)),
        op("", A.mul.Tensor, SAME, SAME),
        op("", A.div.Tensor, SAME, SAME),
        op("", A.mm.default, SQUARE, SQUARE),
        op("", A.div.Tensor_mode, f(6, 8), f(8), rounding_mode="floor"),
        op("", A.add.Tensor, f(6, 8), 2.0),
        op("", A.sub.Scalar, f(6, 8), 2.0),
    ],
    ids=str,
)
def test_calls_of_linear_ops_that_are_not_linear(call: Op) -> None:
    assert not is_sum(call, call.operands[:1])
    assert linear_of(call) == ""
    assert RULES[op_name(call.target)].linear


# Ops outside the table


@pytest.mark.parametrize(
    "call",
    [
        op("", A.native_dropout.default, f(6, 8), 0.5, True),
        op("", A.dropout.default, f(6, 8), 0.5, True),
        op("", A.bernoulli.p, f(6, 8), 0.5),
        op("", A.rrelu.default, f(6, 8), 0.1, 0.2, True),
        op("", A.add_.Tensor, f(6, 8), f(6, 8)),
        op("", A.topk.values, f(6, 8), 2, values=f(6, 2), indices=i(6, 2)),
        op("", A.flip.default, f(6, 8), [1]),
        op("", A.roll.default, f(6, 8), [1]),
    ],
    ids=str,
)
def test_random_in_place_and_unknown_ops_mix_and_are_named(call: Op) -> None:
    found = list(claims(call))
    assert found and all(
        c.outcome == Mixing(f"{op_name(call.target)} is not in the table of token-wise ops") for c in found
    )


def test_ops_without_tensors_or_tokens_mix() -> None:
    assert {c.outcome for c in claims(op("", A.equal.default, f(6, 8), f(6, 8)))} == {Mixing("returns no tensor")}
    node, _, shapes = op("", A.mul.Tensor, f(6, 8), f(6, 8)).node()
    assert classify(node, sympy.Integer(6), {}, shapes) == Mixing("no operand carries tokens")


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_every_refusal_says_why(name: str, call: Op) -> None:
    for claim in claims(call):
        if isinstance(claim.outcome, Mixing):
            assert claim.outcome.reason and "\n" not in claim.outcome.reason


def test_getitem_picks_one_output() -> None:
    node, _, shapes = op("", A.topk.default, f(6, 8), 2).node()
    item = node.graph.call_function(operator.getitem, (node, 1))
    here = TokenDim(0)
    outcome = classify(item, sympy.Integer(6), {node: (None, here)}, {**shapes, item: shapes[node][1:]})
    assert outcome == RowWise({node: here}, (here,))
    outcome = classify(item, sympy.Integer(6), {node: (here, None)}, {**shapes, item: shapes[node][1:]})
    assert isinstance(outcome, Mixing)


@pytest.mark.parametrize(("reduce_op", "linear"), [("sum", "homogeneous"), ("avg", "homogeneous"), ("max", "")])
def test_all_reduce_over_another_axis_is_row_wise(reduce_op: str, linear: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    start = graph.call_function(C10D.all_reduce.default, (x, reduce_op, "dp"))
    wait = graph.call_function(C10D.wait_tensor.default, (start,))
    graph.output(wait)
    shapes = dict.fromkeys((x, start, wait), (expr(f(6, 8)),))
    for node, source in ((start, x), (wait, start)):
        assert classify(node, sympy.Integer(6), {source: (TokenDim(0),)}, shapes) == RowWise(
            {source: TokenDim(0)}, (TokenDim(0),)
        )
    assert find_rule(start).linear == linear  # type: ignore[union-attr]
    gm = fx.GraphModule(torch.nn.Module(), graph)
    data = [f(6, 8).make(seed) for seed in range(2)]
    whole, top, bottom = (
        run_lockstep([RankProgram(gm, [x], {"dp": (0, 1)}) for x in part])[0]
        for part in (data, [x[:4] for x in data], [x[4:] for x in data])
    )
    assert isinstance(whole, Tensor) and isinstance(top, Tensor) and isinstance(bottom, Tensor)
    assert torch.equal(torch.cat([top, bottom]), whole)


# DTensor

# Rows that DTensor cannot confirm, and why; their numbers are checked above like all others'.
NO_STRATEGY = {
    "aten::index_put": "its strategy takes a mask for integers: on shards of both it asks for shapes that differ",
    "aten::scaled_dot_product_attention": "composite: DTensor decomposes it to a CPU kernel without a strategy",
    "aten::_scaled_dot_product_attention_math": "composite, likewise",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "no strategy is registered: only CUDA's kernels have one",
    "aten::copy": "no strategy is registered: functionalisation does not show it copy, only copy_",
    "aten::lift_fresh_copy": "no strategy is registered: it is met in tracing only, on constants",
    "aten::sym_size": "returns an int, which DTensor answers without a strategy",
    "aten::sym_numel": "returns an int, which DTensor answers without a strategy",
}


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=RANKS)
    yield init_device_mesh("cpu", (RANKS,))
    dist.destroy_process_group()


def distribute(value: Tensor, demand: object, claim: Claim, mesh: DeviceMesh) -> DTensor:
    if not isinstance(demand, TokenDim):
        return DTensor.from_local(value, mesh, [Replicate()], run_check=False)
    mine = take(value, demand, claim.tokens, slice(0, claim.tokens // RANKS))
    return DTensor.from_local(mine, mesh, [Shard(demand.dim)], run_check=False)


@pytest.mark.parametrize("name", [n for n in CASES if n not in NO_STRATEGY])
def test_dtensor_agrees(name: str, mesh: DeviceMesh) -> None:
    """With the operands placed as demanded, DTensor communicates nothing and shards the output where we say."""
    asked = 0
    for call in CASES[name]:
        values = call.values()
        for claim, outcome in row_wise(call):
            folded = [
                d for d in [*claim.demands.values(), *outcome.outputs] if isinstance(d, TokenDim) and d.outer != 1
            ]
            if folded or claim.tokens % RANKS:
                continue  # the rows of a shard are not contiguous, or DTensor would have uneven shards
            asked += 1
            placed = {x: distribute(values[x], d, claim, mesh) for x, d in claim.demands.items()}
            with CommDebugMode() as communication:
                got = call.run(placed)
            assert communication.get_total_counts() == 0, (str(call), claim)
            split = any(isinstance(d, TokenDim) for d in claim.demands.values())
            for mine, layout in zip(got, outcome.outputs, strict=True):
                # Rows that only a size argument makes (of constants, of one row expanded) DTensor makes whole.
                want = Shard(layout.dim) if layout is not None and split else Replicate()
                assert mine.placements == (want,), (str(call), claim)
    assert asked


def test_rows_without_a_dtensor_strategy_have_a_reason() -> None:
    assert all(NO_STRATEGY.values()) and NO_STRATEGY.keys() <= RULES.keys()
