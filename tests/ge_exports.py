"""Export every rank's GE graph of a tiny model, with torchair's own converter: called where torch_npu is."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import models
import torch
from conftest import SharedRanks, as_rank, make
from simulate import fake_rank
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.module_tp import Sharing
from cpcompile.passes.module_parallel import share_modules
from cpcompile.plan import Plan

EXAMPLE = 10  # divides by 2 and not by 4: padding is not needed for two ranks, and is for four


def model_of(kind: str, layers: int, dtype: torch.dtype, **changes: Any) -> Any:
    """The unsharded model, alike in every process; ``changes`` are of its configuration.

    An indexer of 4 heads gives one key of 16 the score 0, and the op leaves open which of equal keys it takes: of 32
    heads, no two keys here score alike.
    """
    return make(kind, dtype, layers, **({"index_n_heads": 32} if kind == "v32" else {}), **changes)


@functools.lru_cache(maxsize=1)
def traces(kind: str, size: int, layers: int, dtype: torch.dtype, **changes: Any) -> SharedRanks:
    """Every rank's trace, made of the first one's; kept, as a test exports one model in two ways."""

    def make_sharded(mesh: Any) -> Any:
        return models.shard(model_of(kind, layers, dtype, **changes), mesh)

    with fake_rank(0, size) as mesh:
        first = capture(make_sharded(mesh), input_ids=torch.zeros((1, EXAMPLE), dtype=torch.long), use_cache=False)
    every = [as_rank(first, rank, size, make_sharded) for rank in range(size)]
    return SharedRanks([trace for trace, _ in every], [axis for _, axis in every])


def export(
    out: Path, kind: str, size: int, layers: int, dtype: torch.dtype, strategy: str = "tp",
    changes: Mapping[str, Any] = {}, settings: Mapping[str, Any] = {},
) -> list[Any]:  # fmt: skip
    """Write ``out/rank_r``, and in ``out/rank_r/weights.pt`` what the graph takes but the token ids, by source.

    With ``"off"``, what the ranks of an uncompiled model compute. Returns each rank's list of what torchair has no
    converter for.
    """
    from cpcompile.lowering.ascend.export import export as write
    from cpcompile.lowering.ascend.whole_model import known_of
    from cpcompile.lowering.targets import Settings

    ranks = traces(kind, size, layers, dtype, **changes)
    every = ranks.compile(strategy=strategy, profile="ascend-a3", sparse_attention=strategy != "off")
    unsupported = []
    for rank, (trace, compiled) in enumerate(zip(ranks.traces, every, strict=True)):
        with fake_rank(rank, size), torch.no_grad():
            gm, folder = compiled.variants[-1].gm, out / f"rank_{rank}"
            unsupported.append(write(gm, folder, Settings(**settings), known_of(compiled, trace.inputs))[1])
        torch.save(weights_of(trace), folder / "weights.pt")
    return unsupported


def export_shared(out: Path, kind: str, roles: Sequence[str], group_tokens: str | int) -> list[dict[str, Any]]:
    """The same of a replicated model on four ranks, whose ``roles`` are shared by ranks 0 and 2, and by 1 and 3.

    Returns each rank's summary.
    """
    from shared_modules import shared, trace_of

    from cpcompile.lowering.ascend.export import export as write
    from cpcompile.lowering.ascend.whole_model import known_of
    from cpcompile.lowering.targets import Settings

    trace, found = trace_of(kind, 1), []
    for rank in range(4):
        with fake_rank(rank, 4), torch.no_grad():
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            axis = axis_of("dp", mesh["dp"])
            graph = share_modules(trace.gm, shared(trace, axis, group_tokens != "equal", roles), group_tokens)
            compiled = Compiled(trace.gm, [], Plan(), sharing=Sharing(cuts=dict(graph.cuts), axes=dict(graph.axes)))
            known = known_of(compiled, trace.inputs)
            found.append(write(graph.gm, out / f"rank_{rank}", Settings(), known)[0].to_dict())
        torch.save(weights_of(trace), out / f"rank_{rank}/weights.pt")
    return found


def weights_of(trace: Trace) -> dict[str, torch.Tensor]:
    """What this rank's trace has of the model, by its names."""
    found = {}
    for given in trace.inputs:
        if given.kind in ("parameter", "buffer"):
            value: Any = given.value
            found[given.name] = (value.to_local() if isinstance(value, DTensor) else value).detach().clone()
    return found


def token_inputs(ids: torch.Tensor, name: str = "L['kwargs']['input_ids']") -> dict[str, torch.Tensor | int]:
    """Token ids and their sizes, as traces call them."""
    return {name: ids, **{f"{name}.size()[{dim}]": size for dim, size in enumerate(ids.shape)}}
