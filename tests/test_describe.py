"""Rows of the report: decision, elements per rank, and a reason for every collective of an axis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from placed import Annotated, Layer, annotated, layer, traced
from test_token_dims import of

from cpcompile.costs import profile
from cpcompile.passes.describe import describe, module_of
from cpcompile.passes.materialise import materialise
from cpcompile.passes.place import place
from cpcompile.plan import Interval
from cpcompile.report import Collective

TOKENS, SIZE, HIDDEN = 64, 4, 8


def planned(found: Annotated) -> Interval:
    (interval,) = place(found.graph(), profile("ascend-a3"), "tp", "").intervals
    return interval


def rows(found: Annotated, interval: Interval | None = None, tokens: int = TOKENS) -> dict[str, Collective]:
    interval = interval or planned(found)
    gathers = materialise(found.gm, found.graph(), interval).meta["gathers"]
    described = describe(found.graph(), interval, tokens, gathers)
    assert [r.name for r in described] == sorted(
        (r.name for r in described), key=[n.name for n in found.gm.graph.nodes].index
    )
    return {row.name: row for row in described}


def test_every_all_reduce_and_every_gather_has_a_row() -> None:
    found = rows(layer())
    assert {name: (r.kind, r.decision, r.becomes) for name, r in found.items()} == {
        "wait_tensor": ("all_reduce", "scatter", "reduce_scatter"),
        "mul_18": ("all_gather", "gather", "all_gather"),
        "wait_tensor_1": ("all_reduce", "scatter", "reduce_scatter"),
        "add_50": ("all_gather", "gather", "all_gather"),
    }
    assert {r.axis for r in found.values()} == {"tp"}
    assert [found[n].fused for n in ("wait_tensor", "mul_18", "add_50")] == [None, 0, 1]


def test_elements_are_what_one_rank_sends() -> None:
    """Of ``[T, 8]`` over 4 ranks: 2 * 3/4 for an all-reduce, 3/4 for a scatter or gather."""
    found = rows(layer())
    half = TOKENS * HIDDEN * (SIZE - 1) // SIZE
    reduced, gathered = found["wait_tensor"], found["mul_18"]
    assert (reduced.elements_before, reduced.elements_after) == (2 * half, half)
    assert (reduced.elements_before_in_t, reduced.elements_after_in_t) == ("12*T", "6*T")
    assert (gathered.elements_before, gathered.elements_after) == (0, half)
    assert (gathered.elements_before_in_t, gathered.elements_after_in_t) == ("0", "6*T")


def test_a_batch_counts_with_its_traced_size() -> None:
    found = rows(layer(shape=(3, 12)))
    assert found["wait_tensor"].elements_before == 3 * TOKENS * HIDDEN * 2 * 3 // 4
    assert found["wait_tensor"].elements_before_in_t.startswith("12*T*s")


def test_a_static_count_is_stated_as_it_is() -> None:
    found = rows(layer(shape=(1, 1)), tokens=99)
    assert (found["wait_tensor"].elements_before, found["wait_tensor"].elements_before_in_t) == (12, "12")


def test_reasons() -> None:
    found = rows(layer())
    assert found["wait_tensor"].reason == "its readers are row-wise and run on 1/4 of the rows: add_12"
    assert found["mul_18"].reason == (
        "needed whole by mm_1: its other operands differ between the ranks, so every rank needs every row"
    )
    assert found["add_50"].reason == "needed whole by output: the graph returns it whole"


def test_what_is_kept_and_why() -> None:
    here = layer()
    kept = replace(planned(here), labels={}, raises={"wait_tensor": "reduce"})
    found = describe(here.graph(), kept, TOKENS, [])
    assert [(r.decision, r.becomes, r.reason) for r in found] == [
        ("keep", "all_reduce", "one all-reduce is cheaper here than shards would be"),
        ("keep", "nothing: no one reads it", "its result is not used"),
    ]
    assert found[0].elements_after == found[0].elements_before > 0 == found[1].elements_after


def test_an_all_reduce_without_tokens_is_kept_with_the_reason() -> None:
    found = rows(of(lambda x, g: x + funcol.all_reduce(x.sum(0), "sum", g)))
    row = list(found.values())[-1]
    assert (row.decision, row.reason) == ("keep", "no dim of the reduced value holds the tokens")
    assert row.elements_before == row.elements_after == HIDDEN * 2 * 3 // 4


class TwoSums(Layer):
    """Two sums over the ranks that are added, the second scaled first."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(ids, self.table)
        return torch.relu(self.sum(x @ self.first) + 2 * self.sum(torch.sin(x @ self.first)))


class OneScaled(Layer):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = torch.nn.functional.embedding(ids, self.table)
        return torch.relu(2 * self.sum(x @ self.first)[..., :2])


def of_model(model: Any) -> Annotated:
    return annotated(*traced(lambda mesh: model(mesh, 0, SIZE), SIZE, (12,)))


def test_two_sums_become_one() -> None:
    here = of_model(TwoSums)
    found = rows(here)
    merged = [r for r in found.values() if r.kind == "all_reduce"]
    (target,) = [r for r in found.values() if r.kind == "sum of partial values"]
    assert [(r.decision, r.becomes, r.elements_after, r.elements_after_in_t) for r in merged] == [
        ("merge", f"part of {target.name}", 0, "0")
    ] * 2
    assert merged[0].reason == f"the sum over the ranks is taken once, of {target.name}"
    assert (target.decision, target.becomes, target.elements_before) == ("scatter", "reduce_scatter", 0)
    assert target.elements_after == TOKENS * HIDDEN * 3 // 4
    assert target.reason == "its readers run on shards"


def test_a_sum_that_is_taken_of_less() -> None:
    """Two of eight columns are used: they are cut out of the partial sums, and only they are summed."""
    found = rows(of_model(OneScaled))
    (sunk,) = [r for r in found.values() if r.kind == "all_reduce"]
    (target,) = [r for r in found.values() if r.kind == "sum of partial values"]
    assert (sunk.decision, sunk.elements_after) == ("sink", 0)
    assert target.elements_after <= TOKENS * 2 * 2 * 3 // 4 < sunk.elements_before


@pytest.mark.parametrize(
    ("stack", "expected"),
    [
        (None, ""),
        ({}, ""),
        ({"a": ("L['self'].layers.0", object), "b": ("L['self'].layers.0.mlp", object)}, "layers.0.mlp"),
        ({"a": ("L['self']", object)}, ""),
        ({"a": ("L['self'].mlp.forward.__closure__[0].cell_contents", object)}, "mlp"),
    ],
)
def test_the_module_of_a_node(stack: Any, expected: str) -> None:
    node = fx.Graph().placeholder("x")
    if stack is not None:
        node.meta["nn_module_stack"] = stack
    assert module_of(node) == expected
