"""Products of token rows and a weight, which module TP may cut: the one table of which argument of which op is what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from cpcompile.passes.collectives import arguments, op_name
from cpcompile.passes.token_layout import shape_of


@dataclass(frozen=True)
class Form:
    """Arguments of an op that computes ``[R, K] x [K, N] -> [R, N]``, by their schema names.

    Args:
        rows: the ``[R, K]`` operand.
        weight: the ``[K, N]`` operand.
        bias: what is added to every row, ``[N]``.
        per_row: factors of the rows, ``[R]`` or ``[R, 1]``; one number for all rows is none.
        per_column: factors of the columns, ``[N]`` or ``[1, N]``; one number for all columns is none.
        ones: arguments that must be 1 for the op to be a plain product.
    """

    rows: str
    weight: str
    bias: str = ""
    per_row: tuple[str, ...] = ()
    per_column: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()


# Sources: native_functions.yaml; torch_npu 2.13 op schemas.
PRODUCTS: Mapping[str, Form] = {
    "aten::mm": Form("self", "mat2"),
    "aten::_int_mm": Form("self", "mat2"),
    "aten::addmm": Form("mat1", "mat2", bias="self", ones=("beta", "alpha")),
    "aten::_scaled_mm": Form("self", "mat2", bias="bias", per_row=("scale_a",), per_column=("scale_b",)),
    "npu::npu_quant_matmul": Form("x1", "x2", bias="bias", per_row=("pertoken_scale",), per_column=("scale", "offset")),
}


@dataclass(frozen=True)
class Product:
    """One product of a graph.

    Args:
        node: the call.
        rows: its ``[R, K]`` operand.
        weight: its ``[K, N]`` operand.
        bias: what is added to every row, if anything.
        per_row: factors that go with rows.
        per_column: factors that go with columns.
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    per_row: tuple[fx.Node, ...]
    per_column: tuple[fx.Node, ...]


def product_of(node: object) -> Product | None:
    """``node`` as a product, None if it is none."""
    form = PRODUCTS.get(op_name(node.target)) if isinstance(node, fx.Node) and node.op == "call_function" else None
    if form is None or not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    given = arguments(node)
    if any(given[name] != 1 for name in form.ones):
        return None
    rows, weight, bias = given[form.rows], given[form.weight], given.get(form.bias)
    if not (isinstance(rows, fx.Node) and isinstance(weight, fx.Node)) or len(shape_of(weight.meta["val"])) != 2:
        return None
    return Product(node, rows, weight, bias, _vectors(given, form.per_row), _vectors(given, form.per_column))


def _vectors(given: Mapping[str, Any], names: tuple[str, ...]) -> tuple[fx.Node, ...]:
    values = (given[name] for name in names)
    return tuple(v for v in values if isinstance(v, fx.Node) and any(s != 1 for s in shape_of(v.meta["val"])))
