"""MLA ahead of attention in GE: queries and keys from tokens, keys normed, rotated and written to paged caches.

Prototypes: CANN's ``fusion_ops.h`` and ``nn_norm_ops.h``, which torchair's ``auto_generated_ge_raw_ops.py`` repeats.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_matmul import product
from cpcompile.lowering.ge.ops_norms import rms_normed
from cpcompile.lowering.ge.ops_rope import interleaved
from cpcompile.lowering.ge.signatures import expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"


def _write_paged(cache: Tensor, index: Tensor, rows: Tensor) -> None:
    """Rows ``[T, D]`` into the places ``index [T]`` of ``cache [blocks, size, 1, D]``; negative ones are left out."""
    expect(cache.ndim == 4 and cache.shape[2] == 1, f"expected a cache [blocks, size, 1, D], found {list(cache.shape)}")
    places, flat = index.reshape(-1).long(), rows.reshape(-1, rows.shape[-1])
    kept = places >= 0
    expect(len(places) == len(flat), f"expected a place for each of {len(flat)} rows, found {len(places)}")
    expect(bool((places < cache.shape[0] * cache.shape[1]).all()), f"places beyond the cache {list(cache.shape)}")
    cache.view(-1, cache.shape[-1])[places[kept]] = flat[kept].to(cache.dtype)


@op(
    "KvRmsNormRopeCache",
    "T, T, T, T, int64, T, T, float32, float32, float32, float32, T -> k_cache:T, ckv_cache:T, k_rope:T, c_kv:T",
    T=_FLOAT,
)
def kv_rms_norm_rope_cache(
    kv: Tensor,
    gamma: Tensor,
    cos: Tensor,
    sin: Tensor,
    index: Tensor,
    k_cache: Tensor,
    ckv_cache: Tensor,
    k_rope_scale: Tensor | None = None,
    c_kv_scale: Tensor | None = None,
    k_rope_offset: Tensor | None = None,
    c_kv_offset: Tensor | None = None,
    v: Tensor | None = None,
    *,
    epsilon: float = 1e-5,
    cache_mode: str = "Norm",
    is_output_kv: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``kv [B, 1, S, L + R]``: the first part normed, the second rotated, both written to paged caches at ``index``.

    The third and fourth result are anything unless ``is_output_kv``, here NaN. Source: REG_OP(KvRmsNormRopeCache);
    aclnnKvRmsNormRopeCache, cache mode "PA" ("PA_BNSD" where one head makes both layouts one). Others are refused.
    """
    expect_unfed(k_rope_scale=k_rope_scale, c_kv_scale=c_kv_scale, k_rope_offset=k_rope_offset)
    expect_unfed(c_kv_offset=c_kv_offset, v=v)
    expect_default({"cache_mode": cache_mode}, cache_mode=("PA", "PA_BNSD"))
    latent = rms_normed(kv[..., : gamma.shape[0]], gamma, epsilon)[0]
    rope = interleaved(kv[..., gamma.shape[0] :], cos, sin)
    _write_paged(k_cache, index, rope)
    _write_paged(ckv_cache, index, latent)
    if not is_output_kv:
        rope, latent = torch.full_like(rope, torch.nan), torch.full_like(latent, torch.nan)
    return k_cache, ckv_cache, rope, latent


_SCALES = "float32, float32, float32, float32, float32, float32, float32"
_WEIGHTS = "T, T, T, T, T, T, T, T, T"


def _prolog(
    token_x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor, Tensor],
    gammas: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    caches: tuple[Tensor, Tensor],
    index: Tensor,
    epsilons: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries ``[T, N, L]`` and ``[T, N, R]`` and the normed latent of queries; the keys go to the caches."""
    weight_dq, weight_uq_qr, weight_uk, weight_dkv_kr = weights
    heads, nope, latent = weight_uk.shape
    lead, x = token_x.shape[:-1], token_x.reshape(-1, token_x.shape[-1])
    sin, cos = (part.reshape(-1, 1, part.shape[-1]) for part in rope)
    normed = rms_normed(product(x, weight_dq, False, False), gammas[0], epsilons[0])[0]
    query = product(normed, weight_uq_qr, False, False).view(len(x), heads, -1)
    absorbed = torch.matmul(query[..., :nope].transpose(0, 1), weight_uk).transpose(0, 1)
    query_rope = interleaved(query[..., nope:], cos, sin)
    kv = product(x, weight_dkv_kr, False, False)
    _write_paged(caches[0], index, rms_normed(kv[:, :latent], gammas[1], epsilons[1])[0])
    _write_paged(caches[1], index, interleaved(kv[:, None, latent:], cos, sin)[:, 0])
    return absorbed.reshape(*lead, heads, latent), query_rope.reshape(*lead, heads, -1), normed.view(*lead, -1)


@op(
    "MlaPrologV2",
    f"{_WEIGHTS}, int64, T, T, {_SCALES} -> query:T, query_rope:T, kv_cache:T, kr_cache:T, "
    "dequant_scale_q_nope:float32",
    T=_FLOAT,
)
def mla_prolog_v2(
    token_x: Tensor,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor,
    rmsnorm_gamma_ckv: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    cache_index: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    dequant_scale_x: Tensor | None = None,
    dequant_scale_w_dq: Tensor | None = None,
    dequant_scale_w_uq_qr: Tensor | None = None,
    dequant_scale_w_dkv_kr: Tensor | None = None,
    quant_scale_ckv: Tensor | None = None,
    quant_scale_ckr: Tensor | None = None,
    smooth_scales_cq: Tensor | None = None,
    *,
    rmsnorm_epsilon_cq: float = 1e-05,
    rmsnorm_epsilon_ckv: float = 1e-05,
    cache_mode: str = "PA_BSND",
) -> tuple[Tensor, ...]:
    """As MlaPrologV3 without its later outputs. Source: REG_OP(MlaPrologV2); aclnnMlaPrologV2WeightNz.

    Weights in a fractal layout have the meaning of plain ones: GE's graph names no layout of theirs.
    """
    expect_unfed(x=dequant_scale_x, w_dq=dequant_scale_w_dq, w_uq_qr=dequant_scale_w_uq_qr)
    expect_unfed(w_dkv_kr=dequant_scale_w_dkv_kr, ckv=quant_scale_ckv, ckr=quant_scale_ckr, cq=smooth_scales_cq)
    expect_default({"cache_mode": cache_mode}, cache_mode="PA_BSND")
    weights = weight_dq, weight_uq_qr, weight_uk, weight_dkv_kr
    gammas, epsilons = (rmsnorm_gamma_cq, rmsnorm_gamma_ckv), (rmsnorm_epsilon_cq, rmsnorm_epsilon_ckv)
    caches = kv_cache, kr_cache
    query, rope, _ = _prolog(token_x, weights, gammas, (rope_sin, rope_cos), caches, cache_index, epsilons)
    return query, rope, *caches, token_x.new_empty(0, dtype=torch.float32)


@op(
    "MlaProlog",
    f"{_WEIGHTS}, int64, T, T, {_SCALES} -> query:T, query_rope:T, kv_cache:T, kr_cache:T",
    T=_FLOAT,
)
@functools.wraps(mla_prolog_v2)
def mla_prolog(*inputs: Any, **attrs: Any) -> tuple[Tensor, ...]:
    """As MlaPrologV2 without its scales. Source: REG_OP(MlaProlog); aclnnMlaProlog."""
    return mla_prolog_v2(*inputs, **attrs)[:4]


@op(
    "MlaPrologV3",
    f"{_WEIGHTS}, T, T, int64, {_SCALES}, int32, float32 -> query:T, query_rope:T, kv_cache:T, kr_cache:T, "
    "dequant_scale_q_nope:float32, query_norm:T, dequant_scale_q_norm:float32",
    T=_FLOAT,
)
def mla_prolog_v3(
    token_x: Tensor,
    weight_dq: Tensor,
    weight_uq_qr: Tensor,
    weight_uk: Tensor,
    weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor,
    rmsnorm_gamma_ckv: Tensor,
    rope_sin: Tensor,
    rope_cos: Tensor,
    kv_cache: Tensor,
    kr_cache: Tensor,
    cache_index: Tensor | None = None,
    dequant_scale_x: Tensor | None = None,
    dequant_scale_w_dq: Tensor | None = None,
    dequant_scale_w_uq_qr: Tensor | None = None,
    dequant_scale_w_dkv_kr: Tensor | None = None,
    quant_scale_ckv: Tensor | None = None,
    quant_scale_ckr: Tensor | None = None,
    smooth_scales_cq: Tensor | None = None,
    actual_seq_len: Tensor | None = None,
    k_nope_clip_alpha: Tensor | None = None,
    *,
    rmsnorm_epsilon_cq: float = 1e-05,
    rmsnorm_epsilon_ckv: float = 1e-05,
    cache_mode: str = "PA_BSND",
    query_norm_flag: bool = False,
    weight_quant_mode: int = 0,
    kv_cache_quant_mode: int = 0,
    query_quant_mode: int = 0,
    ckvkr_repo_mode: int = 0,
    quant_scale_repo_mode: int = 0,
    tile_size: int = 128,
    qc_qr_scale: float = 1.0,
    kc_scale: float = 1.0,
) -> tuple[Tensor, ...]:
    """MLA ahead of attention, without quantisation: queries with absorbed keys, and keys in paged caches.

    ``token_x [T, H]`` or ``[B, S, H]``, weights as they multiply from the right, ``weight_uk [N, D, L]``. Source:
    REG_OP(MlaPrologV3); aclnnMlaPrologV3.
    """
    unfed = [dequant_scale_x, dequant_scale_w_dq, dequant_scale_w_uq_qr, dequant_scale_w_dkv_kr, quant_scale_ckv]
    expect_unfed(scales=[s for s in unfed if s is not None], actual_seq_len=actual_seq_len)
    expect_unfed(quant_scale_ckr=quant_scale_ckr, smooth_scales_cq=smooth_scales_cq)
    expect_unfed(k_nope_clip_alpha=k_nope_clip_alpha)
    modes = {"weight": weight_quant_mode, "kv": kv_cache_quant_mode, "query": query_quant_mode}
    expect_default(modes, weight=0, kv=0, query=0)
    expect_default({"keys": ckvkr_repo_mode, "scales": quant_scale_repo_mode}, keys=0, scales=0)
    scales = {"cache_mode": cache_mode, "qc_qr_scale": qc_qr_scale, "kc_scale": kc_scale}
    expect_default(scales, cache_mode="PA_BSND", qc_qr_scale=1.0, kc_scale=1.0)
    expect(cache_index is not None, "expected cache_index for paged caches, found none")
    assert cache_index is not None
    weights = weight_dq, weight_uq_qr, weight_uk, weight_dkv_kr
    gammas, epsilons = (rmsnorm_gamma_cq, rmsnorm_gamma_ckv), (rmsnorm_epsilon_cq, rmsnorm_epsilon_ckv)
    caches = kv_cache, kr_cache
    query, rope, normed = _prolog(token_x, weights, gammas, (rope_sin, rope_cos), caches, cache_index, epsilons)
    nothing = token_x.new_empty(0, dtype=torch.float32)
    return query, rope, *caches, nothing, normed if query_norm_flag else normed.new_empty(0), nothing.clone()
