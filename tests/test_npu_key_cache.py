"""npu key cache: keys that are normed, rotated and written become one op, equal in what it leaves in the caches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import npu_fused_ops  # noqa: F401  defines the ops
import pytest
import torch
from ascend_process import AscendProcess
from test_ge_forms import targets, traced
from torch import Tensor

from cpcompile.passes.npu_key_cache import LATENT, ROPE, NpuKeyCache

npu = torch.ops.npu
ROWS, BLOCKS, SIZE = 5, 3, 4
FUSED = "npu.npu_kv_rmsnorm_rope_cache_v2_functional.default"


def given(latent: int = LATENT, rope: int = ROPE, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Rows of queries and keys, gamma, cosines, sines, places and both caches."""
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angle = torch.rand((ROWS, 1, 1, rope), generator=generator)
    places = torch.tensor([7, 0, 11, 2, 5], dtype=torch.int32)
    caches = values(BLOCKS, SIZE, 1, latent), values(BLOCKS, SIZE, 1, rope)
    return (
        values(ROWS, 8 + latent + rope),
        values(latent),
        angle.cos().to(dtype),
        angle.sin().to(dtype),
        places,
        *caches,
    )


def put(cache: Tensor, places: Tensor, rows: Tensor) -> Tensor:
    flat = cache.view(-1, cache.shape[-1])
    return npu.npu_scatter_nd_update(flat, places.unsqueeze(1), rows).view(cache.shape)


def written(
    x: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, places: Tensor, latents: Tensor, ropes: Tensor
) -> tuple[Tensor, Tensor]:
    """As a serving model has it."""
    _, keys = x.split([8, x.shape[1] - 8], -1)
    latent, rope = keys.split([gamma.shape[0], cos.shape[-1]], -1)
    latents = put(latents, places, npu.npu_rms_norm(latent, gamma, 1e-6)[0])
    rotated = npu.npu_interleave_rope(rope[:, None, None], cos, sin)[:, 0, 0]
    return latents, put(ropes, places, rotated)


def rope_first(
    x: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, places: Tensor, latents: Tensor, ropes: Tensor
) -> tuple[Tensor, Tensor]:
    keys = x[:, 8:]
    rotated = npu.npu_interleave_rope(keys[:, gamma.shape[0] :].view(ROWS, 1, 1, -1), cos, sin)
    ropes = put(ropes, places, rotated.view(ROWS, -1))
    return put(latents, places, npu.npu_rms_norm(keys[:, : gamma.shape[0]], gamma, 1e-6)[0]), ropes


def of_columns(
    x: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, places: Tensor, latents: Tensor, ropes: Tensor
) -> tuple[Tensor, Tensor]:
    """Both parts as columns of rows that begin with queries."""
    rotated = npu.npu_interleave_rope(x[:, 8 + LATENT :].view(ROWS, 1, 1, ROPE), cos, sin).view(ROWS, ROPE)
    latents = put(latents, places, npu.npu_rms_norm(x[:, 8 : 8 + LATENT], gamma, 1e-6)[0])
    return latents, put(ropes, places, rotated)


@pytest.mark.parametrize("function", [written, rope_first, of_columns])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keys_are_written_by_one_op_and_equal(function: Callable[..., Any], dtype: torch.dtype) -> None:
    values = given(dtype=dtype)
    before = [cache.clone() for cache in values[-2:]]
    gm = traced(function, *values, mode="fake")
    result = NpuKeyCache()(gm)
    assert (result.rewrites, result.refusals) == (1, [])
    assert targets(gm).count(FUSED) == 1
    assert not [t for t in targets(gm) if "scatter" in t or "rms_norm." in t or "interleave" in t]
    for found, expected in zip(gm(*values), function(*values), strict=True):
        assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(values[-2:], before, strict=True))
    assert NpuKeyCache()(gm).rewrites == 0


def read_twice(*values: Tensor) -> tuple[Tensor, ...]:
    x, gamma, cos, sin, places, latents, ropes = values
    latent = npu.npu_rms_norm(x[:, 8 : 8 + LATENT], gamma, 1e-6)[0]
    rotated = npu.npu_interleave_rope(x[:, 8 + LATENT :].view(ROWS, 1, 1, ROPE), cos, sin).view(ROWS, ROPE)
    return put(latents, places, latent), put(ropes, places, rotated), latent


def apart(*values: Tensor) -> tuple[Tensor, ...]:
    """The rotated part of other rows."""
    x, gamma, cos, sin, places, latents, ropes = values
    rotated = npu.npu_interleave_rope((x * 2)[:, 8 + LATENT :].view(ROWS, 1, 1, ROPE), cos, sin).view(ROWS, ROPE)
    return put(latents, places, npu.npu_rms_norm(x[:, 8 : 8 + LATENT], gamma, 1e-6)[0]), put(ropes, places, rotated)


def elsewhere(*values: Tensor) -> tuple[Tensor, ...]:
    x, gamma, cos, sin, places, latents, ropes = values
    rotated = npu.npu_interleave_rope(x[:, 8 + LATENT :].view(ROWS, 1, 1, ROPE), cos, sin).view(ROWS, ROPE)
    latents = put(latents, places, npu.npu_rms_norm(x[:, 8 : 8 + LATENT], gamma, 1e-6)[0])
    return latents, put(ropes, places + 1, rotated)


def late(*values: Tensor) -> tuple[Tensor, ...]:
    x, gamma, cos, sin, places, latents, ropes = values
    latents = put(latents, places, npu.npu_rms_norm(x[:, 8 : 8 + LATENT], gamma, 1e-6)[0])
    rotated = npu.npu_interleave_rope(x[:, 8 + LATENT :].view(ROWS, 1, 1, ROPE), cos * 2, sin).view(ROWS, ROPE)
    return latents, put(ropes, places, rotated)


NO_PARTNER = "no rotated keys of the same rows are written to the same places"
REFUSED: list[tuple[str, Callable[..., Any], tuple[Tensor, ...]]] = [
    ("keys of 256 and 64: the kernel takes 512 and 64", written, given(256)),
    ("keys of 512 and 32: the kernel takes 512 and 64", written, given(rope=32)),
    (
        "operands of torch.float32: the kernel takes one of (torch.float16, torch.bfloat16)",
        written,
        given(dtype=torch.float32),
    ),
    ("cosines are not [T, 1, 1, D]", written, tuple(v[:1] if k in (2, 3) else v for k, v in enumerate(given()))),
    (NO_PARTNER, apart, given()),
    (NO_PARTNER, elsewhere, given()),
    ("keys are read elsewhere than in the cache", read_twice, given()),
    ("cosines or caches are computed behind the first write", late, given()),
    ("the cache is not [blocks, size, 1, 64]", written, (*given()[:-1], given()[-1].view(-1, ROPE))),
]


@pytest.mark.parametrize(("reason", "function", "values"), REFUSED)
def test_other_keys_stay(reason: str, function: Callable[..., Any], values: tuple[Tensor, ...]) -> None:
    gm = traced(function, *values, mode="fake")
    before = targets(gm)
    result = NpuKeyCache()(gm)
    assert (result.rewrites, [r.reason for r in result.refusals]) == (0, [reason])
    assert targets(gm) == before


def test_a_missing_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "cpcompile.passes.npu_key_cache.missing_ops", lambda names: f"no {names[0]}" if "cache" in names[0] else ""
    )
    result = NpuKeyCache()(traced(written, *given(), mode="fake"))
    assert [r.reason for r in result.refusals] == ["no npu_kv_rmsnorm_rope_cache_v2_functional"]


def lowered(values: tuple[Tensor, ...]) -> tuple[list[Tensor], dict[str, int]]:
    """What the exported graph leaves in the caches, and its ops; in a process with torch_npu."""
    import tempfile
    from pathlib import Path

    from cpcompile.lowering.ascend.export import export
    from cpcompile.lowering.ge import GeProgram, interpret, load
    from cpcompile.lowering.targets import Settings

    gm = traced(written, *values, mode="fake")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        summary, unsupported = export(gm, Path(folder), Settings())
        assert not unsupported
        (found,) = interpret([GeProgram(load(Path(folder) / "model.pb"), list(values))])
    return found, summary.ops


def test_the_lowered_graph_writes_the_same(ascend: AscendProcess) -> None:
    values = given()
    found, ops = ascend(lowered, values)
    assert ops["KvRmsNormRopeCache"] == 1 and not {"ScatterNdUpdate", "RmsNorm", "InterleaveRope"} & ops.keys()
    for one, expected in zip(found, written(*values), strict=True):
        torch.testing.assert_close(one, expected, rtol=2**-7, atol=2**-7)  # one rounding of bfloat16
