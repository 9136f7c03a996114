"""Stand-ins for vLLM's ops, by their schemas (vLLM 0.32); tests/serving holds the rules against the real ones."""

from __future__ import annotations

from typing import Any

import torch
from npu_ops import define
from torch import Tensor

_NORM = "Tensor? weight, float epsilon, SymInt? variance_size=None"


def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    seen = x if variance_size is None else x[..., :variance_size]
    scaled = x * torch.rsqrt(seen.pow(2).mean(dim=-1, keepdim=True) + epsilon)
    return scaled if weight is None else scaled * weight


def _fused(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _rms_norm(x + residual, *rest), x + residual


def _in_place(x: Tensor, residual: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Leaves other contents in its operands than it returns, as kernels may."""
    out = _fused(x, residual, *rest)
    x.fill_(7.0)
    residual.fill_(7.0)
    return out


def _indexer(hidden: Tensor, prefix: str, q: Tensor, k: Tensor | None, weights: Tensor, buffer: Tensor) -> Tensor:
    buffer[: weights.shape[0]] = weights[:, :1].to(buffer.dtype)
    return buffer.clone()


def _attention(q: Tensor, output: Tensor) -> None:
    output.copy_(q)


define(f"rms_norm(Tensor x, {_NORM}) -> Tensor", _rms_norm, _rms_norm, "vllm_ir")
define(f"fused_add_rms_norm(Tensor x, Tensor x_residual, {_NORM}) -> (Tensor, Tensor)", _fused, _fused, "vllm_ir")
_MAYBE = f"fused_add_rms_norm.maybe_inplace(Tensor(a0!) x, Tensor(a1!) x_residual, {_NORM}) -> (Tensor, Tensor)"
_LIBRARY = torch.library.Library("vllm_ir", "FRAGMENT")
_LIBRARY.define(_MAYBE)
_LIBRARY.impl("fused_add_rms_norm.maybe_inplace", _in_place, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_ir::fused_add_rms_norm.maybe_inplace", _fused, lib=_LIBRARY)
# The real one has more arguments; it, too, counts the first one's rows, writes the buffer and returns it.
define(
    "sparse_attn_indexer(Tensor hidden_states, str k_cache_prefix, Tensor q_quant, Tensor? k, Tensor weights,"
    " Tensor(a!) topk_indices_buffer) -> Tensor",
    lambda hidden, prefix, q, k, weights, buffer: torch.empty_like(buffer),
    _indexer,
    "vllm",
)
# The real one has more arguments; it, too, writes what it found into a tensor that the model made for it.
define(
    "unified_mla_attention_with_output(Tensor q, Tensor(a!) output) -> ()",
    lambda q, output: None,
    _attention,
    "vllm",
)
