"""DeepSeek-V3.2 on vLLM's CPU platform, which refuses sparse attention: dense attention in its place.

Exact while the context is no longer than ``index_topk``: the indexer then picks every key. The indexer's op stays in
the graph and writes its buffer, and attention demands, as the sparse kernels do, to find there what this layer's
indexer has written in this step.
"""

from __future__ import annotations

from typing import Any

import torch


def install() -> None:
    """Patch this process's vLLM; called as a plugin of vLLM's is, in every process."""
    from vllm.model_executor.layers import sparse_attn_indexer
    from vllm.model_executor.models import deepseek_v2
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

    theirs = CpuPlatform.get_attn_backend_cls

    def backend_of(cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: Any = None) -> str:
        if attn_selector_config.use_mla:
            return _path(CPUMLABackend)
        return str(theirs(selected_backend, attn_selector_config, num_heads))

    CpuPlatform.get_attn_backend_cls = classmethod(backend_of)
    # No cache of its own: its keys are not read.
    deepseek_v2.DeepseekV32IndexerCache.get_kv_cache_spec = lambda *_: None
    deepseek_v2.per_token_group_quant_fp8 = lambda q, *_, **__: (q, torch.ones_like(q[:, :1]))
    indexer = sparse_attn_indexer.SparseAttnIndexer
    indexer.forward_native = indexer.forward_cpu = indexer.forward_cuda
    library = torch.library.Library("vllm", "IMPL")
    _KEPT.append(library)
    library.impl("sparse_attn_indexer", _write, "CPU", allow_override=True)

    original_init, original_mqa, original_mha = CPUMLAImpl.__init__, CPUMLAImpl.forward_mqa, CPUMLAImpl.forward_mha

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original_init(self, *args, **kwargs)
        self.buffer = kwargs.get("topk_indices_buffer")

    def forward_mqa(self: Any, q: Any, cache: Any, metadata: Any, layer: Any) -> Any:
        _check(self)
        return original_mqa(self, q, cache, metadata, layer)

    def forward_mha(self: Any, *args: Any, **kwargs: Any) -> Any:
        _check(self)
        return original_mha(self, *args, **kwargs)

    CPUMLAImpl.__init__, CPUMLAImpl.forward_mqa, CPUMLAImpl.forward_mha = __init__, forward_mqa, forward_mha
    CPUMLAImpl.record_logical_topk_ready = lambda self: None


_KEPT: list[torch.library.Library] = []


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _number(name: str) -> int:
    """Layer number in ``model.layers.3.self_attn...``."""
    return int(name.split("layers.")[1].split(".")[0])


def _write(hidden: torch.Tensor, prefix: Any, *rest: Any, **kwargs: Any) -> torch.Tensor:
    """Leave the layer's number in every row of the buffer, where the real op leaves the rows' top keys."""
    from vllm.model_executor.layers.attention.attention import _resolve_layer_name

    buffer = rest[11]
    assert buffer.dtype == torch.int32
    buffer[: hidden.shape[0]] = _number(_resolve_layer_name(prefix))
    return buffer


def _check(impl: Any) -> None:
    if impl.buffer is None:
        return  # V3
    mine = _number(impl.indexer.prefix)
    found = impl.buffer[0, 0].item()
    assert found == mine, f"attention of layer {mine} found what the indexer of layer {found} wrote"
