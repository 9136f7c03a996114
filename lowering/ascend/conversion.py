"""From a rewritten ATen graph to a GE graph, by torchair's own converters, with or without an NPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import sympy
import torch
import torch.fx as fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from cpcompile.errors import AscendError
from cpcompile.lowering.ascend.converters import register_missing
from cpcompile.lowering.ascend.installation import find, import_torchair
from cpcompile.lowering.ascend.transpositions import prepare_transpositions
from cpcompile.lowering.used_inputs import used_inputs
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
        used: the traced graph's inputs that it was made of, by number.
        unsupported: what has no place in it.
    """

    concrete: Any = None
    used: list[int] = field(default_factory=list)
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
    register_missing(torchair)
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    moved, used = used_inputs(gm, values)
    to_device(moved, _OFF_HOST)
    prepare_transpositions(moved)
    inputs = [_input(values[index]) for index in used]
    result = Converted(used=used)
    with contextlib.ExitStack() as stack:
        stack.enter_context(tracing(TracingContext(_mode(values))))
        stack.enter_context(without_guards(gm))
        stack.enter_context(_without_engine())
        stack.enter_context(collecting(result.unsupported))
        compiler = torchair.get_compiler(config if config is not None else ge_config(torchair))
        result.concrete = compiler(moved, inputs).runner
    return result


def ge_config(torchair: Any) -> Any:
    """Torchair's configuration where the user gives none.

    Its ``remove_noop_ops`` takes copies out, and what it then makes of a permuted value that is reshaped lacks the
    transposition: an all-to-all's columns come back in the other order.
    """
    config = torchair.CompilerConfig()
    config.experimental_config.remove_noop_ops = False
    return config


def _mode(values: Sequence[Any]) -> FakeTensorMode | None:
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


@contextmanager
def without_guards(gm: fx.GraphModule) -> Iterator[None]:
    """Leave no guard behind: what a graph's sizes are at the traced example is not so for all that it is to serve.

    A guard says that two sizes are one, and what is converted later from the same trace, another rank's graph or
    another variant, then lacks the slices between them.

    Raises:
        AscendError: the trace itself says so.
    """
    mode = _mode([node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")])
    if mode is None or mode.shape_env is None:
        yield
        return
    for guard in mode.shape_env.guards:
        # Two inputs of one size are so at run time too.
        if isinstance(guard.expr, sympy.Eq) and not all(side.is_Symbol for side in guard.expr.args):
            raise AscendError(
                f"the traced graph holds only where {guard.expr}: trace an example of another size, "
                "or export a static graph"
            )
    with mode.shape_env.suppress_guards():
        yield


# Fake tensors that torchair takes for the device's: any but the host's. PyTorch guards those on ``npu`` by calling it.
_OFF_HOST = torch.device("meta")


def to_device(gm: fx.GraphModule, device: torch.device) -> None:
    """Let every tensor that ``gm`` makes be made on ``device``."""
    for node in gm.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}
    gm.recompile()


def _input(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    with value.fake_mode:
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_OFF_HOST)


@contextmanager
def _without_engine() -> Iterator[None]:
    """Convert without starting the graph engine, and where CANN is missing, without asking it what it knows."""
    from torchair._ge_concrete_graph import compat_ir, fx2ge_converter
    from torchair.core import _torchair

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(fx2ge_converter, "initialize_graph_engine", lambda *_: None))
        if not find().cann:
            # An op that a converter writes by itself is one that CANN has; none is known well enough to be generated.
            stack.enter_context(patch.object(_torchair, "get_registered_ir_def", lambda _: ("SUCCESS", [], [], [])))
            stack.enter_context(patch.object(compat_ir, "is_cann_compat", lambda *_, **__: ""))
            stack.enter_context(patch("torch.npu.get_device_name", lambda *_: SOC))  # some converters ask
        yield


@contextmanager
def collecting(found: list[Unsupported]) -> Iterator[None]:
    """Note every op that cannot be converted, and go on with an op of its name in its place, to find them all.

    Its converter may fail, or be missing, and so may the function by which PyTorch works out the shapes of its results.
    """
    from torchair._ge_concrete_graph import fx2ge_converter
    from torchair.npu_fx_compiler import _NpuGraphConverter

    parse, call = fx2ge_converter.GeConcreteGraph.parse_node, _NpuGraphConverter.call_function

    def parse_node(self: Any, target: Any, args: Any, kwargs: Any, meta_outputs: Any) -> Any:
        try:
            return parse(self, target, args, kwargs, meta_outputs)
        except Exception as error:
            found.append(_unsupported(self._converter_ctx.node, target, meta_outputs, error))
            return _stand_in(target, meta_outputs)

    def call_function(self: Any, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            return call(self, target, args, kwargs)
        except AscendError:
            raise
        except Exception as error:
            node = self._graph._converter_ctx.node
            traced = tree_map_only(FakeTensor, _input, node.meta.get("val"))
            found.append(_unsupported(node, target, traced, error))
            return self._get_value_pack(traced, _stand_in(target, traced))

    with (
        patch.object(fx2ge_converter.GeConcreteGraph, "parse_node", parse_node),
        patch.object(_NpuGraphConverter, "call_function", call_function),
    ):
        yield


def _unsupported(node: fx.Node, target: Any, results: Any, error: Exception) -> Unsupported:
    if isinstance(results, torch.SymInt | torch.SymFloat | torch.SymBool):
        # A number has no op to stand in for it.
        raise AscendError(
            f"{node.name} computes a number by {target}, for which torchair has no converter: a GE graph cannot"
        ) from error
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return Unsupported(node.name, str(target), module_of(node), reason)


def _stand_in(target: Any, results: Any) -> Any:
    """Ops in the place of what an op gives, if it gives anything."""
    from torchair._ge_concrete_graph.fx2ge_converter import set_ge_outputs

    made = tree_map_only(torch.Tensor, lambda _: _placeholder(str(target)), results)
    if results is not None:
        set_ge_outputs(made, results)
    return made


def _placeholder(name: str) -> Any:
    from torchair._ge_concrete_graph.compat_ir import ge_op

    return ge_op(op_type=name, inputs=None, outputs=["y"])


def require_all(unsupported: Sequence[Unsupported]) -> None:
    """Raise :class:`AscendError` that names what cannot be lowered, if there is anything, and what to do."""
    if unsupported:
        first, kinds = unsupported[0], dict.fromkeys(u.op for u in unsupported)
        where = f" in {first.module}" if first.module else ""
        others = f"; {len(unsupported)} in all, of {', '.join(kinds)}" if len(unsupported) > 1 else ""
        raise AscendError(f"{first.op} ({first.node}{where}) cannot be converted to GE: {remedy(first)}{others}")


def remedy(found: Unsupported) -> str:
    """What can be done about an op that torchair cannot convert."""
    if found.op.startswith(("aten.", "prims.")):
        return f"{found.reason}; write it with other ops, or add a form to GeForms"
    return f"{found.reason}; register one with torchair.register_fx_node_ge_converter(torch.ops.{found.op})"
