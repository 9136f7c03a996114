"""What the graphs of trace files may call and name: registered ops of known libraries, and functions of a table."""

from __future__ import annotations

import contextlib
import importlib
import operator
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch._higher_order_ops
from torch._ops import HigherOrderOperator, OpOverload

from cpcompile import expert_ops, layout_ops, ops, paged_ops  # noqa: F401  registered ops of graphs
from cpcompile.errors import TraceError
from cpcompile.trace_sizes import checked, told

# Libraries of ops that only compute. Others are named by who reads the file.
LIBRARIES = frozenset(
    {"aten", "prims", "_c10d_functional", "c10d_functional", "_dtensor", "cpcompile", "npu", "vllm", "vllm_ir", "_C"}
    | {"_C_cache_ops", "_moe_C", "sgl_kernel", "sglang", "quantized_decomposed", "torchao"}
    | {"transformers"}
)
_DEFINED_IN = {"transformers": "transformers.integrations.moe"}  # libraries that nothing else here imports
_FILES = frozenset({"aten::from_file"})  # reads and makes files
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{f"operator.{n}": getattr(operator, n) for n in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod")},
    **{
        f"operator.{n}": getattr(operator, n)
        for n in ("neg", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
    },
    **{f"torch.{n}": getattr(torch, n) for n in ("sym_max", "sym_min", "sym_not", "sym_ite", "sym_int", "sym_float")},
}
HIGHER_ORDER = frozenset(
    {"cond", "while_loop", "auto_functionalized", "auto_functionalized_v2", "wrap_with_set_grad_enabled", "scan"}
    | {"invoke_subgraph", "flex_attention", "map_impl", "with_effects"}
)
NAMED: Mapping[type, str] = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}
_OF_TORCH = {kind: {str(v)[6:]: v for v in vars(torch).values() if isinstance(v, kind)} for kind in NAMED}
_OP = re.compile(r"(\w+)::(\w+)\.(\w+)", re.ASCII)


def target_name(target: object) -> str:
    """What ``target`` is called in files. Raises :class:`TraceError` if it cannot be."""
    if isinstance(target, OpOverload):
        return f"{target.namespace}::{target._opname}.{target._overloadname}"
    if isinstance(target, HigherOrderOperator) and target.name() in HIGHER_ORDER:
        return f"higher_order.{target.name()}"
    name = next((name for name, function in FUNCTIONS.items() if function is target), None)
    if name is None:
        raise TraceError(f"the graph calls {target}, which cannot be stored")
    return name


def target_of(name: object, libraries: Collection[str]) -> Callable[..., Any]:
    """The function that is called ``name`` in a file. Raises :class:`TraceError` if it is not one of a table."""
    if isinstance(name, str) and name in FUNCTIONS:
        return FUNCTIONS[name]
    text: str = checked(name, str, "a target")
    kind, _, rest = text.partition(".")
    if kind == "higher_order" and rest in HIGHER_ORDER:
        found: object = getattr(torch.ops.higher_order, rest, None)
        if isinstance(found, HigherOrderOperator):
            return found
    parts = _OP.fullmatch(text)
    if parts is None:
        raise TraceError(f"expected an op or a known function; found {told(name)}")
    library, op, overload = parts.groups()
    if library not in {*LIBRARIES, *libraries} or f"{library}::{op}" in _FILES:
        raise TraceError(f"{library}::{op} is not taken from a file: name its library in CPCOMPILE_TRACE_LIBRARIES")
    if library in _DEFINED_IN and not hasattr(getattr(torch.ops, library), op):
        with contextlib.suppress(ImportError):
            importlib.import_module(_DEFINED_IN[library])
    packet = getattr(getattr(torch.ops, library), op, None)
    found = getattr(packet, overload, None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
    if not isinstance(found, OpOverload):
        raise TraceError(f"no op {library}::{op}.{overload} is registered here: import what defines it, or trace again")
    return found


def of_torch(kind: object, name: object) -> Any:
    """The ``kind`` (``"dtype"``, ...) of torch that is called ``name``. Raises :class:`TraceError`."""
    for known, word in NAMED.items():
        if kind == word and isinstance(name, str) and name in _OF_TORCH[known]:
            return _OF_TORCH[known][name]
    raise TraceError(f"expected a dtype, layout or memory format; found {told(name)}")


def device_of(name: object) -> torch.device:
    """The device that is called ``name``. Raises :class:`TraceError`."""
    text = checked(name, str, "a device")
    if not re.fullmatch(r"[a-z]{1,20}(:[0-9]{1,4})?", text):
        raise TraceError(f"expected a device; found {text[:40]!r}")
    return torch.device(text)
