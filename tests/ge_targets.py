"""Targets of ``cpcompile lower`` for tests: tiny models with weights, whole or tensor-parallel over an axis ``tp``."""

from __future__ import annotations

import functools
from typing import Any

import expert_ranks
import models
import serving_models
import torch
from conftest import make
from torch.distributed.device_mesh import DeviceMesh

BLOCKS = 60


def v3(mesh: DeviceMesh | None = None) -> Any:
    return _target("v3", mesh)


def v32(mesh: DeviceMesh | None = None) -> Any:
    return _target("v32", mesh)


def model(kind: str, mesh: DeviceMesh | None = None) -> Any:
    """Alike in every process. An indexer of 32 heads: see ``ge_exports.model_of``."""
    whole = make(kind, layers=2, **({"index_n_heads": 32} if kind == "v32" else {}))
    return models.shard(whole, mesh["tp"]) if mesh is not None and "tp" in (mesh.mesh_dim_names or ()) else whole


def ids_of(tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randint(0, models.TINY["vocab_size"], (1, tokens), generator=generator)


@functools.cache
@torch.no_grad()
def logits(kind: str, tokens: int) -> torch.Tensor:
    """What the unsharded eager model says."""
    return model(kind)(input_ids=ids_of(tokens), use_cache=False).logits  # type: ignore[no-any-return]


def _target(kind: str, mesh: DeviceMesh | None) -> Any:
    return model(kind, mesh), (), {"input_ids": torch.zeros((1, 10), dtype=torch.long), "use_cache": False}


def experts(mesh: DeviceMesh) -> Any:
    """Experts split over the axis ``cp`` by their numbers, all else whole."""
    return expert_ranks.split(expert_ranks.model(), mesh["cp"], "cp"), (), {
        "input_ids": torch.zeros((1, 10), dtype=torch.long), "use_cache": False,
    }  # fmt: skip


def serving_model(dense: bool = False) -> serving_models.Serving:
    layer = serving_models.DenseLayer if dense else serving_models.Layer
    return serving_models.Serving(dtype=torch.float32, layer=layer)


def served(requests: int, dense: bool) -> Any:
    """One request has no symbol for their number, and so a trace of its own."""
    found = serving_model(dense)
    example = serving_models.batch([5, 1, 4][:requests], [0, 3, 2][:requests], BLOCKS, found.sizes)
    return found, (*example, *found.caches(BLOCKS))


def serving() -> Any:
    return served(3, False)


def serving_one() -> Any:
    return served(1, False)


def serving_dense() -> Any:
    return served(3, True)
