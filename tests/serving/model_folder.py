"""A small model in a folder, as vLLM, SGLang and transformers load it: random weights and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 512
LAYERS = 3
ALL_REDUCES = 1 + 2 * LAYERS  # of a model over tensor-parallel ranks: the embedding's, attention's and the MLP's
LONGEST = 512
ANY: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
# vLLM's kernels know the latent of 512 + 64 elements alone. Its rotary kernel for CPUs is right for MLA with yarn only,
# which every published DeepSeek model has.
MLA: dict[str, Any] = {
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "rope_scaling": {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": LONGEST // 2,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "rope_theta": 10000.0,
    },
}
EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
FIELDS: dict[str, Any] = {**ANY, **MLA, **EXPERTS}
INDEXER = {"index_n_heads": 4, "index_head_dim": 128, "index_topk": LONGEST}
# SGLang reads no head_dim of Mixtral: it divides.
HEADS = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64}
ONE_GROUP = {"n_group": 1, "topk_group": 1}
SPARSE = {"mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1)}
#: What servers read in a published config.json and the library does not write.
ROUTED = {"first_k_dense_replace": 1, "moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
#: Kind → its type in transformers, its configuration, and what its config.json says on top. longcat_flash is not here:
#: both servers run its zero experts as a Triton kernel (``zero_experts_compute_triton``).
KINDS: Mapping[str, tuple[str, Mapping[str, Any], Mapping[str, Any]]] = {
    "v3": ("deepseek_v3", FIELDS, ROUTED),
    "v31": ("deepseek_v3", {**FIELDS, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}, ROUTED),
    "v32": ("deepseek_v32", {**FIELDS, **INDEXER, **SPARSE}, ROUTED),
    "kimi_k2": (
        "deepseek_v3",
        {**FIELDS, **ONE_GROUP, "n_routed_experts": 12, "routed_scaling_factor": 2.827},
        {**ROUTED, "model_type": "kimi_k2"},
    ),
    "glm_moe_dsa": ("glm_moe_dsa", {**FIELDS, **INDEXER, **ONE_GROUP, **SPARSE}, ROUTED),
    "deepseek_v2_lite": (
        "deepseek_v2",
        {**FIELDS, **ONE_GROUP, "q_lora_rank": None},
        {**ROUTED, "scoring_func": "softmax", "topk_method": "greedy"},
    ),
    "glm4_moe": ("glm4_moe", {**ANY, **HEADS, **EXPERTS, **ONE_GROUP, "use_qk_norm": True}, {}),
    "qwen3_moe": (
        "qwen3_moe",
        {**ANY, **HEADS, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
        {},
    ),
    "mixtral": ("mixtral", {**ANY, **HEADS, "num_local_experts": 8, "num_experts_per_tok": 2}, {}),
    "llama": ("llama", {**ANY, **HEADS}, {}),
}


def make_folder(folder: Path, kind: str, **fields: Any) -> Path:
    """Write a model of ``kind``, ``fields`` on top, into ``folder``; the same weights every time."""
    type_name, own, more = KINDS[kind]
    config = CONFIG_MAPPING[type_name](**{**own, **fields})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                # Norm weights near 1, the rest wide enough that a wrong row, rank or weight shows.
                tensor.copy_(1 + 0.1 * noise if tensor.ndim == 1 and "norm" in name else 0.08 * noise)
    model.save_pretrained(folder)
    config_file = folder / "config.json"
    saved = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**saved, **more}, indent=1))
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder
    )
    return folder
