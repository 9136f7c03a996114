"""GE's dispatch to experts on other ranks and the way back, against every expert applied where the tokens are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ge_build import run_ranks
from torch import Tensor

from cpcompile.lowering.ge import GeError

COVERED = {
    "MoeDistributeDispatch", "MoeDistributeDispatchV2", "MoeDistributeCombine", "MoeDistributeCombineV2",
}  # fmt: skip

RANKS, EXPERTS, CHOSEN, HIDDEN = 3, 6, 2, 4
LOCAL = EXPERTS // RANKS
VERSIONS = ["", "V2"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_of(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Each rank's rows and their experts; the last expert gets none."""
    return [
        {
            "x": torch.randn(size, HIDDEN, generator=generator(rank)).to(dtype),
            "expert_ids": torch.stack(
                [torch.randperm(EXPERTS - 1, generator=generator(100 * rank + n))[:CHOSEN] for n in range(size)]
            ).int(),
        }
        for rank, size in enumerate(sizes)
    ]


def attrs_of(**attrs: Any) -> list[dict[str, Any]]:
    said = {"group": None, "group_ep": "g", "ep_world_size": RANKS, "moe_expert_num": EXPERTS, **attrs}
    return [{"ep_rank_id": rank, **said} for rank in range(RANKS)]


def dispatched(version: str, inputs: list[dict[str, Tensor]], **attrs: Any) -> list[list[Tensor]]:
    return run_ranks(f"MoeDistributeDispatch{version}", inputs, 7, attrs_of(**attrs))


def combined(
    version: str,
    inputs: list[dict[str, Tensor]],
    sent: list[list[Tensor]],
    rows: list[Tensor],
    more: dict[str, Tensor] | None = None,
    **attrs: Any,
) -> list[Tensor]:
    info = "assist_info_for_combine" if version else "expand_idx"
    given = [
        {
            "expand_x": rows[rank], "expert_ids": own["expert_ids"], info: sent[rank][2],
            "ep_send_counts": sent[rank][4], "expert_scales": scales_of(own["expert_ids"]), **(more or {}),
        }
        for rank, own in enumerate(inputs)
    ]  # fmt: skip
    return [found for (found,) in run_ranks(f"MoeDistributeCombine{version}", given, 1, attrs_of(**attrs))]


def scales_of(expert_ids: Tensor) -> Tensor:
    return torch.rand(expert_ids.shape, generator=generator(int(expert_ids.sum())))


MATRICES = torch.randn(EXPERTS, HIDDEN, HIDDEN, generator=generator(7))


def applied(rank: int, expanded: Tensor, counts: Tensor) -> Tensor:
    """A rank's experts on the rows of each; what is behind them stays undefined."""
    y, first = torch.full_like(expanded, torch.nan), 0
    for expert, count in enumerate(counts.tolist(), rank * LOCAL):
        y[first : first + count] = expanded[first : first + count] @ MATRICES[expert].to(y.dtype)
        first += count
    return y


SIZES = [(4, 4, 4), (5, 1, 3)]


def global_bs(sizes: tuple[int, ...]) -> int:
    """0 where every rank has as many tokens."""
    return 0 if len(set(sizes)) == 1 else RANKS * max(sizes)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("version", VERSIONS)
def test_there_and_back_is_a_sum_over_the_chosen_experts(version: str, sizes: tuple[int, ...]) -> None:
    inputs = tokens_of(sizes)
    sent = dispatched(version, inputs, global_bs=global_bs(sizes))
    rows = [applied(rank, found[0], found[3]) for rank, found in enumerate(sent)]
    for own, found in zip(inputs, combined(version, inputs, sent, rows, global_bs=global_bs(sizes)), strict=True):
        ids = own["expert_ids"]
        expected = torch.einsum("nk,nh,nkhi->ni", scales_of(ids), own["x"], MATRICES[ids.long()])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("version", VERSIONS)
def test_rows_arrive_by_expert_then_rank_then_token(version: str, sizes: tuple[int, ...]) -> None:
    inputs = tokens_of(sizes)
    for rank, found in enumerate(dispatched(version, inputs, global_bs=global_bs(sizes))):
        rows, counts = [], []
        for expert in range(rank * LOCAL, (rank + 1) * LOCAL):
            for own in inputs:
                here = (own["expert_ids"] == expert).any(1)
                rows.append(own["x"][here])
                counts.append(int(here.sum()))
        whole = torch.cat(rows)
        assert found[0].shape == (max(sizes) * RANKS * min(LOCAL, CHOSEN), HIDDEN)
        assert torch.equal(found[0][: len(whole)], whole) and found[0][len(whole) :].isnan().all()
        assert found[3].tolist() == [sum(counts[e * RANKS : (e + 1) * RANKS]) for e in range(LOCAL)]
        assert found[4].tolist() == torch.tensor(counts).cumsum(0).tolist()
        if not version:
            ids = inputs[rank]["expert_ids"].flatten().tolist()
            assert found[2].tolist() == [ids[:i].count(expert) for i, expert in enumerate(ids)]
        assert [part.numel() for part in (found[1], *found[5:])] == [0, 0, 0]


@pytest.mark.parametrize("chosen", [1, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_there_is_room_for_all_tokens_of_all_ranks_and_no_more(version: str, chosen: int) -> None:
    inputs = [{**own, "expert_ids": torch.arange(chosen).repeat(4, 1).int()} for own in tokens_of((4, 4, 4))]
    for found in dispatched(version, inputs):
        assert len(found[0]) == 4 * RANKS * min(LOCAL, chosen)


@pytest.mark.parametrize("version", VERSIONS)
def test_tokens_of_experts_are_counts_or_running_totals(version: str) -> None:
    inputs = tokens_of((4, 4, 4))
    counts = [found[3] for found in dispatched(version, inputs)]
    totals = [found[3] for found in dispatched(version, inputs, expert_token_nums_type=0)]
    assert [c.cumsum(0).tolist() for c in counts] == [t.tolist() for t in totals]


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_rows_may_be_quantised_before_they_are_sent(version: str, smooth: bool) -> None:
    inputs = tokens_of((4, 4, 4), torch.bfloat16)
    factors = torch.rand(EXPERTS, HIDDEN, generator=generator(5)) + 0.5 if smooth else torch.ones(EXPERTS, HIDDEN)
    given = [{**own, "scales": factors} for own in inputs] if smooth else inputs
    plain = dispatched(version, inputs)
    for rank, found in enumerate(dispatched(version, given, quant_mode=2, **({"y_dtype": 2} if version else {}))):
        count = int(found[3].sum())
        experts = torch.arange(rank * LOCAL, (rank + 1) * LOCAL).repeat_interleave(found[3])
        wide = plain[rank][0][:count].float() * factors[experts]
        scale = wide.abs().amax(1) / 127
        assert found[0].dtype == torch.int8 and torch.equal(found[1][:count], scale) and found[1][count:].isnan().all()
        assert torch.equal(found[0][:count], (wide / scale[:, None]).round().to(torch.int8))


def test_half_precision_is_summed_in_float32() -> None:
    inputs = tokens_of((4, 4, 4), torch.bfloat16)
    sent = dispatched("V2", inputs, y_dtype=27)
    for own, found in zip(inputs, combined("V2", inputs, sent, [s[0] for s in sent]), strict=True):
        weights = scales_of(own["expert_ids"])
        expected = (own["x"].float() * weights[:, :1] + own["x"].float() * weights[:, 1:]).bfloat16()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


INPUTS = tokens_of((4, 4, 4))


UNLIKE = tokens_of((5, 1, 3))


def mask_of(rows: int) -> Tensor:
    return torch.arange(rows) < 4


def masked(mask: list[bool]) -> None:
    dispatched("V2", [{**own, "x_active_mask": torch.tensor(mask)} for own in INPUTS])


def back(version: str, **changes: Any) -> None:
    """The way back of what was sent, with other outputs of the first rank."""
    sent = dispatched(version, INPUTS)
    rows = [found[0] for found in sent]
    for position, change in changes.pop("outputs", {}).items():
        sent[0][position] = change(sent[0][position])
    combined(version, INPUTS, sent, rows, **changes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dispatched("", tokens_of((5, 1, 3))), r"'global_bs': expected 15 for tokens \[5, 1, 3\], found 0"),
        (lambda: dispatched("", tokens_of((5, 1, 3)), global_bs=9), "'global_bs': expected 15 .* found 9"),
        (lambda: dispatched("", INPUTS, global_bs=13), "'global_bs': expected 12 .* found 13"),
        (lambda: dispatched("", INPUTS, ep_world_size=2), "'ep_world_size': expected 3, the group's size, found 2"),
        (lambda: dispatched("", INPUTS, ep_rank_id=1), r"'ep_rank_id': expected each rank's place, found \[1, 1, 1\]"),
        (lambda: dispatched("", INPUTS, moe_expert_num=7), "'moe_expert_num': expected a multiple of 3, found 7"),
        (lambda: dispatched("", INPUTS, moe_expert_num=3), r"expert_ids: expected numbers in \[0, 3\)"),
        (lambda: dispatched("", [{**i, "expert_ids": -i["expert_ids"]} for i in INPUTS]), r"numbers in \[0, 6\)"),
        (lambda: dispatched("", [{**i, "x": i["x"][:3]} for i in INPUTS]), "expected experts of 3 tokens, found 4"),
        (lambda: dispatched("", [{k: v[:0] for k, v in i.items()} for i in INPUTS]), r"expert_ids: expected \[BS, K\]"),
        (lambda: dispatched("", INPUTS, quant_mode=1), "'quant_mode': expected 0 or 2, found 1"),
        (lambda: dispatched("", [{**i, "scales": torch.ones(6, 4)} for i in INPUTS]), "'scales' is for quantised rows"),
        (lambda: dispatched("", INPUTS, tp_world_size=2), "'tp_world_size': expected 0 or 1, found 2"),
        (lambda: dispatched("", INPUTS, shared_expert_rank_num=1), "'shared_expert_rank_num': expected 0, found 1"),
        (lambda: dispatched("", INPUTS, expert_token_nums_type=2), "'expert_token_nums_type': expected 0 or 1"),
        (lambda: dispatched("V2", INPUTS, y_dtype=27), "'y_dtype': expected that of torch.float32, found 27"),
        (lambda: dispatched("V2", INPUTS, comm_alg="hierarchy"), "'comm_alg': expected '' or 'fullmesh'"),
        (lambda: dispatched("V2", INPUTS, zero_expert_num=1), "'zero_expert_num': expected 0, found 1"),
        (
            lambda: dispatched("", [{**i, "x_active_mask": torch.ones(4, dtype=torch.bool)} for i in INPUTS]),
            "input 'x_active_mask' is not part of the reference",
        ),
        (lambda: masked([False, True, True, True]), "x_active_mask: expected active tokens ahead of the others"),
        (lambda: masked([True] * 3), r"x_active_mask: expected \[4\], found \[3\]"),
        (
            lambda: dispatched("V2", [{**i, "x_active_mask": mask_of(len(i["x"]))} for i in UNLIKE], global_bs=15),
            r"x_active_mask: expected all tokens where ranks have \[5, 1, 3\], found 4 of 5",
        ),
        (
            lambda: dispatched("V2", [{**i, "expert_ids": i["expert_ids"][:, :1].repeat(1, 2)} for i in INPUTS]),
            "expert_ids: expected different ones for each token",
        ),
        (lambda: back("", more={"x_active_mask": mask_of(4)}), "'x_active_mask' is not part of the reference"),
        (lambda: back("", more={"activation_scale": torch.ones(4)}), "'activation_scale' is not part of the reference"),
        (lambda: back("", more={"group_list": torch.ones(2).long()}), "'group_list' is not part of the reference"),
        (lambda: back("", more={"expert_scales": torch.ones(4, 1)}), r"expert_scales: expected \[4, 2\]"),
        (lambda: back("", comm_quant_mode=2), "'comm_quant_mode': expected 0, found 2"),
        (lambda: back("V2", copy_expert_num=2), "'copy_expert_num': expected 0, found 2"),
        (lambda: back("", outputs={2: lambda t: t.flip(0)}), "expand_idx is not of a dispatch to these experts"),
        (lambda: back("", outputs={2: lambda t: t[:5]}), "expand_idx is not of a dispatch to these experts"),
        (lambda: back("", outputs={4: lambda t: t.flip(0)}), "ep_send_counts: expected 6 ends of 24 rows"),
        (lambda: back("", outputs={4: lambda t: t + 30}), "ep_send_counts: expected 6 ends of 24 rows"),
        (lambda: back("V2", outputs={2: lambda t: t.flip(0)}), "are of different dispatches"),
        (lambda: back("V2", outputs={2: lambda t: t[:128]}), "assist_info_for_combine: expected 3072, found 128"),
    ],
)  # fmt: skip
def test_what_the_reference_does_not_have_and_what_does_not_fit_is_an_error(call: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        call()


def test_rows_that_are_told_to_be_of_one_pair_twice_are_an_error() -> None:
    def twice(info: Tensor) -> Tensor:
        table = info.clone().view(-1, 128)
        table[1, 1:3] = table[0, 1:3]
        return table.reshape(-1)

    with pytest.raises(GeError, match="expected rows of 8 pairs"):
        back("V2", outputs={2: twice})


@pytest.mark.parametrize("active", [(2, 4, 0), (0, 0, 0)])
def test_tokens_that_a_mask_leaves_out_go_nowhere(active: tuple[int, ...]) -> None:
    """What they become is not said; the others are as they are without them."""
    masks = [torch.arange(4) < count for count in active]
    inputs = [{**own, "x_active_mask": mask} for own, mask in zip(INPUTS, masks, strict=True)]
    sent = dispatched("V2", inputs)
    assert sum(int(found[3].sum()) for found in sent) == sum(active) * CHOSEN
    assert all(len(found[0]) == 4 * RANKS * min(LOCAL, CHOSEN) for found in sent)
    given = [
        {
            "expand_x": applied(rank, sent[rank][0], sent[rank][3]), "expert_ids": own["expert_ids"],
            "assist_info_for_combine": sent[rank][2], "ep_send_counts": sent[rank][4],
            "expert_scales": scales_of(own["expert_ids"]), "x_active_mask": masks[rank],
        }
        for rank, own in enumerate(INPUTS)
    ]  # fmt: skip
    found = run_ranks("MoeDistributeCombineV2", given, 1, attrs_of())
    for own, count, (out,) in zip(INPUTS, active, found, strict=True):
        ids = own["expert_ids"][:count]
        weights = scales_of(own["expert_ids"])[:count]
        expected = torch.einsum("nk,nh,nkhi->ni", weights, own["x"][:count], MATRICES[ids.long()])
        torch.testing.assert_close(out[:count], expected, rtol=1e-5, atol=1e-5)
        assert out[count:].isnan().all()
