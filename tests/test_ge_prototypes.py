"""The interpreter's signatures against the prototypes that torchair repeats from CANN: its files are read."""

from __future__ import annotations

import functools
import inspect
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from ascend_process import missing, torch_npu_folder

from cpcompile.lowering.ge.dtypes import NAMES
from cpcompile.lowering.ge.executor import op_types
from cpcompile.lowering.ge.signatures import OPS

# Ops that torchair makes with its generic ``custom_op``: it repeats no prototype of them.
WITHOUT_PROTOTYPE = {"LightningIndexer", "SparseFlashAttention", "MatMulV3", "BatchMatMulV3"}
# Attributes of later CANN releases, which torchair sets beside those of the prototype that it repeats.
LATER = {
    "TopKV2": {"sort_policy", "indices_dtype"}, "MatMulV2": {"enable_hf32", "opImplMode"},
    "BatchMatMulV2": {"enable_hf32"}, "QuantBatchMatmulV3": {"group_size"},
}  # fmt: skip
# Written ``K`` in the prototype, and ``k`` by torchair when it sets it.
RENAMED = {("MoeFinalizeRoutingV2", "K"): "k"}


@functools.cache
def torchair() -> Path:
    """Where torchair lies, on the path or in the folder of the ``ascend`` fixture."""
    if why := missing():
        pytest.fail(why, pytrace=False)
    found = PathFinder.find_spec("torch_npu", [*sys.path, *torch_npu_folder()])
    assert found is not None and found.submodule_search_locations is not None
    return Path(next(iter(found.submodule_search_locations))) / "dynamo/torchair"


@functools.cache
def prototypes() -> dict[str, str]:
    folder = torchair() / "_ge_concrete_graph"
    files = [
        folder / "auto_generated_ge_raw_ops.py",
        folder / "dynamic_output_ops.py",
        torchair() / "ge/_ge_graph.py",
    ]
    text = "".join(file.read_text() for file in files)
    return {m[1]: m[2].replace("\\n", "") for m in re.finditer(r"REG_OP\((\w+)\)(.*?)\"\"\"", text, re.S)}


def value_of(text: str) -> Any:
    """A default as the prototype writes it."""
    text = text.strip()
    if text.startswith("DT_"):
        return NAMES[text][2] if text in NAMES else text
    if text.startswith(("{", "[")):
        inner = text[1:-1].strip()
        return [value_of(part) for part in inner.split(",")] if inner else []
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if text[0] in "\"'":
        return text[1:-1]
    return float(text) if re.search(r"[.e]", text) else int(text)


@pytest.mark.parametrize("op_type", sorted(op_types() - WITHOUT_PROTOTYPE))
def test_a_signature_is_the_prototype(op_type: str) -> None:
    text, spec = prototypes()[op_type], OPS[op_type]
    wanted = [
        (name, kind == "OPTIONAL_", kind == "DYNAMIC_")
        for kind, name in re.findall(r"\.(OPTIONAL_|DYNAMIC_|)INPUT\((\w+)", text)
    ]
    found = [(o.name, o.optional, o.dynamic) for o in spec.inputs]
    assert sorted(found) == sorted(wanted)
    outputs = re.findall(r"\.(DYNAMIC_|)OUTPUT\((\w+)", text)
    assert [(o.name, o.dynamic) for o in spec.outputs] == [(name, kind == "DYNAMIC_") for kind, name in outputs]
    required = {RENAMED.get((op_type, n), n) for n in re.findall(r"\.REQUIRED_ATTR\((\w+)", text)}
    assert {n for n, p in spec.attrs.items() if p.default is inspect.Parameter.empty} == required
    optional = re.findall(r"\.ATTR\((\w+),\s*\w+,\s*(.*?)\)\s*(?=\.|$)", text)
    defaults = {RENAMED.get((op_type, name), name): value_of(value) for name, value in optional}
    ours = {n: p.default for n, p in spec.attrs.items() if p.default is not inspect.Parameter.empty}
    assert {n: v for n, v in ours.items() if n not in LATER.get(op_type, ())} == {
        n: bool(v) if isinstance(ours.get(n), bool) else number(v, ours.get(n)) for n, v in defaults.items()
    }


def number(value: Any, like: Any) -> Any:
    """A dtype by name where the attribute is one, else the number."""
    if isinstance(like, torch.dtype) and isinstance(value, int):
        return next(dtype for number, _, dtype in NAMES.values() if number == value)
    return value


def test_dtypes_are_numbered_as_torchair_numbers_them() -> None:
    attributes = (torchair() / "ge/_ge_graph.py").read_text()
    descriptors = (torchair() / "_ge_concrete_graph/ge_ir_by_protoc_3_19_pb2.py").read_text()
    for name, (attribute, descriptor, _) in NAMES.items():
        assert re.search(rf"^    {name} = (\d+)", attributes, re.M)[1] == str(attribute)
        assert re.search(rf"^{name} = (\d+)", descriptors, re.M)[1] == str(descriptor)
