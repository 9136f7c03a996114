"""What the proofs find to differ between ranks' graphs, without being told: literals, tensors, sizes and numbers."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
import torch.fx as fx
from simulate import in_threads, none_failed
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.axes import Axis
from cpcompile.exchange import LocalExchange, OfflineExchange
from cpcompile.passes.token_dims import annotate
from cpcompile.passes.verify_ranks import Differences, differences
from cpcompile.passes.verify_static import prove

aten, c10d = torch.ops.aten, torch.ops._c10d_functional


def traced(f: Any, *args: Any) -> fx.GraphModule:
    return make_fx(f, tracing_mode="symbolic")(*args)


def compared(graphs: list[fx.GraphModule]) -> list[Differences]:
    ring = LocalExchange.ring(len(graphs), 5.0)
    return none_failed(in_threads(lambda r: differences(graphs[r], ring[r].all_gather), len(graphs)))


def test_equal_graphs_do_not_differ_whatever_their_groups_are_called() -> None:
    def graph(group: str) -> fx.GraphModule:
        return traced(lambda x: c10d.wait_tensor(c10d.all_reduce(x * 2.0, "sum", group)), torch.ones(3))

    assert compared([graph("a"), graph("b")]) == [Differences()] * 2


@pytest.mark.parametrize("literal", [lambda r: r, lambda r: 0.5 * r, lambda r: bool(r)], ids=["int", "float", "bool"])
def test_a_literal_of_the_ranks_own_is_found(literal: Any) -> None:
    def graph(rank: int) -> fx.GraphModule:
        return traced(lambda x: (x + 1) * literal(rank), torch.ones(3))

    found = compared([graph(0), graph(1)])
    assert [d.nodes for d in found] == [frozenset({"mul"})] * 2


def test_a_tensor_of_the_ranks_own_is_found() -> None:
    def graph(rank: int) -> fx.GraphModule:
        own = torch.tensor([1.0, rank])
        return make_fx(lambda x: x + own)(torch.ones(2))

    found = compared([graph(0), graph(1)])
    assert len(found[0].nodes) == 1 and "constant" in min(found[0].nodes)


def test_a_size_and_a_number_of_the_ranks_own_are_found() -> None:
    found = compared([traced(lambda x, k: x * k, torch.ones(5 + r, 7), 3 + r) for r in range(2)])
    assert found[0].nodes == {"x_1", "k_1"}
    assert len(found[0].symbols) == 2 and all(isinstance(s, sympy.Symbol) for s in found[0].symbols)


def test_offline_nothing_is_seen_to_differ() -> None:
    gm = traced(lambda x: x * 3, torch.ones(2))
    assert differences(gm, OfflineExchange(2).all_gather) == Differences()


def test_graphs_of_other_lengths_differ_everywhere() -> None:
    long, short = traced(lambda x: x * 2 + 1, torch.ones(2)), traced(lambda x: x * 2, torch.ones(2))
    assert compared([long, short])[0].nodes == {n.name for n in long.graph.nodes}


# ---- what the planner and the proof make of it, each for itself ----------------------------------------------------

AXIS = Axis("tp", "g", 2, 0, (0, 1))


def scaled() -> tuple[fx.GraphModule, sympy.Symbol]:
    """A sum over the axis times a number that is given."""
    gm = traced(lambda x, k: c10d.wait_tensor(c10d.all_reduce(x, "sum", "g")) * k, torch.ones(6, 4), 3)
    nodes = {n.name: n for n in gm.graph.nodes}
    return gm, nodes["k_1"].meta["val"].node.expr


def test_what_depends_on_a_number_of_the_ranks_own_is_its_own() -> None:
    gm, k = scaled()
    facts = {"x_1": False, "k_1": True}
    assert any(n.name == "mul" for n in annotate(gm, AXIS, facts).replicated)
    for known in (annotate(gm, AXIS, facts, (), {k}), annotate(gm, AXIS, {**facts, "k_1": False})):
        assert {"mul"}.isdisjoint(n.name for n in known.replicated)
        assert any("wait_tensor" in n.name for n in known.replicated)


def on_rows(gm: fx.GraphModule) -> fx.GraphModule:
    """The product on each rank's rows, gathered."""

    def rows(x: Any, k: int) -> Any:
        mine = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 2, "g"))
        return c10d.wait_tensor(c10d.all_gather_into_tensor(mine * k, 2, "g"))

    made = make_fx(rows, tracing_mode="fake")(torch.ones(6, 4), 3)
    made.graph.eliminate_dead_code()
    return made


def test_the_proof_refuses_rows_times_a_number_that_differs() -> None:
    gm = make_fx(lambda x, k: c10d.wait_tensor(c10d.all_reduce(x, "sum", "g")) * k, tracing_mode="fake")(
        torch.ones(6, 4), 3
    )
    made, tokens = on_rows(gm), sympy.Integer(6)
    assert prove(gm, made, AXIS, tokens, lambda name: name != "x_1").failures == ()
    assert not prove(gm, made, AXIS, tokens, lambda name: name != "x_1", ["mul"]).holds


def test_the_proof_refuses_token_counts_that_differ() -> None:
    gm, _ = scaled()
    tokens = next(n for n in gm.graph.nodes if n.name == "x_1").meta["val"].shape[0].node.expr
    same = prove(gm, gm, AXIS, tokens, lambda name: name != "x_1")
    assert same.failures == ()
    found = prove(gm, gm, AXIS, tokens, lambda name: name != "x_1", (), {tokens})
    assert [f.message.split("; ")[0] for f in found.failures] == ["expected as many tokens on every rank"]
