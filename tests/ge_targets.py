"""Targets of ``cpcompile lower`` for tests: tiny models with weights, whole or tensor-parallel over an axis ``tp``."""

from __future__ import annotations

import functools
from typing import Any

import expert_ranks
import models
import serving_models
import torch
import torch.distributed._functional_collectives as funcol
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


class Odd(torch.nn.Module):
    """An op without a result, one without a converter, and two whose shapes cannot be worked out on a device."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.weight = torch.nn.Parameter(torch.ones(32, 32), requires_grad=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(ids, self.weight)
        x = funcol.all_reduce(x @ self.weight, "sum", self.mesh["tp"])
        x = x.masked_scatter(x > 0, x * 2)
        for message in ("few", "many"):  # as indices are checked
            torch._assert_async((x > 0).any(), message)
        chosen = (x > 0).to(x.dtype)
        first, second = two_on_the_host_only(on_the_host_only(chosen))
        return first @ self.weight + second


def _refuse(x: torch.Tensor) -> None:
    if x.device.type != "cpu":
        raise RuntimeError("its shapes\nare known on the host only")


@torch.library.custom_op("cpcompile_tests::on_the_host_only", mutates_args=())
def on_the_host_only(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@on_the_host_only.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    _refuse(x)
    return torch.empty_like(x)


@torch.library.custom_op("cpcompile_tests::two_on_the_host_only", mutates_args=())
def two_on_the_host_only(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.clone(), x.clone()


@two_on_the_host_only.register_fake
def _(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    _refuse(x)
    return torch.empty_like(x), torch.empty_like(x)


def odd(mesh: DeviceMesh) -> Any:
    return Odd(mesh).eval(), (torch.zeros(16, dtype=torch.long),)
