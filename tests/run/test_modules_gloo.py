"""Two real gloo ranks with tokens of their own share their modules: numbers, memory, idle steps, reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from gloo_ranks import joined
from models import TINY, build, shard, tiny_config
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import cpcompile
from cpcompile.errors import OptionError, ParameterChangedError
from cpcompile.idle import IdleStepError, idle_step
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.mesh.process_groups import ProcessGroups
from cpcompile.weights import is_released, local_tensor

WORLD, TOLERANCE = 2, 2e-5
ROLES = {"oproj": "o_proj", "lmhead": "lm_head", "embedding": "embedding", "mlp": "mlp"}
# Rows of each rank, step by step: unequal, one token (a graph of its own, compiled by one rank alone), none, alike.
STEPS = [(5, 3), (7, 8), (1, 4), (0, 6), (9, 0), (1, 1), (33, 2), (0, 1)]


def options(groups: ProcessGroups, **others: Any) -> dict[str, Any]:
    sizes = {f"{name}_tensor_parallel_size": WORLD for name in ROLES}
    return {"groups": groups, "finegrained_tp_config": sizes, "timeout_s": 60, **others}


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).norm() <= TOLERANCE * expected.norm()


@torch.no_grad()
def step(compiled: Any, whole: nn.Module, tokens: int, rank: int) -> None:
    if not tokens:
        return idle_step(compiled)
    ids = torch.randint(0, TINY["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(10 * tokens + rank))
    return close(compiled(input_ids=ids, use_cache=False).logits, whole(input_ids=ids, use_cache=False).logits)


def storages(model: nn.Module) -> int:
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


def unequal_steps_on_released_weights(rank: int, groups: ProcessGroups) -> None:
    whole, model = build(tiny_config("v3")), build(tiny_config("v3"))
    compiled = torch.compile(model, backend="cpcompile", options=options(groups, release_weights=True), fullgraph=True)
    with pytest.raises(IdleStepError, match="call the model once, with a dummy token"):
        idle_step(compiled)
    before = storages(model)
    for tokens in STEPS:
        step(compiled, whole, tokens[rank], rank)
    shared = [n for n, p in model.named_parameters() if is_released(p)]
    assert len(shared) == 2 + 2 + 3, shared  # embedding, lm_head; o_proj twice; gate, up, down of the dense layer
    sizes = dict(whole.named_parameters())
    assert before - storages(model) == sum(4 * sizes[name].numel() for name in shared)
    reload(rank, compiled, model, whole)


def reload(rank: int, compiled: Any, model: nn.Module, whole: nn.Module) -> None:
    """New weights are refused where there is no memory for them, and by what was compiled for the old ones."""
    with pytest.raises(RuntimeError, match="embed_tokens"):
        model.load_state_dict(whole.state_dict())
    names = cpcompile.reallocate_weights(model)
    assert "lm_head.weight" in names and model.lm_head.weight.isnan().all()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.mul_(1.1)
    model.load_state_dict(whole.state_dict())
    with pytest.raises(ParameterChangedError, match="compile again"):
        step(compiled, whole, 3, rank)
    torch._dynamo.reset()
    step(compiled, whole, 4 + rank, rank)


def a_number_of_rows_that_all_pad_to(rank: int, groups: ProcessGroups) -> None:
    torch._dynamo.reset()
    whole = build(tiny_config("v32"))
    compiled = torch.compile(whole, backend="cpcompile", options=options(groups, group_tokens=8), fullgraph=True)
    reference = build(tiny_config("v32"))
    for tokens in [(5, 3), (8, 1), (2, 7), (0, 8)]:
        step(compiled, reference, tokens[rank], rank)
    if rank == 0:
        with pytest.raises(OptionError, match="this step has 9 rows, and group_tokens=8"):
            step(compiled, reference, 9, rank)
    with torch.no_grad():
        whole.lm_head.weight.mul_(2.0)
    with pytest.raises(ParameterChangedError, match="lm_head"):
        step(compiled, reference, 4, rank)


def weights_that_differ(rank: int, groups: ProcessGroups) -> None:
    torch._dynamo.reset()
    model = build(tiny_config("v3"))
    with torch.no_grad():
        model.lm_head.weight.add_(float(rank))
    reference = build(tiny_config("v3"))
    reference.load_state_dict(model.state_dict())
    compiled = torch.compile(model, backend="cpcompile", options=options(groups, release_weights=True), fullgraph=True)
    for tokens in [(3, 4), (6, 5), (1, 7)]:  # compiled again by one rank alone: what was found out is remembered
        step(compiled, reference, tokens[rank], rank)
    assert not is_released(model.lm_head.weight) and is_released(model.model.embed_tokens.weight)


def flashcomm2_and_whole_layers_by_rank(rank: int, _: ProcessGroups) -> None:
    """Tensor parallelism: o_proj whole on 1/2 of the rows, each layer's weight on one of the ranks."""
    groups = ProcessGroups(rank_groups(Sizes(tp=WORLD, flashcomm2_otp=1, shared_weight=True), "vllm"))
    whole, model = build(tiny_config("v3")), shard(build(tiny_config("v3")), init_device_mesh("cpu", (WORLD,)))
    compiled = torch.compile(
        model,
        backend="cpcompile",
        options={
            "groups": groups, "flashcomm2_oproj_tensor_parallel_size": 1, "layer_sharding": ["o_proj"],
            "strategy": "tp", "release_weights": True,
        },
        fullgraph=True,
    )  # fmt: skip
    for tokens in (5, 8, 1, 3):
        ids = torch.randint(0, TINY["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            close(compiled(input_ids=ids, use_cache=False).logits, whole(input_ids=ids, use_cache=False).logits)
    released = [n for n, p in model.named_parameters() if is_released(local_tensor(p))]
    assert released == [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(2)]
    groups.destroy()


SCENARIOS = [
    unequal_steps_on_released_weights,
    a_number_of_rows_that_all_pad_to,
    weights_that_differ,
    flashcomm2_and_whole_layers_by_rank,
]


def run_rank(rank: int, folder: str, name: str) -> None:
    with joined(rank, WORLD, folder):
        groups = ProcessGroups(rank_groups(Sizes(dp=WORLD, **dict.fromkeys(ROLES.values(), WORLD)), "vllm"))
        next(s for s in SCENARIOS if s.__name__ == name)(rank, groups)
        groups.destroy()


@pytest.mark.ranks
@pytest.mark.parametrize("scenario", [s.__name__ for s in SCENARIOS])
def test_two_ranks(scenario: str, tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path), scenario), nprocs=WORLD)
