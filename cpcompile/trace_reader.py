"""A traced graph from JSON values of a file that anyone may have written: nothing of it is run, imported or evaluated.

Targets come from tables (``trace_targets``), sizes too (``trace_sizes``), names are identifiers of generated code and
are checked to be such.
"""

from __future__ import annotations

import keyword
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from cpcompile.errors import TraceError
from cpcompile.trace_sizes import Sizes, checked, integer, told
from cpcompile.trace_targets import device_of, of_torch, target_of

MOST_DEPTH = 12


class GraphReader:
    """Reads what :class:`GraphWriter` wrote.

    Args:
        data: its JSON values.
        raw: the bytes of constants.
        libraries: of ops, beside :data:`LIBRARIES`.

    Raises:
        TraceError: it is something else.
    """

    def __init__(self, data: object, raw: bytes, libraries: Collection[str] = ()) -> None:
        """Read the tables."""
        about: dict[str, Any] = checked(data, dict, "a graph")
        self.libraries = frozenset(libraries)
        self.sizes = Sizes(about.get("symbols"))
        self.mode = FakeTensorMode(shape_env=self.sizes.env)  # so that shapes of new nodes can be worked out
        self.texts = checked(about.get("texts"), list, "texts")
        with self.mode, self.sizes.env.suppress_guards():
            self.values = [self._value(value) for value in checked(about.get("values"), list, "values")]
        self.constants = self._constants(checked(about.get("constants"), list, "constants"), raw)
        self.main = about.get("graph")

    def read(self) -> fx.GraphModule:
        """The graph. Raises :class:`TraceError`."""
        return self._graph(self.main)

    def _graph(self, data: object, depth: int = 0) -> fx.GraphModule:
        found: dict[str, Any] = checked(data, dict, "a graph")
        if depth > MOST_DEPTH:
            raise TraceError("expected a graph; found graphs within graphs without end")
        root = torch.nn.Module()
        for path, about in checked(found.get("attributes"), dict, "attributes").items():
            *owners, name = _path(path)
            owner = root
            for part in owners:
                if not hasattr(owner, part):
                    owner.add_module(part, torch.nn.Module())
                owner = getattr(owner, part)
                if type(owner) is not torch.nn.Module:
                    raise TraceError(f"expected the path of an attribute; found {path[:60]!r}")
            if hasattr(owner, name):
                raise TraceError(f"expected the name of an attribute; found {name!r}")
            setattr(owner, name, self._attribute(about, depth))
        graph, made = fx.Graph(), dict[str, fx.Node]()
        for about in checked(found.get("nodes"), list, "nodes"):
            node = self._node(graph, checked(about, dict, "a node"), made)
            made[node.name] = node
        if not made or next(iter(reversed(graph.nodes))).op != "output" or len(graph.find_nodes(op="output")) != 1:
            raise TraceError("expected one output, the last node of the graph")
        graph.lint()
        return fx.GraphModule(root, graph)

    def _node(self, graph: fx.Graph, about: Mapping[str, Any], made: Mapping[str, fx.Node]) -> fx.Node:
        name, op = _identifier(about.get("name")), about.get("op")
        target: Any = about.get("target")
        if op == "call_function":
            target = target_of(target, self.libraries)
        elif op in ("placeholder", "get_attr"):
            parts = _path(checked(target, str, name))
            if op == "placeholder" and len(parts) != 1:
                raise TraceError(f"{name}: expected the name of an input; found {target[:60]!r}")
        elif op == "output":
            target = "output"
        else:
            raise TraceError(f"{name}: expected a kind of node; found {told(op)}")
        args = tuple(self._argument(a, made) for a in checked(about.get("args"), list, name))
        named = checked(about.get("kwargs", {}), dict, name).items()
        kwargs = {_identifier(k): self._argument(v, made) for k, v in named}
        if isinstance(target, OpOverload):
            _check_call(target, args, kwargs)
        node = graph.create_node(op, target, args, kwargs, name=name)
        if node.name != name:
            raise TraceError(f"expected nodes of different names; found {name!r} twice, or taken")
        if "val" in about:
            node.meta["val"] = _item(self.values, about["val"])
        if "stack" in about:
            node.meta["stack_trace"] = checked(_item(self.texts, about["stack"]), str, "a stack trace")
        if "modules" in about:
            stack = checked(_item(self.texts, about["modules"]), list, "modules")
            node.meta["nn_module_stack"] = {key: (where, kind) for key, where, kind in map(_three_texts, stack)}
        return node

    def _argument(self, data: object, made: Mapping[str, fx.Node], depth: int = 0) -> Any:
        if data is None or isinstance(data, bool | float | str):
            return data
        if isinstance(data, int):
            return integer(data)
        if depth > MOST_DEPTH:
            raise TraceError("expected an argument; found lists within lists without end")
        if isinstance(data, list):
            return [self._argument(v, made, depth + 1) for v in data]
        kind, value = _only(data)
        if kind == "node":
            if not isinstance(value, str) or value not in made:
                raise TraceError(f"expected the name of an earlier node; found {told(value)}")
            return made[value]
        if kind in ("tuple", "slice"):
            items = [self._argument(v, made, depth + 1) for v in checked(value, list, kind)]
            return tuple(items) if kind == "tuple" else slice(*items)
        if kind == "dict":
            pairs = [checked(pair, list, "a pair") for pair in checked(value, list, kind)]
            return {checked(k, str, "a key"): self._argument(v, made, depth + 1) for k, v in pairs}
        if kind == "float" and value in ("inf", "-inf", "nan"):
            return float(value)
        if kind == "device":
            return device_of(value)
        if kind == "op":
            return target_of(value, self.libraries)
        return of_torch(kind, value)

    def _value(self, data: object, depth: int = 0) -> Any:
        kind, value = _only(data)
        if kind == "tensor":
            sizes, strides, offset, dtype, device = _five(value)
            made = [self.sizes.symint(s) for s in checked(sizes, list, "sizes")]
            steps = [self.sizes.symint(s) for s in checked(strides, list, "strides")]
            if len(made) != len(steps):
                raise TraceError("expected as many strides as sizes")
            found = torch.empty_strided(made, steps, dtype=of_torch("dtype", dtype), device=device_of(device))
            start = self.sizes.symint(offset)
            return found if isinstance(start, int) and start == 0 else found.as_strided(made, steps, start)
        if kind == "int":
            return self.sizes.symint(value)
        if kind == "bool":
            return self.sizes.symbool(value)
        if kind == "constant" and (value is None or isinstance(value, bool | int | float | str)):
            return value
        if kind in ("tuple", "list") and depth < MOST_DEPTH:
            items = [self._value(v, depth + 1) for v in checked(value, list, kind)]
            return tuple(items) if kind == "tuple" else items
        raise TraceError(f"expected what is known of a result; found {kind[:40]!r}")

    def _constants(self, data: list[Any], raw: bytes) -> list[torch.Tensor]:
        found, first = [], 0
        for about in data:
            dtype, sizes, length = _three(about)
            kind = of_torch("dtype", dtype)
            shape = [integer(size) for size in checked(sizes, list, "sizes")]
            if any(size < 0 for size in shape) or math.prod(shape) * kind.itemsize != integer(length):
                raise TraceError(f"expected the bytes of a constant {shape}; found {length}")
            part = raw[first : first + length]
            if len(part) != length:
                raise TraceError("expected the bytes of all constants; found fewer")
            first += length
            flat = torch.frombuffer(bytearray(part), dtype=torch.uint8) if part else torch.empty(0, dtype=torch.uint8)
            found.append(flat.view(kind).reshape(shape))
        return found

    def _attribute(self, data: object, depth: int) -> Any:
        kind, value = _only(data)
        if kind == "graph":
            return self._graph(value, depth + 1)
        if kind == "fake":
            with self.mode, self.sizes.env.suppress_guards():
                return self._value(value)
        if kind != "constant":
            raise TraceError(f"expected a constant or a graph; found {kind[:40]!r}")
        return _item(self.constants, value)


def _check_call(target: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """The arguments are those of the op's schema."""
    given = target._schema.arguments
    positional = [a.name for a in given if not a.kwarg_only]
    known = {*positional[: len(args)], *kwargs}
    missing = next((a.name for a in given if a.name not in known and not a.has_default_value()), None)
    if len(args) > len(positional) or missing or not kwargs.keys() <= {a.name for a in given}:
        raise TraceError(f"{target}: expected the arguments of {str(target._schema)[:200]}; found others")


def _identifier(name: object) -> str:
    """A name that generated code may use."""
    if not isinstance(name, str) or len(name) > 500 or not name.isidentifier() or keyword.iskeyword(name):
        raise TraceError(f"expected an identifier; found {told(name)}")
    return name


def _path(text: str) -> list[str]:
    """The parts of an attribute's path: identifiers, and numbers of modules in lists."""
    return [part if re.fullmatch("[0-9]{1,6}", part) else _identifier(part) for part in text.split(".")]


def _only(data: object) -> tuple[str, Any]:
    pair = list(checked(data, dict, "a value").items())
    if len(pair) != 1:
        raise TraceError("expected a value of one kind")
    kind, value = pair[0]
    return kind, value


def _item(table: list[Any], number: object) -> Any:
    place = checked(number, int, "a number")
    if not 0 <= place < len(table):
        raise TraceError(f"expected a number below {len(table)}; found {place}")
    return table[place]


def _of_length(data: object, length: int) -> list[Any]:
    found: list[Any] = checked(data, list, "a list")
    if len(found) != length:
        raise TraceError(f"expected {length} things; found {len(found)}")
    return found


def _three(data: object) -> list[Any]:
    return _of_length(data, 3)


def _five(data: object) -> list[Any]:
    return _of_length(data, 5)


def _three_texts(data: object) -> list[str]:
    return [checked(part, str, "a name") for part in _three(data)]
