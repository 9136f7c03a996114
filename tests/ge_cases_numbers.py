"""Cases of GE's products, norms, rotations and quantisation."""

from __future__ import annotations

import torch
from ge_cases import (
    BETA,
    BF,
    BG,
    CUBE,
    GAMMA,
    POSITIVE,
    A,
    B,
    Case,
    X,
    Y,
    i64,
    rand,
)
from torch import Tensor
from torch.nn import functional


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


def int8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Row by row, element by element."""
    scales = torch.tensor([max(abs(v) for v in row) / 127 for row in x.tolist()])
    return torch.stack([(row / s).round() for row, s in zip(x, scales, strict=True)]).to(torch.int8), scales


EXACT, BIAS = (INT8_A.int() @ INT8_B.T.int()).float(), 9 * rand(5, seed=3)
# As npu_trans_quant_param packs scales: the bits of float32 in the lower half, others above.
PACKED = (SCALE.view(torch.int32).long() | 1 << 46).view(torch.uint64)

CASES = [
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
    Case("MatMul", {"x1": BF, "x2": BF, "bias": BETA}, ((BF.T @ BF).float() + BETA).bfloat16(), {"transpose_x1": True}),
    Case("BatchMatMulV2", {"x1": A, "x2": A}, torch.einsum("bkm,bkn->bmn", A, A), {"adj_x1": True}, 1e-5),
    Case(
        "TransposeBatchMatMul",
        {"x1": rand(3, 2, 4), "x2": rand(5, 3, 4)},
        torch.einsum("bmk,nbk->bmn", rand(3, 2, 4), rand(5, 3, 4)),
        {"perm_x2": [1, 2, 0]},
        1e-5,
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
        "RmsNorm",
        {"x": CUBE, "gamma": rand(3, 4)},
        (functional.rms_norm(CUBE, (3, 4), rand(3, 4), 1e-6), 1 / ((CUBE * CUBE).sum((1, 2), True) / 12 + 1e-6).sqrt()),
        {},
        1e-5,
    ),
    Case(
        "RmsNorm",
        {"x": BF, "gamma": GAMMA},
        (BF.float() * (1 / ((BF.float() ** 2).mean(-1, True) + 1e-6).sqrt()) * GAMMA).bfloat16(),
        {},
        1e-12,
    ),
    Case(
        "AddRmsNorm",
        {"x1": X, "x2": Y.expand(3, 4), "gamma": GAMMA},
        (functional.rms_norm(X + Y, (4,), GAMMA, 0.5), None, X + Y),  # type: ignore[arg-type]
        {"epsilon": 0.5},
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
        (
            functional.rms_norm(BF + BG, (4,), GAMMA.bfloat16(), 1e-6).float(),
            functional.rms_norm(BF + BG, (4,), GAMMA.bfloat16(), 1e-6),
            1 / (((BF + BG).float() ** 2).mean(-1, True) + 1e-6).sqrt(),
            BF + BG,
        ),
        {},
        1e-2,
    ),
    Case(
        "LayerNormV4",
        {"x": X, "normalized_shape": i64(4), "gamma": GAMMA, "beta": BETA},
        (
            functional.layer_norm(X, (4,), GAMMA, BETA, 1e-2),
            X.sum(-1, True) / 4,
            1 / (X.var(-1, correction=0, keepdim=True) + 1e-2).sqrt(),
        ),
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
    Case("AscendQuantV2", {"x": 999 * X, "scale": torch.ones(1)}, (999 * X).clamp(-128, 127).round().to(torch.int8)),
    Case(
        "QuantBatchMatmulV3",
        {"x1": INT8_A.T.contiguous(), "x2": INT8_B, "scale": SCALE.bfloat16(), "bias": BIAS.bfloat16()},
        (EXACT * SCALE.bfloat16().float() + BIAS.bfloat16().float()).half(),
        {"dtype": torch.float16, "transpose_x1": True, "transpose_x2": True},
    ),
    Case(
        "QuantBatchMatmul",
        {"x1": INT8_A, "x2": INT8_B.T.contiguous(), "bias": BIAS.int(), "deq_scale": PACKED},
        ((EXACT + BIAS.int()) * SCALE).half(),
    ),
    Case(
        "QuantBatchMatmul",
        {"x1": INT8_A.T.contiguous(), "x2": INT8_B, "bias": BIAS.int(), "deq_scale": PACKED},
        ((EXACT + BIAS.int()) * SCALE).half(),
        {"adj_x1": True, "adj_x2": True},
    ),
    *(
        Case(
            "QuantBatchMatmulV4",
            {"x1": a.to(kind), "x2": b.to(kind), "bias": BIAS, "x1_scale": POSITIVE[:, 0], "x2_scale": SCALE},
            (EXACT * SCALE * POSITIVE[:, :1] + BIAS).bfloat16(),
            {"dtype": torch.bfloat16, **turned},
        )
        for kind in (torch.int8, torch.float8_e4m3fn)
        for a, b, turned in (
            (INT8_A, INT8_B.T.contiguous(), {}),
            (INT8_A.T.contiguous(), INT8_B, {"transpose_x1": True, "transpose_x2": True, "group_size": 0}),
        )
    ),
]
