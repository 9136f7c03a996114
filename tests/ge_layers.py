"""GE op sequences of small models, made in a process with torch_npu: what golden texts are compared with."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import expert_ranks
import models
import serving_models
import shared_modules
import torch
import torch.distributed as dist
import torch.fx as fx
from simulate import fake_rank

from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture
from cpcompile.exchange import OfflineExchange
from cpcompile.lowering.ascend.export import export
from cpcompile.lowering.targets import Settings
from cpcompile.options import Options
from cpcompile.passes.module_parallel import share_modules
from cpcompile.passes.specialise import sizes_for, specialise
from cpcompile.pipeline import compile_graph, copy_graph

# Sizes, copies and constants: how torchair spells what stands between the ops that a reader looks for.
GLUE = frozenset(
    {
        "Add", "BroadcastTo", "Cast", "ConcatV2", "Const", "Data", "Equal", "Fill", "FloorDiv", "Gather", "GatherV2",
        "GreaterEqual", "Identity", "IndexByTensor", "Less", "LessEqual", "LogicalAnd", "LogicalNot", "LogicalOr",
        "Mul", "Neg", "NetOutput", "NotEqual", "Pack", "Range", "Reshape", "SelectV2", "Shape", "SplitV", "Squeeze",
        "StridedSliceV2", "Sub", "TensorMove", "Transpose", "Unsqueeze", "ZerosLike", "MaskedFill", "Cumsum", "Cos",
        "Sin", "Empty", "GatherElements", "ScatterElements", "RealDiv", "ReduceSum", "TopKV2", "Sigmoid", "Muls",
        "ClipByValueV2", "BatchMatMul",
    }
)  # fmt: skip

WIDE = {
    "hidden_size": 256, "intermediate_size": 512, "v_head_dim": 32, "moe_intermediate_size": 64, "q_lora_rank": 256,
}  # fmt: skip


PLAIN = Settings()


@cache
def traced(kind: str) -> tuple[Trace, Any]:
    """Rank 0 of 2 of a model of one dense and one sparse layer, wide enough for MC2."""
    with fake_rank(0, 2) as mesh, torch.no_grad():
        model = models.shard(models.build(models.tiny_config(kind, **WIDE), torch.bfloat16), mesh)
        trace = capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)
        return trace, model


def lowered(kind: str, strategy: str, mc2: bool = False, tokens: int = 64) -> dict[str, Any]:
    """The summary of a model's GE graph, and its op sequence."""
    trace, _ = traced(kind)
    with fake_rank(0, 2) as mesh:
        gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
        options = {"strategy": strategy, "profile": "ascend-a3", "replicated": ["*"]}
        compiled = compile_graph(
            gm, trace.inputs, Options.parse(options), lambda a: OfflineExchange(a.size, a.rank), [axis_of("tp", mesh)]
        )
        return written(compiled.at(tokens).gm, Settings(mc2=mc2))


def served(layer: str, layout: str) -> dict[str, Any]:
    """The same of the serving form, context-parallel over 4 ranks."""
    with fake_rank(0, 4) as mesh, torch.no_grad():
        sizes = serving_models.Sizes()
        model = serving_models.Serving(sizes, torch.bfloat16, getattr(serving_models, layer))
        step = serving_models.batch([9, 7], [4, 0], 12, sizes)
        trace = capture(model, *step, *model.caches(12))
        options = {"strategy": "cp", "profile": "ascend-a3", "replicated": ["*"], "layout": layout}
        options["axes"] = {"cp": mesh["tp"]}
        compiled = compile_graph(
            trace.gm, trace.inputs, Options.parse(options), lambda a: OfflineExchange(a.size, a.rank)
        )
        return written(compiled.variants[-1].gm)


def shared_o_proj() -> dict[str, Any]:
    """The same of one layer of a replicated V3 model whose attention output is projected by four ranks together."""
    with fake_rank(0, 4) as mesh, torch.no_grad():
        trace, axis = shared_modules.trace_of("v3", 1), axis_of("tp", mesh["tp"])
        modules = shared_modules.shared(trace, axis, unequal=False, roles=["o_proj"])
        return written(share_modules(trace.gm, modules, "equal").gm)


def dispatched(tokens: int) -> dict[str, Any]:
    """The same of a layer whose experts are split over two ranks that share the context, for one token count."""
    with fake_rank(0, 2) as mesh, torch.no_grad():
        model = expert_ranks.split(expert_ranks.model(), mesh["tp"], "cp")
        trace = capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)
        options = {"strategy": "cp", "profile": "ascend-a3", "replicated": ["*"], "axes": {"cp": mesh["tp"]}}
        compiled = compile_graph(
            trace.gm, trace.inputs, Options.parse(options), lambda a: OfflineExchange(a.size, a.rank)
        )
        gm = compiled.at(tokens).gm
        own = dist.new_group([0, 1]).group_name
        return written(specialise(gm, sizes_for(gm, compiled.tokens, tokens)), Settings(moe_dispatch=own))


def written(gm: fx.GraphModule, settings: Settings = PLAIN) -> dict[str, Any]:
    from torchair._ge_concrete_graph.ge_ir_pb2 import ModelDef

    with tempfile.TemporaryDirectory() as folder:
        export(gm, Path(folder), settings)
        files = sorted(path.name for path in Path(folder).iterdir())
        summary = json.loads((Path(folder) / "summary.json").read_text())
        model = ModelDef()
        model.ParseFromString((Path(folder) / "model.pb").read_bytes())
    lines = []
    for op in model.graph[0].op:
        if op.type not in GLUE:
            group = next((op.attr[key].s.decode() for key in ("group", "group_ep") if key in op.attr), "")
            lines.append(f"{op.type} {group}".rstrip())
    return {**summary, "files": files, "text": "\n".join(lines) + "\n"}


def specialised(tokens: int) -> dict[str, Any]:
    """A static graph."""
    trace, _ = traced("v3")
    with fake_rank(0, 2) as mesh:
        gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
        options = Options.parse({"strategy": "tp", "profile": "ascend-a3", "replicated": ["*"]})
        axes = [axis_of("tp", mesh)]
        compiled = compile_graph(gm, trace.inputs, options, lambda a: OfflineExchange(a.size, a.rank), axes)
        own = compiled.at(tokens).gm
        return written(specialise(own, sizes_for(own, compiled.tokens, tokens)))


def exported_by_backend() -> None:
    """What calling a model that was compiled for ``ge-export`` does."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        options = {"target": "ge-export", "dump_dir": folder}
        torch.compile(torch.nn.Linear(4, 4), backend="cpcompile", options=options)(torch.ones(3, 4))
