"""The targets that need an NPU, as far as a host goes: torchair's own compiler and runner, with the engine mocked."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ge_targets
import torch
import torch.fx as fx
from ge_exports import token_inputs
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode

from cpcompile.capture import Trace, capture
from cpcompile.lowering.ascend import conversion
from cpcompile.lowering.ascend.installation import import_torchair
from cpcompile.lowering.ge import GeProgram, interpret
from cpcompile.lowering.ge.loader import parse
from cpcompile.lowering.targets import Settings, lower
from cpcompile.passes.collectives import emit

aten = torch.ops.aten


@contextmanager
def host_for_device() -> Iterator[dict[str, list[Any]]]:
    """Let the targets take this host for an NPU.

    Mocked: the check for an NPU; the graph engine's start, load and compile; its run, which the interpreter does.
    Yields what torchair was asked for: ``configs``, and the ``graphs`` that it was to compile.
    """
    import torchair
    from torchair._ge_concrete_graph import fx2ge_converter
    from torchair.ge._ge_graph import GeGraph

    asked: dict[str, list[Any]] = {"configs": [], "graphs": []}
    original = torchair.get_compiler

    def get_compiler(config: Any) -> Any:
        asked["configs"].append(config)
        compiler = original(config)

        def compile_graph(gm: fx.GraphModule, inputs: Any) -> Any:
            asked["graphs"].append(gm)
            return compiler(gm, inputs)

        return compile_graph

    def run(graph: Any, inputs: Any, assigned: Any = None) -> list[torch.Tensor]:
        return interpret([GeProgram(parse(graph.SerializeToString()), list(inputs))])[0]

    device = "cpcompile.lowering.ascend.device.import_torchair"
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch(device, lambda target, device: import_torchair(target, device=False)))
        stack.enter_context(patch.object(torchair, "get_compiler", get_compiler))
        stack.enter_context(conversion._without_engine())
        stack.enter_context(patch.object(fx2ge_converter, "_update_internal_format_from_inputs", lambda *_: None))
        for name in ("load", "compile"):
            stack.enter_context(patch.object(GeGraph, name, lambda *_, **__: None))
        stack.enter_context(patch.object(GeGraph, "run", run))
        yield asked


def on_device(
    kind: str, counts: list[int], mode: str = "", remove_noop_ops: bool = True
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Compile a whole model of one rank for target ``torchair``, and call it with each number of tokens.

    Args:
        kind: the model.
        counts: numbers of tokens.
        mode: of torchair's configuration, where one is given.
        remove_noop_ops: of that configuration; torchair's own default is True.

    Returns:
        The logits, and how often torchair was asked, whether with the given configuration, and the ops that it got.
    """
    import torchair

    config = None
    if mode:
        config = torchair.CompilerConfig()
        config.mode = mode
        config.experimental_config.remove_noop_ops = remove_noop_ops
    model = ge_targets.model(kind)
    trace = capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)
    values = [node.meta.get("val") for node in trace.gm.graph.find_nodes(op="placeholder")]
    conversion.to_device(trace.gm, conversion._OFF_HOST)
    state = dict([*model.named_parameters(), *model.named_buffers()])
    with host_for_device() as asked, tracing(TracingContext(conversion._mode(values))):
        fakes = [conversion._input(value) for value in values]
        run = lower("torchair", trace.gm, fakes, Settings(compiler_config=config))
        found = []
        for count in counts:
            given = {**state, **token_inputs(ge_targets.ids_of(count))}
            found.append(run([given[i.name] for i in trace.inputs])[0].detach())
    ops = sorted({str(node.target) for node in asked["graphs"][0].graph.nodes if node.op == "call_function"})
    return found, {"times": len(asked["configs"]), "given": asked["configs"][0] is config, "ops": ops}


def configured(target: str, mode: str) -> None:
    """Compile a small graph with a configuration of this mode."""
    import torchair

    config = torchair.CompilerConfig()
    config.mode = mode
    trace = capture(lambda x: x + 1, torch.ones(2))
    values = [node.meta["val"] for node in trace.gm.graph.find_nodes(op="placeholder")]
    with host_for_device():
        lower(target, trace.gm, values, Settings(compiler_config=config))


def captured(op: str) -> list[str]:
    """Compile a graph of one ATen op of a tensor for target ``npugraph_ex``; returns what torchair was asked for."""
    graph = fx.Graph()
    given = graph.placeholder("x")
    with FakeTensorMode():
        given.meta["val"] = torch.ones(1)
    graph.output((graph.call_function(getattr(aten, op).default, (given,)),))
    with host_for_device() as asked, patch("torch_npu.npu.current_device", lambda: 0):
        lower("npugraph_ex", fx.GraphModule({}, graph), [given.meta["val"]])
    return [str(node.target) for gm in asked["graphs"] for node in gm.graph.nodes]


def exported(trace: Trace, inputs: dict[str, Any], remove_noop_ops: bool) -> Any:
    """The one result of the trace's GE graph."""
    import torchair

    from cpcompile.lowering.ascend.bound_inputs import RankGraph
    from cpcompile.lowering.ascend.export import export

    config = torchair.CompilerConfig()
    config.experimental_config.remove_noop_ops = remove_noop_ops
    with tempfile.TemporaryDirectory() as folder:
        export(trace.gm, Path(folder), Settings(compiler_config=config), [{"source": i.name} for i in trace.inputs])
        ((found,),) = interpret([RankGraph.read(Path(folder)).program(inputs)])
    return found


def transposed(remove_noop_ops: bool) -> float:
    """How far a reshape of a transposed copy is from what it should be."""
    x = torch.arange(24.0).view(2, 12)
    trace = capture(lambda x: x.mul(2).view(2, 3, 4).permute(1, 0, 2).clone().add(1), x)
    (add,) = trace.gm.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    # As passes emit it: a copy that keeps the strides, then all elements in order.
    add.args = (emit(add, aten.reshape.default, add.args[0], [-1]), 1)
    found = exported(trace, {trace.inputs[0].name: x}, remove_noop_ops)
    return (found - (x * 2).view(2, 3, 4).permute(1, 0, 2).reshape(-1) - 1).abs().max().item()  # type: ignore[no-any-return]


def turned(remove_noop_ops: bool) -> float:
    """How far a transposition with a dim of 1, behind a view that is taken out, is from what it should be."""

    def angles(ids: torch.Tensor) -> torch.Tensor:
        x = ids[None, :, None].float()
        return torch.cat([x, x * 2, x * 3], -1).view(1, -1, 3).transpose(1, 2).add(1)

    ids = torch.tensor([3, 1, 4, 1, 5])
    trace = capture(angles, torch.zeros(9, dtype=torch.int64))
    name = next(i.name for i in trace.inputs if "size()" not in i.name)
    found = exported(trace, token_inputs(ids, name), remove_noop_ops)
    return (found - angles(ids)).abs().max().item()  # type: ignore[no-any-return]


class _Recorded(Exception):
    """Ends an export once its graph is there."""


def calls() -> set[tuple[str, int, tuple[str, ...]]]:
    """Every call of torch_npu's ops in the graphs of V3 with MC2, V3.2 and both serving forms.

    The op's name, how many arguments it gets by position, and the names of the others.
    """
    import ge_layers

    found = set()

    def convert(gm: fx.GraphModule, config: Any = None) -> Any:
        for node in gm.graph.nodes:
            if getattr(node.target, "namespace", "") == "npu":
                name = str(node.target).split(".")[1]
                found.add((name, len(node.args), tuple(sorted(node.kwargs))))
        raise _Recorded

    with patch("cpcompile.lowering.ascend.export.convert", convert):
        for function, arguments in [
            (ge_layers.lowered, ("v3", "tp", True)),
            (ge_layers.lowered, ("v32", "tp")),
            (ge_layers.served, ("Layer", "contiguous")),
            (ge_layers.served, ("DenseLayer", "contiguous")),
        ]:
            with contextlib.suppress(_Recorded):
                function(*arguments)
    return found


def files_without_an_options_writer() -> list[str]:
    """What an export writes with a release that cannot write GE's options itself."""
    import ge_layers
    from torchair._ge_concrete_graph import fx2ge_converter

    original = fx2ge_converter._generate_export_options_config
    del fx2ge_converter._generate_export_options_config
    try:
        return list(ge_layers.lowered("v3", "tp")["files"])
    finally:
        fx2ge_converter._generate_export_options_config = original
