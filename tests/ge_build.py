"""GE graphs for tests: built op by op, serialised as torchair serialises them, and run."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cpcompile.lowering.ge import GeGraph, GeOp, GeProgram, interpret
from cpcompile.lowering.ge.dtypes import NAMES
from cpcompile.lowering.ge.graph import Attr, TensorDesc
from cpcompile.lowering.ge.wire import SCHEMA

ATTRIBUTE = {dtype: number for number, _, dtype in NAMES.values()}
DESCRIPTOR = {dtype: number for _, number, dtype in NAMES.values()}


def attr(value: Any) -> Attr:
    """An attribute of the kind that torchair gives such a value."""
    if isinstance(value, torch.dtype):
        return Attr("i", ATTRIBUTE[value])
    kinds = {bool: "b", int: "i", float: "f", str: "s", list: "list"}
    return Attr(kinds[type(value)], value)


def data(name: str, index: int, tensor: Tensor | int, dynamic: bool = True) -> GeOp:
    tensor = tensor if isinstance(tensor, Tensor) else torch.tensor(tensor)
    desc = TensorDesc("y", tensor.dtype, tuple(-1 if dynamic else size for size in tensor.shape))
    return GeOp(name, "Data", output_descs=[desc], attrs={"index": attr(index)})


def node(name: str, op_type: str, inputs: Mapping[str, str | Sequence[str]], outputs: int = 1, **attrs: Any) -> GeOp:
    """An op: ``inputs`` by the prototype's names, a list for a dynamic one; an empty string is an unfed input."""
    made = GeOp(name, op_type, attrs={key: attr(value) for key, value in attrs.items()})
    for key, source in inputs.items():
        named = [(key, source)] if isinstance(source, str) else [(f"{key}{i}", s) for i, s in enumerate(source)]
        for input_name, value in named:
            made.inputs.append(value if ":" in value or not value else f"{value}:0")
            made.input_descs.append(TensorDesc(input_name))
    made.output_descs = [TensorDesc(f"y{i}") for i in range(outputs)]
    return made


def output(sources: Sequence[str]) -> GeOp:
    made = node("out", "NetOutput", {"input": list(sources)})
    made.output_descs = []
    return made


def one_op(
    op_type: str, inputs: Mapping[str, Tensor | Sequence[Tensor] | None], outputs: int = 1, **attrs: Any
) -> tuple[GeGraph, list[Tensor]]:
    """A graph of one op whose inputs are the graph's, and the values of those."""
    ops: list[GeOp] = []
    values: list[Tensor] = []
    named: dict[str, str | list[str]] = {}

    def feed(tensor: Tensor | None) -> str:
        if tensor is None:
            return ""
        ops.append(data(f"in{len(values)}", len(values), tensor))
        values.append(tensor)
        return ops[-1].name

    for name, given in inputs.items():
        named[name] = [feed(t) for t in given] if isinstance(given, list | tuple) else feed(given)  # type: ignore[arg-type]
    ops.append(node("tested", op_type, named, outputs, **attrs))
    ops.append(output([f"tested:{i}" for i in range(outputs)]))
    return GeGraph("one", ops), values


def run_op(
    op_type: str, inputs: Mapping[str, Tensor | Sequence[Tensor] | None], outputs: int = 1, **attrs: Any
) -> list[Tensor]:
    """The results of one op on one rank."""
    graph, values = one_op(op_type, inputs, outputs, **attrs)
    return interpret([GeProgram(graph, values)])[0]


def run_ranks(
    op_type: str,
    per_rank: Sequence[Mapping[str, Tensor | Sequence[Tensor] | None]],
    outputs: int = 1,
    attrs: Sequence[Mapping[str, Any]] = (),
) -> list[list[Tensor]]:
    """The results of one op on each rank of group ``g``; ``attrs`` of each rank, or of all, None for an unsaid one."""
    every = [attrs[rank if len(attrs) > 1 else 0] if attrs else {} for rank in range(len(per_rank))]
    members = {"g": tuple(range(len(per_rank)))}
    programs = []
    for inputs, own in zip(per_rank, every, strict=True):
        said = {name: value for name, value in {"group": "g", **own}.items() if value is not None}
        graph, values = one_op(op_type, inputs, outputs, **said)
        programs.append(GeProgram(graph, values, members))
    return interpret(programs)


# ---- serialised ----------------------------------------------------------------------------------------------------


def encode(message: str, fields: Mapping[str, Any]) -> bytes:
    """One message of ``wire.SCHEMA`` as protobuf writes it."""
    numbers = {name: (number, kind) for number, (name, kind) in SCHEMA[message].items()}
    parts = []
    for name, value in fields.items():
        number, kind = numbers[name]
        if kind.endswith("%"):
            for key, entry in value.items():
                pair = _field(1, "string", key) + _field(2, kind[:-1], entry)
                parts.append(_field(number, "bytes", pair))
        else:
            values = value if kind.endswith("*") else [value]
            parts += [_field(number, kind.rstrip("*"), each) for each in values]
    return b"".join(parts)


def _field(number: int, kind: str, value: Any) -> bytes:
    if kind in ("int", "bool"):
        return _varint(number << 3) + _varint(int(value) & (1 << 64) - 1)
    if kind == "float":
        return _varint(number << 3 | 5) + struct.pack("<f", value)
    raw = value.encode() if kind == "string" else value if kind == "bytes" else encode(kind, value)
    return _varint(number << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
