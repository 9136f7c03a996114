"""GE's mixture-of-experts ops: the router against the model's own, rows through experts against a sum over experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ge_build import run_op
from torch import Tensor

from cpcompile.lowering.ge import GeError

COVERED = {"MoeGatingTopK", "MoeInitRoutingV3", "MoeFinalizeRoutingV2", "GroupedMatmul"}

TOKENS, CHOSEN, EXPERTS, HIDDEN, INNER = 5, 2, 6, 4, 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


X, WEIGHTS = rand(TOKENS, HIDDEN), rand(TOKENS, CHOSEN, seed=1)
IDS = torch.stack(
    [torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(n))[:CHOSEN] for n in range(TOKENS)]
).int()
MATRICES = rand(EXPERTS, HIDDEN, INNER, seed=2)


@pytest.mark.parametrize("mode", [0, 1])
def test_the_router_chooses_groups_then_experts_with_the_bias_and_weighs_without_it(mode: int) -> None:
    logits, bias = rand(7, 8), rand(8, seed=3)
    attrs = {"k": 3, "k_group": 2, "group_count": 4, "group_select_mode": mode, "norm_type": 1, "out_flag": True}
    y, ids, scores = run_op(
        "MoeGatingTopK", {"x": logits, "bias": bias}, 3, **attrs, routed_scaling_factor=2.5, eps=1e-20
    )
    for n in range(7):
        plain = [1 / (1 + float((-logits[n, e]).exp())) for e in range(8)]
        choice = [plain[e] + float(bias[e]) for e in range(8)]
        groups = [sorted(choice[2 * g : 2 * g + 2], reverse=True)[: mode + 1] for g in range(4)]
        best = sorted(range(4), key=lambda g: -sum(groups[g]))[:2]
        open_ = [e for e in range(8) if e // 2 in best]
        chosen = sorted(open_, key=lambda e: -choice[e])[:3]
        total = sum(plain[e] for e in chosen)
        assert ids[n].tolist() == chosen
        torch.testing.assert_close(y[n], torch.tensor([2.5 * plain[e] / total for e in chosen]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores[n], torch.tensor(plain), rtol=1e-5, atol=1e-6)


def test_a_softmax_router_takes_its_weights_as_they_are() -> None:
    logits = rand(7, 8)
    y, ids, _ = run_op("MoeGatingTopK", {"x": logits}, 3, k=2, norm_type=0)
    values, places = logits.softmax(-1).topk(2)
    torch.testing.assert_close(y, values)
    assert torch.equal(ids.long(), places)


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


def test_groups_of_int8_rows_are_scaled_by_column_and_by_row() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-128, 128, (4, 8), generator=generator, dtype=torch.int8)
    weight = torch.randint(-128, 128, (2, 8, 3), generator=generator, dtype=torch.int8)
    scale, per_token = rand(2, 3).abs().bfloat16(), rand(4).abs()
    inputs = {
        "x": [rows], "weight": [weight], "scale": [scale], "group_list": torch.tensor([1, 4]),
        "per_token_scale": per_token,
    }  # fmt: skip
    found = run_op("GroupedMatmul", inputs, split_item=2, group_type=0, dtype=1)[0]
    for i in range(4):
        e = int(i >= 1)
        expected = (rows[i].int() @ weight[e].int()).float() * scale[e].float() * per_token[i]
        assert torch.equal(found[i], expected.bfloat16())


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
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
