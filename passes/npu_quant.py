"""npu quant: rows that are quantised as they come, times int8 weights -> torch_npu's ops."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, is_contiguous, only_user, sizes
from cpcompile.passes.npu_ops import missing_ops

aten = torch.ops.aten
NEEDED = ("npu_dynamic_quant", "npu_quant_matmul")
_HALVES = (torch.float16, torch.bfloat16)
LARGEST = 127  # of int8, to which each row's largest value is scaled
INNER = 65535  # sizes of the last dims that npu_quant_matmul takes


class Differs(Exception):
    """The graph is not of the form that the ops compute."""


@dataclass(frozen=True)
class NpuQuant:
    """W8A8: ``round(x / step)`` to int8, ``_int_mm``, times steps and scales -> ``npu_dynamic_quant``, once for all
    products of its rows, and ``npu_quant_matmul``.

    Before: rows of half precision in float32, ``step = max |x| / 127`` of each, the product as float32 times ``step``
    and times a scale for each column, in either order, cast to the rows' dtype.
    After: the two ops. Both compute in float32 and round as the model does; the order of the two factors, one rounding
    in float32, and rows that lie below the least step that the model may ask for, are the ops'.

    Refuses, with the reason: steps with something added to them and steps or products in half precision, which are
    other numbers; results in float32, which the op does not give; and where torch_npu does not have an op.

    Source: torch_npu's documentation of ``npu_dynamic_quant`` and ``npu_quant_matmul``.
    """  # noqa: D205  the first line has the ops

    name = "npu-quant"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        quantised: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        for product in gm.graph.find_nodes(op="call_function", target=aten._int_mm.default):
            try:
                _require(not (missing := missing_ops(NEEDED)), missing)
                _replace(_match(product), quantised)
                result.rewrites += 1
            except Differs as differs:
                result.refuse(product, str(differs))
        return result.finish(gm)


@dataclass(frozen=True)
class _Product:
    """``out [R, N]``: ``x [R, K]``, quantised as ``narrow``, times ``weight [K, N]`` with ``scale`` of N numbers."""

    x: fx.Node
    narrow: fx.Node
    weight: fx.Node
    scale: fx.Node
    out: fx.Node


def _match(product: fx.Node) -> _Product:
    given = arguments(product)
    narrow, weight = given["self"], given["mat2"]
    wide, step = _quotient(narrow)
    _require(_calls(wide, aten._to_copy.default), "the rows are not half precision in float32")
    x = wide.all_input_nodes[0]
    dtype = x.meta["val"].dtype
    _require(dtype in _HALVES and wide.kwargs == {"dtype": torch.float32}, f"rows of {dtype} are quantised")
    _steps(step, wide)
    scale, out = _scaled(product, step)
    _require(out.meta["val"].dtype == dtype, f"rows of {dtype} give {out.meta['val'].dtype}")
    numbers = scale.meta["val"].dtype
    _require(numbers == torch.float32 or numbers == dtype == torch.bfloat16, f"scales of {numbers}")
    columns = (sizes(product) or ())[1]
    _require(sizes(scale) in ((columns,), (1, columns)), "the scales are not one number for each column")
    inner = weight.meta["val"].shape
    _require(all(isinstance(s, int) and s <= INNER for s in inner), f"a weight of {list(inner)}: too large")
    return _Product(x, narrow, weight, scale, out)


def _quotient(narrow: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What is rounded to int8 is the first over the second."""
    _require(_calls(narrow, aten._to_copy.default) and narrow.kwargs == {"dtype": torch.int8}, "rows are not rounded")
    node: Any = narrow.args[0]
    if _calls(node, aten.clamp.default):
        given = arguments(node)
        _require(given["min"] in (-LARGEST, -LARGEST - 1) and given["max"] == LARGEST, "rows are cut off within int8")
        node = given["self"]
    _require(_calls(node, aten.round.default), "rows are not rounded")
    quotient = node.args[0]
    _require(_calls(quotient, aten.div.Tensor), "rows are not over their steps")
    wide, step = quotient.args
    _require(isinstance(step, fx.Node), "rows are not over their steps")
    return wide, step


def _steps(step: fx.Node, wide: fx.Node) -> None:
    """Check ``step = max |wide| / 127`` for each row, by a least value or without."""
    node: Any = _least(step)
    _require(not _calls(node, aten.add.Tensor, aten.add.Scalar), "something is added to the steps")
    _require(_calls(node, aten.div.Tensor) and node.args[1] == LARGEST, f"the steps are not over {LARGEST}")
    node = _least(node.args[0])
    _require(_calls(node, aten.amax.default), "the steps are not of the largest values")
    given = arguments(node)
    _require([dim % 2 for dim in given["dim"]] == [1] and given["keepdim"], "the steps are not one for each row")
    _require(_calls(given["self"], aten.abs.default) and given["self"].args[0] is wide, "the steps are of other rows")


def _least(node: Any) -> Any:
    """What ``node`` is, but for rows below a least value."""
    if _calls(node, aten.clamp.default, aten.clamp_min.default):
        given = arguments(node)
        _require(given.get("max") is None, "the steps have an upper bound")
        return given["self"]
    return node


def _scaled(product: fx.Node, step: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The columns' scales behind ``product``, and its result."""
    wide = only_user(product)
    _require(
        wide is not None and _calls(wide, aten._to_copy.default) and wide.kwargs == {"dtype": torch.float32},
        "the product is not scaled in float32",
    )
    node, factors = wide, []
    for _ in range(2):
        assert node is not None
        user = only_user(node)
        _require(user is not None and _calls(user, aten.mul.Tensor), "the product is not scaled by row and by column")
        assert user is not None
        factors += [arg for arg in user.args if arg is not node]
        node = user
    _require(step in factors and len(factors) == 2, "the product is not scaled by its rows' steps")
    scale = next((factor for factor in factors if factor is not step), None)
    assert node is not None
    out = only_user(node)
    _require(out is not None and _calls(out, aten._to_copy.default), "the op gives half precision alone")
    assert out is not None
    _require(out.kwargs.keys() == {"dtype"}, "the op gives half precision alone")
    _require(isinstance(scale, fx.Node), "the product is not scaled by column")
    return scale, out  # type: ignore[return-value]


def _replace(found: _Product, quantised: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> None:
    npu, out = torch.ops.npu, found.out
    if found.narrow not in quantised:
        at, x = found.narrow, found.x
        x = x if is_contiguous(x) else emit(at, aten.clone.default, x, memory_format=torch.contiguous_format)
        both = emit(at, npu.npu_dynamic_quant.default, x)
        rows, steps = (emit(at, operator.getitem, both, index) for index in range(2))
        quantised[found.narrow] = rows, steps
    rows, steps = quantised[found.narrow]
    scale = found.scale
    if scale.meta["val"].ndim > 1:
        scale = emit(out, aten.reshape.default, scale, [-1])
    made = emit(
        out, npu.npu_quant_matmul.default, rows, found.weight, scale, pertoken_scale=steps,
        output_dtype=_number(out.meta["val"].dtype),
    )  # fmt: skip
    out.replace_all_uses_with(made)
    erase(out)


def _number(dtype: torch.dtype) -> int:
    """The number by which torch_npu's schemas say a dtype: PyTorch's ScalarType."""
    return {torch.float16: 5, torch.bfloat16: 15}[dtype]


def _calls(node: object, *targets: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _require(holds: object, reason: str) -> None:
    if not holds:
        raise Differs(reason)
