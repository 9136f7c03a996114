"""Stand-ins for torch_npu's ops, by their schemas (torch_npu 2.13), with dense reference kernels, request by request.

Where torch_npu is installed its own ops are there already, and nothing is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

LAST = (1 << 63) - 1
# Torch keeps no reference to a library: a fragment that is collected takes its ops along.
_LIBRARIES: list[torch.library.Library] = []


def define(schema: str, fake: Callable[..., Any], kernel: Callable[..., Any], namespace: str = "npu") -> None:
    name = schema.partition("(")[0]
    if hasattr(getattr(torch.ops, namespace), name):
        return
    library = torch.library.Library(namespace, "FRAGMENT")
    _LIBRARIES.append(library)
    library.define(schema)
    torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    library.impl(name, kernel, "CompositeExplicitAutograd")


# ---- attention -----------------------------------------------------------------------------------------------------


def _requests(ends: Sequence[int], lengths: Sequence[int]) -> Iterator[tuple[int, range, int]]:
    """Number, rows and key count of each request."""
    first = 0
    for number, (end, length) in enumerate(zip(ends, lengths, strict=True)):
        yield number, range(first, end), length
        first = end


def _keys(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """A request's keys ``[K, D]``, block by block."""
    blocks = [cache[int(block), :, 0] for block in table]
    return torch.cat(blocks)[:length] if length else cache.new_zeros(0, cache.shape[-1])


def _sees(row: int, rows: range, length: int) -> int:
    """Right-down causal: the last row sees every key, each row before it one less."""
    return max(0, length - (rows[-1] - row))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _indexer(
    query: Tensor, key: Tensor, weights: Tensor, *, actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_key: Tensor | None = None, block_table: Tensor | None = None, layout_query: str = "BSND",
    layout_key: str = "BSND", sparse_count: int = 2048, sparse_mode: int = 3, pre_tokens: int = LAST,
    next_tokens: int = LAST, return_value: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert (layout_query, layout_key) == ("TND", "PA_BSND") and pre_tokens == next_tokens == LAST and not return_value
    assert actual_seq_lengths_query is not None and actual_seq_lengths_key is not None and block_table is not None
    out = torch.full((query.shape[0], 1, sparse_count), -1, dtype=torch.int32)
    ends, lengths = actual_seq_lengths_query.tolist(), actual_seq_lengths_key.tolist()
    for number, rows, length in _requests(ends, lengths):
        keys = _wide(_keys(key, block_table[number], length))
        for row in rows:
            seen = _sees(row, rows, length) if sparse_mode == 3 else length
            score = torch.zeros(seen, dtype=keys.dtype)
            for head in range(query.shape[1]):
                score += _wide(weights[row, head]) * (keys[:seen] @ _wide(query[row, head])).clamp(min=0)
            best = [k for _, k in sorted((-s, k) for k, s in enumerate(score.tolist()))][:sparse_count]
            out[row, 0, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out, query.new_empty(0)


def _indexer_fake(query: Tensor, key: Tensor, weights: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    shape = (*query.shape[:-2], 1, given.get("sparse_count", 2048))
    return query.new_empty(shape, dtype=torch.int32), query.new_empty(shape if given.get("return_value") else (0,))


def _attention(query: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor) -> Tensor:
    """Dense and masked: ``query [R, H, D]``, ``keys [K, D]``, ``values [K, L]``, ``visible [R, K]``."""
    scores = torch.einsum("rhd,kd->rhk", _wide(query), _wide(keys)) * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("rhk,kl->rhl", weights, _wide(values)).to(query.dtype)


def _sparse_attention(
    query: Tensor, key: Tensor, value: Tensor | None, sparse_indices: Tensor, scale_value: float, *,
    block_table: Tensor | None = None, actual_seq_lengths_query: Tensor | None = None,
    actual_seq_lengths_kv: Tensor | None = None, query_rope: Tensor | None = None, key_rope: Tensor | None = None,
    sparse_block_size: int = 1, layout_query: str = "BSND", layout_kv: str = "BSND", sparse_mode: int = 3,
    pre_tokens: int = LAST, next_tokens: int = LAST, attention_mode: int = 0, return_softmax_lse: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    assert (layout_query, layout_kv, sparse_block_size, attention_mode) == ("TND", "PA_BSND", 1, 2) and sinks is None
    assert actual_seq_lengths_query is not None and actual_seq_lengths_kv is not None and block_table is not None
    assert query_rope is not None and key_rope is not None
    out = torch.zeros_like(query)
    ends, lengths = actual_seq_lengths_query.tolist(), actual_seq_lengths_kv.tolist()
    for number, rows, length in _requests(ends, lengths):
        latent, rope = (_keys(cache, block_table[number], length) for cache in (key, key_rope))
        visible = torch.zeros(len(rows), length, dtype=torch.bool)
        for at, row in enumerate(rows):
            chosen = [k for k in sparse_indices[row, 0].tolist() if 0 <= k < length]
            visible[at, chosen] = True
            visible[at, _sees(row, rows, length) if sparse_mode == 3 else length :] = False
        part = slice(rows.start, rows.stop)
        both = torch.cat([query[part], query_rope[part]], -1)
        out[part] = _attention(both, torch.cat([latent, rope], -1), latent, scale_value, visible)
    return out, query.new_empty(0), query.new_empty(0)


define(
    "npu_lightning_indexer(Tensor query, Tensor key, Tensor weights, *, Tensor? actual_seq_lengths_query=None, "
    'Tensor? actual_seq_lengths_key=None, Tensor? block_table=None, str layout_query="BSND", str layout_key="BSND", '
    "int sparse_count=2048, int sparse_mode=3, int pre_tokens=9223372036854775807, "
    "int next_tokens=9223372036854775807, bool return_value=False) -> (Tensor, Tensor)",
    _indexer_fake,
    _indexer,
)
define(
    "npu_sparse_flash_attention(Tensor query, Tensor key, Tensor? value, Tensor sparse_indices, float scale_value, *, "
    "Tensor? block_table=None, Tensor? actual_seq_lengths_query=None, Tensor? actual_seq_lengths_kv=None, "
    'Tensor? query_rope=None, Tensor? key_rope=None, int sparse_block_size=1, str layout_query="BSND", '
    'str layout_kv="BSND", int sparse_mode=3, int pre_tokens=9223372036854775807, '
    "int next_tokens=9223372036854775807, int attention_mode=0, bool return_softmax_lse=False, Tensor? sinks=None)"
    " -> (Tensor, Tensor, Tensor)",
    lambda query, *_, **__: (torch.empty_like(query), query.new_empty(0), query.new_empty(0)),
    _sparse_attention,
)


def _dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, atten_mask: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None, actual_seq_lengths_kv: Tensor | None = None,
    block_table: Tensor | None = None, query_rope: Tensor | None = None, key_rope: Tensor | None = None,
    num_heads: int = 1, scale: float = 1.0, input_layout: str = "BSH", num_key_value_heads: int = 0,
    sparse_mode: int = 0, block_size: int = 0, **others: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    assert (input_layout, num_heads, num_key_value_heads) == ("TND", query.shape[1], 1) and block_size == key.shape[2]
    assert actual_seq_lengths is not None and actual_seq_lengths_kv is not None and block_table is not None
    assert query_rope is not None and key_rope is not None and (sparse_mode == 3) == (atten_mask is not None)
    out = torch.zeros_like(query)
    for number, rows, length in _requests(actual_seq_lengths.tolist(), actual_seq_lengths_kv.tolist()):
        latent, rope = (_keys(cache.transpose(1, 2), block_table[number], length) for cache in (key, key_rope))
        seen = torch.tensor([_sees(row, rows, length) if sparse_mode == 3 else length for row in rows])
        visible = torch.arange(length) < seen[:, None]
        part = slice(rows.start, rows.stop)
        both = torch.cat([query[part], query_rope[part]], -1)
        out[part] = _attention(both, torch.cat([latent, rope], -1), latent, scale, visible)
    return out, query.new_empty(0)


_TENSORS = [
    "dequant_scale1", "quant_scale1", "dequant_scale2", "quant_scale2", "quant_offset2", "antiquant_scale",
    "antiquant_offset", "key_antiquant_scale", "key_antiquant_offset", "value_antiquant_scale",
    "value_antiquant_offset", "block_table", "query_padding_size", "kv_padding_size", "key_shared_prefix",
    "value_shared_prefix", "actual_shared_prefix_len", "query_rope", "key_rope", "key_rope_antiquant_scale",
]  # fmt: skip
define(
    "npu_fused_infer_attention_score(Tensor query, Tensor key, Tensor value, *, Tensor? pse_shift=None, "
    "Tensor? atten_mask=None, Tensor? actual_seq_lengths=None, Tensor? actual_seq_lengths_kv=None, "
    + "".join(f"Tensor? {name}=None, " for name in _TENSORS)
    + "int num_heads=1, float scale=1.0, int pre_tokens=2147483647, int next_tokens=2147483647, "
    'str input_layout="BSH", int num_key_value_heads=0, int sparse_mode=0, int inner_precise=0, int block_size=0, '
    "int antiquant_mode=0, int key_antiquant_mode=0, int value_antiquant_mode=0, bool softmax_lse_flag=False)"
    " -> (Tensor, Tensor)",
    lambda query, *_, **__: (torch.empty_like(query), query.new_empty(0)),
    _dense_attention,
    namespace="air",
)


# ---- caches --------------------------------------------------------------------------------------------------------


def _scatter(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    out = input.clone()
    for row, place in enumerate(indices.tolist()):
        assert all(0 <= number < size for number, size in zip(place, out.shape, strict=False))
        out[tuple(place)] = updates[row]
    return out


define(
    "npu_scatter_nd_update(Tensor input, Tensor indices, Tensor updates) -> Tensor",
    lambda input, *_: torch.empty_like(input),
    _scatter,
)
define(
    "npu_scatter_nd_update_(Tensor(a!) input, Tensor indices, Tensor updates) -> Tensor(a!)",
    lambda input, *_: input,
    lambda input, indices, updates: input.copy_(_scatter(input, indices, updates)),
)


@torch.ops.npu.npu_scatter_nd_update_.default.py_functionalize_impl
def _(ctx: Any, input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """As torch_npu functionalises it: the op without the underscore, and its result in the place of the input."""
    with ctx.redispatch_to_next():
        new = torch.ops.npu.npu_scatter_nd_update.default(*ctx.unwrap_tensors((input, indices, updates)))
    ctx.replace(input, new)
    ctx.commit_update(input)
    ctx.sync(input)
    return input


# ---- row-wise ------------------------------------------------------------------------------------------------------


def _rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    rstd = torch.rsqrt(_wide(input).square().mean(-1, keepdim=True) + epsilon)
    return (_wide(input) * rstd).to(input.dtype) * gamma, rstd


def _rms_norm_fake(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    return torch.empty_like(input), input.new_empty((*input.shape[:-1], 1), dtype=torch.float32)


def _add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    total = x1 + x2
    return (*_rms_norm(total, gamma, epsilon), total)


def _interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[B, N, S, D]``: pairs of neighbours become halves, and are rotated."""
    halves = torch.cat([x[..., ::2], x[..., 1::2]], -1)
    first, second = halves.chunk(2, -1)
    return halves * cos + torch.cat([-second, first], -1) * sin


def _rotary_mul(input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: None = None) -> Tensor:
    first, second = input.chunk(2, -1)
    return input * r1 + torch.cat([-second, first], -1) * r2


define("npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)", _rms_norm_fake, _rms_norm)
define(
    "npu_add_rms_norm(Tensor x1, Tensor x2, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor, Tensor)",
    lambda x1, x2, gamma, epsilon=1e-6: (*_rms_norm_fake(x1, gamma), torch.empty_like(x1)),
    _add_rms_norm,
)
define(
    "npu_interleave_rope(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    lambda x, *_: torch.empty_like(x),
    _interleave_rope,
)
define(
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
    lambda input, *_, **__: torch.empty_like(input),
    _rotary_mul,
)
define(
    "npu_swiglu(Tensor self, int dim=-1) -> Tensor",
    lambda x, dim=-1: x.new_empty([*x.shape[:-1], x.shape[-1] // 2]),
    lambda x, dim=-1: torch.nn.functional.silu(x.chunk(2, dim)[0]) * x.chunk(2, dim)[1],
)


# ---- experts -------------------------------------------------------------------------------------------------------


def _gating(
    x: Tensor, k: int, *, bias: Tensor | None = None, input_ids: None = None, tid2eid: None = None, k_group: int = 1,
    group_count: int = 1, group_select_mode: int = 0, renorm: int = 0, norm_type: int = 0, out_flag: bool = False,
    routed_scaling_factor: float = 1.0, eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Row by row: the ``k`` best of the best groups by ``sigmoid + bias``, weighed by sigmoids over their sum."""
    assert (group_select_mode, renorm, norm_type) == (1, 0, 1) and bias is not None and bias.dtype == x.dtype
    rows, ids = [], []
    for row in x:
        scores = row.sigmoid()
        by_group = (scores + bias).view(group_count, -1)
        totals = [sum(sorted(group.tolist(), reverse=True)[:2]) for group in by_group]
        best = sorted(range(group_count), key=lambda g: -totals[g])[:k_group]
        experts = sorted(
            (-float(by_group[g, e]), g * by_group.shape[1] + e) for g in best for e in range(len(by_group[g]))
        )
        ids.append([e for _, e in experts[:k]])
        weights = scores[ids[-1]]
        rows.append(weights / (weights.sum() + eps) * routed_scaling_factor)
    return torch.stack(rows), torch.tensor(ids, dtype=torch.int32), x.new_empty(x.shape, dtype=torch.float32)


define(
    "npu_moe_gating_top_k(Tensor x, int k, *, Tensor? bias=None, Tensor? input_ids=None, Tensor? tid2eid=None, "
    "int k_group=1, int group_count=1, int group_select_mode=0, int renorm=0, int norm_type=0, bool out_flag=False, "
    "float routed_scaling_factor=1., float eps=9.9999999999999995e-21) -> (Tensor, Tensor, Tensor)",
    lambda x, k, **_: (
        x.new_empty((x.shape[0], k)),
        x.new_empty((x.shape[0], k), dtype=torch.int32),
        x.new_empty(x.shape, dtype=torch.float32),
    ),
    _gating,
)


# ---- quantisation --------------------------------------------------------------------------------------------------


def _dynamic_quant(input: Tensor, **others: Any) -> tuple[Tensor, Tensor]:
    assert input.dtype in (torch.float16, torch.bfloat16) and not any(others.values())
    rows, steps = [], []
    for row in input.float():
        step = row.abs().max() / 127
        steps.append(step)
        rows.append((row / step).round().to(torch.int8) if step else torch.zeros_like(row, dtype=torch.int8))
    return torch.stack(rows), torch.stack(steps)


# Numbers of torch's dtypes, the op's default first; float32 is of this stand-in alone, for tests that compare closely.
_OUTPUTS = {None: torch.int8, 5: torch.float16, 6: torch.float32, 15: torch.bfloat16}


def _quant_matmul(
    x1: Tensor, x2: Tensor, scale: Tensor, *, pertoken_scale: Tensor | None = None, output_dtype: int | None = None,
    **others: Any,
) -> Tensor:  # fmt: skip
    assert x1.dtype == x2.dtype == torch.int8 and scale.shape == x2.shape[1:] and not any(others.values())
    assert pertoken_scale is not None and pertoken_scale.shape == x1.shape[:1]
    exact = (x1.long() @ x2.long()).float()
    out = exact * scale.float() * pertoken_scale[:, None]
    return out.to(_OUTPUTS[output_dtype])


def _quant_matmul_shape(
    x1: Tensor, x2: Tensor, *_: Tensor, pertoken_scale: Tensor | None = None, output_dtype: int | None = None, **__: Any
) -> Tensor:
    if pertoken_scale is not None:
        torch._check(x1.shape[0] == pertoken_scale.shape[0])
    return x1.new_empty((x1.shape[0], x2.shape[1]), dtype=_OUTPUTS[output_dtype])


define(
    "npu_dynamic_quant(Tensor input, *, Tensor? smooth_scales=None, Tensor? group_index=None, int? dst_type=None, "
    'str quant_mode="pertoken", float dst_type_max=0.) -> (Tensor, Tensor)',
    lambda input, **_: (
        torch.empty_like(input, dtype=torch.int8),
        input.new_empty(input.shape[:-1], dtype=torch.float32),
    ),
    lambda input, quant_mode="pertoken", **others: _dynamic_quant(input, **others),
)
define(
    "npu_quant_matmul(Tensor x1, Tensor x2, Tensor scale, *, Tensor? offset=None, Tensor? pertoken_scale=None, "
    "Tensor? bias=None, int? output_dtype=None, int? x1_dtype=None, int? x2_dtype=None, "
    "int? pertoken_scale_dtype=None, int? scale_dtype=None, int[]? group_sizes=None, Tensor? y_scale=None) -> Tensor",
    _quant_matmul_shape,
    _quant_matmul,
)


# ---- collectives ----------------------------------------------------------------------------------------------------


def _of_ranks(*_: Any, **__: Any) -> Any:
    raise AssertionError("of several ranks: a test says what they compute together")


define(
    "npu_mm_reduce_scatter_base(Tensor self, Tensor x2, str hcom, int world_size, *, str reduce_op='sum', "
    "Tensor? bias=None, Tensor? x1_scale=None, Tensor? x2_scale=None, int comm_turn=0, ScalarType? output_dtype=None, "
    "str? comm_mode=None) -> Tensor",
    lambda x, x2, hcom, world_size, **_: x.new_empty((x.shape[0] // world_size, x2.shape[1])),
    _of_ranks,
)
define(
    "npu_all_gather_base_mm(Tensor self, Tensor x2, str hcom, int world_size, *, Tensor? bias=None, "
    "Tensor? x1_scale=None, Tensor? x2_scale=None, int gather_index=0, bool gather_output=True, int comm_turn=0, "
    "ScalarType? output_dtype=None, str? comm_mode=None) -> (Tensor, Tensor)",
    lambda x, x2, hcom, world_size, **_: (
        x.new_empty((x.shape[0] * world_size, x2.shape[1])),
        x.new_empty((x.shape[0] * world_size, x.shape[1])),
    ),
    _of_ranks,
)
define(
    "reduce_scatter_tensor_uneven(Tensor input_tensor, SymInt[] send_counts, SymInt recv_count, str reduce_type, "
    "str tag, int[] rank_list, int group_size, SymInt[] send_displacements) -> Tensor",
    lambda x, send_counts, recv_count, *_: x.new_empty((recv_count, *x.shape[1:])),
    _of_ranks,
    namespace="npu_define",
)
define(
    "allgather_in_tensor_uneven(Tensor input_tensor, SymInt send_count, SymInt[] recv_counts, str tag, "
    "int[] rank_list, int group_size, SymInt[] recv_displacements) -> Tensor",
    lambda x, send_count, recv_counts, *_: x.new_empty((sum(recv_counts), *x.shape[1:])),
    _of_ranks,
    namespace="npu_define",
)
