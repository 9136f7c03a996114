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
    "HcomAllToAllVC",
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


def test_an_all_to_all_of_nothing_gives_nothing() -> None:
    for (found,) in run_ranks("HcomAllToAll", of("x", [torch.empty(0, 4)] * N)):
        assert found.shape == (0, 4)


def test_an_uneven_all_to_all_reads_one_table_of_counts() -> None:
    inputs = [
        {"send_data": shard.flatten()[: sum(sent)], "send_count_matrix": torch.tensor(COUNTS)}
        for shard, sent in zip(SHARDS, COUNTS, strict=True)
    ]
    attrs = [{"rank": rank} for rank in range(N)]
    for rank, (found,) in enumerate(run_ranks("HcomAllToAllVC", inputs, attrs=attrs)):
        parts = [SHARDS[i].flatten()[starts(COUNTS[i])[rank] :][: COUNTS[i][rank]] for i in range(N)]
        assert torch.equal(found, torch.cat(parts))
    with pytest.raises(GeError, match=r"sends \[4, 0, 8\] of 16 elements"):
        run_ranks("HcomAllToAllVC", inputs, attrs=[{"rank": 0}])
    with pytest.raises(GeError, match="'rank': expected a place among 3, found 3"):
        run_ranks("HcomAllToAllVC", inputs, attrs=[{"rank": 3}])
    table = [{**own, "send_count_matrix": own["send_count_matrix"][:2]} for own in inputs]
    with pytest.raises(GeError, match="send_count_matrix: expected 3 by 3"):
        run_ranks("HcomAllToAllVC", table, attrs=attrs)


@pytest.mark.parametrize("rows", [[1, 3, 2], [0, 6, 0], [3, 0, 3]])
@pytest.mark.parametrize("said", [True, False])
def test_an_uneven_all_gather_and_reduce_scatter_count_rows(rows: list[int], said: bool) -> None:
    parts = [shard[:n] for shard, n in zip(SHARDS, rows, strict=True)]
    places = starts(rows) if said else torch.empty(0, dtype=torch.int64)  # as torchair says none
    inputs = [
        {"x": p, "send_count": torch.tensor(len(p)), "recv_counts": torch.tensor(rows), "recv_displacements": places}
        for p in parts
    ]
    for (found,) in run_ranks("HcomAllGatherV", inputs):
        assert torch.equal(found, torch.cat(parts))
    sums = [
        {"x": shard, "recv_count": torch.tensor(n), "send_counts": torch.tensor(rows), "send_displacements": places}
        for shard, n in zip(SHARDS, rows, strict=True)
    ]
    results = run_ranks("HcomReduceScatterV", sums, attrs=[{"reduction": "sum"}])
    assert [len(r[0]) for r in results] == rows
    assert torch.equal(torch.cat([r[0] for r in results]), SHARDS[0] + SHARDS[1] + SHARDS[2])


ROWS = {"x": SHARDS[0][:2], "send_count": torch.tensor([2]), "recv_counts": torch.tensor([2, 2, 2])}
SUMS = {"x": SHARDS[0], "recv_count": torch.tensor([2]), "send_counts": torch.tensor([2, 2, 2])}


@pytest.mark.parametrize(
    ("op_type", "inputs", "attrs", "message"),
    [
        ("HcomAllGatherV", {**ROWS, "send_count": torch.tensor([1])}, {}, "'send_count': expected 2, the size of dim"),
        ("HcomAllGatherV", {**ROWS, "recv_displacements": torch.tensor([0, 2, 5])}, {}, r"expected \[0, 2, 4\], found"),
        ("HcomReduceScatterV", SUMS, {"reduction": "max"}, "'reduction': expected 'sum', found 'max'"),
        (
            "HcomReduceScatterV",
            {**SUMS, "send_counts": torch.tensor([2, 2, 1])},
            {"reduction": "sum"},
            "'send_counts': expected 6 in all, found",
        ),
        (
            "HcomReduceScatterV",
            {**SUMS, "send_displacements": torch.tensor([0, 1, 4])},
            {"reduction": "sum"},
            r"expected \[0, 2, 4\], found \[0, 1, 4\]",
        ),
        (
            "HcomAllToAllV",
            {
                "send_data": SHARDS[0], "send_counts": torch.tensor([8, 8, 8]), "send_displacements": starts([8, 8, 8]),
                "recv_counts": torch.tensor([8, 8, 8]), "recv_displacements": torch.tensor([0, 8, 17]),
            },
            {},
            "input 'recv_displacements': expected .0, 8, 16., found .0, 8, 17.",
        ),
        (
            "HcomAllToAllV",
            {
                "send_data": SHARDS[0], "send_counts": torch.tensor([8, 8, 9]), "send_displacements": starts([8, 8, 8]),
                "recv_counts": torch.tensor([8, 8, 9]), "recv_displacements": starts([8, 8, 9]),
            },
            {},
            "sends more than 24 elements",
        ),
        ("HcomAllToAll", {"x": SHARDS[0][:5]}, {}, "expected elements divisible by the group size 3"),
    ],
)  # fmt: skip
def test_counts_that_do_not_fit_are_an_error(op_type: str, inputs: Any, attrs: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        run_ranks(op_type, [inputs] * N, attrs=[attrs])


def fused(op_type: str, outputs: int = 1, turned: bool = False, **attrs: Any) -> list[list[Tensor]]:
    """A product and its collective, on operands as they are or with ``x2`` turned, with a bias of each rank."""
    inputs = [
        {"x1": x, "x2": w.T.contiguous() if turned else w, "bias": bias, **attrs.get("inputs", {})}
        for x, w, bias in zip(HALVES, WEIGHTS, BIASES, strict=True)
    ]
    said = {name: value for name, value in attrs.items() if name != "inputs"}
    return run_ranks(op_type, inputs, outputs, [{**said, **({"is_trans_b": True} if turned else {})}])


BIASES = [torch.full((5,), float(rank + 1)).bfloat16() for rank in range(N)]


@pytest.mark.parametrize("turned", [False, True])
def test_fused_products_are_a_product_and_a_collective(turned: bool) -> None:
    with_bias = [(x @ w).float() + b.float() for x, w, b in zip(HALVES, WEIGHTS, BIASES, strict=True)]
    partial = [part.bfloat16() for part in with_bias]
    total = partial[0] + partial[1] + partial[2]
    for rank, (y, gathered) in enumerate(fused("AllGatherMatmul", 2, turned)):
        product = (torch.cat(HALVES) @ WEIGHTS[rank]).float() + BIASES[rank].float()
        assert torch.equal(gathered, torch.cat(HALVES)) and torch.equal(y, product.bfloat16())
    assert not fused("AllGatherMatmul", 2, turned, is_gather_out=False)[0][1].numel()
    results = fused("MatmulReduceScatter", 1, turned, rank_size=N)
    assert torch.equal(torch.cat([r[0] for r in results]), total)
    for (y,) in fused("MatmulAllReduce", 1, turned):
        assert torch.equal(y, total)
    more = [part + 2 for part in partial]
    for (y,) in fused("MatmulAllReduce", 1, turned, inputs={"x3": torch.full((6, 5), 2.0).bfloat16()}):
        assert torch.equal(y, more[0] + more[1] + more[2])


@pytest.mark.parametrize(
    ("op_type", "attrs", "message"),
    [
        ("AllGatherMatmul", {"gather_index": 1}, "'gather_index': expected 0, found 1"),
        ("AllGatherMatmul", {"is_trans_a": True}, "'is_trans_a': expected False, found True"),
        ("MatmulReduceScatter", {"is_trans_a": True}, "'is_trans_a': expected False, found True"),
        ("MatmulReduceScatter", {"reduce_op": "max"}, "'reduce_op': expected 'sum', found 'max'"),
        ("MatmulAllReduce", {"comm_quant_mode": 1}, "'comm_quant_mode': expected 0, found 1"),
        ("MatmulAllReduce", {"inputs": {"dequant_scale": torch.ones(5)}}, "input 'dequant_scale' is not part of"),
        ("MatmulAllReduce", {"inputs": {"pertoken_scale": torch.ones(5)}}, "input 'pertoken_scale' is not part of"),
    ],
)
def test_fused_products_that_the_reference_does_not_have_are_errors(op_type: str, attrs: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        fused(op_type, **attrs)


@pytest.mark.parametrize("op_type", ["AllGatherMatmul", "MatmulReduceScatter"])
def test_fused_products_with_another_size_of_the_group_are_an_error(op_type: str) -> None:
    with pytest.raises(LockstepError, match="expected group_size 3, found 2"):
        fused(op_type, rank_size=2)


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
