"""npu MC2: what the ops compute on all ranks is what the product and the collective do; what kernels refuse is left."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import pytest
import torch
import torch.fx as fx
from test_ge_forms import targets, traced
from torch import Tensor

from cpcompile.passes.collectives import NATIVE, emit, emit_waited
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.npu_mc2 import NpuMc2

npu = torch.ops.npu
SCATTER, GATHER = npu.npu_mm_reduce_scatter_base.default, npu.npu_all_gather_base_mm.default
INNER, WIDTH = 256, 8
MC2 = NpuMc2(name_of=lambda group: group)


def scatter(x: Tensor, reduce_op: str = "sum", ranks: int = 2, group: str = "tp") -> Tensor:
    return NATIVE.wait_tensor(NATIVE.reduce_scatter_tensor(x, reduce_op, ranks, group))


def gather(x: Tensor, ranks: int = 2, group: str = "tp") -> Tensor:
    return NATIVE.wait_tensor(NATIVE.all_gather_into_tensor(x, ranks, group))


def signs(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float16) -> Tensor:
    """-1, 0 and 1: sums of a few hundred are exact in half precision, in any order."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def padded(x: Tensor, weight: Tensor) -> Tensor:
    product = x @ weight
    return scatter(torch.constant_pad_nd(product, [0, 0, 0, -product.shape[0] % 2]))


def told_apart(x: Tensor, weight: Tensor) -> Tensor:
    """As models do, whose batch dim is told apart in between."""
    product = (x @ weight).view(1, -1, WIDTH)
    return scatter(torch.constant_pad_nd(product, [0, 0, 0, -x.shape[0] % 2]).view(-1, WIDTH))


def even(x: Tensor, weight: Tensor) -> Tensor:
    return scatter(torch.cat([x, x]) @ weight)


def gathered(x: Tensor, weight: Tensor) -> Tensor:
    return gather(x) @ weight


def cut(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = gather(x)[: 2 * x.shape[0] - 1]
    return rows @ weight, rows @ (weight + 1)


def reread(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = gather(x)
    return rows.view(1, -1, INNER) * 2, rows[: x.shape[0]] @ weight


def meant(gm: fx.GraphModule) -> fx.GraphModule:
    """What the ops mean, by their documentation: ``reducescatter(x @ w)``; ``allgather(x) @ w``, ``allgather(x)``."""
    for node in [n for n in gm.graph.nodes if n.target in (SCATTER, GATHER)]:
        x, weight, group, ranks = node.args
        if node.target is SCATTER:
            product = emit(node, torch.ops.aten.mm.default, x, weight)
            made = emit_waited(node, NATIVE.reduce_scatter_tensor.default, product, "sum", ranks, group)
            node.replace_all_uses_with(made)
        else:
            rows = emit_waited(node, NATIVE.all_gather_into_tensor.default, x, ranks, group)
            results = (emit(node, torch.ops.aten.mm.default, rows, weight), rows)
            for user in list(node.users):
                assert user.target is operator.getitem
                user.replace_all_uses_with(results[user.args[1]])
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def on_ranks(gm: fx.GraphModule, given: Sequence[Sequence[Tensor]]) -> list[Any]:
    return run_lockstep([RankProgram(gm, inputs, {"tp": (0, 1)}) for inputs in given])


CASES: list[tuple[Callable[..., Any], list[str]]] = [
    (padded, ["npu.npu_mm_reduce_scatter_base.default"]),
    (told_apart, ["npu.npu_mm_reduce_scatter_base.default"]),
    (even, ["npu.npu_mm_reduce_scatter_base.default"]),
    (gathered, ["npu.npu_all_gather_base_mm.default"]),
    (cut, ["npu.npu_all_gather_base_mm.default", "aten.mm.default"]),
    (reread, ["npu.npu_all_gather_base_mm.default"]),
]


@pytest.mark.parametrize(("function", "products"), CASES, ids=[case[0].__name__ for case in CASES])
@pytest.mark.parametrize("tokens", [2, 3, 7, 8])
def test_ranks_compute_the_same(function: Callable[..., Any], products: list[str], tokens: int) -> None:
    def sized(x: Tensor, weight: Tensor) -> Any:
        return function(x.view(-1, INNER), weight.view(INNER, WIDTH))

    gm = traced(sized, signs(5, INNER), signs(INNER, WIDTH))
    given = [(signs(tokens, INNER, seed=rank), signs(INNER, WIDTH, seed=9 - rank)) for rank in range(2)]
    expected = on_ranks(gm, given)
    result = MC2(gm)
    assert (result.rewrites, result.refusals) == (1, [])
    assert [t for t in targets(gm) if "mm" in t] == products
    assert not [t for t in targets(gm) if "c10d" in t]
    assert MC2(gm).rewrites == 0
    found = on_ranks(meant(gm), given)
    for one, other in zip(expected, found, strict=True):
        one, other = (x if isinstance(x, list | tuple) else [x] for x in (one, other))
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


X, WEIGHT = signs(4, INNER), signs(INNER, WIDTH)
DTYPES = "the kernels take float16 and bfloat16"
REFUSED: list[tuple[str, Callable[..., Any], Sequence[Tensor]]] = [
    ("3 ranks: the kernels take 2, 4, 8, 16, 32", lambda x, w: scatter(x @ w, ranks=3), (signs(6, INNER), WEIGHT)),
    ("3 ranks: the kernels take 2, 4, 8, 16, 32", lambda x, w: gather(x, 3) @ w, (X, WEIGHT)),
    (f"torch.float32 times torch.float32: {DTYPES}", lambda x, w: scatter(x @ w), (X.float(), WEIGHT.float())),
    (f"torch.float32 times torch.float32: {DTYPES}", gathered, (X.float(), WEIGHT.float())),
    ("the summed dim is 255: the kernels take 256 to 65534", lambda x, w: scatter(x[:, 1:] @ w[1:]), (X, WEIGHT)),
    ("the summed dim is 255: the kernels take 256 to 65534", gathered, (X[:, 1:].contiguous(), WEIGHT[1:])),
    ("the summed dim is 65535: the kernels take 256 to 65534", gathered, (signs(2, 65535), signs(65535, 1))),
    ("the reduction is 'avg'", lambda x, w: scatter(x @ w, "avg"), (X, WEIGHT)),
    ("its rows are no multiple of 2", lambda x, w: scatter(x @ w), (signs(5, INNER), WEIGHT)),
    (
        "its rows are transposed: the kernels take them row by row",
        lambda x, w: scatter(x @ w),
        (signs(INNER, 4).T, WEIGHT),
    ),
    ("what is scattered is not a product alone", lambda x, w: scatter((x @ w).relu()), (X, WEIGHT)),
    ("what is scattered is not a product alone", lambda x, w: scatter(torch.addmm(w[0], x, w)), (X, WEIGHT)),
    (
        "what is scattered is not a product alone",
        lambda x, w: (y := x @ w, scatter(y)),
        (X, WEIGHT),
    ),
    (
        "what is scattered is not a product alone",
        lambda x, w: scatter(torch.constant_pad_nd(x @ w, [0, 0, 2, 0])),
        (X, WEIGHT),
    ),
    (
        "what is scattered is not a product alone",
        lambda x, w: scatter(torch.constant_pad_nd(x @ w, [0, 0, 0, 2], 1.0)),
        (X, WEIGHT),
    ),
    ("what is gathered is not rows of one dim", lambda x, w: gather(x.view(2, 2, -1)) @ w, (X, WEIGHT)),
    ("the gathered rows are not multiplied", lambda x, w: gather(x) * 2, (X, WEIGHT)),
    ("the gathered rows are not multiplied", lambda x, w: gather(x)[1:] @ w, (X, WEIGHT)),
    ("its weight is computed", lambda x, w: gather(x) @ (w * x.sum()), (X, WEIGHT)),
    ("its weight is computed", lambda x, w: gather(x) @ (w * 2).relu(), (X, WEIGHT)),
]


@pytest.mark.parametrize(("reason", "function", "given"), REFUSED)
def test_what_the_kernels_do_not_take_is_refused(
    reason: str, function: Callable[..., Any], given: Sequence[Tensor]
) -> None:
    gm = traced(function, *given, mode="fake")
    before = targets(gm)
    result = MC2(gm)
    assert (result.rewrites, [r.reason for r in result.refusals]) == (0, [reason])
    assert targets(gm) == before


def test_a_model_has_one_group() -> None:
    def two(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return scatter(x @ w), scatter(x @ (w * 2), group="dp"), gather(x) @ w

    gm = traced(two, X, WEIGHT, mode="fake")
    result = MC2(gm)
    assert result.rewrites == 2
    assert [r.reason for r in result.refusals] == ["its group is another than tp: a model's MC2 ops have one"]


def test_a_missing_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpcompile.passes.npu_mc2.missing_ops", lambda names: f"there is no op npu::{names[0]}")
    result = MC2(traced(gathered, X, WEIGHT, mode="fake"))
    assert [r.reason for r in result.refusals] == ["there is no op npu::npu_mm_reduce_scatter_base"]
