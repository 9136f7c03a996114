"""npu uneven: rows that are moved without pads are those that were moved with them, on every rank, for any number."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import pytest
import torch
import torch.fx as fx
from test_ge_forms import targets, traced
from test_npu_mc2 import gather, scatter, signs
from torch import Tensor

from cpcompile.passes.collectives import emit, emit_waited
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.lockstep_collectives import ALL_TO_ALL
from cpcompile.passes.npu_uneven import Group, NpuUneven

aten, define = torch.ops.aten, torch.ops.npu_define
SCATTER, GATHER = define.reduce_scatter_tensor_uneven.default, define.allgather_in_tensor_uneven.default
WIDTH = 3


def scattered(x: Tensor, size: int) -> Tensor:
    tokens = x.shape[0]
    each = (tokens + size - 1) // size
    return scatter(torch.constant_pad_nd(x, [0, 0, 0, each * size - tokens]), ranks=size)


def told_apart(x: Tensor, size: int) -> Tensor:
    tokens = x.shape[0]
    each = (tokens + size - 1) // size
    padded = torch.constant_pad_nd(x.view(1, tokens, WIDTH), [0, 0, 0, each * size - tokens])
    return scatter(padded.view(each * size, WIDTH), ranks=size).view(1, each, WIDTH) * 2


def both(x: Tensor, size: int) -> Tensor:
    """Scattered, changed on each rank's own rows, pads included, and gathered again."""
    return gather(scattered(x, size) + 1, size)[: x.shape[0]]


def meant(gm: fx.GraphModule) -> fx.GraphModule:
    """What the ops mean: rank r gets ``send_counts[r]`` rows of the sum; every rank gets all ranks' rows."""
    for node in [n for n in gm.graph.nodes if n.target in (SCATTER, GATHER)]:
        if node.target is SCATTER:
            x, sent, count, reduce_type, _, ranks, size, starts = node.args
            assert (reduce_type, starts, len(sent)) == ("sum", [], size)
            received = [count] * size
            parts = emit_waited(node, ALL_TO_ALL, x, received, sent, "tp")
            each = emit(node, aten.reshape.default, parts, [size, count, WIDTH])
            made = emit(node, aten.sum.dim_IntList, each, [0])
        else:
            x, count, received, _, ranks, size, starts = node.args
            assert (starts, len(received)) == ([], size)
            made = emit_waited(
                node, ALL_TO_ALL, emit(node, aten.cat.default, [x] * size), received, [count] * size, "tp"
            )
        assert ranks == [5 + rank for rank in range(size)]
        node.replace_all_uses_with(made)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def on_ranks(graphs: Sequence[fx.GraphModule], given: Sequence[Tensor]) -> list[Any]:
    ranks = tuple(range(len(given)))
    return run_lockstep([RankProgram(gm, [x], {"tp": ranks}) for gm, x in zip(graphs, given, strict=True)])


def sized(function: Callable[..., Tensor], size: int) -> fx.GraphModule:
    def of_rows(x: Tensor) -> Tensor:
        return function(x.view(-1, WIDTH), size)

    return traced(of_rows, signs(5, WIDTH))


def uneven(rank: int, size: int) -> NpuUneven:
    return NpuUneven(lambda name: Group("tag", [5 + r for r in range(size)], rank))


@functools.cache
def rewritten(function: Callable[..., Tensor], size: int) -> list[fx.GraphModule]:
    graphs = []
    for rank in range(size):
        gm = sized(function, size)
        result = uneven(rank, size)(gm)
        assert (result.rewrites, result.refusals) == (2 if function is both else 1, [])
        assert not [t for t in targets(gm) if "c10d" in t or "pad" in t]
        assert uneven(rank, size)(gm).rewrites == 0
        graphs.append(meant(gm))
    return graphs


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("function", [scattered, told_apart, both])
def test_ranks_have_the_same_rows(function: Callable[..., Tensor], size: int) -> None:
    original = sized(function, size)
    for tokens in [*range(1, 4 * size + 2), 33]:
        given = [signs(tokens, WIDTH, seed=rank) for rank in range(size)]
        expected = on_ranks([original] * size, given)
        for found, wanted in zip(on_ranks(rewritten(function, size), given), expected, strict=True):
            assert torch.equal(found, wanted)


def test_a_known_number_of_rows_leaves_nothing_to_compute() -> None:
    unknown = sized(functools.partial(scattered), 4)
    assert uneven(2, 4)(unknown).rewrites == 1 and [t for t in targets(unknown) if "built-in" in t]
    gm = traced(lambda x: scattered(x, 4), signs(5, WIDTH), mode="fake")
    assert uneven(2, 4)(gm).rewrites == 1
    (call,) = gm.graph.find_nodes(op="call_function", target=SCATTER)
    assert call.args[1:3] == ([2, 2, 1, 0], 1)
    assert not [t for t in targets(gm) if "built-in" in t]


X = signs(5, WIDTH)
NO_PAD, NO_CUT = "no rows are appended to what is scattered", "no rows are cut off what is gathered"
REFUSED: list[tuple[str, Callable[..., Any]]] = [
    (NO_PAD, lambda x: scatter(x[:4])),
    (NO_PAD, lambda x: scatter(torch.constant_pad_nd(x, [0, 0, 1, 0]))),
    (NO_PAD, lambda x: scatter(torch.constant_pad_nd(x, [0, 0, 0, 1], 1.0))),
    (NO_PAD, lambda x: (p := torch.constant_pad_nd(x, [0, 0, 0, 1]), scatter(p))),
    (NO_PAD, lambda x: scatter(torch.constant_pad_nd(x.expand(2, 5, 3), [0, 0, 0, 1]).view(12, 3))),
    ("the reduction is 'avg'", lambda x: scatter(torch.constant_pad_nd(x, [0, 0, 0, 1]), "avg")),
    (
        "rows are appended otherwise than to the next multiple of the ranks",
        lambda x: scatter(torch.constant_pad_nd(x, [0, 0, 0, 3])),
    ),
    (NO_CUT, lambda x: gather(x)),
    (NO_CUT, lambda x: gather(x)[1:]),
    (NO_CUT, lambda x: gather(x)[:, :2]),
    (NO_CUT, lambda x: ((g := gather(x))[:9], g * 2)),
    ("rows are cut off otherwise than from the next multiple of the ranks", lambda x: gather(x)[:7]),
]


@pytest.mark.parametrize(("reason", "function"), REFUSED)
def test_other_collectives_stay(reason: str, function: Callable[..., Any]) -> None:
    gm = traced(function, X, mode="fake")
    before = targets(gm)
    result = uneven(1, 2)(gm)
    assert (result.rewrites, [r.reason for r in result.refusals]) == (0, [reason])
    assert targets(gm) == before


def test_a_missing_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpcompile.passes.npu_uneven.missing_ops", lambda names, namespace: f"no {namespace}")
    result = uneven(0, 2)(traced(lambda x: scattered(x, 2), X, mode="fake"))
    assert [r.reason for r in result.refusals] == ["no npu_define"]
