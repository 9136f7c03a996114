"""Read the protobuf of GE graphs, ``ge_ir.proto``, with the fields that a reader of graphs needs.

The few messages are read here so that an exported graph can be checked where neither torch_npu nor protobuf is
installed; torchair itself ships one generated module for each protobuf release. Fields that are not in the table are
skipped, as protobuf does with fields that it does not know.

Source: torchair's ``ge_ir.proto``; https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# Message -> number -> (field, kind). A kind is a scalar or a message; ``*`` repeats it, ``%`` is a map from strings.
SCHEMA: Mapping[str, Mapping[int, tuple[str, str]]] = {
    "ModelDef": {1: ("name", "string"), 7: ("graph", "GraphDef*"), 11: ("attr", "AttrDef%")},
    "GraphDef": {1: ("name", "string"), 6: ("op", "OpDef*"), 11: ("attr", "AttrDef%")},
    "OpDef": {
        1: ("name", "string"),
        2: ("type", "string"),
        5: ("input", "string*"),
        10: ("attr", "AttrDef%"),
        33: ("input_desc", "TensorDescriptor*"),
        34: ("output_desc", "TensorDescriptor*"),
        35: ("subgraph_name", "string*"),
    },
    "TensorDescriptor": {
        1: ("name", "string"),
        2: ("dtype", "int"),
        3: ("shape", "ShapeDef"),
        4: ("layout", "string"),
        5: ("attr", "AttrDef%"),
    },
    "ShapeDef": {1: ("dim", "int*")},
    "TensorDef": {1: ("desc", "TensorDescriptor"), 2: ("data", "bytes")},
    "AttrDef": {
        1: ("list", "ListValue"),
        2: ("s", "bytes"),
        3: ("i", "int"),
        4: ("f", "float"),
        5: ("b", "bool"),
        7: ("bt", "bytes"),
        11: ("td", "TensorDescriptor"),
        12: ("t", "TensorDef"),
        14: ("list_list_int", "ListListInt"),
        15: ("dt", "int"),
        16: ("list_list_float", "ListListFloat"),
        17: ("expression", "bytes"),
    },
    "ListValue": {
        2: ("s", "bytes*"),
        3: ("i", "int*"),
        4: ("f", "float*"),
        5: ("b", "bool*"),
        7: ("bt", "bytes*"),
        12: ("dt", "int*"),
        20: ("val_type", "int"),
    },
    "ListListInt": {1: ("list_list_i", "ListInt*")},
    "ListInt": {1: ("list_i", "int*")},
    "ListListFloat": {1: ("list_list_f", "ListFloat*")},
    "ListFloat": {1: ("list_f", "float*")},
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def decode(message: str, data: bytes) -> dict[str, Any]:
    """Read one message: fields that are present, by name; repeated ones as lists, maps as dicts.

    Raises:
        ValueError: ``data`` is no such message.
    """
    found: dict[str, Any] = {}
    schema = SCHEMA[message]
    for number, wire, value in _fields(data):
        if number not in schema:
            continue
        name, kind = schema[number]
        if kind.endswith("%"):
            entry = {n: v for n, _, v in _fields(value)}
            found.setdefault(name, {})[entry[1].decode()] = decode(kind[:-1], entry.get(2, b""))
        elif kind.endswith("*"):
            found.setdefault(name, []).extend(_repeated(kind[:-1], wire, value))
        else:
            found[name] = _value(kind, wire, value)
    return found


def _repeated(kind: str, wire: int, value: Any) -> Iterator[Any]:
    """The values of one occurrence of a repeated field: numbers may come packed."""
    if wire == _BYTES and kind in ("int", "bool", "float"):
        if kind == "float":
            yield from struct.unpack(f"<{len(value) // 4}f", value)
            return
        at = 0
        while at < len(value):
            raw, at = _varint(value, at)
            yield _SCALARS[kind](raw)
    else:
        yield _value(kind, wire, value)


def _value(kind: str, wire: int, value: Any) -> Any:
    expected = {"int": _VARINT, "bool": _VARINT, "float": _FIXED32}.get(kind, _BYTES)
    if wire != expected:
        raise ValueError(f"a {kind} has wire type {expected}, found {wire}")
    return _SCALARS[kind](value) if kind in _SCALARS else decode(kind, value)


def _signed(raw: int) -> int:
    return raw - (1 << 64) if raw >> 63 else raw


_SCALARS: Mapping[str, Callable[[Any], Any]] = {
    "int": _signed,
    "bool": bool,
    "float": lambda raw: struct.unpack("<f", raw)[0],
    "string": lambda raw: raw.decode(),
    "bytes": lambda raw: raw,
}


def _fields(data: bytes) -> Iterator[tuple[int, int, Any]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, at = _varint(data, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(data, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"ends within field {number}, at byte {at}")
        yield number, wire, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"ends within a number, at byte {at}")
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return result, at
        shift += 7
