"""The layouts inside a graph against their index maps: one graph for every token count, no data-dependent shape."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.errors import LayoutError
from cpcompile.layout_tensors import index_tensors, restore_rows, split_rows
from cpcompile.layouts import KINDS, PAD, TokenLayout

FEW = settings(max_examples=300, deadline=None)
VIEW_OPS = {
    "sym_size",
    "constant_pad_nd",
    "view",
    "_unsafe_view",
    "select",
    "cat",
    "transpose",
    "slice",
    "clone",
}


def rows_of(kind: str, ranks: int, tokens: int) -> list[tuple[int, ...]]:
    """Each rank's rows of one request, as ``split_rows`` pads it."""
    if kind == "zigzag":
        layout = TokenLayout(kind, ranks, (tokens,), padded=(-(-tokens // (2 * ranks)) * 2 * ranks,))
    elif kind == "interleave" and tokens < ranks:  # beyond what the index form serves
        return [(rank if rank < tokens else PAD,) if tokens else () for rank in range(ranks)]
    else:
        layout = TokenLayout(kind, ranks, (tokens,))
    return [layout.rows(rank) for rank in range(ranks)]


def check_split(kind: str, ranks: int, x: Tensor, dim: int, parts: list[Tensor]) -> None:
    rows = rows_of(kind, ranks, x.shape[dim])
    for mine, part in zip(rows, parts, strict=True):
        index = torch.tensor([t for t in mine if t != PAD], dtype=torch.int64)
        held = torch.tensor([t != PAD for t in mine], dtype=torch.bool)
        assert part.shape[dim] == len(mine)
        part = part.movedim(dim, 0)
        assert part[held].equal(x.movedim(dim, 0)[index])
        assert not part[~held].any()  # pads are zero


@FEW
@given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(0, 70), st.sampled_from([0, 1, 2, -1, -2]))
@example("zigzag", 8, 17, 0)
@example("interleave", 4, 1, -1)
def test_views_are_the_index_maps_and_restore_undoes_split(kind: str, ranks: int, tokens: int, dim: int) -> None:
    shape = [2, 3, 2]
    shape[dim] = tokens
    x = torch.rand(shape) + 1
    parts = [split_rows(x, dim, rank, ranks, kind) for rank in range(ranks)]
    check_split(kind, ranks, x, dim % 3, parts)
    assert restore_rows(torch.cat(parts, dim), dim, ranks, kind, tokens).equal(x)


def traced(fn: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    """The graph of ``fn`` with every size symbolic. Its guards must hold whatever the sizes are."""
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        gm = make_fx(fn, tracing_mode="symbolic")(*inputs)
    for guard in gm.shape_env.guards:
        symbols = sorted(guard.expr.free_symbols, key=str)
        for sizes in itertools.product((0, 1, 2, 3, 8, 9, 16, 17), repeat=len(symbols)):
            assert guard.expr.subs(dict(zip(symbols, sizes, strict=True))), f"{guard.expr} fails for {sizes}"
    return gm


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("kind", "ranks"), list(itertools.product(KINDS, [1, 3, 8])))
def test_one_graph_of_views_serves_every_token_count(kind: str, ranks: int, dim: int) -> None:
    """Traced at 10 tokens; run from none on."""

    def split(x: Tensor) -> list[Tensor]:
        return [split_rows(x, dim, rank, ranks, kind) for rank in range(ranks)]

    def both(x: Tensor) -> Tensor:
        return restore_rows(torch.cat(split(x), dim), dim, ranks, kind, x.shape[dim])

    shape = [3, 3]
    shape[dim] = 10
    splitting, whole = (traced(fn, torch.rand(shape)) for fn in (split, both))
    called = {n.target.__name__.split(".")[0] for n in whole.graph.nodes if isinstance(n.target, OpOverload)}
    assert called <= VIEW_OPS
    for tokens in (*range(10), 15, 16, 17, 24, 31, 33):
        shape[dim] = tokens
        x = torch.rand(shape) + 1
        check_split(kind, ranks, x, dim, splitting(x))
        assert whole(x).equal(x)


@pytest.mark.parametrize("kind", KINDS)
def test_dynamo_compiles_once(kind: str) -> None:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> fx.GraphModule:
        graphs.append(gm)
        return gm

    def both(x: Tensor) -> Tensor:
        return restore_rows(torch.cat([split_rows(x, 0, r, 4, kind) for r in range(4)]), 0, 4, kind, x.shape[0])

    torch._dynamo.reset()
    compiled = torch.compile(both, backend=keep, dynamic=True, fullgraph=True)
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        for tokens in (10, 2, 3, 8, 17, 40, 1, 0):
            x = torch.rand(tokens, 2)
            assert compiled(x).equal(x)
    assert len(graphs) == 1


lengths_of = st.lists(st.integers(0, 40), min_size=1, max_size=5)


def check_index(layout: TokenLayout, found: tuple[Tensor, Tensor, Tensor]) -> None:
    """``found`` may have more rows per rank than the layout needs: then they are pads."""
    split, valid, restore = found
    m = layout.rows_per_rank
    assert split.shape == valid.shape and split.shape[0] == layout.ranks and split.shape[1] >= m
    assert valid[:, :m].equal(layout.valid) and not valid[:, m:].any()
    assert split[:, :m].equal(layout.split_index) and not split[:, m:].any()
    rank, row = layout.restore_index // max(m, 1), layout.restore_index % max(m, 1)
    assert restore[: layout.tokens].equal(rank * split.shape[1] + row)
    assert split.dtype == restore.dtype == torch.int64


@FEW
@given(st.sampled_from(KINDS), st.integers(1, 8), lengths_of, st.sampled_from([torch.int32, torch.int64]))
def test_index_tensors_are_the_layouts(kind: str, ranks: int, lengths: list[int], dtype: torch.dtype) -> None:
    if kind == "interleave":
        lengths = [*lengths, ranks]
    layout = TokenLayout(kind, ranks, tuple(lengths))
    q = torch.tensor(lengths, dtype=dtype)
    check_index(layout, index_tensors(q, layout.tokens, ranks, kind))
    exact = index_tensors(q, layout.tokens, ranks, kind, rows=layout.rows_per_rank)
    assert exact.split.shape[1] == layout.rows_per_rank
    check_index(layout, exact)


@FEW
@given(st.sampled_from(KINDS), st.integers(1, 8), lengths_of, st.integers(0, 20))
def test_a_bound_on_the_tokens_leaves_the_rest_unowned(kind: str, ranks: int, lengths: list[int], more: int) -> None:
    total = sum(lengths)
    split, valid, restore = index_tensors(torch.tensor(lengths), total + more, ranks, kind)
    assert sorted(split[valid].tolist()) == list(range(total))
    assert split.flatten()[restore[:total]].tolist() == list(range(total)) and valid.flatten()[restore[:total]].all()
    assert restore.shape == (total + more,) and not restore[total:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_of_indices_serves_every_batch(kind: str) -> None:
    """Traced at 3 requests of 10 tokens; nothing in the graph reads a value."""

    def indices(q: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return index_tensors(q, ids.shape[0], 4, kind)

    gm = traced(indices, torch.tensor([1, 2, 7]), torch.zeros(10))
    assert not any("item" in str(n.target) or "local_scalar" in str(n.target) for n in gm.graph.nodes)
    for lengths in ((1, 2, 7), (0, 4, 0), (40, 1, 30), (5, 5, 5), (1, 3, 0)):
        layout = TokenLayout(kind, 4, lengths)
        check_index(layout, gm(torch.tensor(lengths), torch.zeros(sum(lengths))))


def test_a_token_without_a_row_cannot_be_indexed() -> None:
    restore = index_tensors(torch.tensor([5, 1]), 6, 2, "sp", rows=3).restore
    assert restore.tolist() == [0, 1, 2, 3, 4, 6]
    with pytest.raises(IndexError):
        torch.zeros(6)[restore]


BAD = {
    "unknown token layout 'zig' (did you mean 'zigzag'?)": lambda: split_rows(torch.zeros(4), 0, 0, 2, "zig"),
    "expected a rank in [0, 2); found 2": lambda: split_rows(torch.zeros(4), 0, 2, 2, "zigzag"),
    "expected ranks >= 1; found 0": lambda: index_tensors(torch.tensor([3]), 3, 0, "sp"),
    "found torch.float32 [1]": lambda: index_tensors(torch.tensor([3.0]), 3, 2, "sp"),
    "found torch.int64 [0]": lambda: index_tensors(torch.zeros(0, dtype=torch.int64), 0, 2, "sp"),
    "found torch.int64 [1, 1]": lambda: index_tensors(torch.tensor([[3]]), 3, 2, "sp"),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_are_one_line(message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        BAD[message]()
    assert message in str(caught.value) and "\n" not in str(caught.value)
