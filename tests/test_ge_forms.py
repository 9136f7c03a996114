"""GE forms: equal values from ops that torchair has converters for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import pytest
import torch
import torch.fx as fx
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.passes.ge_forms import GeForms

aten = torch.ops.aten
x = torch.arange(12.0).view(1, 3, 4, 1)


def traced(function: Callable[..., Any], *args: Any, mode: str = "symbolic") -> fx.GraphModule:
    gm = make_fx(function, tracing_mode=mode)(*args)
    gm.graph.eliminate_dead_code()
    return gm


def targets(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


def test_a_masked_put_becomes_a_choice() -> None:
    value = torch.randn(5, 3)

    def put(value: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return aten.index_put(value, [mask], torch.zeros((), dtype=value.dtype))

    mask = torch.tensor([True, False, True, False, False])
    gm = traced(put, value, mask)
    assert GeForms()(gm).rewrites == 1
    assert "aten.where.self" in targets(gm) and "aten.index_put.default" not in targets(gm)
    assert torch.equal(gm(value, mask), put(value, mask))
    assert GeForms()(gm).rewrites == 0


def test_squeezed_dims_go_one_by_one() -> None:
    gm = traced(lambda x: aten.squeeze.dims(x, [0, -1]), x)
    assert GeForms()(gm).rewrites == 1
    assert targets(gm) == ["aten.squeeze.dim", "aten.squeeze.dim"]
    assert torch.equal(gm(x), x.view(3, 4))


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_rows_appended_by_an_expression_are_concatenated(tokens: int) -> None:
    gm = traced(lambda v: v + 1, torch.randn(9, 2))
    value, add = (node for node in gm.graph.nodes if node.op != "output")
    with gm.graph.inserting_after(add):
        rows = gm.graph.call_function(aten.sym_size.int, (value, 0))
    rows.meta["val"] = value.meta["val"].shape[0]
    with gm.graph.inserting_after(rows):
        padded = gm.graph.call_function(aten.constant_pad_nd.default, (value, [0, 0, 0, rows], 2.0))
    padded.meta["val"] = value.meta["val"]
    add.replace_all_uses_with(padded)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert GeForms()(gm).rewrites == 1
    assert "aten.cat.default" in targets(gm) and "aten.constant_pad_nd.default" not in targets(gm)
    given = torch.randn(tokens, 2)
    assert torch.equal(gm(given), torch.cat([given, torch.full((tokens, 2), 2.0)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_rows_appended_by_a_number_are_of_the_tensor_s_dtype(dtype: torch.dtype) -> None:
    """A pad of 0, as passes write it, is of int64 in torchair's PadV3, which takes one dtype alone."""
    given = torch.arange(6).view(3, 2).to(dtype)
    gm = traced(lambda v: aten.constant_pad_nd(v, [0, 1, 2, 0], 0), given)
    assert GeForms()(gm).rewrites == 1
    assert "aten.constant_pad_nd.default" not in targets(gm)
    parts = [part for cat in gm.graph.find_nodes(op="call_function", target=aten.cat.default) for part in cat.args[0]]
    assert len(parts) == 4 and all(part.meta["val"].dtype == dtype for part in parts)
    assert torch.equal(gm(given), torch.nn.functional.pad(given, (0, 1, 2, 0)))


def test_no_rows_appended_is_nothing() -> None:
    gm = traced(lambda v: aten.constant_pad_nd(v, [0, 0, 0, 0], 0) + 1, x)
    assert GeForms()(gm).rewrites == 1 and targets(gm) == ["aten.add.Tensor"]


def test_rows_cut_off_are_refused() -> None:
    gm = traced(lambda v: aten.constant_pad_nd(v, [0, -1], 0), x)
    assert [refusal.reason for refusal in GeForms()(gm).refusals] == ["negative padding"]


def rows_put(value: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    return aten.index_put(value, [index], rows)


def cells_put(value: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    return aten.index_put(value.view(2, -1, 3), [index % 2, index], rows)


@pytest.mark.parametrize("put", [rows_put, cells_put])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("rows", [torch.randn(4, 3), torch.randn(1, 3), torch.randn(3), torch.tensor(2.0)])
def test_rows_are_put_where_numbers_say(put: Callable[..., Any], dtype: torch.dtype, rows: Tensor) -> None:
    given = torch.randn(10, 3), torch.tensor([3, -1, 0, -5], dtype=dtype), rows
    gm = traced(put, *given)
    before = given[0].clone()
    assert GeForms()(gm).rewrites == 1
    assert "npu.npu_scatter_nd_update.default" in targets(gm) and "aten.index_put.default" not in targets(gm)
    assert torch.equal(gm(*given), put(*given))
    assert torch.equal(given[0], before)
    assert GeForms()(gm).rewrites == 0


def test_caches_that_are_written_at_the_same_places_share_their_count() -> None:
    def both(a: Tensor, b: Tensor, c: Tensor, index: Tensor, rows: Tensor) -> list[Tensor]:
        return [aten.index_put(cache, [index], rows) for cache in (a, b, c)]

    given = torch.randn(10, 3), torch.randn(10, 3), torch.randn(9, 3), torch.tensor([3, -1]), torch.randn(2, 3)
    gm = traced(both, *given, mode="fake")
    assert GeForms()(gm).rewrites == 3
    assert targets(gm).count("aten.where.self") == 2
    assert all(torch.equal(a, b) for a, b in zip(gm(*given), both(*given), strict=True))


ROWS, PLACES, MASK = torch.randn(5, 3), torch.tensor([1, 3]), torch.tensor([True, False, True, False, False])
NO_FORM = "only what is put at places of the first dims, without accumulation, has a form"
PUTS: list[tuple[str, Tensor, list[Tensor | None], Tensor, bool]] = [
    (NO_FORM, ROWS, [PLACES], ROWS[:2], True),
    (NO_FORM, ROWS, [MASK], torch.zeros(()), True),
    (NO_FORM, ROWS, [None, PLACES - 1], torch.randn(5, 2), False),
    ("the places' numbers differ in shape", ROWS, [PLACES, PLACES[:1]], torch.zeros(2), False),
    ("several masks", ROWS, [MASK, PLACES[:2] - 1], torch.zeros(2), False),
    (
        "values of a mask's places are not where they go: only a scalar can be chosen",
        ROWS,
        [MASK],
        ROWS[:2],
        False,
    ),
    (
        "the values are torch.float64: npu_scatter_nd_update takes "
        "torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.int64, torch.int8",
        ROWS.double(),
        [PLACES],
        ROWS[:2].double(),
        False,
    ),
]


@pytest.mark.parametrize(("reason", "value", "indices", "rows", "accumulate"), PUTS)
def test_other_puts_are_refused(
    reason: str, value: Tensor, indices: list[Tensor | None], rows: Tensor, accumulate: bool
) -> None:
    def put(value: Tensor, rows: Tensor) -> Tensor:
        return aten.index_put(value, indices, rows, accumulate)

    gm = make_fx(put, tracing_mode="real")(value, rows)
    for node, known in zip(gm.graph.find_nodes(op="placeholder"), (value, rows), strict=True):
        node.meta["val"] = known
    for node in gm.graph.find_nodes(op="get_attr"):
        node.meta["val"] = getattr(gm, node.target)
    result = GeForms()(gm)
    assert (result.rewrites, [r.reason for r in result.refusals]) == (0, [reason])
    assert "aten.index_put.default" in targets(gm)
