"""Reading serialised GE graphs: the wire format, ops and their attributes, constants, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from ge_build import ATTRIBUTE, DESCRIPTOR, encode

from cpcompile.lowering.ge import GeError, GeProgram, interpret, load, parse
from cpcompile.lowering.ge.dtypes import NAMES
from cpcompile.lowering.ge.graph import UNFED
from cpcompile.lowering.ge.wire import decode


def desc(name: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (), **attrs: Any) -> dict[str, Any]:
    return {"name": name, "dtype": DESCRIPTOR[dtype], "shape": {"dim": shape}, "attr": attrs}


def const(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
    said = desc("y", tensor.dtype, tuple(tensor.shape))
    return {"name": name, "type": "Const", "attr": {"value": {"t": {"desc": said, "data": raw}}}, "output_desc": [said]}


DATA = {
    "name": "x", "type": "Data", "attr": {"index": {"i": 0}}, "input_desc": [desc("x", shape=(-1, 3))],
    "output_desc": [desc("y", shape=(-1, 3))],
}  # fmt: skip
ADD = {
    "name": "sum", "type": "Add", "input": ["x:0", "one:0"], "input_desc": [desc("x1"), desc("x2")],
    "output_desc": [desc("y", _fx_tensor_name={"s": b"add"})],
}  # fmt: skip
OUT = {
    "name": "out",
    "type": "NetOutput",
    "input": ["early:-1", "sum:0"],
    "input_desc": [desc("input0", shape=(-1, 3))],
}
EARLY = {"name": "early", "type": "Identity", "input": ["x:0"], "input_desc": [desc("x")], "output_desc": [desc("y")]}
ONE = const("one", torch.tensor([1.0, 2.0, -3.0]))


def model(*ops: dict[str, Any]) -> bytes:
    return encode("ModelDef", {"name": "m", "graph": [{"name": "g", "op": list(ops)}]})


def test_a_model_is_read_and_run() -> None:
    graph = parse(model(DATA, ONE, ADD, EARLY, OUT))
    assert graph.name == "g" and [op.type for op in graph.ops] == ["Data", "Const", "Add", "Identity", "NetOutput"]
    (found,) = interpret([GeProgram(graph, [torch.ones(2, 3)])])[0]
    assert torch.equal(found, torch.tensor([[2.0, 3.0, -2.0]] * 2))
    assert graph.op("sum").output_descs[0].traced and not graph.op("early").output_descs[0].traced
    assert graph.op("out").after == ["early"]


def test_ops_are_put_behind_those_that_they_need() -> None:
    graph = parse(model(OUT, ADD, EARLY, ONE, DATA))
    names = [op.name for op in graph.ops]
    assert names.index("out") > names.index("early") and names.index("sum") > max(names.index("x"), names.index("one"))


@pytest.mark.parametrize(
    "dtype", [dtype for _, _, dtype in NAMES.values() if dtype.itemsize > 1 or dtype == torch.bool]
)
def test_constants_keep_their_bits(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(dtype)
    found = parse(model(const("c", tensor))).op("c").data
    assert found is not None and found.dtype == dtype and torch.equal(found.view(torch.uint8), tensor.view(torch.uint8))


def test_weights_in_files_are_found_beside_the_graph(tmp_path: Path) -> None:
    weight = torch.randn(3)
    (tmp_path / "weight").write_bytes(weight.numpy().tobytes())
    op = {
        "name": "w", "type": "FileConstant", "output_desc": [desc("y")],
        "attr": {
            "file_path": {"s": b"/elsewhere/weight"}, "shape": {"list": {"i": [3]}},
            "dtype": {"i": ATTRIBUTE[torch.float32]},
        },
    }  # fmt: skip
    (tmp_path / "model.pb").write_bytes(model(op))
    assert torch.equal(load(tmp_path / "model.pb").op("w").data, weight)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "weight").write_bytes((2 * weight).numpy().tobytes())
    there = {**op, "attr": {**op["attr"], "file_path": {"s": str(tmp_path / "elsewhere/weight").encode()}}}
    assert torch.equal(parse(model(there), tmp_path).op("w").data, 2 * weight)  # where the graph says, if it is there
    (tmp_path / "weight").unlink()
    with pytest.raises(GeError, match=r"op 'w' \(FileConstant\): its weight file '/elsewhere/weight' is missing"):
        load(tmp_path / "model.pb")


def test_attributes_are_read_by_kind() -> None:
    attrs = {
        "i": {"i": -1}, "f": {"f": 0.5}, "b": {"b": False}, "s": {"s": b"text"}, "l": {"list": {"i": [3, -4]}},
        "empty": {"list": {}}, "kind": {"list": {"f": [0.5, -2.0], "val_type": 5}}, "none": {},
        "n": {"list_list_int": {"list_list_i": [{"list_i": [1, 2]}, {}]}}, "zero": {"i": 0},
    }  # fmt: skip
    op = {"name": "a", "type": "Anything", "attr": attrs}
    found = {name: tuple(value) for name, value in parse(model(op)).op("a").attrs.items()}
    assert found == {
        "i": ("i", -1), "f": ("f", 0.5), "b": ("b", False), "s": ("s", "text"), "l": ("list", [3, -4]),
        "empty": ("list", []), "kind": ("list", [0.5, -2.0]), "none": ("none", None),
        "n": ("list_list_int", [[1, 2], []]), "zero": ("i", 0),
    }  # fmt: skip


def test_an_attribute_of_two_kinds_has_no_value() -> None:
    op = {"name": "a", "type": "Anything", "attr": {"both": {"i": 1, "f": 0.5}}}
    assert tuple(parse(model(op)).op("a").attrs["both"]) == ("none", None)


def test_a_shape_that_is_not_known_is_none_and_an_input_may_be_unfed() -> None:
    graph = parse(model({**DATA, "output_desc": [desc("y", shape=(-2,))]}, {**ADD, "input": ["x:0", ""]}))
    assert graph.op("x").output_descs[0].shape is None and graph.op("sum").inputs == ["x:0", UNFED]


def test_a_reference_needs_no_input() -> None:
    graph = parse(model({**DATA, "type": "RefData"}))
    assert [op.type for op in graph.inputs] == ["RefData"]


def test_a_constant_may_be_empty() -> None:
    found = parse(model(const("c", torch.ones(0, 3)))).op("c").data
    assert found is not None and found.shape == (0, 3) and found.dtype == torch.float32


def test_an_attribute_may_be_a_map_entry_without_a_value() -> None:
    """An empty message, which protobuf writes as a key alone."""
    assert decode("OpDef", b"\x52\x03\x0a\x01a") == {"attr": {"a": {}}}


def test_packed_and_unpacked_numbers_are_read_alike() -> None:
    packed = bytes([0x1A, 0x03, 0x05, 0x96, 0x01])  # field 3 of ListValue: 5, 150
    unpacked = bytes([0x18, 0x05, 0x18, 0x96, 0x01])
    assert decode("ListValue", packed) == decode("ListValue", unpacked) == {"i": [5, 150]}
    halves = struct.pack("<ff", 0.5, -3.0)
    assert decode("ListValue", b"\x22\x08" + halves) == {"f": [0.5, -3.0]}
    assert decode("ListValue", b"\x25" + halves[:4] + b"\x25" + halves[4:]) == {"f": [0.5, -3.0]}


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"\x1d\x00\x00\x00\x00", "a int has wire type 0, found 5"),  # an int as four bytes
        (b"\x1a\x05\x01", "ends within field 3, at byte 2"),
        (b"\x25\x00\x00", "ends within field 4, at byte 1"),
        (b"\x18" + b"\x80" * 12 + b"\x00", "ends within a number"),
        (b"\x1b", "unknown wire type 3 at byte 1"),
    ],
)
def test_damaged_messages_are_errors(damaged: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode("ListValue", damaged)


def test_numbers_may_be_as_wide_as_64_bits() -> None:
    least = b"\x18" + b"\xff" * 9 + b"\x01"
    assert decode("ListValue", least) == {"i": [-1]}


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        ([DATA, DATA], r"op 'x' \(Data\): expected unique names"),
        ([ADD, ONE], "its input 'x' is not in the graph"),
        ([{**ADD, "input": ["sum:0", "sum:0"]}], "depends on itself, through 'sum'"),
        ([{**ONE, "attr": {}}], "expected a tensor in attribute 'value', found none"),
        ([{**DATA, "subgraph_name": ["then"]}], "expected no subgraphs"),
        ([{**ADD, "input_desc": []}], "expected a descriptor for each of 2 inputs, found 0"),
    ],
)
def test_graphs_that_do_not_hold_together_are_errors(ops: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(GeError, match=message):
        parse(model(*ops))


@pytest.mark.parametrize("size", [4, 16])
def test_a_constant_of_the_wrong_length_is_an_error(size: int) -> None:
    wrong = const("c", torch.ones(3))
    wrong["attr"]["value"]["t"]["data"] = b"1" * size
    with pytest.raises(GeError, match=rf"expected 12 bytes for float32 \[3\], found {size}"):
        parse(model(wrong))


def test_a_constant_of_a_dtype_that_torch_has_not_is_an_error() -> None:
    wrong = const("c", torch.ones(3))
    wrong["attr"]["value"]["t"]["desc"]["dtype"] = 14
    with pytest.raises(GeError, match="expected a dtype that torch has, found number 14"):
        parse(model(wrong))


def test_a_model_of_two_graphs_is_an_error() -> None:
    graph = {"name": "g", "op": [DATA]}
    with pytest.raises(GeError, match="expected a GE model of one graph, found 2"):
        parse(encode("ModelDef", {"name": "m", "graph": [graph, graph]}))


@pytest.mark.parametrize("damaged", [b"\xff\xff", b"no model", model(DATA)[:-3], b""])
def test_bytes_that_are_no_model_are_an_error(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pb").write_bytes(damaged)
    with pytest.raises(
        GeError, match=r"model.pb: expected a serialised GE model|model.pb: expected a GE model of one graph"
    ):
        load(tmp_path / "model.pb")


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GeError, match=r"model.pb: No such file"):
        load(tmp_path / "model.pb")
