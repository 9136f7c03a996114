"""The proof's own rules for look-ups and masked writes: the numbers of rows, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx

from cpcompile.passes.verify_call import Call
from cpcompile.passes.verify_index import Rows
from cpcompile.passes.verify_rules import rows_of

aten = torch.ops.aten
TABLE, IDS, MORE = torch.randn(5, 3, 2), torch.tensor([[0], [4], [2], [1]]), torch.tensor([[0, 2]])
BELOW, MASK, VALUE = torch.randn(4, 3, 2), torch.rand(4, 3) < 0.5, torch.tensor(7.0)


def found(target: Any, *args: Any, rows: dict[int, Rows]) -> Rows | str:
    """What the rules say of ``target(*args)`` if the operands numbered in ``rows`` are split there."""
    graph, nodes = fx.Graph(), []

    def operand(value: torch.Tensor) -> fx.Node:
        nodes.append(graph.placeholder(f"x{len(nodes)}"))
        nodes[-1].meta["val"] = value
        return nodes[-1]

    given = [[operand(v) for v in a] if isinstance(a, list) else operand(a) for a in args]
    node = graph.call_function(target, tuple(given))
    out = tuple(target(*args).shape)
    shapes = {n: tuple(n.meta["val"].shape) for n in nodes}
    return rows_of(Call(node, shapes, {nodes[i]: r for i, r in rows.items()}, (out,)))


def test_a_row_is_looked_up_for_each_row_of_the_numbers() -> None:
    assert found(aten.index.Tensor, TABLE, [IDS, MORE], rows={1: Rows(0)}) == Rows(0)
    assert torch.equal(aten.index(TABLE, [IDS[1:3], MORE]), aten.index(TABLE, [IDS, MORE])[1:3])
    assert found(aten.index.Tensor, TABLE, [IDS], rows={1: Rows(0)}) == Rows(0)


def test_a_masked_write_is_row_wise_with_its_mask() -> None:
    assert found(aten.index_put.default, BELOW, [MASK], VALUE, rows={0: Rows(0), 1: Rows(0)}) == Rows(0)
    whole = aten.index_put(BELOW, [MASK], VALUE)
    assert torch.equal(aten.index_put(BELOW[1:3], [MASK[1:3]], VALUE), whole[1:3])
    assert found(aten.index_put.default, BELOW, [MASK], VALUE, rows={0: Rows(2)}) == Rows(2)
    assert torch.equal(aten.index_put(BELOW[..., 1:], [MASK], VALUE), whole[..., 1:])


@pytest.mark.parametrize(
    ("args", "rows", "reason"),
    [
        ((aten.index.Tensor, TABLE, [IDS]), {0: Rows(0)}, "it looks rows up"),
        ((aten.index.Tensor, TABLE, [IDS]), {0: Rows(0), 1: Rows(0)}, "it looks rows up"),
        ((aten.index.Tensor, BELOW, [MASK]), {1: Rows(0)}, "it does not look up a row for each number"),
        ((aten.index.Tensor, TABLE, [IDS, IDS % 3]), {1: Rows(0)}, "has every row"),
        ((aten.index_put.default, BELOW, [MASK], VALUE), {0: Rows(0)}, "its mask is not split as what it writes to"),
        ((aten.index_put.default, BELOW, [MASK], VALUE), {1: Rows(0)}, "what it writes to is not"),
        ((aten.index_put.default, BELOW, [MASK], VALUE), {0: Rows(2), 1: Rows(0)}, "its mask is of other rows"),
        ((aten.index_put.default, BELOW, [IDS[:, 0] % 4], VALUE), {0: Rows(0), 1: Rows(0)}, "rows that it names"),
        ((aten.index_put.default, BELOW, [MASK[:, 0]], BELOW[0]), {0: Rows(0), 1: Rows(0)}, "rows that it names"),
    ],
)
def test_what_meets_other_rows_is_refused(args: Any, rows: dict[int, Rows], reason: str) -> None:
    told = found(*args, rows=rows)
    assert isinstance(told, str) and reason in told
