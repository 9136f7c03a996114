"""Tiny random models of DeepSeek's family and of others with a plan for tensor parallelism, by the names used here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models import TINY, TINY_INDEXER, tiny_config
from transformers import CONFIG_MAPPING

_DENSE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "vocab_size": 96,
    "pad_token_id": 0,
}
_YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 40, "original_max_position_embeddings": 64}
_YARN |= {"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 48}

# Name → model type, and what differs from a tiny configuration of that type.
COUSINS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "v2_lite": (
        "deepseek_v2",
        {**TINY, "q_lora_rank": None, "first_k_dense_replace": 1, "num_hidden_layers": 2}
        | {"num_attention_heads": 8, "num_key_value_heads": 8},
    ),
    "glm4_moe": (
        "glm4_moe",
        {**_DENSE, **_EXPERTS, "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "use_qk_norm": True},
    ),
    "glm_moe_dsa": (
        "glm_moe_dsa",
        {**TINY, **TINY_INDEXER, "num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "pad_token_id": 0},
    ),
    "longcat_flash": (
        "longcat_flash",
        {**TINY, "ffn_hidden_size": 96, "expert_ffn_hidden_size": 48, "moe_topk": 2, "zero_expert_num": 2}
        | {"num_layers": 1, "num_hidden_layers": 2, "head_dim": 8, "routed_scaling_factor": 1.5},
    ),
    "qwen3_moe": ("qwen3_moe", {**_DENSE, **_EXPERTS, "num_key_value_heads": 4, "head_dim": 8, "num_experts": 8}),
    "mixtral": ("mixtral", {**_DENSE, "num_key_value_heads": 4, "num_local_experts": 8}),
    "llama": ("llama", {**_DENSE, "num_key_value_heads": 4}),
}
# DeepSeek-V3's own type with other settings.
_V3_LIKE: Mapping[str, Mapping[str, Any]] = {
    "v3": {},
    "v31": {"rope_parameters": _YARN, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "q_lora_rank": None},
    "kimi_k2": {"rope_parameters": {**_YARN, "factor": 32}, "n_group": 1, "routed_scaling_factor": 2.827}
    | {"num_attention_heads": 8, "num_key_value_heads": 8, "n_routed_experts": 12},
}
NAMES = (*_V3_LIKE, "v32", *COUSINS)


def config_of(name: str, **changes: Any) -> Any:
    """The tiny configuration of a model called ``name``; sizes divide by 2 and 4."""
    if name == "v32":
        return tiny_config("v32", **changes)
    if name in _V3_LIKE:
        return tiny_config("v3", **{**_V3_LIKE[name], **changes})
    kind, fields = COUSINS[name]
    return CONFIG_MAPPING[kind](**{**fields, **changes})
