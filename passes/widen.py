"""A graph in float64: the same computation with every float dtype widened, so that rounding cannot hide a wrong row."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping

import torch
import torch.fx as fx

_WIDE = {True: torch.complex128, False: torch.float64}
CASTS = frozenset({"aten::_to_copy", "prims::convert_element_type", "aten::clone"})


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for floats, complex128 for complex numbers, else ``dtype``."""
    return _WIDE[dtype.is_complex] if dtype.is_floating_point or dtype.is_complex else dtype


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, bias: None = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """``[M, K]`` rows, each group of them up to the next of ``offs [G]`` times its own matrix of ``[G, K, N]``."""
    if a.dim() != 2 or b.dim() != 3 or bias is not None:
        raise NotImplementedError("grouped product of other than rows by groups of matrices")
    out = a.new_zeros(a.shape[0], b.shape[2])
    for group, (first, last) in enumerate(itertools.pairwise([0, *offs.tolist()])):
        out[first:last] = a[first:last] @ b[group]
    return out


# Ops whose kernels take no float64, as functions that do.
_WIDE_OPS: Mapping[object, Callable[..., torch.Tensor]] = {torch.ops.aten._grouped_mm.default: _grouped_mm}


def widened(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` that computes in float64: dtype arguments, given or defaulted, constants, and ``_WIDE_OPS``."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        env[node] = copy = new.node_copy(node, env.__getitem__)
        copy.args = fx.node.map_aggregate(copy.args, _wide_argument)
        copy.kwargs = fx.node.map_aggregate(copy.kwargs, _wide_argument)
        copy.target = _WIDE_OPS.get(copy.target, copy.target)
        value = operator.attrgetter(node.target)(gm) if node.op == "get_attr" else node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype == wide(value.dtype):
            continue
        if node.op == "get_attr":
            env[node] = new.call_function(torch.ops.aten._to_copy.default, (copy,), {"dtype": wide(value.dtype)})
        elif isinstance(copy.target, torch._ops.OpOverload):
            _widen_defaults(copy, copy.target, wide(value.dtype))
    return fx.GraphModule(gm, new)


def _wide_argument(value: fx.node.Argument) -> fx.node.Argument:
    return wide(value) if isinstance(value, torch.dtype) else value


def _widen_defaults(node: fx.Node, target: torch._ops.OpOverload, dtype: torch.dtype) -> None:
    for index, argument in enumerate(target._schema.arguments):
        given = index < len(node.args) or node.kwargs.get(argument.name) is not None
        if argument.name == "dtype" and argument.has_default_value() and not given:
            node.kwargs = {**node.kwargs, "dtype": dtype}
        if argument.name == "half_to_float" and index < len(node.args):
            node.update_arg(index, False)
