"""Small random DeepSeek models of the transformers library, whole or sharded, for tests, examples and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV32Config, PreTrainedModel
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_attention_heads": 24,
    "num_key_value_heads": 24,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "vocab_size": 96,
}
TINY_INDEXER = {"index_n_heads": 4, "index_head_dim": 16, "index_topk": 6}
# Caches of sparse attention: before, they hold the keys and values of each head, of which no op of ours runs.
CACHES_LATENTS = Version(transformers.__version__) >= Version("5.18")


def tiny_config(kind: str, layers: int = 2, **changes: Any) -> Any:
    """A tiny V3 (``"v3"``) or V3.2 (``"v32"``) configuration, first layer dense; sizes divide by 2, 3, 4 and 8."""
    fields = {**TINY, "num_hidden_layers": layers}
    if kind == "v3":
        return DeepseekV3Config(**{"first_k_dense_replace": 1, **fields, **changes})
    kinds = ["dense"] + ["sparse"] * (layers - 1)
    return DeepseekV32Config(**{"mlp_layer_types": kinds, **TINY_INDEXER, **fields, **changes})


def build(config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A model with random weights, norms and router biases included, alike for one ``seed``."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                # Norm weights near 1, the rest wide enough that a wrong row, rank or weight shows.
                tensor.copy_(1 + 0.1 * noise if tensor.ndim == 1 and "norm" in name else 0.08 * noise)
    return model


# Experts split over the ranks by their numbers; the router masks those of other ranks.
EXPERT_PLAN = {
    "model.layers.*.mlp.gate": "ep_router",
    "model.layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "model.layers.*.mlp.experts.down_proj": "grouped_gemm",
    "model.layers.*.mlp.experts": "moe_tp_experts",
}


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> PreTrainedModel:
    """Make ``model`` tensor-parallel by the library's own plan, with attention and embedding sharded as well."""
    attention = "model.layers.*.self_attn."
    model._tp_plan = {
        **model.tp_plan,
        attention + "q_b_proj": "colwise",
        attention + "kv_b_proj": "colwise",
        attention + "o_proj": "rowwise",
        "model.embed_tokens": "embedding_rowwise",
    }
    return apply_tensor_parallelism(model, mesh)  # type: ignore[no-any-return]
