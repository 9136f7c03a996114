"""GE's collectives over simulated ranks, against torch on all ranks' operands at once; ranks that do not agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ge_build import run_ranks
from torch import Tensor

from cpcompile.lowering.ge import GeError
from cpcompile.passes.lockstep import LockstepError

COVERED = {
    "HcomAllReduce", "HcomAllGather", "HcomReduceScatter", "HcomBroadcast", "HcomAllToAll", "HcomAllToAllV",
    "HcomAllGatherV", "HcomReduceScatterV", "AllGatherMatmul", "MatmulReduceScatter", "MatmulAllReduce",
}  # fmt: skip

N = 3
SHARDS = [torch.randn(6, 4, generator=torch.Generator().manual_seed(rank)) for rank in range(N)]
HALVES = [shard.bfloat16() for shard in SHARDS]
WEIGHTS = [torch.randn(4, 5, generator=torch.Generator().manual_seed(9 + rank)).bfloat16() for rank in range(N)]


def of(name: str, tensors: list[Tensor]) -> list[dict[str, Any]]:
    return [{name: tensor} for tensor in tensors]


@pytest.mark.parametrize(("reduction", "expected"), [
    ("sum", SHARDS[0] + SHARDS[1] + SHARDS[2]),
    ("max", torch.stack(SHARDS).amax(0)),
    ("min", torch.stack(SHARDS).amin(0)),
    ("prod", SHARDS[0] * SHARDS[1] * SHARDS[2]),
])  # fmt: skip
def test_an_all_reduce_gives_every_rank_the_reduction(reduction: str, expected: Tensor) -> None:
    for (found,) in run_ranks("HcomAllReduce", of("x", SHARDS), attrs=[{"reduction": reduction}]):
        assert torch.equal(found, expected)


def test_an_all_gather_joins_and_a_reduce_scatter_divides_along_dim_0() -> None:
    for (found,) in run_ranks("HcomAllGather", of("x", SHARDS), attrs=[{"rank_size": N}]):
        assert torch.equal(found, torch.cat(SHARDS))
    results = run_ranks("HcomReduceScatter", of("x", SHARDS), attrs=[{"rank_size": N, "reduction": "sum"}])
    assert torch.equal(torch.cat([r[0] for r in results]), SHARDS[0] + SHARDS[1] + SHARDS[2])


def test_a_broadcast_takes_the_roots_operands() -> None:
    inputs = [{"x": [shard, -shard]} for shard in SHARDS]
    for found in run_ranks("HcomBroadcast", inputs, 2, [{"root_rank": 1}]):
        assert torch.equal(found[0], SHARDS[1]) and torch.equal(found[1], -SHARDS[1])


def test_an_all_to_all_sends_the_ith_part_to_rank_i() -> None:
    for rank, (found,) in enumerate(run_ranks("HcomAllToAll", of("x", SHARDS))):
        assert torch.equal(found, torch.cat([shard[2 * rank : 2 * rank + 2] for shard in SHARDS]))


def starts(counts: list[int]) -> Tensor:
    return torch.tensor([sum(counts[:i]) for i in range(len(counts))])


COUNTS = [[4, 0, 8], [8, 4, 4], [0, 12, 8]]  # elements that rank r sends to rank i


def test_an_uneven_all_to_all_counts_elements() -> None:
    inputs = []
    for rank, sent in enumerate(COUNTS):
        received = [COUNTS[i][rank] for i in range(N)]
        inputs.append({
            "send_data": SHARDS[rank], "send_counts": torch.tensor(sent), "send_displacements": starts(sent),
            "recv_counts": torch.tensor(received), "recv_displacements": starts(received),
        })  # fmt: skip
    for rank, (found,) in enumerate(run_ranks("HcomAllToAllV", inputs)):
        parts = [SHARDS[i].flatten()[starts(COUNTS[i])[rank] :][: COUNTS[i][rank]] for i in range(N)]
        assert torch.equal(found, torch.cat(parts))
    inputs[1]["recv_counts"] = torch.tensor([0, 4, 16])
    inputs[1]["recv_displacements"] = starts([0, 4, 16])
    with pytest.raises(LockstepError, match=r"output_split_sizes .* do not match what rank 2 sends"):
        run_ranks("HcomAllToAllV", inputs)


def test_an_uneven_all_gather_and_reduce_scatter_count_rows() -> None:
    rows = [1, 3, 2]
    parts = [shard[:n] for shard, n in zip(SHARDS, rows, strict=True)]
    inputs = [{"x": p, "send_count": torch.tensor([len(p)]), "recv_counts": torch.tensor(rows)} for p in parts]
    for (found,) in run_ranks("HcomAllGatherV", inputs):
        assert torch.equal(found, torch.cat(parts))
    sums = [
        {"x": shard, "recv_count": torch.tensor([n]), "send_counts": torch.tensor(rows)}
        for shard, n in zip(SHARDS, rows, strict=True)
    ]
    results = run_ranks("HcomReduceScatterV", sums, attrs=[{"reduction": "sum"}])
    assert [len(r[0]) for r in results] == rows
    torch.testing.assert_close(torch.cat([r[0] for r in results]), SHARDS[0] + SHARDS[1] + SHARDS[2])


def test_fused_products_are_a_product_and_a_collective() -> None:
    inputs = [{"x1": x, "x2": w} for x, w in zip(HALVES, WEIGHTS, strict=True)]
    partial = [x @ w for x, w in zip(HALVES, WEIGHTS, strict=True)]
    total = partial[0] + partial[1] + partial[2]
    for rank, (y, gathered) in enumerate(run_ranks("AllGatherMatmul", inputs, 2)):
        assert torch.equal(gathered, torch.cat(HALVES)) and torch.equal(y, torch.cat(HALVES) @ WEIGHTS[rank])
    results = run_ranks("MatmulReduceScatter", inputs, attrs=[{"rank_size": N}])
    assert torch.equal(torch.cat([r[0] for r in results]), total)
    for (y,) in run_ranks("MatmulAllReduce", inputs):
        assert torch.equal(y, total)
    turned = [{"x1": x, "x2": w.T.contiguous()} for x, w in zip(HALVES, WEIGHTS, strict=True)]
    for (y,) in run_ranks("MatmulAllReduce", turned, attrs=[{"is_trans_b": True}]):
        assert torch.equal(y, total)


@pytest.mark.parametrize(
    ("op_type", "inputs", "attrs", "message"),
    [
        (
            "HcomAllGather",
            of("x", [SHARDS[0], SHARDS[1], SHARDS[2][:5]]),
            [{"rank_size": N}],
            "with operands float32 .6, 4.",
        ),
        ("HcomAllGather", of("x", [SHARDS[0], SHARDS[1], SHARDS[2].double()]), [{"rank_size": N}], "float64"),
        ("HcomAllGather", of("x", SHARDS), [{"rank_size": 2}], "expected group_size 3, found 2"),
        ("HcomReduceScatter", of("x", [s[:5] for s in SHARDS]), [{"rank_size": N, "reduction": "sum"}], "divisible"),
        (
            "HcomAllReduce",
            of("x", SHARDS),
            [{"reduction": "sum"}, {"reduction": "sum"}, {"reduction": "max"}],
            "with reduce_op sum and rank 2 .* with reduce_op max",
        ),
    ],
)
def test_ranks_that_do_not_agree_are_an_error(op_type: str, inputs: Any, attrs: Any, message: str) -> None:
    with pytest.raises(LockstepError, match=message):
        run_ranks(op_type, inputs, attrs=attrs)


def test_a_group_or_reduction_that_is_not_known_is_an_error() -> None:
    with pytest.raises(GeError, match=r"group 'h' is not given \(known: g\)"):
        run_ranks("HcomAllReduce", of("x", SHARDS), attrs=[{"reduction": "sum", "group": "h"}])
    with pytest.raises(GeError, match="'reduction': expected sum, prod, max, min, found 'mean'"):
        run_ranks("HcomAllReduce", of("x", SHARDS), attrs=[{"reduction": "mean"}])


def test_a_group_is_read_off_the_name_that_torchair_gives_it() -> None:
    attrs = [{"reduction": "sum", "group": "tag=;rank_list=0,1,2"}]
    assert torch.equal(
        run_ranks("HcomAllReduce", of("x", SHARDS), attrs=attrs)[0][0], SHARDS[0] + SHARDS[1] + SHARDS[2]
    )
