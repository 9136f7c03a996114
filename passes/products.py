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
        rescaling: arguments that, where given, change the result so that summands of it do not add up.
    """

    rows: str
    weight: str
    bias: str = ""
    per_row: tuple[str, ...] = ()
    per_column: tuple[str, ...] = ()
    ones: tuple[str, ...] = ()
    rescaling: tuple[str, ...] = ()


# Sources: native_functions.yaml; torch_npu 2.13 op schemas.
PRODUCTS: Mapping[str, Form] = {
    "aten::mm": Form("self", "mat2"),
    "aten::_int_mm": Form("self", "mat2"),
    "aten::addmm": Form("mat1", "mat2", bias="self", ones=("beta", "alpha")),
    "aten::_scaled_mm": Form(
        "self", "mat2", bias="bias", per_row=("scale_a",), per_column=("scale_b",), rescaling=("scale_result",)
    ),
    "npu::npu_quant_matmul": Form(
        "x1", "x2", bias="bias", per_row=("pertoken_scale",), per_column=("scale", "offset"),
        rescaling=("offset", "y_scale"),
    ),
}  # fmt: skip
# Dtypes in which a sum of summands is the sum, up to rounding: none of fewer bits.
_SUMMABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)


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
        single: factors of one number for all rows or columns.
        no_sum: why summands of it do not add up; empty if they do.
    """

    node: fx.Node
    rows: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    per_row: tuple[fx.Node, ...]
    per_column: tuple[fx.Node, ...]
    single: tuple[fx.Node, ...] = ()
    no_sum: str = ""


def product_of(node: object) -> Product | None:
    """``node`` as a product, None if it is none, or has factors of other shapes (of blocks) or that are not known."""
    form = PRODUCTS.get(op_name(node.target)) if isinstance(node, fx.Node) and node.op == "call_function" else None
    if form is None or not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), torch.Tensor):
        return None
    given = arguments(node)
    if any(given[name] != 1 for name in form.ones):
        return None
    rows, weight, bias = given[form.rows], given[form.weight], given.get(form.bias)
    if not (isinstance(rows, fx.Node) and isinstance(weight, fx.Node)) or len(shape_of(weight.meta["val"])) != 2:
        return None
    (height, width), vectors = shape_of(node.meta["val"]), [n for n in form.per_row + form.per_column if given[n]]
    fits = {name: ((height,), (height, 1)) if name in form.per_row else ((width,), (1, width)) for name in vectors}
    single = [name for name in vectors if all(size == 1 for size in shape_of(given[name].meta["val"]))]
    odd = any(shape_of(given[name].meta["val"]) not in fits[name] for name in vectors if name not in single)
    others = set(node.all_input_nodes) - {rows, weight, bias, *(given[name] for name in vectors)}
    if odd or others or (bias is not None and shape_of(bias.meta["val"]) not in ((width,), (1, width))):
        return None
    per_row, per_column = (
        tuple(given[n] for n in vectors if n in names and n not in single) for names in (form.per_row, form.per_column)
    )
    return Product(
        node, rows, weight, bias, per_row, per_column, tuple(given[n] for n in single), _no_sum(node, form, given)
    )


def _no_sum(node: fx.Node, form: Form, given: Mapping[str, Any]) -> str:
    dtype, name = node.meta["val"].dtype, next((n for n in form.rescaling if given.get(n) is not None), "")
    if name:
        return f"{node} has the argument {name}, which would be added or scaled with every summand"
    return "" if dtype in _SUMMABLE else f"{node} gives {dtype}, in which summands are not added"
