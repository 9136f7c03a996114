"""Export every rank's GE graph of a tiny model, with torchair's own converter: run as a script where torch_npu is.

``python ge_exports.py OUT KIND SIZE LAYERS DTYPE [STRATEGY [mc2]]`` writes ``OUT/rank_r/model.pb``, and in
``OUT/rank_r/inputs.pt`` the weights that the graph takes, by name, and the names of its token ids.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Ahead of all that imports torch_npu where it finds it: it loads with the libraries that stand in for CANN's alone.
    from cpcompile.lowering.ascend.installation import import_torchair

    import_torchair("the tests of the GE interpreter", device=False)

import models
import torch
from conftest import make
from simulate import fake_rank, real_inputs

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.exchange import OfflineExchange
from cpcompile.options import Options
from cpcompile.pipeline import compile_graph

EXAMPLE = 10


def model_of(kind: str, layers: int, dtype: torch.dtype) -> Any:
    """The unsharded model, alike in every process.

    An indexer of 4 heads gives one key of 16 the score 0, and the op leaves open which of equal keys it takes: of 32
    heads, no two keys here score alike.
    """
    return make(kind, dtype, layers, **({"index_n_heads": 32} if kind == "v32" else {}))


def export(out: Path, kind: str, size: int, layers: int, dtype: torch.dtype, strategy: str, mc2: bool) -> None:
    from cpcompile.lowering.targets import Settings, lower

    for rank in range(size):
        folder = out / f"rank_{rank}"
        with fake_rank(rank, size) as mesh, torch.no_grad():
            model = models.shard(model_of(kind, layers, dtype), mesh)
            ids = torch.zeros((1, EXAMPLE), dtype=torch.long)
            trace = capture(model, input_ids=ids, use_cache=False)
            gm = _rewritten(trace, axis_of("tp", mesh), kind, strategy)
            names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
            lower("ge-export", gm, [], Settings(folder=folder, mc2=mc2))
            values = dict(zip(names, real_inputs(trace, ids), strict=True))
        tokens = [name for name, given in zip(names, trace.inputs, strict=True) if given.kind == "input"]
        weights = {n: v.clone() for n, v in values.items() if isinstance(v, torch.Tensor) and n not in tokens}
        torch.save({"weights": weights, "tokens": tokens}, folder / "inputs.pt")


def _rewritten(trace: Trace, axis: Axis, kind: str, strategy: str) -> torch.fx.GraphModule:
    options = {"strategy": strategy, "profile": "ascend-a3", "sparse_attention": kind == "v32"}
    compiled = compile_graph(
        trace.gm, trace.inputs, Options.parse(options), lambda a: OfflineExchange(a.size, a.rank), [axis]
    )
    return compiled.variants[-1].gm


if __name__ == "__main__":
    _, folder, name, ranks, depth, precision, *rest = sys.argv
    export(
        Path(folder), name, int(ranks), int(depth), getattr(torch, precision), rest[0] if rest else "tp", "mc2" in rest
    )
