"""``cpcompile lower``, and every rank's graph that it wrote interpreted: the unsharded eager model, caches included."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ge_targets
import pytest
import torch
from ascend_process import AscendProcess
from ge_exports import token_inputs
from serving_models import NAMES, batch
from simulate import fake_rank
from torch import Tensor
from torch.distributed.tensor import DTensor
from typer.testing import CliRunner

from cpcompile.cli import app
from cpcompile.lowering.ascend.bound_inputs import RankGraph
from cpcompile.lowering.ge import interpret

TARGETS = Path(ge_targets.__file__)
TOLERANCE = 2e-5
TOKENS = (1, 7, 16, 33)


def lower(*arguments: object) -> str:
    """What the command prints, where it succeeds: every op was lowered."""
    result = CliRunner().invoke(app, ["lower", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def state(model: Any) -> dict[str, Tensor]:
    every = [*model.named_parameters(), *model.named_buffers()]
    return {n: (v.to_local() if isinstance(v, DTensor) else v).detach() for n, v in every}


@functools.cache
def rank_of(folder: Path) -> RankGraph:
    """Read once for all token counts."""
    return RankGraph.read(folder)


def run(folder: Path, given: Sequence[Mapping[str, Tensor | int]]) -> list[list[Tensor]]:
    """What each rank returns for what it is given."""
    return interpret([rank_of(folder / f"rank_{rank}").program(own) for rank, own in enumerate(given)])


def summary(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rank_{rank}/summary.json").read_text())  # type: ignore[no-any-return]


def is_model(folder: Path, kind: str, counts: Sequence[int], weights: Sequence[Mapping[str, Tensor]]) -> None:
    """Each rank's logits of its own number of tokens are the unsharded model's."""
    ids = [token_inputs(ge_targets.ids_of(count)) for count in counts]
    given = [{**own, **tokens} for own, tokens in zip(weights, ids, strict=True)]
    for (found,), count in zip(run(folder, given), counts, strict=True):
        torch.testing.assert_close(found, ge_targets.logits(kind, count), rtol=0, atol=TOLERANCE)


def indexers(folder: Path) -> int:
    """How many sparse attentions rank 0's graph runs as such."""
    return sum(op.type == "LightningIndexer" for op in rank_of(folder / "rank_0").graph.ops)


def test_sparse_attention_is_left_dense_on_request(ascend: AscendProcess, tmp_path: Path) -> None:
    ascend(
        lower, f"{TARGETS}:v32", "--axis", "tp=2", "--no-sparse-attention", "--static", "--tokens", 16, "-o", tmp_path
    )
    assert indexers(tmp_path) == 0


@pytest.mark.parametrize(("kind", "layout"), [("v3", "contiguous"), ("v32", "zigzag")])
def test_context_parallel(ascend: AscendProcess, tmp_path: Path, kind: str, layout: str) -> None:
    cp = ["--axis", "cp=2", "--strategy", "cp", "--layout", layout, "--replicated", "*"]
    ascend(lower, f"{TARGETS}:{kind}", *cp, "-o", tmp_path)
    assert indexers(tmp_path) == (len(ge_targets.model(kind).model.layers) if kind == "v32" else 0)
    for tokens in TOKENS:
        is_model(tmp_path, kind, [tokens] * 2, [state(ge_targets.model(kind))] * 2)


@pytest.mark.parametrize(("kind", "tokens"), [("v3", 7), ("v32", 16)])
def test_tensor_parallel_for_one_number_of_tokens(
    ascend: AscendProcess, tmp_path: Path, kind: str, tokens: int
) -> None:
    tp = ["--axis", "tp=2", "--strategy", "tp", "--static", "--tokens", tokens]
    ascend(lower, f"{TARGETS}:{kind}", *tp, "-o", tmp_path)
    for rank in range(2):
        shapes = [row["shape"] for row in summary(tmp_path, rank)["inputs"]]
        assert [1, tokens] in shapes and not any(-1 in shape for shape in shapes)
    is_model(tmp_path, kind, [tokens] * 2, sharded(kind, 2))


def sharded(kind: str, size: int) -> list[dict[str, Tensor]]:
    """Each rank's weights of a tensor-parallel model."""
    found = []
    for rank in range(size):
        with fake_rank(rank, size) as mesh:
            found.append(state(ge_targets.model(kind, mesh)))
    return found


MODULES = "embedding=2,o_proj=2,mlp=2,lm_head=2"
SAME = ("--replicated", "*")  # the weights of replicas


@pytest.mark.parametrize("kind", ["v3", "v32"])
def test_modules_of_two_replicas(ascend: AscendProcess, tmp_path: Path, kind: str) -> None:
    """Weights are given whole: the summary says which part a rank has."""
    ascend(lower, f"{TARGETS}:{kind}", "--modules", MODULES, "--group-tokens", 34, *SAME, "-o", tmp_path)
    rows = summary(tmp_path, 1)["inputs"]
    (head,) = [row for row in rows if row["source"] == "lm_head.weight"]
    assert head["shape"] == [48, 64] and head["part"] == {"dim": 0, "segments": 1, "parts": 2, "index": 1}
    for counts in [(7, 7), (33, 1), (16, 7)]:
        is_model(tmp_path, kind, counts, [state(ge_targets.model(kind))] * 2)


def test_modules_of_two_tensor_parallel_replicas(ascend: AscendProcess, tmp_path: Path) -> None:
    """Ranks 0 and 1 are one replica, 2 and 3 the other: a module is shared by 0 and 2, and by 1 and 3."""
    given = ["--axis", "tp=2", "--strategy", "tp", "--modules", "embedding=2,lm_head=2", *SAME]
    ascend(lower, f"{TARGETS}:v3", *given, "-o", tmp_path)
    groups = [{tuple(row["ranks"]) for row in summary(tmp_path, rank)["collectives"]} for rank in range(4)]
    assert groups == [{(0, 1), (0, 2)}, {(0, 1), (1, 3)}, {(2, 3), (0, 2)}, {(2, 3), (1, 3)}]
    weights = sharded("v3", 2) * 2
    for tokens in TOKENS:
        is_model(tmp_path, "v3", [tokens] * 4, weights)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--modules", "o_proj=2", "--group-tokens", "exchange"], "cannot read a number off a tensor"),
        (["--modules", "o_proj=2,mlp=3"], "o_proj=2 does not divide the 3 replicas"),
        (["--axis", "tp=2", "--modules", "o_proj=2", "--rank", "4"], "has ranks 0 to 3"),
    ],
)
def test_what_cannot_be_lowered_is_one_line(tmp_path: Path, given: list[str], problem: str) -> None:
    result = CliRunner().invoke(app, ["lower", f"{TARGETS}:v3", *given, "-o", str(tmp_path)])
    assert result.exit_code == 2 and problem in result.output and len(result.output.splitlines()) == 1


def lowered_in_part(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["lower", *map(str, arguments)], catch_exceptions=False)
    return result.exit_code, result.output


@pytest.mark.parametrize("more", [[], ["--static"]])
def test_each_op_that_cannot_be_lowered_is_one_line(ascend: AscendProcess, tmp_path: Path, more: list[str]) -> None:
    """It fails in its converter, has none, gives nothing, or its shapes cannot be worked out: the rest is lowered."""
    given = ["--axis", "tp=2", "--tokens", 16, "--rank", 0, "-o", tmp_path]
    code, output = ascend(lowered_in_part, f"{TARGETS}:odd", *given, *more)
    assert code == 1
    lines = [line for line in output.splitlines() if "NOT LOWERED: " in line]
    ops = [line.partition("NOT LOWERED: ")[2].partition(" in ")[0] for line in lines]
    own = [f"1 cpcompile_tests.{name}.default" for name in ("on_the_host_only", "two_on_the_host_only")]
    assert ops == ["1 aten.masked_scatter.default", "2 aten._assert_async.msg", *own]
    assert "its shapes; register one with torchair" in lines[-1]
    assert summary(tmp_path, 0)["ops"]["MatMul"] == 2


STEPS = {1: [1], 7: [3, 4], 16: [1, 9, 6], 33: [20, 13]}  # tokens → of each request


@pytest.mark.parametrize(
    ("target", "size", "layout"),
    [("serving", 2, "zigzag"), ("serving_one", 2, "contiguous"), ("serving_dense", 2, "contiguous")],
)
def test_the_serving_form(ascend: AscendProcess, tmp_path: Path, target: str, size: int, layout: str) -> None:
    """Every rank's logits and the caches that it wrote, from caches with a prefix of each request."""
    cp = ["--axis", f"cp={size}", "--strategy", "cp", "--layout", layout, "--replicated", "*"]
    ascend(lower, f"{TARGETS}:{target}", *cp, "-o", tmp_path)
    whole = ge_targets.serving_model(target == "serving_dense")
    for lengths in STEPS.values():
        if (len(lengths) == 1) != (target == "serving_one"):
            continue
        prefixes = [5, 0, 3][: len(lengths)]
        caches = whole.caches(ge_targets.BLOCKS)
        with torch.no_grad():
            whole(*batch([max(1, p) for p in prefixes], [0] * len(lengths), ge_targets.BLOCKS, whole.sizes), *caches)
            step = batch(lengths, prefixes, ge_targets.BLOCKS, whole.sizes)
            expected = [c.clone() for c in caches]
            logits = whole(*step, *expected)
        given = {**state(whole), **dict(zip([f"L['{name}']" for name in NAMES], step, strict=True))}
        every = [{**given, **{f"L['caches'][{k}]": c.clone() for k, c in enumerate(caches)}} for _ in range(size)]
        for rank, (*written, found) in enumerate(run(tmp_path, every)):
            torch.testing.assert_close(found, logits, rtol=0, atol=TOLERANCE)
            order = [row["source"] for row in summary(tmp_path, rank)["inputs"] if "caches" in row["source"]]
            assert len(order) == len(written) == len(caches)
            for source, cache in zip(order, written, strict=True):
                torch.testing.assert_close(cache, expected[int(source[12:-1])], rtol=0, atol=TOLERANCE)


def test_rows_go_to_experts_over_a_group_of_their_own(tmp_path: Path, ascend: AscendProcess) -> None:
    axis = ("--axis", "cp=2", "--rank", 1, "--strategy", "cp", "--static", "--tokens", 7, "--replicated", "*")
    text = ascend(lower, f"{TARGETS}:experts", "-o", tmp_path, *axis, "--moe-dispatch", "cp")
    assert "NOT LOWERED" not in text
    rows = [r for r in summary(tmp_path, 1)["collectives"] if r["op"].startswith("Moe")]
    assert [r["op"] for r in rows] == ["MoeDistributeDispatchV2", "MoeDistributeCombineV2"]
    assert all(r["ranks"] == [0, 1] for r in rows)
    others = {r["group"] for r in summary(tmp_path, 1)["collectives"]} - {r["group"] for r in rows}
    assert len(others) == 1


def test_an_axis_of_experts_that_is_none(tmp_path: Path) -> None:
    arguments = ["lower", f"{TARGETS}:v3", "-o", str(tmp_path), "--axis", "tp=2", "--moe-dispatch", "ep"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("cpcompile: error: --moe-dispatch ep: there is no such --axis")
