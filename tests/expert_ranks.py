"""DeepSeek models whose experts are split over the ranks by their numbers, by the transformers library's own plan."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
from conftest import SharedRanks, as_rank
from ge_exports import EXAMPLE, weights_of
from simulate import fake_rank
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from cpcompile.capture import capture

# What the ops take: rows of 1024 and more; torch's grouped product wants rows of whole 16 bytes.
WIDE = {"hidden_size": 1024, "moe_intermediate_size": 64, "first_k_dense_replace": 0}


def model() -> Any:
    """The unsharded model, alike in every process, in which tokens choose their experts by wide margins.

    A token's embedding is largest in two of the first columns, which its router's weights read, so that no rounding
    changes a choice; see ``conftest._fix_choices``, in which all tokens choose the same experts.
    """
    whole = models.build(models.tiny_config("v3", 1, **WIDE), torch.bfloat16)
    experts = whole.config.n_routed_experts
    half = experts // whole.config.n_group
    with torch.no_grad():
        rows = whole.model.embed_tokens.weight
        for token in range(len(rows)):
            first = 7 * token % experts
            second = first // half * half + (first + 1) % half
            rows[token, :experts] = 0
            rows[token, first], rows[token, second] = 30, 20
        for layer in whole.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:, :experts] = 0.1 * torch.eye(experts)
            layer.mlp.gate.e_score_correction_bias.zero_()
    return whole


def split(whole: Any, mesh: Any, how: str) -> Any:
    """``whole`` with its experts split over the ranks, and with ``"tp"`` all that tensor parallelism splits."""
    if how == "tp":
        whole._tp_plan = {**whole.tp_plan, **models.EXPERT_PLAN}
        return models.shard(whole, mesh)
    whole._tp_plan = models.EXPERT_PLAN
    return apply_tensor_parallelism(whole, mesh)


@functools.lru_cache(maxsize=1)
def traces(how: str, size: int) -> SharedRanks:
    """Every rank's trace."""

    def make(mesh: Any) -> Any:
        return split(model(), mesh, how)

    with fake_rank(0, size) as mesh:
        first = capture(make(mesh), input_ids=torch.zeros((1, EXAMPLE), dtype=torch.long), use_cache=False)
    every = [as_rank(first, rank, size, make) for rank in range(size)]
    return SharedRanks([trace for trace, _ in every], [axis for _, axis in every])


def export(out: Path, how: str, size: int, strategy: str, tokens: int = 0) -> list[dict[str, Any]]:
    """Write ``out/rank_r`` with its weights, for ``tokens`` tokens by dispatch, or for all T. Each rank's summary."""
    from cpcompile.lowering.ascend.export import export as write
    from cpcompile.lowering.ascend.whole_model import known_of
    from cpcompile.lowering.targets import Settings
    from cpcompile.passes.specialise import sizes_for, specialise

    every, found = zip(traces(how, size).traces, compiled_of(how, size, strategy), strict=True), []
    for rank, (trace, compiled) in enumerate(every):
        gm, folder, settings = compiled.variants[-1].gm, out / f"rank_{rank}", Settings()
        with fake_rank(rank, size), torch.no_grad():
            if tokens:
                gm = specialise(gm, sizes_for(gm, compiled.tokens, tokens))
                settings = Settings(moe_dispatch=dist.new_group(list(range(size))).group_name)
            summary, unsupported = write(gm, folder, settings, known_of(compiled, trace.inputs))
        assert not unsupported
        torch.save(weights_of(trace), folder / "weights.pt")
        found.append(summary.to_dict())
    return found


@functools.lru_cache(maxsize=2)
def compiled_of(how: str, size: int, strategy: str) -> list[Any]:
    return traces(how, size).compile(strategy=strategy, profile="ascend-a3")
