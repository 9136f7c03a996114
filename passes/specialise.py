"""Specialise: a graph for any sizes -> the same for given ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
import torch.fx as fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from cpcompile.errors import OptionError
from cpcompile.passes.token_layout import Expr, size_expr


def specialise(gm: fx.GraphModule, sizes: Mapping[sympy.Symbol, int]) -> fx.GraphModule:
    """A copy of ``gm`` whose symbols have these values: sizes that it computes become constants.

    Args:
        gm: a functional ATen graph with ``val`` on its placeholders.
        sizes: a value for every symbol of its inputs.
    """
    mode, graph = FakeTensorMode(), fx.Graph()
    env: dict[fx.Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], env.__getitem__))
            continue
        made = graph.node_copy(node, lambda n: n)
        made.args, made.kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        if "val" in node.meta or node.op != "placeholder":
            made.meta["val"] = _value(gm, made, node.meta.get("val"), sizes, mode)
        env[node] = made
        if isinstance(made.meta.get("val"), int | float | bool) and node.op != "placeholder":
            env[node] = made.meta["val"]
            graph.erase_node(made)
        elif isinstance(made.meta.get("val"), int):
            env[node] = made.meta["val"]  # the input stays, unused
    return fx.GraphModule(gm, graph)


def _value(gm: fx.GraphModule, node: fx.Node, symbolic: Any, sizes: Mapping[Any, int], mode: FakeTensorMode) -> Any:
    if node.op == "placeholder":
        return _given(symbolic, sizes, mode)
    if node.op == "get_attr":
        return tree_map_only(torch.Tensor, mode.from_tensor, getattr(gm, str(node.target)))
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    with mode:
        return node.target(*args, **kwargs)


def _given(value: Any, sizes: Mapping[Any, int], mode: FakeTensorMode) -> Any:
    if isinstance(value, torch.SymInt):
        return int(size_expr(value).subs(sizes))
    if not isinstance(value, FakeTensor):
        return value
    shape, strides = ([int(size_expr(s).subs(sizes)) for s in part] for part in (value.shape, value.stride()))
    with mode:
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)


def sizes_for(gm: fx.GraphModule, tokens: Expr | None, count: int) -> dict[sympy.Symbol, int]:
    """The value of the symbol that ``tokens`` is of at ``count`` tokens; of the others, what the traced example has.

    Raises:
        OptionError: which symbol that is cannot be said, or there is no such size.
    """
    examples = dict[sympy.Symbol, int]()
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        found = value.shape if isinstance(value, torch.Tensor) else [value] if isinstance(value, torch.SymInt) else []
        examples |= {size_expr(size): int(size.node.hint) for size in found if isinstance(size, torch.SymInt)}
    if not examples:
        return {}
    of = tokens.free_symbols if tokens is not None else set(examples)
    if len(of) != 1:
        raise OptionError(f"a static graph of sizes {sorted(map(str, examples))} is not determined by its token count")
    (symbol,) = of
    values = sympy.solve((tokens if tokens is not None else symbol) - count, symbol)
    if len(values) != 1 or not values[0].is_Integer:
        raise OptionError(f"no size {symbol} makes {count} tokens of {tokens}")
    return {**examples, symbol: int(values[0])}
