"""GE ops as torchair's own converters make them from torch_npu's, interpreted: what the ops' documentation says."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import test_ge_fused_attention as fused
import test_ge_mla as mla
import test_ge_moe as moe
import test_ge_moe_exchange as exchange
import torch
from ascend_process import AscendProcess
from ge_converted import ROWS, lowered
from torch import Tensor

from cpcompile.lowering.ge import GeProgram, interpret, parse


def run(ascend: AscendProcess, name: str, given: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Each rank's results of a function of ``ge_converted``."""
    graphs = [parse(data) for data in ascend(lowered, name, given)]
    members = {"g": tuple(range(len(given)))}
    return interpret([GeProgram(g, [t.clone() for t in own], members) for g, own in zip(graphs, given, strict=True)])


def alone(ascend: AscendProcess, name: str, *given: Tensor) -> list[Tensor]:
    return run(ascend, name, [given])[0]


def near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_first_prolog(ascend: AscendProcess) -> None:
    near(alone(ascend, "npu_mla_prolog", *mla.PROLOG.values()), mla.prolog(1e-5, 1e-5)[:4])


@pytest.mark.parametrize(
    ("name", "op_type", "outputs", "attrs"),
    [("_v2", "MlaPrologV2", 4, {}), ("_v3", "MlaPrologV3", 6, {"query_norm_flag": True})],
)
def test_later_prologs_are_the_same_in_bfloat16(
    ascend: AscendProcess, name: str, op_type: str, outputs: int, attrs: dict[str, bool]
) -> None:
    """torch_npu's meta functions promise that dtype of any queries."""
    halves = {key: part if part.dtype == torch.int64 else part.bfloat16() for key, part in mla.PROLOG.items()}
    found = alone(ascend, f"npu_mla_prolog{name}", *halves.values())
    own, _ = mla.run_writing(op_type, halves, outputs, **attrs)
    for ours, theirs in zip(found, [*own[:4], *own[5:]], strict=True):
        assert torch.equal(ours, theirs)
    for ours, exact in zip(found, mla.prolog(1e-5, 1e-5), strict=False):
        torch.testing.assert_close(ours.float(), exact, rtol=0.1, atol=0.1)


def test_keys_of_a_norm_and_a_rotation_go_to_the_caches(ascend: AscendProcess) -> None:
    found = alone(ascend, "npu_kv_rmsnorm_rope_cache", *mla.KEYS.values())
    attrs = {"cache_mode": "PA", "is_output_kv": True}
    (k_cache, ckv_cache, rope, latent), _ = mla.run_writing("KvRmsNormRopeCache", mla.KEYS, 4, **attrs)
    near(found, [rope, latent, k_cache, ckv_cache])


@pytest.mark.parametrize("name", ["npu_moe_distribute", "npu_moe_distribute_v2"])
def test_tokens_go_to_experts_of_other_ranks_and_back(ascend: AscendProcess, name: str) -> None:
    inputs = exchange.tokens_of((4, 4, 4))
    scales = [exchange.scales_of(own["expert_ids"]) for own in inputs]
    weights = exchange.MATRICES.chunk(exchange.RANKS)
    given = [[*own.values(), scale, w] for own, scale, w in zip(inputs, scales, weights, strict=True)]
    for own, scale, (found,) in zip(inputs, scales, run(ascend, name, given), strict=True):
        chosen = exchange.MATRICES[own["expert_ids"].long()]
        near([found], [torch.einsum("nk,nh,nkhi->ni", scale, own["x"], chosen)])


def test_rows_by_expert_and_back(ascend: AscendProcess) -> None:
    bias = moe.rand(moe.EXPERTS, moe.HIDDEN)
    found = alone(ascend, "npu_moe_init_routing", moe.X, moe.NUMBERS, moe.IDS, bias, moe.WEIGHTS)
    rows = moe.X[:, None] + bias[moe.IDS.long()]
    counts = torch.bincount(moe.IDS.flatten(), minlength=moe.EXPERTS).cumsum(0).int()
    near(found, [moe.X + (moe.WEIGHTS[..., None] * rows).sum(1), counts])


def test_rows_of_ranks_by_expert(ascend: AscendProcess) -> None:
    rows, counts = moe.rand(6, 4), torch.tensor([[2, 1], [1, 2]])
    tokens, _, places, numbers = alone(ascend, "npu_moe_re_routing", rows, counts)
    order = [0, 1, 3, 2, 4, 5]
    assert torch.equal(tokens, rows[order]) and places.tolist() == order and numbers.tolist() == [3, 3]


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH", "TND"])
def test_fused_attention_in_each_layout(ascend: AscendProcess, layout: str) -> None:
    whole = [fused.ROWS] * fused.BATCH, [fused.KEYS] * fused.BATCH
    parts = [fused.laid_out(fused.QUERY, layout, whole[0])]
    parts += [fused.laid_out(part, layout, whole[1]) for part in (fused.KEY, fused.VALUE)]
    wanted = fused.laid_out(fused.expected(fused.everything, False, *whole), layout, whole[0])
    near(alone(ascend, f"fused {layout}", *parts), [wanted])


def test_rows_at_places(ascend: AscendProcess) -> None:
    x, rows = moe.rand(5, 4), moe.rand(2, 4)
    expected = torch.stack([x[0], rows[1], x[2], rows[0], x[4]])
    near(alone(ascend, "npu_scatter_nd_update", x, torch.tensor([[3], [1]]), rows), [expected])


def test_rows_in_pages(ascend: AscendProcess) -> None:
    keys, values, cache = moe.rand(3, 1, 4), moe.rand(3, 1, 4, seed=1), moe.rand(2, 4, 1, 4)
    found = alone(ascend, "npu_scatter_pa_kv_cache", keys, values, cache, cache + 1, torch.tensor([6, -1, 1]).int())
    for ours, rows, before in zip(found, (keys, values), (cache, cache + 1), strict=True):
        expected = before.clone()
        expected[1, 2], expected[0, 1] = rows[0], rows[2]
        assert torch.equal(ours, expected)


def test_int8_products(ascend: AscendProcess) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8) for shape in ((3, 8), (8, 5)))
    scale, per_token = torch.rand(5, generator=generator), torch.rand(3, generator=generator)
    expected = ((a.int() @ b.int()) * scale * per_token[:, None]).bfloat16()
    assert torch.equal(alone(ascend, "npu_quant_matmul", a, b, scale, per_token)[0], expected)


def test_uneven_collectives(ascend: AscendProcess) -> None:
    rows = [moe.rand(n, 2, seed=rank) for rank, n in enumerate(ROWS)]
    partial = [moe.rand(sum(ROWS), 2, seed=9 + rank) for rank in range(len(ROWS))]
    sums = sum(partial).split(ROWS)  # type: ignore[union-attr]
    for found, mine in zip(run(ascend, "uneven", list(zip(rows, partial, strict=True))), sums, strict=True):
        near(found, [torch.cat(rows), mine])
