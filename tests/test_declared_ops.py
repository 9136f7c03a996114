"""``cpcompile.row_wise``: an opaque op runs on rows as stated; what is wrong is caught; the proof tells its trust."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from placed import Layer
from simulate import fake_rank
from torch import Tensor, nn

import cpcompile
from cpcompile.axes import axis_of
from cpcompile.capture import capture
from cpcompile.compiled import Compiled
from cpcompile.declared_ops import forget_row_wise
from cpcompile.errors import OptionError
from cpcompile.exchange import OfflineExchange
from cpcompile.explanation import Explanation
from cpcompile.options import Options
from cpcompile.pipeline import compile_graph

REPLICATED = ["table", "weight"]


@torch.library.custom_op("cpcompile_stated::mixed", mutates_args=())
def mixed(x: Tensor, weight: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of ``x`` scaled by its row of ``gate``, in a basis of ``weight``; and how large the weight is."""
    return x * gate.sigmoid() + weight.flip(0), weight.norm()[None]


@torch.library.custom_op("cpcompile_stated::centred", mutates_args=())
def centred(x: Tensor) -> Tensor:
    """Not row-wise, whatever is stated: the mean of all rows is taken off each."""
    return x - x.mean(0, keepdim=True)


mixed.register_fake(lambda x, weight, gate: (torch.empty_like(x), weight.new_empty(1)))
centred.register_fake(torch.empty_like)


class Opaque(Layer):
    """The layer with an op between its sum and its product that no table knows."""

    op: Any

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.embedding(ids, self.table)
        h = self.op(x + self.sum(x @ self.first), self.weight)
        normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        return h + self.sum(torch.relu(normed @ self.up) @ self.down)


def with_mixed(h: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.cpcompile_stated.mixed(h, weight, h)[0]  # type: ignore[no-any-return]


def with_centred(h: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.cpcompile_stated.centred(h)  # type: ignore[no-any-return]


def compiled(op: Any, batch: tuple[int, ...] = (), **options: Any) -> Compiled:
    with fake_rank(0, 2) as mesh:
        model = Opaque(mesh, 0, 2)
        model.op = op
        trace, axis = capture(model, torch.zeros(*batch, 10, dtype=torch.long)), axis_of("tp", mesh)
        parsed = Options.parse({"strategy": "tp", "replicated": REPLICATED, **options})
        return compile_graph(trace.gm, trace.inputs, parsed, lambda _: OfflineExchange(2, 0), [axis])


def shape_at(result: Compiled, target: Any) -> list[str]:
    (node,) = result.variants[-1].gm.graph.find_nodes(op="call_function", target=target)
    return [str(n.meta["val"].shape[0]) for n in node.all_input_nodes]


@pytest.fixture(autouse=True)
def nothing_stated() -> Iterator[None]:
    yield
    for name in ("mixed", "centred"):
        forget_row_wise(f"cpcompile_stated::{name}")


def test_an_op_runs_on_rows_once_that_is_stated() -> None:
    target = torch.ops.cpcompile_stated.mixed.default
    before = compiled(with_mixed, verify="numeric")
    assert all("//" not in size for size in shape_at(before, target))
    assert [p["trusts"] for p in before.proofs if p["method"] == "static"] == [[]]
    cpcompile.row_wise("cpcompile_stated::mixed", rows=(0, 2), out=(0,))
    after = compiled(with_mixed, verify="numeric")
    assert {p["method"]: (p["holds"], p["failures"]) for p in after.proofs} == {
        "static": (True, []),
        "numeric": (True, []),
    }
    rows, weight = shape_at(after, target)
    assert "//" in rows and weight == "8"
    assert after.proofs[0]["trusts"] == ["cpcompile_stated::mixed"]
    told = "proven, taking on trust that cpcompile_stated::mixed is row-wise, as stated"
    assert told in str(Explanation(after, 64, {}))


@pytest.mark.parametrize(("dim", "placed"), [(1, True), (0, False)])
def test_rows_may_lie_in_another_dim(dim: int, placed: bool) -> None:
    cpcompile.row_wise("cpcompile_stated::mixed", rows=(0, 2), dim=dim)
    result = compiled(with_mixed, batch=(3,), verify="numeric")
    (node,) = result.variants[-1].gm.graph.find_nodes(
        op="call_function", target=torch.ops.cpcompile_stated.mixed.default
    )
    assert ("//" in str(node.args[0].meta["val"].shape[1])) == placed
    assert all(p["holds"] for p in result.proofs)


def test_a_wrong_statement_is_caught_in_numbers() -> None:
    """The static proof cannot see it, and says that it took it on trust; run on rows and on the whole, it shows."""
    cpcompile.row_wise("cpcompile_stated::centred")
    on_trust = compiled(with_centred)
    assert on_trust.rewritten and [p["trusts"] for p in on_trust.proofs] == [["cpcompile_stated::centred"]]
    caught = compiled(with_centred, verify="numeric")
    assert not caught.rewritten
    (reason,) = caught.refused.values()
    assert "relative error" in reason


@pytest.mark.parametrize("rows", [(1,), (0, 1), (0, 1, 2), (7,)])
def test_a_statement_that_does_not_fit_the_call_is_told(rows: tuple[int, ...]) -> None:
    cpcompile.row_wise("cpcompile_stated::mixed", rows=rows)
    result = compiled(with_mixed)
    assert all("//" not in size for size in shape_at(result, torch.ops.cpcompile_stated.mixed.default))
    assert all(p["holds"] for p in result.proofs)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("mixed", {}, "expected the name of an op"),
        ("a::b.default", {}, "without an overload"),
        ("aten::mm", {}, "ops of 'aten' are known already"),
        ("a::b", {"rows": ()}, "at least one"),
        ("a::b", {"rows": (0, 0)}, "each once"),
        ("a::b", {"rows": (-1,)}, "expected positions of arguments"),
        ("a::b", {"out": (1,)}, r"expected results from the first on, such as \(0,\) or \(0, 1\)"),
        ("a::b", {"dim": -1}, "expected a dim counted from 0"),
    ],
)
def test_what_cannot_be_stated(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cpcompile.row_wise(name, **given)
