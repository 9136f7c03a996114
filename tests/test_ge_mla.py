"""GE's ops that make queries and keys from tokens and write caches, against their formula token by token."""

from __future__ import annotations

from typing import Any

import npu_fused_ops
import pytest
import torch
from ge_build import one_op
from torch import Tensor

from cpcompile.lowering.ge import GeError, GeProgram, interpret

COVERED = {"KvRmsNormRopeCache", "MlaProlog", "MlaPrologV2", "MlaPrologV3"}

TOKENS, HIDDEN, LOW, HEADS, NOPE, WIDTH, ROPE, SIZE, BLOCKS = 5, 6, 7, 3, 3, 8, 4, 4, 9
PLACES = [6, 0, -1, 3, 1]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def run_writing(
    op_type: str, inputs: dict[str, Tensor], outputs: int, **attrs: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Results, and the inputs afterwards."""
    given = {name: value.clone() for name, value in inputs.items()}
    graph, values = one_op(op_type, given, outputs, **attrs)
    return interpret([GeProgram(graph, values)])[0], given


def normed(row: Tensor, gamma: Tensor, epsilon: float) -> Tensor:
    return row / (float((row * row).sum()) / len(row) + epsilon) ** 0.5 * gamma


def turned(row: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours ``(a, b)`` turned, all first ones ahead."""
    half = len(row) // 2
    out = torch.empty(len(row))
    for i in range(half):
        a, b = row[2 * i], row[2 * i + 1]
        out[i] = a * cos[i] - b * sin[i]
        out[half + i] = b * cos[half + i] + a * sin[half + i]
    return out


def written(cache: Tensor, rows: list[Tensor]) -> Tensor:
    """Rows with a negative place are left out."""
    out = cache.clone()
    for place, row in zip(PLACES, rows, strict=True):
        if place >= 0:
            out[place // SIZE, place % SIZE, 0] = row
    return out


CACHE, ROPES = rand(BLOCKS, SIZE, 1, WIDTH, seed=3), rand(BLOCKS, SIZE, 1, ROPE, seed=3)
KEYS = {
    "kv": rand(TOKENS, 1, 1, WIDTH + ROPE), "gamma": rand(WIDTH), "cos": rand(TOKENS, 1, 1, ROPE, seed=1),
    "sin": rand(TOKENS, 1, 1, ROPE, seed=2), "index": torch.tensor(PLACES), "k_cache": ROPES, "ckv_cache": CACHE,
}  # fmt: skip


@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("epsilon", [1e-5, 0.5])
@pytest.mark.parametrize("mode", ["PA", "PA_BNSD"])
def test_keys_are_normed_rotated_and_written_to_the_caches(mode: str, epsilon: float, said: bool) -> None:
    attrs = {"cache_mode": mode, "is_output_kv": said, "epsilon": epsilon}
    (k_cache, ckv_cache, rope, latent), after = run_writing("KvRmsNormRopeCache", KEYS, 4, **attrs)
    rows = KEYS["kv"].view(TOKENS, -1)
    latents = [normed(row[:WIDTH], KEYS["gamma"], epsilon) for row in rows]
    cos, sin = (KEYS[name].view(TOKENS, ROPE) for name in ("cos", "sin"))
    ropes = [turned(row[WIDTH:], c, s) for row, c, s in zip(rows, cos, sin, strict=True)]
    torch.testing.assert_close(ckv_cache, written(CACHE, latents), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(k_cache, written(ROPES, ropes), rtol=1e-5, atol=1e-5)
    assert torch.equal(after["k_cache"], k_cache) and torch.equal(after["ckv_cache"], ckv_cache)
    if said:
        torch.testing.assert_close(latent.view(TOKENS, -1), torch.stack(latents), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rope.view(TOKENS, -1), torch.stack(ropes), rtol=1e-5, atol=1e-5)
    else:
        assert latent.isnan().all() and rope.isnan().all()  # undefined: whatever reads it shows


PROLOG = {
    "token_x": rand(TOKENS, HIDDEN), "weight_dq": rand(HIDDEN, LOW), "weight_uq_qr": rand(LOW, HEADS * (NOPE + ROPE)),
    "weight_uk": rand(HEADS, NOPE, WIDTH), "weight_dkv_kr": rand(HIDDEN, WIDTH + ROPE),
    "rmsnorm_gamma_cq": rand(LOW), "rmsnorm_gamma_ckv": rand(WIDTH), "rope_sin": rand(TOKENS, ROPE, seed=1),
    "rope_cos": rand(TOKENS, ROPE), "cache_index": torch.tensor(PLACES), "kv_cache": CACHE, "kr_cache": ROPES,
}  # fmt: skip
EPSILONS = {"rmsnorm_epsilon_cq": 0.5, "rmsnorm_epsilon_ckv": 0.25}


def prolog(epsilon_q: float, epsilon_kv: float) -> list[Tensor]:
    """Token by token and head by head: queries, their ropes, both caches, and the normed latents of queries."""
    p, queries, ropes, latents, keys, key_ropes = PROLOG, [], [], [], [], []
    for t in range(TOKENS):
        x, cos, sin = p["token_x"][t], p["rope_cos"][t], p["rope_sin"][t]
        latents.append(normed(p["weight_dq"].T @ x, p["rmsnorm_gamma_cq"], epsilon_q))
        heads = (p["weight_uq_qr"].T @ latents[-1]).split(NOPE + ROPE)
        queries.append(torch.stack([p["weight_uk"][h].T @ head[:NOPE] for h, head in enumerate(heads)]))
        ropes.append(torch.stack([turned(head[NOPE:], cos, sin) for head in heads]))
        kv = p["weight_dkv_kr"].T @ x
        keys.append(normed(kv[:WIDTH], p["rmsnorm_gamma_ckv"], epsilon_kv))
        key_ropes.append(turned(kv[WIDTH:], cos, sin))
    caches = [written(CACHE, keys), written(ROPES, key_ropes)]
    return [torch.stack(queries), torch.stack(ropes), *caches, torch.stack(latents)]


@pytest.mark.parametrize(("op_type", "outputs"), [("MlaProlog", 4), ("MlaPrologV2", 5), ("MlaPrologV3", 7)])
@pytest.mark.parametrize("epsilons", [EPSILONS, {}])
def test_the_prolog_computes_queries_and_writes_keys(op_type: str, outputs: int, epsilons: dict[str, float]) -> None:
    found, after = run_writing(op_type, PROLOG, outputs, **epsilons)
    *expected, _ = prolog(*(epsilons.values() or (1e-5, 1e-5)))
    for ours, theirs in zip(found[:4], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert torch.equal(after["kv_cache"], found[2]) and torch.equal(after["kr_cache"], found[3])
    assert [part.numel() for part in found[4:]] == [0] * (outputs - 4)


def test_the_prolog_takes_batches_and_gives_the_latents_of_queries() -> None:
    batched = {
        **PROLOG, **{name: PROLOG[name][None] for name in ("token_x", "rope_sin", "rope_cos", "cache_index")}
    }  # fmt: skip
    found, _ = run_writing("MlaPrologV3", batched, 7, query_norm_flag=True)
    expected = prolog(1e-5, 1e-5)
    for ours, theirs in zip([found[0][0], found[1][0], found[5][0]], [*expected[:2], expected[4]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_stand_in_of_the_other_tests_agrees() -> None:
    """Written apart from these: the same numbers from both."""
    plain = {**PROLOG, "cache_index": torch.tensor([6, 0, 9, 3, 1])}
    *expected, kv_cache, kr_cache = npu_fused_ops._prolog(**plain, query_norm_flag=True)
    found, _ = run_writing("MlaPrologV3", plain, 7, query_norm_flag=True)
    for ours, theirs in zip(found, [*expected[:2], kv_cache, kr_cache, *expected[2:]], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


SCALE = torch.ones(1)


@pytest.mark.parametrize(
    ("op_type", "inputs", "attrs", "message"),
    [
        ("KvRmsNormRopeCache", KEYS, {"cache_mode": "Norm"}, "attribute 'cache_mode': expected 'PA' or 'PA_BNSD'"),
        ("KvRmsNormRopeCache", {**KEYS, "c_kv_scale": SCALE}, {"cache_mode": "PA"}, "input 'c_kv_scale'"),
        (
            "KvRmsNormRopeCache",
            {**KEYS, "index": torch.tensor([36, 0, 1, 2, 3])},
            {"cache_mode": "PA"},
            "places beyond the cache",
        ),
        (
            "KvRmsNormRopeCache",
            {**KEYS, "index": torch.tensor([3])},
            {"cache_mode": "PA"},
            "expected a place for each of 5 rows, found 1",
        ),
        ("KvRmsNormRopeCache", {**KEYS, "k_cache": ROPES[:, :, 0]}, {"cache_mode": "PA"}, "expected a cache .blocks"),
        ("MlaProlog", PROLOG, {"cache_mode": "PA_NZ"}, "attribute 'cache_mode': expected 'PA_BSND', found 'PA_NZ'"),
        ("MlaPrologV2", {**PROLOG, "quant_scale_ckr": SCALE}, {}, "is not part of the reference"),
        ("MlaPrologV2", {**PROLOG, "dequant_scale_w_dq": SCALE}, {}, "input 'w_dq' is not part of the reference"),
        ("MlaPrologV3", {**PROLOG, "dequant_scale_x": SCALE}, {}, "is not part of the reference"),
        ("MlaPrologV3", {**PROLOG, "k_nope_clip_alpha": SCALE}, {}, "input 'k_nope_clip_alpha' is not part"),
        ("MlaPrologV3", PROLOG, {"weight_quant_mode": 1}, "attribute 'weight': expected 0, found 1"),
        ("MlaPrologV3", PROLOG, {"ckvkr_repo_mode": 1}, "attribute 'keys': expected 0, found 1"),
        ("MlaPrologV3", PROLOG, {"kc_scale": 2.0}, "attribute 'kc_scale': expected 1.0, found 2.0"),
        ("MlaPrologV3", PROLOG, {"cache_mode": "TND"}, "attribute 'cache_mode': expected 'PA_BSND', found 'TND'"),
        ("MlaPrologV3", {**PROLOG, "weight_uk": PROLOG["weight_uk"].half()}, {}, "input 'weight_uk': expected float32"),
        (
            "MlaPrologV3",
            {name: value for name, value in PROLOG.items() if name != "cache_index"},
            {},
            "expected cache_index for paged caches, found none",
        ),
    ],
)
def test_what_the_reference_does_not_have_is_an_error(
    op_type: str, inputs: dict[str, Tensor], attrs: Any, message: str
) -> None:
    with pytest.raises(GeError, match=message):
        run_writing(op_type, inputs, 1, **attrs)
