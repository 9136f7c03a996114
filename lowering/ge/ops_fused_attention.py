"""CANN's fused attention of inference, over paged caches.

Prototype: CANN's ``fusion_ops.h``, which torchair's ``dynamic_output_ops.py`` repeats. Semantics: torch_npu's
documentation of ``npu_fused_infer_attention_score``. float32 operands are taken too, as in ``ops_attention``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_attention import Request, attend, lengths_of, requests_of
from cpcompile.lowering.ge.signatures import Tensors, expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"
_ALL32 = 2147483647


@op(
    "FusedInferAttentionScore",
    "T, T, T, T, bool|uint8|int8, int64, int64, "
    + ", ".join(["any"] * 7)
    + ", int32, int64, int64, "
    + ", ".join(["any"] * 6)
    + ", int64, T, T, any, float32, bfloat16, int64, int64"
    " -> attention_out:T, softmax_lse:float32",
    T=_FLOAT,
)
def fused_infer_attention_score(
    query: Tensor,
    key: Tensors,
    value: Tensors,
    pse_shift: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None,
    dequant_scale1: Tensor | None = None,
    quant_scale1: Tensor | None = None,
    dequant_scale2: Tensor | None = None,
    quant_scale2: Tensor | None = None,
    quant_offset2: Tensor | None = None,
    antiquant_scale: Tensor | None = None,
    antiquant_offset: Tensor | None = None,
    block_table: Tensor | None = None,
    query_padding_size: Tensor | None = None,
    kv_padding_size: Tensor | None = None,
    key_antiquant_scale: Tensor | None = None,
    key_antiquant_offset: Tensor | None = None,
    value_antiquant_scale: Tensor | None = None,
    value_antiquant_offset: Tensor | None = None,
    key_shared_prefix: Tensor | None = None,
    value_shared_prefix: Tensor | None = None,
    actual_shared_prefix_len: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    key_rope_antiquant_scale: Tensor | None = None,
    dequant_scale_query: Tensor | None = None,
    learnable_sink: Tensor | None = None,
    q_start_idx: Tensor | None = None,
    kv_start_idx: Tensor | None = None,
    *,
    num_heads: int,
    scale: float = 1.0,
    pre_tokens: int = _ALL32,
    next_tokens: int = _ALL32,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    sparse_mode: int = 0,
    inner_precise: int = 0,
    block_size: int = 0,
    antiquant_mode: int = 0,
    softmax_lse_flag: bool = False,
    key_antiquant_mode: int = 0,
    value_antiquant_mode: int = 0,
    query_quant_mode: int = 0,
    pse_type: int = 0,
    out_dtype: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attention of queries ``TND`` over paged caches ``[blocks, heads, size, D]``, MLA's with ropes beside.

    ``sparse_mode`` 0 sees all keys, or those that ``atten_mask`` of one request leaves; 3 is right-down causal, its
    mask the upper triangle ``[2048, 2048]`` that the op reads by parts. Query lengths are ends, key lengths each
    request's. Source: REG_OP(FusedInferAttentionScore); torch_npu.npu_fused_infer_attention_score. Other layouts,
    quantisation, prefixes, paddings and sinks are refused.
    """
    expect_unfed(pse_shift=pse_shift, dequant_scale1=dequant_scale1, quant_scale1=quant_scale1)
    expect_unfed(dequant_scale2=dequant_scale2, quant_scale2=quant_scale2, quant_offset2=quant_offset2)
    expect_unfed(antiquant_scale=antiquant_scale, antiquant_offset=antiquant_offset)
    expect_unfed(query_padding_size=query_padding_size, kv_padding_size=kv_padding_size)
    expect_unfed(key_antiquant_scale=key_antiquant_scale, key_antiquant_offset=key_antiquant_offset)
    expect_unfed(value_antiquant_scale=value_antiquant_scale, value_antiquant_offset=value_antiquant_offset)
    expect_unfed(key_shared_prefix=key_shared_prefix, value_shared_prefix=value_shared_prefix)
    expect_unfed(actual_shared_prefix_len=actual_shared_prefix_len, learnable_sink=learnable_sink)
    expect_unfed(key_rope_antiquant_scale=key_rope_antiquant_scale, dequant_scale_query=dequant_scale_query)
    expect_unfed(q_start_idx=q_start_idx, kv_start_idx=kv_start_idx)
    found = {"input_layout": input_layout, "sparse_mode": sparse_mode, "softmax_lse_flag": softmax_lse_flag}
    expect_default(found, input_layout="TND", sparse_mode=(0, 3), softmax_lse_flag=False)
    expect(
        len(key) == len(value) == 1 and block_table is not None, "expected one paged cache of keys and one of values"
    )
    cache = key[0]
    heads = num_key_value_heads or num_heads
    expect(cache.ndim == 4 and cache.shape[1] == heads, f"expected a cache of {heads} heads, found {list(cache.shape)}")
    expect(query.shape[1] == num_heads, f"expected {num_heads} heads of queries, found {list(query.shape)}")
    expect(block_size == cache.shape[2], f"attribute 'block_size': expected {cache.shape[2]}, found {block_size}")
    _check_mask(atten_mask, sparse_mode)
    lengths = lengths_of(actual_seq_lengths_kv, "actual_seq_lengths_kv")
    expect(lengths is not None, "expected actual_seq_lengths_kv for paged caches, found none")
    ends = lengths_of(actual_seq_lengths, "actual_seq_lengths")
    whole = query if query_rope is None else torch.cat([query, query_rope], -1)
    caches = cache if key_rope is None else torch.cat([cache, key_rope], -1)
    out = torch.zeros(*query.shape[:2], value[0].shape[-1], dtype=query.dtype)
    for request in requests_of(query, "TND", ends, lengths or []):
        keys, values = (_paged_heads(request, c, block_table) for c in (caches, value[0]))  # type: ignore[arg-type]
        visible = request.visible(sparse_mode == 3)
        out[request.rows] = attend(whole[request.rows], keys, values, visible, scale).to(query.dtype)
    return out, torch.empty(0, dtype=torch.float32)


def _check_mask(mask: Tensor | None, sparse_mode: int) -> None:
    if sparse_mode == 0:
        expect_unfed(atten_mask=mask)
        return
    expect(mask is not None, "sparse_mode 3: expected atten_mask, found none")
    assert mask is not None
    expect(tuple(mask.shape[-2:]) == (2048, 2048), f"atten_mask: expected [2048, 2048], found {list(mask.shape)}")
    above = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    expect(
        torch.equal(mask.bool().view(2048, 2048), above),
        "atten_mask: expected the upper triangle that sparse_mode 3 reads",
    )


def _paged_heads(request: Request, cache: Tensor, table: Tensor) -> Tensor:
    """``[K, heads, D]`` of a cache ``[blocks, heads, size, D]``."""
    blocks = table[request.number, : -(-request.keys // cache.shape[2])].long()
    expect(bool(((blocks >= 0) & (blocks < cache.shape[0])).all()), f"block_table names blocks beyond {cache.shape[0]}")
    return cache[blocks].transpose(1, 2).flatten(0, 1)[: request.keys]
