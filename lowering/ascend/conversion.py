"""From a rewritten ATen graph to a GE graph, by torchair's own converters, with or without an NPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.fx as fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map_only

from cpcompile.errors import AscendError
from cpcompile.lowering.ascend.installation import find, import_torchair
from cpcompile.passes.describe import module_of


SOC = "Ascend910_93"  # what graphs are made for where no device says: Atlas A3


@dataclass(frozen=True)
class Unsupported:
    """An op that torchair cannot convert.

    Args:
        node: name of the FX node.
        op: the op.
        module: the model's module that it comes from.
        reason: the converter's own words.
    """

    node: str
    op: str
    module: str
    reason: str


@dataclass
class Converted:
    """A GE graph.

    Args:
        concrete: torchair's ``GeConcreteGraph``; its ``graph`` is the protobuf message.
        unsupported: what has no place in it.
    """

    concrete: Any
    unsupported: list[Unsupported] = field(default_factory=list)


def convert(gm: fx.GraphModule, config: Any = None) -> Converted:
    """Convert ``gm``, whose inputs' ``val`` are fake tensors on any device, as it would be on an NPU.

    Args:
        gm: a functional ATen graph; not changed.
        config: torchair's ``CompilerConfig``; None for its defaults.

    Raises:
        AscendError: torch_npu is missing or does not fit.
    """
    torchair = import_torchair("ge-export", device=False)
    moved, inputs = off_host(gm)
    mode = next((v.fake_mode for v in inputs if isinstance(v, FakeTensor)), None)
    result = Converted(None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(_without_engine())
        stack.enter_context(_collecting(result.unsupported))
        result.concrete = torchair.get_compiler(config or torchair.CompilerConfig())(moved, inputs).runner
    return result


def off_host(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of ``gm`` with no tensor on the host, and its fake inputs: torchair takes those for the device's.

    They are on ``meta``, as PyTorch guards fake tensors on ``npu`` with calls of the device.
    """
    device = torch.device("meta")
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    moved = fx.GraphModule(gm, graph)
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    moved.recompile()
    return moved, [_input(node.meta.get("val"), device) for node in graph.find_nodes(op="placeholder")]


def _input(value: Any, device: torch.device) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)


@contextmanager
def _without_engine() -> Iterator[None]:
    """Convert without starting the graph engine, and where CANN is missing, without asking it what it knows."""
    from torchair._ge_concrete_graph import compat_ir, fx2ge_converter
    from torchair.core import _torchair

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(fx2ge_converter, "initialize_graph_engine", lambda *_: None))
        if not find().cann:
            # Every op that a converter writes by itself is one that CANN has; none is known well enough to be generated.
            stack.enter_context(patch.object(_torchair, "get_registered_ir_def", lambda _: ("SUCCESS", [], [], [])))
            stack.enter_context(patch.object(compat_ir, "is_cann_compat", lambda *_, **__: ""))
            stack.enter_context(patch.object(torch.npu, "get_device_name", lambda *_: SOC))  # some converters ask
        yield


@contextmanager
def _collecting(found: list[Unsupported]) -> Iterator[None]:
    """Note every op that cannot be converted, and go on with an op of its name in its place, to find them all."""
    from torchair._ge_concrete_graph import fx2ge_converter

    original = fx2ge_converter.GeConcreteGraph.parse_node

    def parse_node(self: Any, target: Any, args: Any, kwargs: Any, meta_outputs: Any) -> Any:
        try:
            return original(self, target, args, kwargs, meta_outputs)
        except Exception as error:
            node = self._converter_ctx.node
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            found.append(Unsupported(node.name, str(target), module_of(node), reason))
            made = tree_map_only(torch.Tensor, lambda _: _placeholder(str(target)), meta_outputs)
            fx2ge_converter.set_ge_outputs(made, meta_outputs)
            return made

    with patch.object(fx2ge_converter.GeConcreteGraph, "parse_node", parse_node):
        yield


def _placeholder(name: str) -> Any:
    from torchair._ge_concrete_graph.compat_ir import ge_op

    return ge_op(op_type=name, inputs=None, outputs=["y"])


def require_all(converted: Converted) -> None:
    """Raise :class:`AscendError` that lists what cannot be lowered, if there is anything."""
    if converted.unsupported:
        first = converted.unsupported[0]
        where = f" in {first.module}" if first.module else ""
        more = len(converted.unsupported) - 1
        others = f", and {more} more" if more else ""
        raise AscendError(f"no converter to GE for {first.op} ({first.node}{where}): {first.reason}{others}")
