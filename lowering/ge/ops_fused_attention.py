"""CANN's fused attention of inference, over paged caches and over whole keys.

Prototype: CANN's ``fusion_ops.h``, which torchair's ``dynamic_output_ops.py`` repeats. Semantics: torch_npu's
documentation of ``npu_fused_infer_attention_score``. float32 operands are taken too, as in ``ops_attention``.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cpcompile.lowering.ge.ops_attention import Request, attend, key_lengths, lengths_of, requests_of
from cpcompile.lowering.ge.signatures import Tensors, expect, expect_default, expect_unfed, op

_FLOAT = "float16|bfloat16|float32"
_ALL32 = 2147483647

# input_layout -> dims of queries (and of keys that are not paged), and of the result.
_LAYOUTS: Mapping[str, tuple[str, str]] = {
    **{layout: (layout, layout) for layout in ("TND", "BSND", "BNSD", "BSH")},
    "BNSD_BSND": ("BNSD", "BSND"),
    "TND_NTD": ("TND", "NTD"),
}


def _by_rows(x: Tensor, layout: str, heads: int) -> Tensor:
    """``x`` as ``TND`` or ``BSND``."""
    expect(x.ndim == len(layout), f"expected {layout}, found {list(x.shape)}")
    if layout == "BSH":
        expect(x.shape[-1] % heads == 0, f"expected {heads} heads in the last dim, found {list(x.shape)}")
        return x.reshape(*x.shape[:-1], heads, -1)
    x = x.transpose(1, 2) if layout == "BNSD" else x
    expect(x.shape[-2] == heads, f"expected {heads} heads of {layout}, found {list(x.shape)}")
    return x


def _laid_out(y: Tensor, layout: str) -> Tensor:
    """The result, ``TND`` or ``BSND``, as ``layout``."""
    if layout == "BSH":
        return y.flatten(-2)
    return y.transpose(-3, -2) if layout in ("BNSD", "NTD") else y


@dataclass(frozen=True)
class _Cache:
    """Keys or values of ``heads`` heads: paged by ``table``, else by request, or rows from ``starts`` on."""

    data: Tensor
    table: Tensor | None
    heads: int
    starts: list[int]

    def of(self, request: Request) -> Tensor:
        """The request's keys ``[K, heads, D]``."""
        if self.table is None:
            first = self.starts[request.number] if self.starts else 0
            rows = self.data if self.starts else self.data[request.number]
            expect(first + request.keys <= len(rows), f"expected at most {len(rows)} keys, found {request.keys}")
            return rows[first : first + request.keys]
        pages = self.data if self.data.ndim == 4 else self.data.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        blocks = self.table[request.number, : -(-request.keys // pages.shape[2])].long()
        inside = (blocks >= 0) & (blocks < len(pages))
        expect(bool(inside.all()), f"block_table names blocks beyond {len(pages)}")
        keys = pages[blocks].transpose(1, 2).flatten(0, 1)
        expect(len(keys) >= request.keys, f"block_table: expected blocks for {request.keys} keys, found {len(keys)}")
        return keys[: request.keys]


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
    """Attention of queries over keys and values, whole or in paged caches, MLA's with ropes beside.

    ``input_layout`` is that of queries, keys and the result: ``TND`` (lengths are ends), ``BSND``, ``BNSD``, ``BSH``
    (lengths are each request's, or all rows), and ``X_Y`` with a result of its own. Caches are ``[blocks, heads, size,
    D]`` or ``[blocks, size, heads * D]``; key lengths are then each request's in every layout. ``sparse_mode`` 0 and 1
    see what ``atten_mask`` leaves, 2 is left-up causal, 3 right-down causal, both with the upper triangle ``[2048,
    2048]`` that the op reads by parts. Rows behind a request's length are undefined. Source:
    REG_OP(FusedInferAttentionScore); torch_npu.npu_fused_infer_attention_score. Quantisation, prefixes, paddings,
    bands and sinks are refused.
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
    expect_default(found, input_layout=tuple(_LAYOUTS), sparse_mode=(0, 1, 2, 3), softmax_lse_flag=False)
    bands = {"pre_tokens": pre_tokens, "next_tokens": next_tokens, "pse_type": pse_type, "out_dtype": out_dtype}
    expect_default(bands, pre_tokens=_ALL32, next_tokens=_ALL32, pse_type=0, out_dtype=0)
    expect(len(key) == len(value) == 1, "expected one tensor of keys and one of values")
    layout, result = _LAYOUTS[input_layout]
    heads = num_key_value_heads or num_heads
    parts = [_by_rows(part, layout, num_heads) for part in (query, query_rope) if part is not None]
    caches = [part for part in (key[0], key_rope) if part is not None]
    if block_table is None:
        caches, values = [_by_rows(part, layout, heads) for part in caches], _by_rows(value[0], layout, heads)
    else:
        for part in (*caches, value[0]):
            _check_pages(part, heads, block_size)
        values = value[0]
    rows, kind = torch.cat(parts, -1), "TND" if layout == "TND" else "BSND"
    paged = kind if block_table is None else "PA_BSND"
    lengths, starts = key_lengths(caches[0], paged, lengths_of(actual_seq_lengths_kv, "actual_seq_lengths_kv"))
    ends = lengths_of(actual_seq_lengths, "actual_seq_lengths")
    width = values.shape[-1] // heads if paged == "PA_BSND" and values.ndim == 3 else values.shape[-1]
    out = torch.full((*rows.shape[:-2], num_heads, width), torch.nan, dtype=query.dtype)
    if sparse_mode in (2, 3):
        _check_triangle(atten_mask, sparse_mode)
    flat, written = rows.reshape(-1, *rows.shape[-2:]), out.view(-1, *out.shape[-2:])
    for request in requests_of(rows, kind, ends, lengths):
        keys = torch.cat([_Cache(part, block_table, heads, starts).of(request) for part in caches], -1)
        own = _Cache(values, block_table, heads, starts).of(request)
        visible = _visible(request, atten_mask, sparse_mode, rows.shape[1] if kind == "BSND" else None)
        written[request.rows] = attend(flat[request.rows], keys, own, visible, scale).to(query.dtype)
    return _laid_out(out, result), torch.empty(0, dtype=torch.float32)


def _check_pages(cache: Tensor, heads: int, block_size: int) -> None:
    fits = cache.shape[1] == heads if cache.ndim == 4 else cache.ndim == 3 and cache.shape[2] % heads == 0
    expect(fits, f"expected a cache of {heads} heads, found {list(cache.shape)}")
    expect(cache.shape[-2] == block_size, f"attribute 'block_size': expected {cache.shape[-2]}, found {block_size}")


def _visible(request: Request, mask: Tensor | None, sparse_mode: int, rows: int | None) -> Tensor:
    """``[R, K]``: the keys that each of the request's rows sees, of ``rows`` a request if they are equally many."""
    if sparse_mode in (2, 3):
        seen = request.visible(sparse_mode == 3)
        return seen if sparse_mode == 3 else seen.tril()
    if mask is None:
        expect(sparse_mode == 0, "sparse_mode 1: expected atten_mask, found none")
        return request.visible(False)
    expect(rows is not None, "atten_mask of layout TND: expected sparse_mode 2 or 3")
    expect(mask.ndim in (2, 3) or mask.shape[1] == 1, f"atten_mask: expected one for all heads, found {mask.shape}")
    every = mask.reshape(-1, *mask.shape[-2:])
    fits = every.shape[1] == rows and every.shape[2] >= request.keys
    expect(
        fits and (len(every) == 1 or len(every) > request.number),
        f"atten_mask: expected {rows} rows of {request.keys} keys, found {list(mask.shape)}",
    )
    own = every[request.number if len(every) > 1 else 0]
    return ~own[: request.last - request.first, : request.keys].bool()


@functools.cache
def _triangle() -> Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def _check_triangle(mask: Tensor | None, sparse_mode: int) -> None:
    expect(mask is not None, f"sparse_mode {sparse_mode}: expected atten_mask, found none")
    assert mask is not None
    expect(tuple(mask.shape[-2:]) == (2048, 2048), f"atten_mask: expected [2048, 2048], found {list(mask.shape)}")
    expect(
        torch.equal(mask.bool().view(2048, 2048), _triangle()),
        f"atten_mask: expected the upper triangle that sparse_mode {sparse_mode} reads",
    )
