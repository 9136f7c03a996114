"""DeepSeek-V3.2 on a CPU: SGLang's indexer has no PyTorch form there, and ``torch_native`` attends over every key.

In plain PyTorch here, in float32, without the rotation and the FP8 of the kernels, which change no dot product but by
rounding: keys in the order of each request's tokens, the highest of them by score, attention over these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_OVERRIDES = "sglang.srt.arg_groups.overrides"


def install() -> None:
    """Patch this process's SGLang, before its arguments are read."""
    from sglang.kernels.fused_op import BaseFusedOp
    from sglang.srt.layers.attention.dsa import dsa_indexer
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    from sglang.srt.platforms import current_platform
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    torch.cuda.get_device_capability = lambda *_: (0, 0)  # asked for V3.2's flags on every device but NPUs and XPUs
    for name in ("_dsa_kv_cache_dtype_default", "_dsa_split_backend_resolution"):  # bfloat16, and kernels of GPUs
        HookRegistry.register(f"{_OVERRIDES}.{name}", lambda view: {}, HookType.REPLACE)
    HookRegistry.apply_hooks()
    BaseFusedOp.register_oot_forward(dsa_indexer.Indexer, index, current_platform.get_dispatch_key_name())
    for name in ("forward_extend", "forward_decode"):
        setattr(TorchNativeAttnBackend, name, _sparse_or(getattr(TorchNativeAttnBackend, name)))


def requests(pool: Any, batch: Any) -> Iterator[tuple[slice, Tensor]]:
    """Of each request: its rows among the batch's, and where its tokens so far lie in the caches."""
    counts = [1] * len(batch.seq_lens) if batch.forward_mode.is_decode() else batch.extend_seq_lens.tolist()
    start = 0
    for count, length, row in zip(counts, batch.seq_lens.tolist(), batch.req_pool_indices.tolist(), strict=True):
        yield slice(start, start + count), pool.req_to_token[row, :length]
        start += count


def index(self: Any, x: Tensor, q_lora: Tensor, positions: Tensor, forward_batch: Any, layer_id: int) -> Tensor:
    """Numbers of the highest keys for each row, [T, index_topk] int32, -1 where there are fewer."""
    from sglang.srt.model_executor.forward_context import get_attn_backend, get_token_to_kv_pool

    cos, sin = self.rotary_emb.cos_sin_cache[positions, None].chunk(2, dim=-1)
    query = _rotated(self.wq_b(q_lora)[0].view(len(x), self.n_heads, self.head_dim), cos, sin)
    key = _rotated(self.k_norm(self.wk(x)[0])[:, None], cos, sin)[:, 0]
    if not hasattr(self, "own_keys"):
        self.own_keys = key.new_zeros(len(get_token_to_kv_pool().get_key_buffer(layer_id)), self.head_dim)
    self.own_keys[forward_batch.out_cache_loc] = key
    gates = x @ self.weights_proj.weight.to(x.dtype).T
    found = torch.full((len(x), self.index_topk), -1, dtype=torch.int32)
    for rows, slots in requests(get_attn_backend().req_to_token_pool, forward_batch):
        scores = _scores(query[rows], self.own_keys[slots], gates[rows])
        ahead = torch.arange(len(slots)) > positions[rows, None]
        best = scores.masked_fill(ahead, float("-inf")).topk(min(self.index_topk, len(slots)))
        found[rows, : best.indices.shape[1]] = best.indices.masked_fill(best.values.isinf(), -1).int()
    return found


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[T, heads, d] by [T, 1, r / 2], the first r elements by halves: SGLang's PyTorch form of that fails."""
    first, second, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _scores(query: Tensor, keys: Tensor, gates: Tensor) -> Tensor:
    """[q, heads, d], [k, d], [q, heads] -> [q, k]."""
    return torch.einsum("qhk,qh->qk", F.relu(torch.einsum("qhd,kd->qhk", query, keys)), gates)


def _sparse_or(dense: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def forward(
        self: Any, q: Tensor, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, **more: Any
    ) -> Tensor:
        picked = more.pop("topk_indices", None)
        if picked is None:
            return dense(self, q, k, v, layer, batch, save_kv_cache, **more)
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        query = q.view(len(q), layer.tp_q_head_num, layer.qk_head_dim)
        out = [
            _attend(query[rows], keys[slots], values[slots], picked[rows], layer.scaling)
            for rows, slots in requests(self.req_to_token_pool, batch)
        ]
        return torch.cat(out).reshape(len(q), -1)

    return forward


def _attend(query: Tensor, keys: Tensor, values: Tensor, picked: Tensor, scaling: float) -> Tensor:
    """[q, heads, d] over [k, 1, d], of which each row sees those that were picked for it."""
    seen = torch.zeros(len(query), len(keys) + 1, dtype=torch.bool)  # the last: no key
    seen.scatter_(1, picked.long().where(picked >= 0, torch.tensor(len(keys))), True)
    heads = query.transpose(0, 1)  # [heads, q, d]
    scores = heads @ keys[:, 0].T * scaling
    return (scores.masked_fill(~seen[:, :-1], float("-inf")).softmax(-1) @ values[:, 0]).transpose(0, 1)
