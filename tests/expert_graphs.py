"""One layer's experts between gathers and a reduce-scatter, as a graph without a model: what a test changes of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cpcompile import expert_ops  # noqa: F401  registers the op
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import NATIVE, emit, emit_waited
from cpcompile.passes.npu_moe_dispatch import NpuMoeDispatch
from cpcompile.passes.npu_uneven import Group

aten = torch.ops.aten
Change = Callable[[fx.Node, fx.Node], fx.Node]


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer on the last of two ranks, and what stands where; see ``build``."""

    tokens: int = 5
    ranks: int = 2
    width: int = 1024
    local: int = 4
    total: int = 8
    scored: int = 8
    chosen: int = 2
    part: bool = True
    first: int = 4
    routed: bool = True
    symbolic: bool = False
    dtype: torch.dtype = torch.bfloat16
    tables: torch.dtype = torch.bfloat16
    group: str = "tp"
    extra: str = ""
    start: int = 0
    pads: tuple[int, ...] = ()
    reduce_op: str = "sum"
    gathered: Change | None = None  # of the gathered hidden rows
    summed: Change | None = None  # of the experts' sum, cast to the rows' dtype


def cast(at: fx.Node, node: fx.Node) -> fx.Node:
    return emit(at, aten._to_copy.default, node, dtype=torch.bfloat16)


def build(layer: Layer) -> fx.GraphModule:
    """``(x [c, H], scores [c, E], gate_up, down, other [T, H]) -> [c, H]``."""
    mode, graph = FakeTensorMode(shape_env=ShapeEnv()), fx.Graph()
    each = -(-layer.tokens // layer.ranks)
    shapes: Mapping[str, Any] = {
        "x": ((each, layer.width), layer.dtype),
        "scores": ((each, layer.scored), torch.float32),
        "gate_up": ((layer.local, layer.width, 16), layer.tables),
        "down": ((layer.local, 8, layer.width), layer.tables),
        "other": ((layer.tokens, layer.width), torch.bfloat16),
        "numbers": ((each, layer.chosen), torch.int64),
    }
    given = {name: graph.placeholder(name) for name in shapes}
    for name, (shape, dtype) in shapes.items():
        first = DimDynamic.DYNAMIC if layer.symbolic and name in ("x", "scores") else DimDynamic.STATIC
        context = StatelessSymbolicContext([first, DimDynamic.STATIC] + [DimDynamic.STATIC] * (len(shape) - 2))
        given[name].meta["val"] = mode.from_tensor(torch.empty(shape, dtype=dtype), symbolic_context=context)
    end = graph.output(given["x"])
    end.meta["val"] = given["x"].meta["val"]
    top = emit(end, aten.topk.default, given["scores"], layer.chosen)
    weights, ids = (emit(end, operator.getitem, top, index) for index in (0, 1))
    rows = [given["x"], ids if layer.routed else given["numbers"], weights]
    whole, last = [], layer.start + layer.tokens
    for value in rows:
        every = emit_waited(end, NATIVE.all_gather_into_tensor.default, value, layer.ranks, "tp")
        every = layer.gathered(end, every) if layer.gathered is not None and value is rows[0] else every
        whole.append(every if layer.symbolic else emit(end, aten.slice.Tensor, every, 0, layer.start, last))
    part = [[layer.first, layer.total]] if layer.part else []
    made = emit(end, torch.ops.cpcompile.routed_experts.default, *whole, given["gate_up"], given["down"], *part)
    made = layer.summed(end, made) if layer.summed is not None else cast(end, made)
    if not layer.symbolic:
        pads = layer.pads or (0, 0, 0, layer.ranks * each - layer.tokens)
        made = emit(end, aten.constant_pad_nd.default, made, list(pads))
    made = emit_waited(end, NATIVE.reduce_scatter_tensor.default, made, layer.reduce_op, layer.ranks, layer.group)
    extra = emit_waited(end, NATIVE.all_gather_into_tensor.default, given["x"], layer.ranks, layer.extra or "tp")
    end.args = ((made, extra, *([layer_users(graph)] if layer.extra == "sum" else [])),)
    return fx.GraphModule({}, graph)


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def layer_users(graph: fx.Graph) -> fx.Node:
    """The experts' sum."""
    return next(n for n in graph.nodes if n.target is torch.ops.cpcompile.routed_experts.default)


def dispatched(layer: Layer, own: str = "own", ranks: tuple[int, ...] = ()) -> tuple[fx.GraphModule, PassResult]:
    """The graph after the pass, on the last rank of those of the group ``own``."""
    gm = build(layer)

    def members(name: str) -> Group:
        every = tuple(range(layer.ranks))
        return Group("tag", ranks if ranks and name == own else every, len(every) - 1)

    return gm, NpuMoeDispatch(own, lambda name: f"hccl {name}", members)(gm)
