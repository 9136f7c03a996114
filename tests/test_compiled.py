"""The outcome of the pipeline: which variant runs, and how the token count is read off a call's inputs."""

from __future__ import annotations

import pytest
import sympy
import torch
import torch.fx as fx
from placed import layer

from cpcompile.compiled import Compiled, Variant, count_at, token_reader
from cpcompile.passes.token_layout import product, size_expr
from cpcompile.plan import Plan


def compiled() -> Compiled:
    gm = layer().gm
    return Compiled(gm, [Variant(0, 4, gm), Variant(5, 9, gm), Variant(10, None, gm)], Plan())


@pytest.mark.parametrize(("tokens", "first"), [(0, 0), (4, 0), (5, 5), (9, 5), (10, 10), (10**9, 10)])
def test_the_variant_that_holds(tokens: int, first: int) -> None:
    assert compiled().at(tokens).first == first


def test_without_steps_nothing_is_rewritten_and_the_report_is_of_the_graph_as_it_came() -> None:
    found = compiled()
    report = found.report(7)
    assert not found.rewritten and report.tokens == 7 and report.collectives == []
    assert report.nodes_before == report.nodes_after == len(found.original.graph.nodes)
    assert report.verify == {"proofs": [], "holds": True}
    found.proofs = [{"holds": True}, {"holds": False}]
    assert not found.report(7).verify["holds"]


@pytest.mark.parametrize(("shape", "real"), [((12,), (7,)), ((3, 12), (5, 7)), ((1, 12), (1, 7))])
def test_the_token_count_is_read_off_a_size_that_is_passed(shape: tuple[int, ...], real: tuple[int, ...]) -> None:
    found = layer(shape=shape)
    read = token_reader(found.gm, found.known.tokens)
    assert read is not None
    sizes = {f"L['ids'].size()[{dim}]": size for dim, size in enumerate(real)}
    assert read([sizes.get(i.name) for i in found.trace.inputs]) == 7


def test_the_token_count_is_read_off_the_ids_where_no_size_is_passed() -> None:
    found = layer(shape=(3, 12))
    gm = fx.GraphModule({}, fx.Graph())
    ids = next(
        n.meta["val"]
        for n in found.gm.graph.find_nodes(op="placeholder")
        if getattr(n.meta["val"], "dtype", None) == torch.int64
    )
    for name, value in (("weight", torch.ones(7, 7)), ("mesh", object()), ("ids", ids)):
        gm.graph.placeholder(name).meta["val"] = value
    read = token_reader(gm, found.known.tokens)
    assert read is not None and read([None, None, torch.zeros(5, 9)]) == 9


def test_a_static_or_unreadable_count_has_no_reader() -> None:
    found = layer()
    assert token_reader(found.gm, None) is None
    assert token_reader(found.gm, sympy.Integer(12)) is None
    assert token_reader(found.gm, sympy.Symbol("elsewhere")) is None
    assert found.known.tokens is not None
    assert token_reader(found.gm, product([found.known.tokens, found.known.tokens])) is None


def test_a_multiple_of_a_size_is_read_off_that_size() -> None:
    """The rows of n pipeline stages' shards: T = n * local, and the graph's input has the local ones."""
    found = layer()
    assert found.known.tokens is not None
    one, two = (token_reader(found.gm, factor * found.known.tokens) for factor in (1, 2))
    values = [torch.zeros(7, 7) if isinstance(n.meta["val"], torch.Tensor) else 7 for n in _inputs(found.gm)]
    assert one is not None and two is not None and two(values) == 2 * one(values) == 14


def _inputs(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def test_a_sum_of_sizes_is_read_off_all_of_them() -> None:
    """A prefix before the tokens, by number and by size."""
    tokens = sympy.Symbol("tokens", integer=True, positive=True)
    gm = fx.GraphModule({}, fx.Graph())
    values = [n.meta["val"] for n in _inputs(layer(shape=(3, 12)).gm)]
    ids = next(value for value in values if getattr(value, "dtype", None) == torch.int64)
    gm.graph.placeholder("ids").meta["val"] = ids
    rows, columns = (size_expr(size) for size in ids.shape)
    for count, expected in ((columns + 3, 12), (2 * columns + rows, 23), (rows + columns + 1, 15)):
        read = token_reader(gm, count)
        assert read is not None and read([torch.zeros(5, 9)]) == expected
    assert token_reader(gm, columns + tokens) is None and token_reader(gm, columns * rows + 1) is None


def test_a_count_is_stated_for_a_number_of_tokens() -> None:
    tokens, other = sympy.symbols("tokens other", integer=True, positive=True)
    assert count_at(tokens + 3, tokens, 10) == 13
    assert count_at(tokens + other, tokens, 10, {other: 4}) == 14
    assert count_at(other, tokens, 10, {other: 4}) == 10  # a micro-batch: as many as the model's
    assert count_at(sympy.Integer(8), tokens, 10) == 8
