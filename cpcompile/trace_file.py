"""Trace files: a captured graph with its axes and facts, in one file that explains the same as the model did.

A trace file is a zip archive of ``header.json`` and ``graph.pkl``, the graph as PyTorch's own ``GraphPickler`` writes
it: shapes stay symbolic, values of parameters are not stored. It holds a pickle: **do not load one from a stranger,
for loading can run code**.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx._graph_pickler import GraphPickler, Options
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cpcompile.axes import Axis
from cpcompile.capture import Trace
from cpcompile.errors import TraceError
from cpcompile.exchange import OfflineExchange
from cpcompile.graph_inputs import GraphInput, unique_names
from cpcompile.passes.context import KEY, GraphContext
from cpcompile.pipeline import copy_graph
from cpcompile.replication import InputFact, input_facts

FORMAT = 1
SUFFIX = ".pt2"
_MODULES = "cpcompile_modules"  # GraphPickler drops nn_module_stack, which may hold anything: ours is only strings


@dataclass
class SavedTrace:
    """A trace as it was read from a file.

    Args:
        trace: graph, inputs (with fake values) and seconds. ``trace.gm.meta`` has the :class:`GraphContext`.
        axes: the mesh axes that the model was sharded over.
        replicated: the facts that were established when it was saved, as the ``replicated`` option declares them.
    """

    trace: Trace
    axes: list[Axis]
    replicated: tuple[str, ...]


def save_trace(path: str | Path, trace: Trace, axes: Sequence[Axis], replicated: Sequence[str] = ()) -> None:
    """Write ``trace`` to ``path``.

    Args:
        path: the file, by convention ``*.pt2``.
        trace: what ``capture`` made; left as it is.
        axes: the mesh axes.
        replicated: patterns of inputs that are the same on every rank, as in ``Options``.

    Raises:
        TraceError: the graph holds something that cannot be stored, or the file cannot be written.
    """
    header = {
        "format": FORMAT,
        "cpcompile": version("cpcompile"),
        "torch": torch.__version__,
        "axes": [dataclasses.asdict(axis) for axis in axes],
        "inputs": [{"name": i.name, "kind": i.kind} for i in trace.inputs],
        "facts": {axis.name: [[f.replicated, f.source] for f in _facts(trace, axis, replicated)] for axis in axes},
        "seconds": trace.seconds,
    }
    try:
        graph = GraphPickler.dumps(_portable(trace.gm), Options(ops_filter=None))
    except Exception as error:  # whatever a constant of the graph raises when pickled
        raise TraceError(f"the graph cannot be stored: {type(error).__name__}: {error}") from error
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("header.json", json.dumps(header, indent=1))
            archive.writestr("graph.pkl", graph)
    except OSError as error:
        raise TraceError(f"cannot write the trace {path}: {error.strerror}") from error


def load_trace(path: str | Path) -> SavedTrace:
    """Read a trace from a file that you trust: loading can run code that is in it.

    Raises:
        TraceError: the file is missing, damaged, of another format, or no trace.
    """
    header, data = _read(path)
    # As dynamo makes it, so that shapes of new nodes can be worked out.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    try:
        gm = GraphPickler.loads(data, mode)
        assert isinstance(gm, fx.GraphModule)
        gm.recompile()
        return _assemble(header, gm)
    except Exception as error:  # a pickle can fail in any way
        made = f"made with cpcompile {header.get('cpcompile')} and torch {header.get('torch')}"
        why = f"{type(error).__name__}: {_first_line(error)}"
        raise TraceError(f"{path}: the graph cannot be read ({why}); it was {made}: trace again") from error


def _facts(trace: Trace, axis: Axis, replicated: Sequence[str]) -> list[InputFact]:
    values, kinds = [i.value for i in trace.inputs], [i.kind for i in trace.inputs]
    exchange = OfflineExchange(axis.size, axis.rank)
    return input_facts(unique_names(trace.inputs), values, kinds, axis, exchange, declared=replicated)


def _portable(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of which only shapes, source lines and module names are kept with each node."""
    copy = fx.GraphModule(gm, copy_graph(gm.graph))
    copy.meta = {}
    for node in copy.graph.nodes:
        meta = {k: node.meta[k] for k in ("val", "stack_trace") if k in node.meta}
        if node.op == "placeholder" and not isinstance(meta.get("val"), FakeTensor | torch.SymInt):
            meta.pop("val", None)  # a device mesh or another object, which no node reads
        if "nn_module_stack" in node.meta:
            stack = node.meta["nn_module_stack"].items()
            meta[_MODULES] = {str(key): (str(where), str(kind)) for key, (where, kind, *_) in stack}
        node.meta = meta
    return copy


def _read(path: str | Path) -> tuple[dict[str, Any], bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            header, data = json.loads(archive.read("header.json")), archive.read("graph.pkl")
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise TraceError(f"{path} is damaged or not a trace of `cpcompile trace`: {_first_line(error)}") from error
    except Exception as error:  # zlib.error has no common base with the rest
        raise TraceError(f"{path} is damaged: {_first_line(error)}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else header
        raise TraceError(f"{path}: expected trace format {FORMAT}, found {found!r}: trace again with this version")
    return header, data


def _assemble(header: Mapping[str, Any], gm: fx.GraphModule) -> SavedTrace:
    nodes = gm.graph.find_nodes(op="placeholder")
    for node in gm.graph.nodes:
        if _MODULES in node.meta:
            node.meta["nn_module_stack"] = node.meta.pop(_MODULES)
    inputs = [
        GraphInput(i["name"], node.meta.get("val"), i["kind"]) for node, i in zip(nodes, header["inputs"], strict=True)
    ]
    axes = [Axis(**{**a, "ranks": tuple(a["ranks"])}) for a in header["axes"]]
    facts = {
        axis.name: {node.name: same for node, (same, _) in zip(nodes, header["facts"][axis.name], strict=True)}
        for axis in axes
    }
    gm.meta[KEY] = GraphContext(tuple(axes), facts)
    return SavedTrace(Trace(gm, inputs, dict(header["seconds"])), axes, _declared(header["facts"], inputs))


def _declared(facts: Mapping[str, Sequence[tuple[bool, str]]], inputs: Sequence[GraphInput]) -> tuple[str, ...]:
    """Patterns that declare the facts which cannot be seen again without the original values.

    An input that is replicated over some axes only counts as not replicated: that loses an opportunity, never rows.
    """
    patterns = []
    for name, *found in zip(unique_names(inputs), *facts.values(), strict=True):
        if any(source != "integer input" and not source.startswith("unknown") for _, source in found):
            patterns.append(("" if all(same for same, _ in found) else "!") + glob.escape(name))
    return tuple(patterns)


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
