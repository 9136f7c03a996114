"""Load an exported GE graph: the serialised model that torchair hands to GE, constants bound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from cpcompile.lowering.ge import dtypes
from cpcompile.lowering.ge.graph import UNFED, Attr, GeError, GeGraph, GeOp, TensorDesc
from cpcompile.lowering.ge.wire import decode


def load(path: str | Path) -> GeGraph:
    """Read a GE graph from a file: a serialised ``ge.proto.ModelDef``, as ``torchair`` exports it.

    Raises:
        GeError: the file cannot be read, or is no such graph.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise GeError(f"{path}: {error.strerror or error}") from error
    try:
        return parse(data, Path(path).parent)
    except GeError as error:
        raise GeError(f"{path}: {error}") from error


def parse(data: bytes, folder: Path = Path()) -> GeGraph:
    """Read a GE graph from its serialised model. Weights that it keeps in files are looked for under ``folder`` too.

    Raises:
        GeError: ``data`` is no GE model of one graph, or its ops refer to values that nothing makes.
    """
    try:
        model = decode("ModelDef", data)
    except (ValueError, KeyError, UnicodeDecodeError) as error:
        raise GeError(f"expected a serialised GE model, found {len(data)} bytes that are none: {error}") from error
    graphs = model.get("graph", [])
    if len(graphs) != 1:
        raise GeError(f"expected a GE model of one graph, found {len(graphs)}")
    ops = [_op(raw, folder) for raw in graphs[0].get("op", [])]
    attrs = {name: _attr(raw) for name, raw in graphs[0].get("attr", {}).items()}
    return GeGraph(graphs[0].get("name", ""), _ordered(ops), attrs)


def _op(raw: dict[str, Any], folder: Path) -> GeOp:
    op = GeOp(raw.get("name", ""), raw.get("type", ""))
    op.attrs = {name: _attr(value) for name, value in raw.get("attr", {}).items()}
    op.input_descs = [_desc(desc) for desc in raw.get("input_desc", [])]
    op.output_descs = [_desc(desc) for desc in raw.get("output_desc", [])]
    if raw.get("subgraph_name"):
        raise op.error("expected no subgraphs: control flow is not interpreted")
    for value in raw.get("input", []):
        source, _, index = value.rpartition(":")
        if index == "-1":
            op.after.append(source)
        else:
            op.inputs.append(value or UNFED)
    if op.type not in ("Data", "RefData", "Const", "Constant") and len(op.inputs) != len(op.input_descs):
        raise op.error(f"expected a descriptor for each of {len(op.inputs)} inputs, found {len(op.input_descs)}")
    if op.type in ("Const", "Constant"):
        op.data = _constant(op, raw)
    elif op.type == "FileConstant":
        op.data = _file_constant(op, folder)
    return op


def _attr(raw: dict[str, Any]) -> Attr:
    if len(raw) != 1:
        # An attribute without a value, or a list of several kinds: whoever needs it refuses it.
        return Attr("none", None)
    ((kind, value),) = raw.items()
    if kind == "s":
        return Attr("s", value.decode(errors="replace"))
    if kind == "list":
        values = [v for name, found in value.items() if name != "val_type" for v in found]
        return Attr("list", [v.decode(errors="replace") if isinstance(v, bytes) else v for v in values])
    if kind == "list_list_int":
        return Attr(kind, [inner.get("list_i", []) for inner in value.get("list_list_i", [])])
    return Attr(kind, value)


def _desc(raw: dict[str, Any]) -> TensorDesc:
    attrs = raw.get("attr", {})
    shape = tuple(raw.get("shape", {}).get("dim", []))
    return TensorDesc(
        raw.get("name", ""),
        dtypes.OF_DESCRIPTOR.get(raw.get("dtype", 0)),
        None if -2 in shape else shape,
        "_fx_tensor_name" in attrs,
    )


def _constant(op: GeOp, raw: dict[str, Any]) -> torch.Tensor:
    value = raw.get("attr", {}).get("value", {}).get("t")
    if value is None:
        raise op.error("expected a tensor in attribute 'value', found none")
    desc = value.get("desc", {})
    dtype = dtypes.OF_DESCRIPTOR.get(desc.get("dtype", 0))
    if dtype is None:
        raise op.error(f"expected a dtype that torch has, found number {desc.get('dtype', 0)}")
    return _tensor(op, value.get("data", b""), dtype, desc.get("shape", {}).get("dim", []))


def _file_constant(op: GeOp, folder: Path) -> torch.Tensor:
    named, shape = str(op.attrs["file_path"].value), list(op.attrs["shape"].value)
    number = int(op.attrs["dtype"].value)
    if number not in dtypes.OF_ATTRIBUTE:
        raise op.error(f"expected a dtype that torch has, found number {number}")
    # The export names files as they were where it ran.
    path = next((p for p in (Path(named), folder / Path(named).name) if p.is_file()), None)
    if path is None:
        raise op.error(f"its weight file {named!r} is missing; keep it beside the graph")
    return _tensor(op, path.read_bytes(), dtypes.OF_ATTRIBUTE[number], shape)


def _tensor(op: GeOp, data: bytes, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise op.error(f"expected {expected} bytes for {dtypes.short(dtype)} {shape}, found {len(data)}")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def _ordered(ops: list[GeOp]) -> list[GeOp]:
    """``ops`` so that each comes behind those that it needs, else as they were."""
    by_name: dict[str, GeOp] = {}
    for op in ops:
        if op.name in by_name:
            raise op.error("expected unique names, found another op of this name")
        by_name[op.name] = op
    done: dict[str, GeOp] = {}
    for first in ops:
        stack, path = [first], {first.name}
        while stack:
            op = stack[-1]
            needed = [value.rpartition(":")[0] for value in op.inputs if value != UNFED] + op.after
            missing = next((name for name in needed if name not in done), None)
            if op.name in done or missing is None:
                done.setdefault(op.name, op)
                path.discard(stack.pop().name)
            elif missing not in by_name:
                raise op.error(f"its input {missing!r} is not in the graph")
            elif missing in path:
                raise op.error(f"depends on itself, through {missing!r}")
            else:
                stack.append(by_name[missing])
                path.add(missing)
    return list(done.values())
