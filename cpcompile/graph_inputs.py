"""What each input of an AOT graph is: its name in the model, its value at the dynamo level, and its kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._guards import TracingContext
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cpcompile.replication import Kind

_MODULE_PART = re.compile(r"\.?_(?:modules|parameters|buffers)\['([^']+)'\]|\.([A-Za-z_]\w*)")


@dataclass(frozen=True)
class GraphInput:
    """One input of the AOT graph.

    Args:
        name: fully qualified name in the model (``model.norm.weight``), or dynamo's name of the argument.
        value: the dynamo-level value: the Parameter or DTensor itself, a tensor, a SymInt, or any other object.
        kind: ``"parameter"``, ``"buffer"``, ``"input"`` or ``"other"``.
        written: the graph writes it. What it holds when the graph is compiled says nothing of later calls then.
    """

    name: str
    value: object
    kind: Kind
    written: bool = False


def describe_inputs(
    gm: fx.GraphModule, example_inputs: Sequence[object], written: Collection[int] = ()
) -> list[GraphInput]:
    """The AOT graph's inputs in order, from the dynamo graph's placeholders and example inputs.

    AOTAutograd passes the tensors inside a DTensor (and, since torch 2.13, its mesh) in the DTensor's place.

    Args:
        gm: dynamo's graph.
        example_inputs: its inputs.
        written: places of those that the graph writes, see ``written_places``.
    """
    found = []
    placeholders = gm.graph.find_nodes(op="placeholder")
    for place, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
        source = source_name(node)
        given = GraphInput(readable_name(source) or node.name, value, _kind(source, value), place in written)
        found += [given] * _leaves(value)
    return found


def written_places() -> frozenset[int]:
    """Places of the dynamo graph's inputs that it writes, by AOTAutograd, which asks for its graph to be compiled."""
    context: Any = TracingContext.try_get()
    metadata = context.fw_metadata if context is not None else None
    return frozenset(metadata.mutated_inp_runtime_indices if metadata is not None else ())


def source_name(node: fx.Node) -> str:
    """Dynamo's name of a placeholder's source, ``""`` where it has none."""
    source = getattr(node, "_dynamo_source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)


def readable_name(source: str) -> str:
    """``L['self']._modules['model']._parameters['w']`` as ``model.w``; other sources as they are."""
    if "_modules[" not in source and "_parameters[" not in source and "_buffers[" not in source:
        return source
    first = source.find("._")
    return ".".join(a or b for a, b in _MODULE_PART.findall(source[first:]))


def unique_names(inputs: Sequence[GraphInput]) -> list[str]:
    """The inputs' names, numbered where several share one (the tensors inside one DTensor)."""
    seen: dict[str, int] = {}
    names = []
    for given in inputs:
        seen[given.name] = count = seen.get(given.name, 0) + 1
        names.append(given.name if count == 1 else f"{given.name}#{count}")
    return names


def meshes_of(inputs: Sequence[GraphInput]) -> list[DeviceMesh]:
    """The device meshes among the inputs and of the DTensors among them."""
    found: dict[int, DeviceMesh] = {}
    for given in inputs:
        mesh = given.value if isinstance(given.value, DeviceMesh) else getattr(given.value, "device_mesh", None)
        if isinstance(mesh, DeviceMesh):
            found[id(mesh)] = mesh
    return list(found.values())


def _kind(source: str, value: object) -> Kind:
    if not isinstance(value, torch.Tensor):
        return "other"
    if isinstance(value, torch.nn.Parameter) or "_parameters[" in source:
        return "parameter"
    return "buffer" if "_buffers[" in source or isinstance(value, torch.nn.Buffer) else "input"


def _leaves(value: object) -> int:
    if isinstance(value, torch.Tensor) and is_traceable_wrapper_subclass(value):
        names, _ = value.__tensor_flatten__()
        return sum(_leaves(getattr(value, name)) for name in names)
    return 1
