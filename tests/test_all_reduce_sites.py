"""Every all-reduce of a graph has one row with a reason, whatever failed; through ``torch.compile``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as fc
from simulate import fake_rank
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

HIDDEN = 16
WEIGHT = torch.eye(HIDDEN)


@pytest.fixture(autouse=True)
def two_ranks() -> Iterator[None]:
    torch._dynamo.reset()
    with fake_rank(0, 2), torch.no_grad():
        yield


def layer(x: Tensor) -> Tensor:
    """One all-reduce of the plain kind: the control in each graph."""
    return torch.rms_norm(x + summed(x @ WEIGHT), (HIDDEN,))


def summed(x: Tensor, kind: str = "sum") -> Tensor:
    return fc.all_reduce(x, kind, dist.group.WORLD)  # type: ignore[no-any-return]


def in_a_branch(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x + summed(x @ WEIGHT), lambda x: x * 2, (layer(x),))  # type: ignore[no-any-return]


def in_a_loop(x: Tensor) -> Tensor:
    def body(i: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return i + 1, x + summed(x @ WEIGHT)

    return torch.while_loop(lambda i, x: i < 2, body, (torch.zeros((), dtype=torch.long), layer(x)))[1]  # type: ignore[no-any-return]


def averaged(x: Tensor) -> Tensor:
    return layer(x) + summed(x @ WEIGHT, "avg")


def nobody_reads(x: Tensor) -> Tensor:
    summed(x @ WEIGHT)
    return layer(x)


def nobody_waits(x: Tensor) -> tuple[Tensor, Tensor]:
    return layer(x), torch.ops._c10d_functional.all_reduce(x @ WEIGHT, "sum", dist.group.WORLD.group_name)


def coalesced(x: Tensor) -> Tensor:
    a, b = fc.all_reduce_coalesced([x @ WEIGHT, x @ WEIGHT * 2], "sum", dist.group.WORLD)
    return layer(x) + a + b


def in_one_call(x: Tensor) -> Tensor:
    a, b = x @ WEIGHT, x @ WEIGHT * 2
    with dist._coalescing_manager():
        dist.all_reduce(a)
        dist.all_reduce(b)
    return layer(x) + a + b


def without_tokens(x: Tensor) -> Tensor:
    return layer(x) + summed(WEIGHT.mean(0))


# What has all-reduces beside that of ``layer`` → a part of the reason of each.
KINDS: dict[Callable[[Tensor], Any], list[str]] = {
    layer: [],
    in_a_branch: ["it is in control flow, inside cond"],
    in_a_loop: ["it is in control flow, inside while_loop"],
    averaged: ["it reduces by 'avg', not by a sum"],
    nobody_reads: ["its result is not used"],
    nobody_waits: ["it is not waited for once"],
    coalesced: ["its readers are row-wise"] * 2,
    in_one_call: ["its readers are row-wise"] * 2,
    without_tokens: ["no dim of the reduced value holds the tokens"],
}


def listed(work: Callable[[Tensor], Any], folder: Path, **options: Any) -> list[dict[str, Any]]:
    """The rows of all all-reduces at the one number of tokens."""
    x = torch.ones(8, HIDDEN)
    options = {"dump_dir": str(folder), "strategy": "tp", "replicated": ["*"], **options}
    torch.compile(work, backend="cpcompile", options=options, fullgraph=True)(x)
    (file,) = folder.glob("rank_0/graph_*/report.json")
    (report,) = json.loads(file.read_text()).values()
    return [row for row in report["collectives"] if row["kind"] == "all_reduce"]


@pytest.mark.parametrize("work", KINDS, ids=lambda work: work.__name__)
def test_every_kind_is_listed_once_with_its_reason(work: Callable[[Tensor], Any], tmp_path: Path) -> None:
    rows = listed(work, tmp_path)
    assert len({row["name"] for row in rows}) == len(rows) == 1 + len(KINDS[work]), rows
    assert all(row["reason"] for row in rows), rows
    for reason in KINDS[work]:
        assert any(reason in row["reason"] for row in rows), rows
    # Who does not wait hands out what the proof knows nothing of: there the plain one is kept too.
    assert ("scatter" in {row["decision"] for row in rows}) == (work is not nobody_waits), rows


def fails(*_: Any, **__: Any) -> Any:
    raise KeyError("made to fail")


@pytest.mark.parametrize(
    "broken",
    ["find_axes", "_adopt_names", "with_rank_lists", "clashing", "agree_on", "Rewriter.run", "Canonicalise.__call__"],
)
def test_every_kind_is_listed_where_something_fails(broken: str, tmp_path: Path) -> None:
    def work(x: Tensor) -> Tensor:
        return averaged(x) + in_a_branch(x)

    with mock.patch(f"cpcompile.pipeline.{broken}", fails):
        rows = listed(work, tmp_path)
    assert len({row["name"] for row in rows}) == len(rows) == 4, rows
    assert all(row["reason"] for row in rows), rows
    if broken != "Canonicalise.__call__":
        assert sum("KeyError: 'made to fail'" in row["reason"] for row in rows) == 2, rows
        assert {row["decision"] for row in rows} == {"keep"}


def test_a_required_all_reduce_that_is_not_placed_is_an_error(tmp_path: Path) -> None:
    def required(work: Callable[[Tensor], Tensor]) -> None:
        torch._dynamo.reset()
        listed(work, tmp_path, require=["*"])

    required(layer)
    with mock.patch("cpcompile.pipeline.clashing", fails), pytest.raises(BackendCompilerFailed, match="made to fail"):
        required(layer)
    with pytest.raises(BackendCompilerFailed, match="nothing of that name was rewritten"):
        required(lambda x: torch.cond(x.sum() > 0, lambda x: x + summed(x @ WEIGHT), lambda x: x * 2, (x,)))


def test_a_second_group_of_the_same_ranks_is_listed_once(tmp_path: Path) -> None:
    twin = dist.new_group([0, 1])
    rows = listed(lambda x: layer(x) + fc.all_reduce(x @ WEIGHT, "sum", twin), tmp_path)
    assert len(rows) == 2, rows
    assert "keep" not in {row["decision"] for row in rows}, rows
