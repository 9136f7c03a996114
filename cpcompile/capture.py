"""Capture: a model's functional ATen graph for inference, by dynamo and AOTAutograd, without running it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed

from cpcompile.errors import TraceError
from cpcompile.graph_inputs import GraphInput, describe_inputs, written_places

Compiler = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass
class Trace:
    """A captured graph.

    Args:
        gm: functional ATen graph of one rank, as AOTAutograd made it.
        inputs: what each of its inputs is.
        seconds: time that dynamo and AOTAutograd took, by ``"dynamo"`` and ``"aot"``.
    """

    gm: fx.GraphModule
    inputs: list[GraphInput]
    seconds: dict[str, float] = field(default_factory=dict)


def lower_inference(gm: fx.GraphModule, example_inputs: Sequence[Any], inference: Compiler, training: Compiler) -> Any:
    """Hand a dynamo graph's functional ATen form to ``inference``, or its training form to ``training``.

    Input mutations come back as leading outputs, so that the graph that the passes see has no effects.
    """
    return aot_autograd(
        fw_compiler=training,
        bw_compiler=training,
        inference_compiler=inference,
        keep_inference_input_mutations=False,
    )(gm, example_inputs)


class _Captured(Exception):
    """Ends a compilation once its graph is there."""


def capture(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Trace:
    """Trace ``model(*args, **kwargs)`` for inference. Nothing is run; meta tensors allocate nothing.

    Dims of integer tensor arguments that are longer than 1 become symbolic, so that one trace stands for any number
    of tokens.

    Raises:
        TraceError: the model cannot be traced as one graph; the message has dynamo's reason.
    """
    found: list[Trace] = []
    began = time.perf_counter()

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        dynamo = time.perf_counter()

        def keep(aot: fx.GraphModule, _: Sequence[Any]) -> Any:
            seconds = {"dynamo": dynamo - began, "aot": time.perf_counter() - dynamo}
            found.append(Trace(aot, describe_inputs(gm, example_inputs, written_places()), seconds))
            raise _Captured

        return lower_inference(gm, example_inputs, keep, make_boxed_func)

    _mark_tokens([*args, *kwargs.values()])
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(model, backend=backend, fullgraph=True)(*args, **kwargs)
    except (_Captured, BackendCompilerFailed) as error:
        if not found:
            raise TraceError(f"the model cannot be traced: {_first_line(error)}") from error
    except Exception as error:
        raise TraceError(f"the model cannot be traced: {_first_line(error)}") from error
    finally:
        torch._dynamo.reset()
    if not found:
        raise TraceError("the model has no graph: it runs no tensor operation")
    trace = found[0]
    if len(trace.inputs) != len(trace.gm.graph.find_nodes(op="placeholder")):
        trace.inputs = unknown_inputs(trace.gm)
    return trace


def unknown_inputs(gm: fx.GraphModule) -> list[GraphInput]:
    """Inputs by the graph's own names, for graphs whose inputs cannot be matched with dynamo's."""
    nodes = gm.graph.find_nodes(op="placeholder")
    return [
        GraphInput(n.name, n.meta.get("val"), "input" if isinstance(n.meta.get("val"), torch.Tensor) else "other")
        for n in nodes
    ]


def _mark_tokens(values: Sequence[Any]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor) and not value.dtype.is_floating_point:
            for dim, size in enumerate(value.shape):
                if size > 1:
                    torch._dynamo.mark_dynamic(value, dim)


def _first_line(error: BaseException) -> str:
    """The line of dynamo's message that says what went wrong: the cause that it quotes, else the first one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = next((line for line in lines if line.startswith("got ")), "")
    return " ".join([*lines[:1], cause]).strip() or type(error).__name__
