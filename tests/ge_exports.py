"""Export every rank's GE graph of a tiny model, with torchair's own converter: called where torch_npu is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models
import torch
from conftest import SharedRanks, as_rank, make
from simulate import fake_rank, real_inputs
from torch.distributed.device_mesh import init_device_mesh

from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture
from cpcompile.passes.module_parallel import share_modules
from cpcompile.passes.weight_cuts import cut_tensor

EXAMPLE = 10  # divides by 2 and not by 4: padding is not needed for two ranks, and is for four


def model_of(kind: str, layers: int, dtype: torch.dtype, **changes: Any) -> Any:
    """The unsharded model, alike in every process; ``changes`` are of its configuration.

    An indexer of 4 heads gives one key of 16 the score 0, and the op leaves open which of equal keys it takes: of 32
    heads, no two keys here score alike.
    """
    return make(kind, dtype, layers, **({"index_n_heads": 32} if kind == "v32" else {}), **changes)


def traces(kind: str, size: int, layers: int, dtype: torch.dtype, **changes: Any) -> SharedRanks:
    """Every rank's trace, made of the first one's."""

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
    """Write ``out/rank_r/model.pb``, and in ``out/rank_r/inputs.pt`` what the graph takes by name, but the token ids.

    Returns each rank's list of what torchair has no converter for.
    """
    from cpcompile.lowering.ascend.export import export as write
    from cpcompile.lowering.targets import Settings

    ranks = traces(kind, size, layers, dtype, **changes)
    every = ranks.compile(strategy=strategy, profile="ascend-a3", sparse_attention=kind == "v32")
    unsupported = []
    for rank, (trace, compiled) in enumerate(zip(ranks.traces, every, strict=True)):
        with fake_rank(rank, size), torch.no_grad():
            unsupported.append(write(compiled.variants[-1].gm, out / f"rank_{rank}", Settings(**settings))[1])
        _save(out / f"rank_{rank}/inputs.pt", trace, {})
    return unsupported


def export_shared(out: Path, kind: str, role: str, group_tokens: str | int) -> list[dict[str, Any]]:
    """The same of a replicated model on four ranks, whose ``role`` is shared by ranks 0 and 2, and by 1 and 3.

    Returns each rank's summary.
    """
    from shared_modules import shared, trace_of

    from cpcompile.lowering.ascend.export import export as write
    from cpcompile.lowering.targets import Settings

    trace, found = trace_of(kind, 1), []
    for rank in range(4):
        with fake_rank(rank, 4), torch.no_grad():
            mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
            axis = axis_of("dp", mesh["dp"])
            graph = share_modules(trace.gm, shared(trace, axis, group_tokens != "equal", [role]), group_tokens)
            found.append(write(graph.gm, out / f"rank_{rank}", Settings())[0].to_dict())
        _save(out / f"rank_{rank}/inputs.pt", trace, {name: (cut, axis.rank) for name, cut in graph.cuts.items()})
    return found


def _save(file: Path, trace: Trace, cuts: dict[str, tuple[Any, int]]) -> None:
    names = [node.name for node in trace.gm.graph.find_nodes(op="placeholder")]
    tokens = [name for name, given in zip(names, trace.inputs, strict=True) if given.kind == "input"]
    values = dict(zip(names, real_inputs(trace, torch.zeros((1, EXAMPLE), dtype=torch.long)), strict=True))
    weights = {n: v.clone() for n, v in values.items() if isinstance(v, torch.Tensor) and n not in tokens}
    weights.update({name: cut_tensor(weights[name], *cut).clone() for name, cut in cuts.items()})
    torch.save({"weights": weights, "tokens": tokens}, file)
