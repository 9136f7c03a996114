"""A traced graph as JSON values: shapes stay symbolic, small constants are raw bytes beside, no parameter is stored."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cpcompile.errors import TraceError
from cpcompile.trace_sizes import checked, size_data, symbols_data
from cpcompile.trace_targets import NAMED, target_name

MOST_CONSTANTS = 64 << 20  # bytes


@dataclass
class GraphWriter:
    """Writes graphs; values, texts and constants that repeat are written once.

    Args:
        values: what is known of results, by number.
        texts: stack traces and module stacks, by number.
        constants: dtype, shape, first byte of each small tensor in ``raw``.
        raw: the bytes of all constants.
        symbols: symbols of sizes.
        env: where they come from.
    """

    values: list[Any] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    raw: bytearray = field(default_factory=bytearray)
    symbols: set[sympy.Symbol] = field(default_factory=set)
    env: ShapeEnv | None = None
    _numbers: dict[str, int] = field(default_factory=dict)

    def data(self, gm: fx.GraphModule) -> dict[str, Any]:
        """``gm`` and all that it refers to. Raises :class:`TraceError` if something cannot be stored."""
        graph = self._graph(gm)
        symbols = symbols_data(self.env, self.symbols) if self.env is not None else {}
        return {
            "symbols": symbols, "values": self.values, "texts": self.texts, "constants": self.constants, "graph": graph
        }  # fmt: skip

    def _graph(self, gm: fx.GraphModule) -> dict[str, Any]:
        attributes: dict[str, Any] = {}
        nodes = []
        for node in gm.graph.nodes:
            about: dict[str, Any] = {"name": node.name, "op": node.op}
            if node.op == "call_function":
                about["target"] = target_name(node.target)
            elif node.op in ("placeholder", "get_attr"):
                about["target"] = str(node.target)
            elif node.op != "output":
                raise TraceError(f"{node.name}: {node.op} {node.target} cannot be stored")
            if node.op == "get_attr" and about["target"] not in attributes:
                attributes[about["target"]] = self._attribute(gm, about["target"])
            about["args"] = [self._argument(a) for a in node.args]
            if node.kwargs:
                about["kwargs"] = {k: self._argument(v) for k, v in node.kwargs.items()}
            about |= self._meta(node)
            nodes.append(about)
        return {"nodes": nodes, "attributes": attributes}

    def _meta(self, node: fx.Node) -> dict[str, Any]:
        found: dict[str, Any] = {}
        value = node.meta.get("val")
        known = node.op != "placeholder" or isinstance(value, FakeTensor | torch.SymInt)
        if "val" in node.meta and known:  # no device mesh or other object that no node reads
            found["val"] = self._once(self.values, "v", self._value(value))
        if "stack_trace" in node.meta:
            found["stack"] = self._once(self.texts, "t", checked(node.meta["stack_trace"], str, "a stack trace"))
        if "nn_module_stack" in node.meta:
            stack = node.meta["nn_module_stack"].items()
            modules = [[str(key), str(where), str(kind)] for key, (where, kind, *_) in stack]
            found["modules"] = self._once(self.texts, "t", modules)
        return found

    def _once(self, table: list[Any], kind: str, value: Any) -> int:
        key = f"{kind}{value}"
        if key not in self._numbers:
            self._numbers[key] = len(table)
            table.append(value)
        return self._numbers[key]

    def _size(self, value: Any) -> Any:
        if isinstance(value, int):
            return value
        self.env = self.env or value.node.shape_env
        self.symbols |= value.node.expr.free_symbols
        return size_data(value.node.expr)

    def _value(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            sizes, strides = [self._size(s) for s in value.shape], [self._size(s) for s in value.stride()]
            offset = self._size(value.storage_offset())
            return {"tensor": [sizes, strides, offset, str(value.dtype)[6:], str(value.device)]}
        if isinstance(value, torch.SymInt | torch.SymBool):
            return {"int" if isinstance(value, torch.SymInt) else "bool": self._size(value)}
        if isinstance(value, list | tuple):
            return {"tuple" if isinstance(value, tuple) else "list": [self._value(v) for v in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"constant": value}
        raise TraceError(f"a result of type {type(value).__name__} cannot be stored")

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return {"node": value.name}
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, list | tuple):
            items = [self._argument(v) for v in value]
            return {"tuple": items} if isinstance(value, tuple) else items
        if isinstance(value, dict):
            return {"dict": [[checked(k, str, "a key"), self._argument(v)] for k, v in value.items()]}
        if isinstance(value, slice):
            return {"slice": [self._argument(v) for v in (value.start, value.stop, value.step)]}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, OpOverload):
            return {"op": target_name(value)}
        kind = next((kind for kind in NAMED if isinstance(value, kind)), None)
        if kind is None:
            raise TraceError(f"an argument of type {type(value).__name__} cannot be stored")
        return {NAMED[kind]: str(value)[6:]}

    def _attribute(self, gm: fx.GraphModule, path: str) -> Any:
        value = operator.attrgetter(path)(gm)
        if isinstance(value, fx.GraphModule):
            return {"graph": self._graph(value)}
        if isinstance(value, FakeTensor):
            return {"fake": self._value(value)}
        if not isinstance(value, torch.Tensor):
            raise TraceError(f"the constant {path} of type {type(value).__name__} cannot be stored")
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        if len(self.raw) + len(data) > MOST_CONSTANTS:
            raise TraceError(f"the constant {path} has {len(data)} bytes, too many to be stored: make it a buffer")
        self.constants.append([str(value.dtype)[6:], list(value.shape), len(data)])
        self.raw += data
        return {"constant": len(self.constants) - 1}
