"""GE's mixture-of-experts ops: the router against the model's own, rows through experts against a sum over experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ge_build import run_op
from torch import Tensor

from cpcompile.lowering.ge import GeError

COVERED = {
    "MoeGatingTopK", "MoeInitRoutingV3", "MoeFinalizeRoutingV2", "GroupedMatmul", "MoeInitRouting",
    "MoeFinalizeRouting", "MoeComputeExpertTokens", "MoeReRouting",
}  # fmt: skip

TOKENS, CHOSEN, EXPERTS, HIDDEN, INNER = 5, 2, 6, 4, 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


X, WEIGHTS = rand(TOKENS, HIDDEN), rand(TOKENS, CHOSEN, seed=1)
IDS = torch.stack(
    [torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(n))[:CHOSEN] for n in range(TOKENS)]
).int()
MATRICES = rand(EXPERTS, HIDDEN, INNER, seed=2)


@pytest.mark.parametrize("shift", [0.0, -3.0])  # choices below zero, too
@pytest.mark.parametrize("mode", [0, 1])
def test_the_router_chooses_groups_then_experts_with_the_bias_and_weighs_without_it(mode: int, shift: float) -> None:
    logits, bias = rand(7, 12), rand(12, seed=3) + shift
    attrs = {"k": 3, "k_group": 2, "group_count": 4, "group_select_mode": mode, "norm_type": 1, "out_flag": True}
    y, ids, scores = run_op(
        "MoeGatingTopK", {"x": logits, "bias": bias}, 3, **attrs, routed_scaling_factor=2.5, eps=0.25
    )
    for n in range(7):
        plain = [1 / (1 + float((-logits[n, e]).exp())) for e in range(12)]
        choice = [plain[e] + float(bias[e]) for e in range(12)]
        groups = [sorted(choice[3 * g : 3 * g + 3], reverse=True)[: mode + 1] for g in range(4)]
        best = sorted(range(4), key=lambda g: -sum(groups[g]))[:2]
        open_ = [e for e in range(12) if e // 3 in best]
        chosen = sorted(open_, key=lambda e: -choice[e])[:3]
        total = sum(plain[e] for e in chosen) + 0.25
        assert ids[n].tolist() == chosen
        torch.testing.assert_close(y[n], torch.tensor([2.5 * plain[e] / total for e in chosen]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores[n], torch.tensor(plain), rtol=1e-5, atol=1e-6)


def test_the_router_takes_the_first_of_equal_groups_and_experts() -> None:
    attrs = {"k": 3, "k_group": 2, "group_count": 4, "norm_type": 1}
    _, ids, scores = run_op("MoeGatingTopK", {"x": torch.zeros(2, 64)}, 3, **attrs)
    assert ids.tolist() == [[0, 1, 2]] * 2 and not scores.numel()


def test_a_softmax_router_takes_its_weights_as_they_are() -> None:
    logits = rand(7, 8)
    y, ids, _ = run_op("MoeGatingTopK", {"x": logits}, 3, k=2, norm_type=0)
    values, places = logits.softmax(-1).topk(2)
    torch.testing.assert_close(y, values)
    assert torch.equal(ids.long(), places)
    renormed = run_op("MoeGatingTopK", {"x": logits}, 3, k=2, norm_type=0, renorm=1)[0]
    torch.testing.assert_close(renormed, values / values.sum(-1, keepdim=True))


def routed(**attrs: Any) -> list[Tensor]:
    said = {"expert_num": EXPERTS, "expert_tokens_num_flag": True, "expert_tokens_num_type": 1}
    return run_op("MoeInitRoutingV3", {"x": X, "expert_idx": IDS}, 4, **{**said, **attrs})


def test_rows_are_sorted_by_expert_and_say_where_they_went() -> None:
    expanded, places, counts, _ = routed()
    pairs = sorted((int(IDS[n, k]), n, k) for n in range(TOKENS) for k in range(CHOSEN))
    assert torch.equal(expanded, torch.stack([X[n] for _, n, _ in pairs]))
    assert counts.tolist() == [sum(e == expert for e, _, _ in pairs) for expert in range(EXPERTS)]
    for at, (_, n, k) in enumerate(pairs):
        assert places[n * CHOSEN + k] == at
    assert routed(expert_tokens_num_type=0)[2].tolist() == counts.cumsum(0).tolist()
    scattered = routed(row_idx_type=1)[1]
    assert scattered.tolist() == [n * CHOSEN + k for _, n, k in pairs]
    assert not routed(expert_tokens_num_flag=False)[2].numel()


def test_scales_of_rows_follow_them() -> None:
    scales = rand(TOKENS).abs()
    inputs = {"x": X, "expert_idx": IDS, "scale": scales}
    expanded, _, _, found = run_op("MoeInitRoutingV3", inputs, 4, expert_num=EXPERTS)
    assert torch.equal(found, torch.stack([scales[(row == X).all(1)][0] for row in expanded]))


def test_rows_of_experts_elsewhere_drop_out() -> None:
    expanded, places, counts, _ = routed(active_expert_range=[2, 4])
    active = [(int(IDS[n, k]), n, k) for n in range(TOKENS) for k in range(CHOSEN) if 2 <= IDS[n, k] < 4]
    assert torch.equal(expanded[: len(active)], torch.stack([X[n] for _, n, _ in sorted(active)]))
    assert expanded[len(active) :].isnan().all()  # undefined: whatever reads it shows
    assert (places >= 0).sum() == len(active)
    assert counts.tolist() == [sum(e == expert for e, _, _ in active) for expert in (2, 3)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", [0, 1])
def test_groups_of_rows_meet_their_own_weights(kind: int, transposed: bool) -> None:
    rows, counts = rand(7, HIDDEN), [3, 0, 2, 0, 0, 1]
    ends = torch.tensor(counts).cumsum(0)
    weight = MATRICES.mT.contiguous() if transposed else MATRICES
    inputs = {"x": [rows], "weight": [weight], "group_list": ends if kind == 0 else torch.tensor(counts)}
    attrs = {"split_item": 3, "group_type": 0, "group_list_type": kind, "transpose_weight": transposed, "dtype": -1}
    found = run_op("GroupedMatmul", inputs, **attrs)[0]
    owners = [e for e, count in enumerate(counts) for _ in range(count)]
    expected = torch.stack([rows[i] @ MATRICES[e] for i, e in enumerate(owners)])
    torch.testing.assert_close(found[:6], expected, rtol=1e-5, atol=1e-6)
    assert found[6:].isnan().all()


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("shifted", [False, True])
def test_groups_of_int8_rows_are_scaled_by_column_and_by_row(shifted: bool, number: int) -> None:
    generator, dtype = torch.Generator().manual_seed(0), [torch.float16, torch.bfloat16][number]
    rows = torch.randint(-128, 128, (4, 8), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (2, 8, 3), generator=generator, dtype=torch.int8)
    bias = torch.randint(-9999, 9999, (2, 3), generator=generator, dtype=torch.int32)
    scale, per_token = (rand(2, 3).abs() / 99).bfloat16(), rand(4).abs() / 99
    inputs = {
        "x": [rows], "weight": [weight], "scale": [scale], "group_list": torch.tensor([1, 4]),
        "per_token_scale": per_token, "bias": [bias] if shifted else [],
    }  # fmt: skip
    found = run_op("GroupedMatmul", inputs, split_item=2, group_type=0, dtype=number)[0]
    for i in range(4):
        e = int(i >= 1)
        whole = rows[i].int() @ weight[e].int() + (bias[e] if shifted else 0)
        assert torch.equal(found[i], (whole.float() * scale[e].float() * per_token[i]).to(dtype))


def test_groups_of_rows_have_a_bias_each() -> None:
    bias = rand(EXPERTS, INNER)
    inputs = {"x": [X], "weight": [MATRICES], "bias": [bias], "group_list": torch.tensor([0, 1, 1, 1, 3, 5])}
    found = run_op("GroupedMatmul", inputs, split_item=3, group_type=0)[0]
    owners = [1, 4, 4, 5, 5]
    expected = torch.stack([X[i] @ MATRICES[e] + bias[e] for i, e in enumerate(owners)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [0, 2])
def test_rows_come_back_weighted_to_their_tokens(mode: int) -> None:
    rows = rand(TOKENS * CHOSEN, HIDDEN, seed=9)
    order = torch.randperm(TOKENS * CHOSEN, generator=torch.Generator().manual_seed(1)).int()
    order[3] = -1
    bias = rand(EXPERTS, HIDDEN, seed=4)
    inputs = {
        "expanded_x": rows, "expanded_row_idx": order, "x1": X, "x2": 2 * X, "bias": bias, "scales": WEIGHTS,
        "expert_idx": IDS,
    }  # fmt: skip
    found = run_op("MoeFinalizeRoutingV2", inputs, drop_pad_mode=mode)[0]
    for n in range(TOKENS):
        expected = 3 * X[n]
        for k in range(CHOSEN):
            place = int(order[n + k * TOKENS] if mode == 0 else order[n * CHOSEN + k])
            if place >= 0:
                expected = expected + WEIGHTS[n, k] * (rows[place] + bias[IDS[n, k]])
        torch.testing.assert_close(found[n], expected, rtol=1e-5, atol=1e-5)


def test_the_ops_together_are_a_sum_over_the_chosen_experts() -> None:
    expanded, places, counts, _ = routed()
    inputs = {"x": [expanded], "weight": [MATRICES], "group_list": counts}
    rows = run_op("GroupedMatmul", inputs, split_item=3, group_type=0, group_list_type=1)[0]
    back = {"expanded_x": rows, "expanded_row_idx": places, "scales": WEIGHTS}
    found = run_op("MoeFinalizeRoutingV2", back, drop_pad_mode=2)[0]
    expected = torch.einsum("nk,nh,nkhi->ni", WEIGHTS, X, MATRICES[IDS.long()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# ---- the first versions, and rows from several ranks ---------------------------------------------------------------

NUMBERS = torch.arange(TOKENS * CHOSEN, dtype=torch.int32).view(CHOSEN, TOKENS).T.contiguous()


@pytest.mark.parametrize("active", [TOKENS, TOKENS + 3, 2, 0])
def test_the_first_versions_sort_rows_and_bring_them_back(active: int) -> None:
    inputs = {"x": X, "row_idx": NUMBERS, "expert_idx": IDS}
    expanded, places, experts = run_op("MoeInitRouting", inputs, 3, active_num=active)
    pairs = sorted((int(IDS[n, k]), n, k) for n in range(TOKENS) for k in range(CHOSEN))
    kept = [n for _, n, _ in pairs][: active * CHOSEN]
    assert torch.equal(expanded, X[kept]) and experts.tolist() == [e for e, _, _ in pairs]
    assert all(places[k * TOKENS + n] == at for at, (_, n, k) in enumerate(pairs))
    if active < TOKENS:
        return
    back = {
        "expanded_x": expanded, "x1": X, "x2": 2 * X, "bias": rand(EXPERTS, HIDDEN, seed=4), "scales": WEIGHTS,
        "expanded_row_idx": places, "expanded_expert_idx": IDS,
    }  # fmt: skip
    expected = 3 * X + (WEIGHTS[..., None] * (X[:, None] + back["bias"][IDS.long()])).sum(1)
    torch.testing.assert_close(run_op("MoeFinalizeRouting", back)[0], expected, rtol=1e-5, atol=1e-5)
    tokens = run_op("MoeComputeExpertTokens", {"sorted_experts": experts}, num_experts=EXPERTS)[0]
    assert tokens.tolist() == [sum(e <= expert for e, _, _ in pairs) for expert in range(EXPERTS)]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_from_several_ranks_are_put_by_expert_and_rank(dtype: torch.dtype) -> None:
    counts, rows, scales = torch.tensor([[2, 0, 1], [0, 0, 3]], dtype=dtype), rand(6, HIDDEN), rand(6).abs()
    inputs = {"tokens": rows, "expert_token_num_per_rank": counts, "per_token_scales": scales}
    found = run_op("MoeReRouting", inputs, 4)
    order = [0, 1, 2, 3, 4, 5]  # two of expert 0; of expert 2 one of the first rank, three of the second
    assert torch.equal(found[0], rows[order]) and torch.equal(found[1], scales[order])
    assert found[2].tolist() == order and found[3].tolist() == [2, 0, 4] and found[3].dtype == dtype
    inputs["expert_token_num_per_rank"] = torch.tensor([[2, 1], [1, 2]], dtype=dtype)
    found = run_op("MoeReRouting", inputs, 4)
    order = [0, 1, 3, 2, 4, 5]
    assert torch.equal(found[0], rows[order]) and torch.equal(found[1], scales[order]) and found[2].tolist() == order
    assert found[3].tolist() == [3, 3]
    del inputs["per_token_scales"]
    found = run_op("MoeReRouting", inputs, 4)
    assert found[1].shape == (6,) and found[1].isnan().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: run_op("GroupedMatmul", {"x": [X], "weight": [MATRICES], "group_list": torch.tensor(
                [3, 1, 3, 4, 5, 5])}, split_item=3, group_type=0),
            "group_list: expected ends up to 5, found",
        ),
        (
            lambda: run_op("MoeInitRouting", {"x": X, "row_idx": NUMBERS.flip(0), "expert_idx": IDS}, active_num=5),
            "row_idx: expected the number k . 5 . n of each pair",
        ),
        (
            lambda: run_op("MoeInitRouting", {"x": X, "row_idx": NUMBERS.T, "expert_idx": IDS}, active_num=5),
            r"row_idx: expected .5, 2., found .2, 5.",
        ),
        (
            lambda: run_op("MoeInitRouting", {"x": X, "row_idx": NUMBERS, "expert_idx": IDS}, active_num=-1),
            "'active_num': expected a number of tokens, found -1",
        ),
        (
            lambda: run_op("MoeComputeExpertTokens", {"sorted_experts": torch.tensor([1, 0]).int()}, num_experts=6),
            "sorted_experts: expected them in order",
        ),
        (
            lambda: run_op("MoeComputeExpertTokens", {"sorted_experts": torch.tensor([0, 6]).int()}, num_experts=6),
            r"sorted_experts: expected numbers in \[0, 6\)",
        ),
        (
            lambda: run_op("MoeReRouting", {"tokens": X, "expert_token_num_per_rank": torch.tensor([[2, 2]])}),
            "expected 5 rows in all, found",
        ),
        (
            lambda: run_op("MoeReRouting", {"tokens": X, "expert_token_num_per_rank": torch.tensor([[5]])}, idx_type=1),
            "attribute 'idx': expected 0, found 1",
        ),
        (lambda: routed(quant_mode=1), "attribute 'quant_mode': expected -1, found 1"),
        (lambda: routed(drop_pad_mode=1), "attribute 'drop_pad_mode': expected 0, found 1"),
        (lambda: routed(active_num=3), "attribute 'active_num': expected -1 or 10, found 3"),
        (lambda: routed(expert_num=3), r"expert_idx: expected numbers in \[0, 3\)"),
        (
            lambda: run_op("GroupedMatmul", {"x": [X], "weight": [MATRICES], "group_list": torch.tensor([9] * 6)},
                           split_item=3, group_type=0),
            "group_list: expected ends up to 5, found",
        ),
        (
            lambda: run_op("GroupedMatmul", {"x": [X], "weight": [MATRICES], "group_list": torch.tensor([5])},
                           split_item=3, group_type=0),
            "group_list: expected 6 groups, found 1",
        ),
        (
            lambda: run_op("MoeFinalizeRoutingV2", {"expanded_x": X, "expanded_row_idx": torch.tensor([9, 0]).int()}),
            "expanded_row_idx: expected places below 5",
        ),
    ],
)  # fmt: skip
def test_what_the_reference_does_not_have_is_an_error(call: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        call()
