"""The shapes of a DeepSeek-style model that costs depend on, read from its ``config.json``; builds no model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpcompile.errors import TraceError

_REQUIRED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
)
_MOE = ("moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
_INDEXER = ("index_n_heads", "index_head_dim", "index_topk")


@dataclass(frozen=True)
class ModelShapes:
    """Multi-head latent attention (MLA), perhaps with an indexer (V3.2), and an MLP or experts (MoE) per layer.

    Args:
        hidden: width of the hidden state.
        layers: attention layers.
        dense_layers: layers with a dense MLP.
        moe_layers: layers with experts.
        heads: query heads.
        q_lora: width of the query latent; 0 where queries come straight from the hidden state.
        kv_lora: width of the key-value latent.
        nope, rope, value: widths of a head without and with rotary position, and of its value.
        intermediate: inner width of a dense MLP.
        expert_intermediate: inner width of one expert.
        experts, shared_experts, top_experts: routed experts, shared ones, routed ones that a token meets.
        vocab: rows of the embedding.
        index_heads, index_dim, index_topk: the indexer, and the keys that it keeps per query; 0: dense attention.
        weight_bytes: bytes of one weight of a linear: 2 (bf16), or 1 (fp8, int8).
    """

    hidden: int
    layers: int
    dense_layers: int
    moe_layers: int
    heads: int
    q_lora: int
    kv_lora: int
    nope: int
    rope: int
    value: int
    intermediate: int
    expert_intermediate: int
    experts: int
    shared_experts: int
    top_experts: int
    vocab: int
    index_heads: int = 0
    index_dim: int = 0
    index_topk: int = 0
    weight_bytes: int = 2

    @property
    def sparse(self) -> bool:
        """Whether attention reads only the keys that an indexer picks."""
        return self.index_topk > 0

    @property
    def qk(self) -> int:
        """Width of one query or key head."""
        return self.nope + self.rope

    @property
    def latent(self) -> int:
        """Elements per token of a cached key and value: latent and rotary key, without the indexer's key."""
        return self.kv_lora + self.rope


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises :class:`TraceError` if it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise TraceError(f"{path} is not JSON: {error}") from error


def read_shapes(directory: Path) -> ModelShapes:
    """Shapes from ``directory/config.json``, a transformers configuration.

    Raises:
        TraceError: the file cannot be read, is not JSON, or lacks a key.
    """
    path = directory / "config.json"
    data = read_json(path)
    if not isinstance(data, dict):
        raise TraceError(f"{path}: expected an object, found {type(data).__name__}")
    return shapes_of(data, str(path))


def shapes_of(config: Mapping[str, Any], name: str = "the configuration") -> ModelShapes:
    """Shapes from a configuration's fields, such as ``DeepseekV32Config().to_dict()``. Raises :class:`TraceError`."""
    layers = _integer(config, "num_hidden_layers", name)
    kinds = config.get("mlp_layer_types")
    routed = kinds.count("sparse") if kinds else layers - min(layers, config.get("first_k_dense_replace") or 0)
    routed = routed if config.get("n_routed_experts") else 0
    # Any key of the indexer means an indexer: half of one is a mistake, not dense attention.
    indexer = any(config.get(key) is not None for key in _INDEXER)
    sizes = {key: _integer(config, key, name) for key in (*_REQUIRED, *(_MOE if routed else ()))}
    sizes |= {key: _integer(config, key, name) for key in _INDEXER if indexer}
    return ModelShapes(
        hidden=sizes["hidden_size"],
        layers=layers,
        dense_layers=layers - routed,
        moe_layers=routed,
        heads=sizes["num_attention_heads"],
        q_lora=config.get("q_lora_rank") or 0,
        kv_lora=sizes["kv_lora_rank"],
        nope=sizes["qk_nope_head_dim"],
        rope=sizes["qk_rope_head_dim"],
        value=sizes["v_head_dim"],
        intermediate=sizes["intermediate_size"],
        expert_intermediate=sizes.get("moe_intermediate_size", 0),
        experts=sizes.get("n_routed_experts", 0),
        shared_experts=(config.get("n_shared_experts") or 0) if routed else 0,
        top_experts=sizes.get("num_experts_per_tok", 0),
        vocab=sizes["vocab_size"],
        index_heads=sizes.get("index_n_heads", 0),
        index_dim=sizes.get("index_head_dim", 0),
        index_topk=sizes.get("index_topk", 0),
        weight_bytes=1 if config.get("quantization_config") else 2,
    )


def _integer(config: Mapping[str, Any], key: str, name: str) -> int:
    value = config.get(key)
    if value is None:
        raise TraceError(f"{name} has no {key!r}: strategies are compared for models with MLA, such as DeepSeek-V3")
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise TraceError(f"{name}: expected a positive integer as {key!r}, found {value!r}")
    return value
