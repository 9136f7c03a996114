"""A small DeepSeek model in a folder, as vLLM and transformers load it: random weights, a tokenizer, yarn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV32Config, PreTrainedTokenizerFast

VOCAB = 512
LAYERS = 3
LONGEST = 512
# vLLM's kernels know the latent of 512 + 64 elements alone. Its rotary kernel for CPUs is right for MLA with yarn only,
# which every published DeepSeek model has.
FIELDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "max_position_embeddings": LONGEST,
    "tie_word_embeddings": False,
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
    "bos_token_id": 0,
    "eos_token_id": 1,
}
INDEXER = {"index_n_heads": 4, "index_head_dim": 128, "index_topk": 256}


def make_folder(folder: Path, kind: str, **fields: Any) -> Path:
    """Write a model of ``kind`` ("v3" or "v32"), ``fields`` on top, into ``folder``; the same weights every time."""
    if kind == "v3":
        config: Any = DeepseekV3Config(first_k_dense_replace=1, **{**FIELDS, **fields})
    else:
        layers = ["dense"] + ["sparse"] * (LAYERS - 1)
        config = DeepseekV32Config(mlp_layer_types=layers, **{**FIELDS, **INDEXER, **fields})
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
    saved.update(first_k_dense_replace=1, moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc")
    config_file.write_text(json.dumps(saved, indent=1))
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w0", eos_token="w1", unk_token="w2").save_pretrained(
        folder
    )
    return folder
