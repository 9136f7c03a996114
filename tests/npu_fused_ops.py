"""Stand-ins for torch_npu's ops that compute keys, or queries and keys, and write them to paged caches.

By their schemas (torch_npu 2.13), the functional form of each and the one that writes in place.
"""

from __future__ import annotations

from typing import Any

import torch
from npu_ops import _interleave_rope, _rms_norm, define
from torch import Tensor

EPSILON = 1e-5  # the ops' default, which differs from npu_rms_norm's


def _written(cache: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """``[blocks, size, 1, D]`` with row r of ``values`` at place ``index[r]``, counted over blocks."""
    out = cache.clone(memory_format=torch.contiguous_format)
    rows = out.view(-1, cache.shape[-1])
    for row, place in enumerate(index.flatten().tolist()):
        rows[place] = values.reshape(-1, cache.shape[-1])[row]
    return out


def define_both(name: str, functional: str, head: str, tail: str, kept: int, fake: Any, kernel: Any) -> None:
    """The op that writes two caches in place, the last two of ``head``, and the one that returns them as well.

    Args:
        name: of the first.
        functional: of the second.
        head: positional arguments, of which the caches are the last two.
        tail: keyword arguments.
        kept: number of results other than the caches.
        fake: meta function of the second.
        kernel: of the second.
    """
    names = head.split(", ")
    results = ", ".join(["Tensor"] * kept)
    caches = [f"Tensor({mark}!) {n}" for mark, n in zip("ab", names[-2:], strict=True)]
    mutable = ", ".join([*(f"Tensor {n}" for n in names[:-2]), *caches])
    pure = ", ".join(f"Tensor {n}" for n in names)
    first = len(names) - 2

    def in_place(*args: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
        found = kernel(*args, **kwargs)
        for cache, new in zip(args[first:], found[kept:], strict=True):
            cache.copy_(new)
        return found[:kept]

    define(f"{functional}({pure}, *, {tail}) -> ({results}, Tensor, Tensor)", fake, kernel)
    define(f"{name}({mutable}, *, {tail}) -> ({results})", lambda *a, **k: fake(*a, **k)[:kept], in_place)

    @getattr(torch.ops.npu, name).default.py_functionalize_impl
    def _(ctx: Any, *args: Tensor, **kwargs: Any) -> Any:
        """As torch_npu functionalises it: the functional form, and its last results in the caches' place."""
        given, named = ctx.unwrap_tensors(args), ctx.unwrap_tensors(kwargs)
        with ctx.redispatch_to_next():
            found = getattr(torch.ops.npu, functional).default(*given, **named)
        for cache, new in zip(args[first:], found[kept:], strict=True):
            ctx.replace(cache, new)
            ctx.commit_update(cache)
            ctx.sync(cache)
        return ctx.wrap_tensors(tuple(found[:kept]))


# ---- keys ----------------------------------------------------------------------------------------------------------


def _keys(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, *,
    epsilon: float = EPSILON, cache_mode: str = "Norm", is_output_kv: bool = False, **others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``kv [T, 1, 1, L + R]``: the first part normed, the second rotated. What is not output is garbage."""
    assert cache_mode == "PA" and kv.shape[1:3] == (1, 1) and not any(v is not None for v in others.values())
    latent = _rms_norm(kv[..., : gamma.shape[0]], gamma, epsilon)[0]
    rope = _interleave_rope(kv[..., gamma.shape[0] :], cos, sin)
    caches = _written(k_cache, index, rope), _written(ckv_cache, index, latent)
    if not is_output_kv:
        rope, latent = torch.full_like(rope, torch.nan), torch.full_like(latent, torch.nan)
    return rope, latent, *caches


def _keys_fake(
    kv: Tensor, gamma: Tensor, cos: Tensor, sin: Tensor, index: Tensor, k_cache: Tensor, ckv_cache: Tensor, **_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    widths = cos.shape[3], gamma.shape[0]
    return *(kv.new_empty((*kv.shape[:-1], w)) for w in widths), torch.empty_like(k_cache), torch.empty_like(ckv_cache)


define_both(
    "npu_kv_rmsnorm_rope_cache_v2",
    "npu_kv_rmsnorm_rope_cache_v2_functional",
    "kv, gamma, cos, sin, index, k_cache, ckv_cache",
    "Tensor? k_rope_scale=None, Tensor? c_kv_scale=None, Tensor? k_rope_offset=None, Tensor? c_kv_offset=None, "
    "Tensor? v=None, float epsilon=1e-5, str cache_mode='Norm', bool is_output_kv=False, int? k_cache_dtype=None, "
    "int? ckv_cache_dtype=None",
    2,
    _keys_fake,
    _keys,
)


# ---- queries and keys ----------------------------------------------------------------------------------------------


def _prolog(
    token_x: Tensor, weight_dq: Tensor, weight_uq_qr: Tensor, weight_uk: Tensor, weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor, rmsnorm_gamma_ckv: Tensor, rope_sin: Tensor, rope_cos: Tensor, kv_cache: Tensor,
    kr_cache: Tensor, *, cache_index: Tensor | None = None, rmsnorm_epsilon_cq: float = EPSILON,
    rmsnorm_epsilon_ckv: float = EPSILON, cache_mode: str = "PA_BSND", query_norm_flag: bool = False, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """MLA ahead of attention, of ``token_x [T, H]``, without quantisation."""
    assert cache_mode == "PA_BSND" and cache_index is not None and token_x.ndim == 2
    heads, nope, latent = weight_uk.shape
    normed = _rms_norm(token_x @ weight_dq, rmsnorm_gamma_cq, rmsnorm_epsilon_cq)[0]
    query = (normed @ weight_uq_qr).view(len(token_x), heads, -1)
    absorbed = torch.einsum("thd,hdl->thl", query[..., :nope], weight_uk).contiguous()
    sin, cos = rope_sin[:, None, None], rope_cos[:, None, None]
    query_rope = _interleave_rope(query[..., None, nope:], cos, sin)[..., 0, :]
    kv = token_x @ weight_dkv_kr
    keys = _rms_norm(kv[:, :latent], rmsnorm_gamma_ckv, rmsnorm_epsilon_ckv)[0]
    key_rope = _interleave_rope(kv[:, None, None, latent:], cos, sin)
    caches = _written(kv_cache, cache_index, keys), _written(kr_cache, cache_index, key_rope)
    nothing = token_x.new_empty(0, dtype=torch.float32)
    return absorbed, query_rope, nothing, normed if query_norm_flag else normed.new_empty(0), nothing.clone(), *caches


def _prolog_fake(
    token_x: Tensor, weight_dq: Tensor, weight_uq_qr: Tensor, weight_uk: Tensor, weight_dkv_kr: Tensor,
    rmsnorm_gamma_cq: Tensor, rmsnorm_gamma_ckv: Tensor, rope_sin: Tensor, rope_cos: Tensor, kv_cache: Tensor,
    kr_cache: Tensor, *, query_norm_flag: bool = False, **_: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    tokens, (heads, _, latent) = token_x.shape[0], weight_uk.shape
    nothing = token_x.new_empty(0, dtype=torch.float32)
    return (
        token_x.new_empty(tokens, heads, latent),
        token_x.new_empty(tokens, heads, rope_sin.shape[1]),
        nothing,
        token_x.new_empty((tokens, weight_dq.shape[1]) if query_norm_flag else (0,)),
        torch.empty_like(nothing),
        torch.empty_like(kv_cache),
        torch.empty_like(kr_cache),
    )


_SCALES = [
    "dequant_scale_x", "dequant_scale_w_dq", "dequant_scale_w_uq_qr", "dequant_scale_w_dkv_kr", "quant_scale_ckv",
    "quant_scale_ckr", "smooth_scales_cq", "actual_seq_len", "k_nope_clip_alpha",
]  # fmt: skip
_MODES = ["weight_quant", "kv_cache_quant", "query_quant", "ckvkr_repo", "quant_scale_repo"]
_DTYPES = ["token_x", "weight_dq", "weight_uq_qr", "weight_dkv_kr", "kv_cache"]
define_both(
    "npu_mla_prolog_v3",
    "npu_mla_prolog_v3_functional",
    "token_x, weight_dq, weight_uq_qr, weight_uk, weight_dkv_kr, rmsnorm_gamma_cq, rmsnorm_gamma_ckv, rope_sin, "
    "rope_cos, kv_cache, kr_cache",
    "Tensor? cache_index=None, "
    + "".join(f"Tensor? {name}=None, " for name in _SCALES)
    + "float rmsnorm_epsilon_cq=1e-05, float rmsnorm_epsilon_ckv=1e-05, str cache_mode='PA_BSND', "
    + "bool query_norm_flag=False, "
    + "".join(f"int {name}_mode=0, " for name in _MODES)
    + "int tile_size=128, float qc_qr_scale=1.0, float kc_scale=1.0, "
    + ", ".join(f"int? {name}_dtype=None" for name in _DTYPES),
    5,
    _prolog_fake,
    _prolog,
)
