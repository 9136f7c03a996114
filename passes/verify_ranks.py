"""What differs between the ranks' graphs, as the proofs read them: literals of calls, sizes and numbers of inputs.

Each rank says of every node what it holds besides nodes; where that is not the same on all ranks, or cannot be said,
the node differs. Nothing is taken over from what the planner was told.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
import torch.fx as fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass

from cpcompile.passes.verify_index import plain

Gather = Callable[[object, str], list[object]]


@dataclass(frozen=True)
class Differences:
    """Nodes of a graph, by name, whose literals differ between ranks, and symbols of sizes and numbers that do."""

    nodes: frozenset[str] = frozenset()
    symbols: frozenset[sympy.Symbol] = frozenset()


def differences(gm: fx.GraphModule, gather: Gather) -> Differences:
    """Compare ``gm`` with the other ranks' graphs; one exchange.

    Args:
        gm: this rank's graph.
        gather: sends an object, and what it is called, to all ranks and returns what each of them sent.
    """
    nodes = list(gm.graph.nodes)
    # One line of 8 bytes for each node, None for what cannot be read, and the sizes that each input has.
    mine = ([_line(gm, node) for node in nodes], [[_example(e) for e in _extents(node)] for node in nodes])
    everyone = cast(list[tuple[list[Any], list[list[Any]]]], gather(mine, "literals of the graph"))
    if any(len(lines) != len(nodes) for lines, _ in everyone):
        return Differences(frozenset(node.name for node in nodes), _symbols(nodes))
    names, symbols = set(), set[sympy.Symbol]()
    for index, node in enumerate(nodes):
        if None in (lines := {lines[index] for lines, _ in everyone}) or len(lines) > 1:
            names.add(node.name)
        examples = [found[index] for _, found in everyone]
        for place, extent in enumerate(_extents(node)):
            if any(found[place : place + 1] != examples[0][place : place + 1] for found in examples):
                names.add(node.name)
                symbols |= _free(extent)
    return Differences(frozenset(names), frozenset(symbols))


def _extents(node: fx.Node) -> list[object]:
    """What an input counts: the sizes of a tensor, or itself."""
    value = node.meta.get("val") if node.op == "placeholder" else None
    return list(value.shape) if isinstance(value, torch.Tensor) else [value] if _is_number(value) else []


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _example(value: Any) -> object:
    """A number as it was when the graph was made; None where it was none."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return value.node.hint if value.node.has_hint() else None
    return value


def _free(value: Any) -> frozenset[sympy.Symbol]:
    if isinstance(value, torch.SymInt):
        size = plain(value)
        return frozenset() if isinstance(size, int) else frozenset(size.free_symbols)
    return frozenset(value.node.expr.free_symbols) if isinstance(value, torch.SymFloat | torch.SymBool) else frozenset()


def _symbols(nodes: list[fx.Node]) -> frozenset[sympy.Symbol]:
    return frozenset(symbol for node in nodes for extent in _extents(node) for symbol in _free(extent))


def _line(gm: fx.GraphModule, node: fx.Node) -> bytes | None:
    """What ``node`` holds besides nodes, in short; None where that cannot be read."""
    if node.op == "placeholder":
        return b""
    try:
        if node.op in ("get_attr", "call_module"):
            said = [_content(operator.attrgetter(str(node.target))(gm))]
        else:
            said = list(_literals(_without_groups(node)))
    except _UnreadableError:
        return None
    return hashlib.sha256("\n".join(said).encode()).digest()[:8] if said else b""


class _UnreadableError(Exception):
    pass


def _without_groups(node: fx.Node) -> list[Any]:
    """Arguments but for the names of process groups, which ranks that do the same may call otherwise."""
    given = [*enumerate(node.args), *node.kwargs.items()]
    if not isinstance(node.target, OpOverload):
        return [value for _, value in given]
    names = [argument.name for argument in node.target._schema.arguments]
    named = [(names[key] if isinstance(key, int) else str(key), value) for key, value in given]
    return [value for key, value in named if not (isinstance(value, str) and "group" in key)]


def _literals(value: Any) -> Iterator[str]:
    if isinstance(value, fx.Node):
        return
    if isinstance(value, list | tuple):
        for item in value:
            yield from _literals(item)
        yield f"{len(value)} of them"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _literals(item)
    elif isinstance(value, slice):
        yield from _literals([value.start, value.stop, value.step])
    elif isinstance(value, torch.device):
        yield value.type
    elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        yield "a symbol"
    elif isinstance(value, OpOverload | OpOverloadPacket | HigherOrderOperator):
        yield str(value)
    elif isinstance(value, bool | int | float | complex | str | torch.dtype | torch.layout | torch.memory_format):
        yield f"{type(value).__name__} {value!r}"
    elif value is None or value is ...:
        yield repr(value)
    else:
        raise _UnreadableError


def _content(value: object) -> str:
    """Contents of a constant, or of a graph within the graph."""
    if isinstance(value, fx.GraphModule):
        lines = [_line(value, node) for node in value.graph.nodes]
        if None in lines:
            raise _UnreadableError
        return f"{value.code} {lines}"
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or is_traceable_wrapper_subclass(value):
        raise _UnreadableError
    if value.is_meta or value.is_quantized or value.layout != torch.strided:
        raise _UnreadableError
    with torch.no_grad(), _disable_current_modes():
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{value.dtype} {list(value.shape)} {hashlib.sha256(data).hexdigest()}"
