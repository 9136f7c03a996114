"""GE forms: equal values from ops that torchair has converters for, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
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


def test_other_puts_are_refused() -> None:
    def put(value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return aten.index_put(value, [index], value[:2])

    result = GeForms()(gm := traced(put, torch.randn(5, 3), torch.tensor([1, 3])))
    assert [r.reason for r in result.refusals] == [
        "only one mask, without accumulation, is a choice between two values"
    ]
    assert "aten.index_put.default" in targets(gm)
