"""Models of the transformers library as servers call them: caches in and out, and several requests in one row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache


class Cached(nn.Module):
    """``(ids [B, T], *caches) -> (logits [B, T, V], *caches)``; no caches before the first chunk.

    Per layer latent keys, rope keys and, for V3.2, indexer keys, in token order, ``[.., P, D]`` of P cached tokens.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.per_layer = 3 if hasattr(model.config, "index_topk") else 2

    def forward(self, ids: torch.Tensor, *past: torch.Tensor) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache(config=self.model.config)
        for layer in range(len(past) // self.per_layer):
            keys, rope, *indexer = past[self.per_layer * layer :][: self.per_layer]
            cache.update(keys, rope, layer)
            if indexer:
                cache.update_indexer(indexer[0], layer)
        found = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
        caches = [
            value
            for layer in found.past_key_values.layers
            for value in (layer.keys, layer.values, getattr(layer, "indexer_keys", None))
            if value is not None
        ]
        return (found.logits, *caches)


def mark_prefix(caches: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The caches with their prefix dims marked dynamic for tracing."""
    for cache in caches:
        torch._dynamo.mark_dynamic(cache, cache.ndim - 2)
    return list(caches)


class Packed(nn.Module):
    """Several requests one after another in one row: positions start anew with each, and none sees another's keys."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits  # type: ignore[no-any-return]


def positions_of(lengths: Sequence[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]
