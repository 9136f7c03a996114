"""Each op type of the GE interpreter against torch, on random inputs; attention, experts and collectives have files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import test_ge_attention
import test_ge_collectives
import test_ge_moe
import torch
from ge_build import attr, one_op, run_op
from torch import Tensor
from torch.nn import functional

from cpcompile.lowering.ge import GeError, GeProgram, interpret, op_types


def rand(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        return torch.randint(-9, 9, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)


def i64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def scalar(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@dataclass
class Case:
    """One op on some inputs, and what it gives: exactly, unless there is a tolerance."""

    type: str
    inputs: dict[str, Any]
    expected: Tensor | tuple[Tensor, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    within: float = 0.0


X, Y = rand(3, 4), rand(3, 1, seed=1)
A, B = rand(2, 3, 4), rand(5, 4)
POSITIVE = rand(3, 4).abs() + 0.1
BF, BG = rand(3, 4, dtype=torch.bfloat16), rand(3, 4, dtype=torch.bfloat16, seed=5)
INT, JNT = rand(3, 4, dtype=torch.int64), rand(3, 4, dtype=torch.int64, seed=3)
YES, NO = rand(3, 4, dtype=torch.bool), rand(3, 4, dtype=torch.bool, seed=7)
CUBE = rand(2, 3, 4, seed=2)
GAMMA, BETA = rand(4, seed=9) + 1, rand(4, seed=11)


def pair(op_type: str, function: Callable[..., Tensor], a: Tensor = X, b: Tensor = Y) -> Case:
    return Case(op_type, {"x1": a, "x2": b}, function(a, b))


def single(op_type: str, function: Callable[..., Tensor], x: Tensor = X, **attrs: Any) -> Case:
    return Case(op_type, {"x": x}, function(x), attrs)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotation of complex numbers: ``x`` has all real parts, then all imaginary ones, as cos and sin twice."""
    half = x.shape[-1] // 2
    turn = torch.complex(cos[..., :half], sin[..., :half])
    found = torch.complex(x[..., :half], x[..., half:]) * turn
    return torch.cat([found.real, found.imag], -1)


ANGLES = rand(2, 1, 3, 2, seed=4).repeat(1, 1, 1, 2)
COS, SIN, QUERY = ANGLES.cos(), ANGLES.sin(), rand(2, 5, 3, 4, seed=6)
EVEN_ODD = torch.cat([QUERY[..., ::2], QUERY[..., 1::2]], -1)
INT8_A, INT8_B = rand(3, 8, dtype=torch.int8), rand(5, 8, dtype=torch.int8)
SCALE = rand(5).abs() + 0.5


def written(cache: Tensor, places: list[int], rows: Tensor) -> Tensor:
    out = cache.clone()
    for place, row in zip(places, rows, strict=True):
        if place >= 0:
            out[place // cache.shape[1], place % cache.shape[1]] = row
    return out


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row, element by element."""
    scales = torch.tensor([max(abs(v) for v in row) / 127 for row in x.tolist()])
    return torch.stack([(row / s).round() for row, s in zip(x, scales, strict=True)]).to(torch.int8), scales


PAGES, ROWS = rand(3, 2, 2, 4), rand(5, 2, 4, seed=8)
SLOTS = [4, -1, 0, 3, 5]

CASES = [
    pair("Add", torch.add),
    pair("Add", torch.add, BF, BG),
    pair("Add", torch.add, INT, JNT),
    pair("Sub", torch.sub),
    pair("Mul", torch.mul),
    pair("Mul", torch.logical_and, YES, NO),
    pair("RealDiv", torch.true_divide),
    pair("Div", torch.true_divide),
    Case("Div", {"x1": i64(7, 8, 9), "x2": i64(2, 2, 2)}, i64(3, 4, 4)),
    Case("FloorDiv", {"x1": i64(-7, 7, 8), "x2": i64(2, 2, 2)}, i64(-4, 3, 4)),
    Case("FloorMod", {"x1": i64(-7, 7, 8), "x2": i64(3, 3, 3)}, i64(2, 1, 2)),
    Case("Mod", {"x1": i64(-7, 7, 8), "x2": i64(3, 3, 3)}, i64(-1, 1, 2)),
    Case("TruncateDiv", {"x1": i64(-7, 7, 8), "x2": i64(2, 2, 2)}, i64(-3, 3, 4)),
    pair("Pow", lambda a, b: torch.exp(b * torch.log(a)), POSITIVE, Y),
    pair("Maximum", lambda a, b: torch.where(a > b, a, b)),
    pair("Minimum", lambda a, b: torch.where(a < b, a, b)),
    pair("Equal", torch.eq, INT, INT.flip(0)),
    pair("NotEqual", torch.ne, INT, INT.flip(0)),
    pair("Less", torch.lt, INT, INT.flip(0)),
    pair("LessEqual", torch.le, INT, INT.flip(0)),
    pair("Greater", torch.gt, INT, INT.flip(0)),
    pair("GreaterEqual", torch.ge, INT, INT.flip(0)),
    pair("LogicalAnd", torch.logical_and, YES, NO),
    pair("LogicalOr", torch.logical_or, YES, NO),
    single("LogicalNot", torch.logical_not, YES),
    pair("BitwiseAnd", torch.bitwise_and, INT, JNT),
    pair("BitwiseOr", torch.bitwise_or, INT, JNT),
    single("Neg", torch.neg),
    single("Abs", torch.abs),
    single("Relu", lambda x: torch.where(x > 0, x, 0)),
    single("Exp", torch.exp),
    single("Exp", lambda x: 2 ** (3 * x + 1), base=2.0, scale=3.0, shift=1.0),
    single("Log", torch.log, POSITIVE),
    single("Log", lambda x: torch.log2(3 * x + 1), POSITIVE, base=2.0, scale=3.0, shift=1.0),
    single("Sqrt", torch.sqrt, POSITIVE),
    single("Rsqrt", lambda x: 1 / x.sqrt(), POSITIVE),
    single("Reciprocal", lambda x: 1 / x, POSITIVE),
    single("Cos", torch.cos),
    single("Sin", torch.sin),
    single("Sigmoid", lambda x: 1 / (1 + torch.exp(-x))),
    single("Swish", functional.silu),
    single("Swish", functional.silu, BF),
    single("Swish", lambda x: x * torch.sigmoid(2 * x), scale=2.0),
    single("SwiGlu", lambda x: functional.silu(x[:, :2]) * x[:, 2:]),
    single("SwiGlu", lambda x: functional.silu(x[:, :1]) * x[:, 1:], CUBE[:, :2], dim=1),
    single("Cast", lambda x: x.trunc().int(), 3 * X, dst_type=torch.int32),
    single("Cast", lambda x: x != 0, INT, dst_type=torch.bool),
    single("Cast", lambda x: x.bfloat16(), dst_type=torch.bfloat16),
    Case("SelectV2", {"condition": YES, "then": X, "else": Y}, torch.where(YES, X, Y)),
    Case("Select", {"condition": YES, "x1": X, "x2": -X}, torch.where(YES, X, -X)),
    Case("Select", {"condition": YES[:, 0], "x1": X, "x2": -X}, torch.where(YES[:, :1], X, -X)),
    Case("MaskedFill", {"x": X, "mask": YES[:1], "value": scalar(7.0, torch.float32)}, X.masked_fill(YES[:1], 7.0)),
    Case(
        "ClipByValueV2",
        {"x": X, "clip_value_min": scalar(-0.5, torch.float32), "clip_value_max": scalar(0.5, torch.float32)},
        X.clamp(-0.5, 0.5),
    ),
    single("ZerosLike", torch.zeros_like),
    single("OnesLike", torch.ones_like, INT),
    # ---- shapes
    single("Identity", torch.clone),
    single("TensorMove", torch.clone),
    Case("Assign", {"ref": X, "value": -X}, -X),
    Case("Shape", {"x": CUBE}, torch.tensor([2, 3, 4], dtype=torch.int32)),
    Case("Shape", {"x": CUBE}, i64(2, 3, 4), {"dtype": torch.int64}),
    Case("Reshape", {"x": CUBE, "shape": i64(4, -1)}, CUBE.view(4, 6)),
    Case("Unsqueeze", {"x": X}, X[:, None, :, None], {"axes": [1, -1]}),
    Case("Squeeze", {"x": CUBE[:1, :, None]}, CUBE[0], {"axis": [0, 2]}),
    Case("Squeeze", {"x": CUBE[:1, :1]}, CUBE[0, 0]),
    Case("ExpandDims", {"x": X, "axis": scalar(1)}, X[:, None]),
    Case("FlattenV2", {"x": CUBE}, CUBE.flatten(0, 1), {"axis": 0, "end_axis": 1}),
    Case("Transpose", {"x": CUBE, "perm": i64(2, 0, 1)}, CUBE.permute(2, 0, 1)),
    Case("BroadcastTo", {"x": Y, "shape": i64(2, 3, 4)}, Y.expand(2, 3, 4)),
    Case("Expand", {"x": Y, "shape": i64(1, 4)}, Y.expand(3, 4)),
    Case("Tile", {"x": X, "multiples": i64(2, 3)}, torch.cat([torch.cat([X] * 3, 1)] * 2)),
    Case("ConcatV2", {"x": [X, Y], "concat_dim": scalar(-1)}, torch.cat([X, Y], 1), {"N": 2}),
    Case("Pack", {"x": [X, -X]}, torch.stack([X, -X], 1), {"N": 2, "axis": 1}),
    Case("Unpack", {"x": X}, tuple(X[:, i] for i in range(4)), {"num": 4, "axis": 1}),
    Case("Split", {"split_dim": scalar(1, torch.int32), "x": X}, (X[:, :2], X[:, 2:]), {"num_split": 2}),
    Case("SplitD", {"x": X}, (X[:, :2], X[:, 2:]), {"num_split": 2, "split_dim": 1}),
    Case(
        "SplitV",
        {"x": X, "size_splits": i64(1, -1), "split_dim": scalar(1, torch.int32)},
        (X[:, :1], X[:, 1:]),
        {"num_split": 2},
    ),
    Case("SplitVD", {"x": X}, (X[:, :3], X[:, 3:]), {"num_split": 2, "split_dim": 1, "size_splits": [3, 1]}),
    Case("Slice", {"x": X, "offsets": i64(1, 0), "size": i64(-1, 2)}, X[1:, :2]),
    Case(
        "StridedSliceV2",
        {"x": CUBE, "begin": i64(1, -3), "end": i64(9, -1), "axes": i64(1, 2), "strides": i64(1, 2)},
        CUBE[:, 1:9, -3:-1:2],
    ),
    Case("StridedSliceV2", {"x": X, "begin": i64(1), "end": i64(2)}, X[:2], {"begin_mask": 1}),
    Case("StridedSliceV2", {"x": X, "begin": i64(1), "end": i64(2)}, X[1:], {"end_mask": 1}),
    Case(
        "StridedSlice",
        {"x": CUBE, "begin": i64(-1, 1), "end": i64(0, 3), "strides": i64(1, 1)},
        CUBE[-1, 1:3],
        {"shrink_axis_mask": 1},
    ),
    Case("Pad", {"x": X, "paddings": torch.tensor([[1, 0], [0, 2]])}, functional.pad(X, (0, 2, 1, 0))),
    Case(
        "PadV3",
        {"x": X, "paddings": i64(1, 0, 0, 2), "constant_values": scalar(3.0, torch.float32)},
        functional.pad(X, (0, 2, 1, 0), value=3.0),
    ),
    Case(
        "PadV3", {"x": X, "paddings": i64(1, 0, 0, 2)}, functional.pad(X, (0, 2, 1, 0)), {"paddings_contiguous": True}
    ),
    Case("PadV3", {"x": X, "paddings": i64(1, 0, 0, 2)}, functional.pad(X, (0, 2, 1, 0)).clone(), {}),
    Case(
        "PadV3", {"x": X, "paddings": i64(1, 2, 0, 3)}, functional.pad(X, (2, 3, 1, 0)), {"paddings_contiguous": False}
    ),
    Case("Fill", {"dims": i64(2, 3), "value": scalar(1.5, torch.bfloat16)}, torch.full((2, 3), 1.5).bfloat16()),
    Case("Empty", {"shape": i64(2, 3)}, torch.zeros(2, 3), {"dtype": torch.float32, "init": True}),
    Case("Empty", {"shape": i64(2)}, torch.full((2,), torch.nan), {"dtype": torch.float32}),
    Case("Range", {"start": scalar(7), "limit": scalar(0), "delta": scalar(-3)}, i64(7, 4, 1)),
    Case("Range", {"start": scalar(0), "limit": scalar(0), "delta": scalar(1)}, i64()),
    Case(
        "Range",
        {"start": scalar(0, torch.int32), "limit": scalar(3), "delta": scalar(1, torch.int32)},
        torch.arange(3, dtype=torch.int32),
    ),
    Case("Bitcast", {"x": X}, X.view(torch.int32), {"type": torch.int32}),
    Case(
        "AsStrided",
        {"x": X, "size": i64(2, 2), "stride": i64(4, 1), "storage_offset": i64(5)},
        X[1:3, 1:3],
    ),
    # ---- reductions and order
    Case("ReduceSum", {"x": CUBE, "axes": i64(0, 2)}, sum(CUBE[i, :, j] for i in range(2) for j in range(4)), {}, 1e-5),  # type: ignore[arg-type]
    Case("ReduceMean", {"x": CUBE, "axes": i64(-1)}, CUBE.sum(-1, True) / 4, {"keep_dims": True}, 1e-6),
    Case("ReduceMax", {"x": CUBE, "axes": i64(1)}, CUBE.sort(1).values[:, -1]),
    Case("ReduceMin", {"x": CUBE, "axes": i64(1)}, CUBE.sort(1).values[:, 0]),
    Case("ReduceAny", {"x": YES, "axes": i64(1)}, YES.sum(1) > 0),
    Case("ReduceAll", {"x": YES | NO, "axes": i64(0)}, (YES | NO).sum(0) == 3),
    Case("Cumsum", {"x": i64(1, 2, 3), "axis": scalar(0)}, i64(1, 3, 6)),
    Case("Cumsum", {"x": i64(1, 2, 3), "axis": scalar(0)}, i64(0, 1, 3), {"exclusive": True}),
    Case("Cumsum", {"x": i64(1, 2, 3), "axis": scalar(0)}, i64(6, 5, 3), {"reverse": True}),
    Case("Cumsum", {"x": i64(1, 2, 3), "axis": scalar(0)}, i64(5, 3, 0), {"reverse": True, "exclusive": True}),
    Case("SoftmaxV2", {"x": CUBE}, CUBE.exp() / CUBE.exp().sum(1, True), {"axes": [1]}, 1e-6),
    Case("SoftmaxV2", {"x": X.half()}, X.half().float().softmax(-1), {"half_to_float": True}, 1e-6),
    Case("TopKV2", {"x": X, "k": scalar(2)}, (X.sort(-1, True).values[:, :2], X.argsort(-1, True)[:, :2].int())),
    Case(
        "TopKV2",
        {"x": X, "k": scalar(2, torch.int32)},
        (X.sort(0).values[:2], X.argsort(0)[:2].int()),
        {"dim": 0, "largest": False},
    ),
    Case("Sort", {"x": i64(3, 1, 3, 2)}, (i64(3, 3, 2, 1), i64(0, 2, 3, 1).int()), {"descending": True}),
    Case("ArgMaxV2", {"x": torch.tensor([[1, 5, 5], [7, 2, 7]]), "dimension": scalar(1)}, i64(1, 0)),
    Case("Histogram", {"x": i64(0, 1, 1, 3).float()}, i64(1, 2, 0, 1).float(), {"bins": 4, "min": 0.0, "max": 3.0}),
    # ---- positions
    Case("Gather", {"x": X, "indices": i64(2, 0)}, torch.stack([X[2], X[0]])),
    Case("Gather", {"x": X, "indices": scalar(-1)}, X[2], {"negative_index_support": True}),
    Case("GatherV2", {"x": CUBE, "indices": torch.tensor([[2, 0]]), "axis": i64(1)}, CUBE[:, [2, 0]][:, None]),
    Case("GatherElements", {"x": X, "index": i64(3, 0)[None]}, torch.stack([X[0, 3], X[0, 0]])[None], {"dim": 1}),
    Case("GatherNd", {"x": CUBE, "indices": torch.tensor([[1, 2], [0, 0]])}, torch.stack([CUBE[1, 2], CUBE[0, 0]])),
    Case(
        "IndexByTensor",
        {"x": CUBE, "indices": [i64(1, 0), i64(3, -1)]},
        CUBE[[1, 0], :, [3, 3]],
        {"indices_mask": [1, 0, 1]},
    ),
    Case(
        "ScatterElements",
        {"data": X, "indices": i64(1, 1, 1, 1)[None], "updates": X[2:]},
        torch.stack([X[0], X[2], X[2]]),
        {"axis": 0, "reduction": "none"},
    ),
    Case(
        "ScatterElements",
        {"data": X, "indices": i64(1, 1, 1, 1)[None], "updates": X[2:]},
        torch.stack([X[0], X[1] + X[2], X[2]]),
        {"axis": 0, "reduction": "add"},
    ),
    Case(
        "ScatterNdUpdate",
        {"var": X, "indices": i64(2, 0)[:, None], "updates": -X[:2]},
        torch.stack([-X[1], X[1], -X[0]]),
    ),
    Case("ScatterUpdate", {"var": X, "indices": i64(2, 0), "updates": -X[:2]}, torch.stack([-X[1], X[1], -X[0]])),
    Case(
        "Scatter",
        {"var": CUBE, "indices": i64(2, 0), "updates": -CUBE[:, :1]},
        torch.stack([torch.cat([CUBE[0, :2], -CUBE[0, :1]]), torch.cat([-CUBE[1, :1], CUBE[1, 1:]])]),
        {"reduce": "update", "axis": 1},
    ),
    Case(
        "ScatterPaKvCache",
        {"key": ROWS, "key_cache": PAGES, "slot_mapping": i64(*SLOTS), "value": -ROWS, "value_cache": PAGES + 1},
        (written(PAGES, SLOTS, ROWS), written(PAGES + 1, SLOTS, -ROWS)),
    ),
    # ---- products
    Case("MatMul", {"x1": X, "x2": B}, X @ B.T, {"transpose_x2": True}),
    Case("MatMul", {"x1": B, "x2": B, "bias": BETA}, B.T @ B + BETA, {"transpose_x1": True}, 1e-6),
    *(
        Case(t, {"x1": X, "x2": B, "bias": None, "offset_w": None}, X @ B.T, {"transpose_x2": True, "offset_x": 0})
        for t in ("MatMulV2", "MatMulV3")
    ),
    Case("BatchMatMul", {"x1": A, "x2": A}, torch.einsum("bmk,bnk->bmn", A, A), {"adj_x2": True}, 1e-5),
    Case("BatchMatMul", {"x1": A, "x2": A}, torch.einsum("bkm,bkn->bmn", A, A), {"adj_x1": True}, 1e-5),
    *(
        Case(
            t, {"x1": A, "x2": B, "bias": rand(5)}, torch.einsum("bmk,nk->bmn", A, B) + rand(5), {"adj_x2": True}, 1e-5
        )
        for t in ("BatchMatMulV2", "BatchMatMulV3")
    ),
    Case(
        "TransposeBatchMatMul",
        {"x1": A, "x2": rand(3, 4, 5)},
        torch.einsum("mbk,bkn->mbn", A, rand(3, 4, 5)),
        {"perm_x1": [1, 0, 2], "perm_y": [1, 0, 2]},
        1e-5,
    ),
    # ---- norms
    Case(
        "RmsNorm", {"x": X, "gamma": GAMMA}, (functional.rms_norm(X, (4,), GAMMA, 1e-3), None), {"epsilon": 1e-3}, 1e-5
    ),  # type: ignore[arg-type]
    Case(
        "RmsNorm",
        {"x": X, "gamma": GAMMA},
        (functional.rms_norm(X, (4,), GAMMA, 1e-6), 1 / ((X * X).sum(-1, True) / 4 + 1e-6).sqrt()),
        {},
        1e-5,
    ),
    Case(
        "AddRmsNorm",
        {"x1": X, "x2": 2 * X, "gamma": GAMMA},
        (functional.rms_norm(3 * X, (4,), GAMMA, 1e-6), None, 3 * X),  # type: ignore[arg-type]
        {},
        1e-5,
    ),
    Case(
        "AddRmsNormCast",
        {"x1": BF, "x2": BG, "gamma": GAMMA.bfloat16()},
        (None, None, None, BF + BG),  # type: ignore[arg-type]
    ),
    Case(
        "LayerNormV4",
        {"x": X, "normalized_shape": i64(4), "gamma": GAMMA, "beta": BETA},
        functional.layer_norm(X, (4,), GAMMA, BETA, 1e-2),
        {"epsilon": 1e-2},
        1e-5,
    ),
    # ---- rotations
    Case("RotaryMul", {"x": QUERY, "r1": COS, "r2": SIN}, rotated(QUERY, COS, SIN), {}, 1e-6),
    Case("InterleaveRope", {"x": QUERY, "cos": COS, "sin": SIN}, rotated(EVEN_ODD, COS, SIN), {}, 1e-6),
    Case("RotaryPositionEmbedding", {"x": QUERY, "cos": COS, "sin": SIN}, rotated(QUERY, COS, SIN), {}, 1e-6),
    Case(
        "RotaryPositionEmbedding", {"x": QUERY, "cos": COS, "sin": SIN}, rotated(EVEN_ODD, COS, SIN), {"mode": 3}, 1e-6
    ),
    Case(
        "RotaryPositionEmbedding",
        {
            "x": QUERY,
            "cos": COS[..., :2].repeat_interleave(2, -1),
            "sin": SIN[..., :2].repeat_interleave(2, -1),
        },
        rotated(EVEN_ODD, COS, SIN).unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2),
        {"mode": 1},
        1e-6,
    ),
    # ---- quantised
    Case("DynamicQuant", {"x": X}, int8_rows(X), {}, 1e-7),
    Case("DynamicQuant", {"x": X, "smooth_scales": GAMMA}, int8_rows(X * GAMMA), {}, 1e-7),
    Case("DynamicQuant", {"x": torch.zeros(2, 4)}, (torch.zeros(2, 4).to(torch.int8), torch.zeros(2))),
    Case(
        "AscendQuantV2",
        {"x": 40 * X, "scale": GAMMA, "offset": BETA},
        (40 * X * GAMMA + BETA).round().clamp(-128, 127).to(torch.int8),
    ),
    Case(
        "QuantBatchMatmulV3",
        {"x1": INT8_A, "x2": INT8_B, "scale": SCALE, "pertoken_scale": POSITIVE[:, 0]},
        ((INT8_A.int() @ INT8_B.T.int()) * SCALE * POSITIVE[:, :1]).bfloat16(),
        {"dtype": torch.bfloat16, "transpose_x2": True},
    ),
    Case(
        "QuantBatchMatmulV3",
        {
            "x1": INT8_A,
            "x2": INT8_B.T.contiguous(),
            "scale": SCALE.view(torch.int32).long(),
            "bias": torch.arange(5, dtype=torch.int32),
        },
        ((INT8_A.int() @ INT8_B.T.int() + torch.arange(5)) * SCALE).half(),
        {"dtype": torch.float16},
    ),
]
CASES = [
    case for case in CASES if not (case.type == "PadV3" and case.attrs == {} and "constant_values" not in case.inputs)
]
OTHERS = test_ge_attention.COVERED | test_ge_collectives.COVERED | test_ge_moe.COVERED


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case.type}" for i, case in enumerate(CASES)])
def test_an_op_gives_what_torch_gives(case: Case) -> None:
    expected = case.expected if isinstance(case.expected, tuple) else (case.expected,)
    fed = {
        name: [t.clone() for t in v] if isinstance(v, list) else None if v is None else v.clone()
        for name, v in case.inputs.items()
    }
    for found, wanted in zip(run_op(case.type, fed, len(expected), **case.attrs), expected, strict=True):
        if wanted is not None:
            # Functions that torch approximates may differ in the last place.
            close = case.within or (1e-6 if wanted.dtype.is_floating_point else 0)
            torch.testing.assert_close(found, wanted, rtol=close, atol=close, equal_nan=True)


def test_every_op_type_has_a_case() -> None:
    assert {case.type for case in CASES} | OTHERS == op_types()


def test_an_op_type_that_is_not_known_is_an_error_and_never_skipped() -> None:
    with pytest.raises(GeError, match=r"op 'tested' \(Swoosh\): unknown op type \(did you mean 'Swish'\?\)"):
        run_op("Swoosh", {"x": X})


@pytest.mark.parametrize(
    ("op_type", "inputs", "attrs", "message"),
    [
        ("MatMul", {"x1": X, "x2": B}, {"transpose_x3": True}, r"unknown attribute 'transpose_x3' = True \(did you"),
        ("MatMul", {"x1": X, "x2": B}, {"transpose_x2": 1}, "attribute 'transpose_x2': expected bool, found i 1"),
        ("Pack", {"x": [X]}, {}, "expected attribute 'N', found none"),
        ("Pack", {"x": [X, X]}, {"N": 3}, "attribute 'N': expected 2 as there are inputs, found 3"),
        ("Cast", {"x": X}, {"dst_type": 1000}, "attribute 'dst_type': expected the number of a dtype"),
        ("Reshape", {"x": X, "shape": i64(12)}, {"axis": 1}, "attribute 'axis': expected 0, found 1"),
        (
            "StridedSliceV2",
            {"x": X, "begin": i64(0), "end": i64(1)},
            {"new_axis_mask": 1},
            "'new_axis_mask': expected 0",
        ),
        (
            "SplitV",
            {"x": X, "size_splits": i64(1, 3), "split_dim": scalar(1)},
            {"num_split": 3},
            "'num_split': expected 2",
        ),
    ],
)
def test_an_attribute_that_the_prototype_lacks_or_the_reference_does_not_mean_is_an_error(
    op_type: str, inputs: Any, attrs: Any, message: str
) -> None:
    with pytest.raises(GeError, match=message):
        run_op(op_type, inputs, **attrs)


@pytest.mark.parametrize(
    ("op_type", "inputs", "message"),
    [
        ("Add", {"x1": X, "x2": X.double()}, "input 'x2': expected float32 as 'x1', found float64; cast it"),
        ("Mul", {"x1": BF, "x2": X}, "input 'x2': expected bfloat16 as 'x1', found float32; cast it"),
        ("MatMul", {"x1": INT, "x2": JNT}, "input 'x1': expected float16.bfloat16.float32, found int64"),
        ("Gather", {"x": X, "indices": X}, "input 'indices': expected int32.int64, found float32"),
        ("SelectV2", {"condition": INT, "then": X, "else": X}, "input 'condition': expected bool, found int64"),
        (
            "Range",
            {"start": scalar(0), "limit": scalar(3.0, torch.float32), "delta": scalar(1)},
            "expected operands of one",
        ),
    ],
)
def test_operands_are_not_promoted(op_type: str, inputs: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        run_op(op_type, inputs)


@pytest.mark.parametrize(
    ("op_type", "inputs", "attrs", "message"),
    [
        ("MatMul", {"x1": X, "x2": B}, {}, "expected inner sizes that agree, found .3, 4. and .5, 4."),
        ("Gather", {"x": X, "indices": i64(3)}, {}, r"expected positions in \[0, 3\), found 3 to 3"),
        ("Gather", {"x": X, "indices": i64(-1)}, {}, r"expected positions in \[0, 3\), found -1 to -1"),
        ("Reshape", {"x": X, "shape": i64(5, 5)}, {}, "failed: shape"),
        ("Transpose", {"x": X, "perm": i64(0, 0)}, {}, "expected an order of 2 dims"),
        ("Div", {"x1": i64(-3), "x2": i64(2)}, {}, "expected integers that are not negative"),
        ("ReduceSum", {"x": X, "axes": i64()}, {}, "expected at least one dim"),
        ("Swish", {"x": X, "y": X}, {}, r"unknown or repeated input 'y' \(known: x\)"),
        ("Add", {"x1": X}, {}, "expected input 'x2', found none"),
        (
            "MatMulV2",
            {"x1": X, "x2": X, "offset_w": torch.ones(4, dtype=torch.int8)},
            {},
            "input 'offset_w' is not part of",
        ),
    ],
)
def test_what_an_op_cannot_take_is_an_error(op_type: str, inputs: Any, attrs: Any, message: str) -> None:
    with pytest.raises(GeError, match=f"rank 0: op 'tested' .*: .*{message}"):
        run_op(op_type, inputs, **attrs)


def test_a_result_of_another_dtype_than_the_traced_graph_says_is_an_error() -> None:
    graph, values = one_op("Swish", {"x": X})
    desc = graph.op("tested").output_descs[0]
    desc.dtype, desc.traced = torch.bfloat16, True
    with pytest.raises(GeError, match="output 0: the traced graph expects bfloat16, found float32; a cast is missing"):
        interpret([GeProgram(graph, values)])


def test_more_outputs_than_the_op_makes_are_an_error() -> None:
    with pytest.raises(GeError, match="expected at most 1 outputs, found 2"):
        run_op("Swish", {"x": X}, 2)


def test_attributes_that_torchair_adds_for_itself_are_passed_over() -> None:
    graph, values = one_op("Swish", {"x": X})
    graph.op("tested").attrs["_input_name_key"] = attr(["x"])
    interpret([GeProgram(graph, values)])
