"""Modules over groups of their own: bytes and volumes by hand and by the library's model, times, refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.calibration import V3
from cpcompile.comparison import step_cost
from cpcompile.costs import HardwareProfile, profile
from cpcompile.errors import GroupError
from cpcompile.layer_costs import Collective
from cpcompile.module_costs import MODULES, check_size, module_cost
from cpcompile.module_verdict import ModuleCost
from cpcompile.strategies import KERNELS, Step, Strategy

A3 = profile("ascend-a3")
R1 = replace(V3, weight_bytes=1)
TOY = HardwareProfile("toy", 100.0, 1e-3, 1.5e-3, 50.0, 200.0, "made up")
FUSED = KERNELS["fused"]
ALONG = ("lm_head", "embedding", "o_proj", "mlp")


def at(module: str, ranks: int = 8, tokens: int = 24, tp: int = 1, model=R1, machine=A3) -> ModuleCost:
    return module_cost(module, model, ranks, Step(tokens, machine, FUSED), tp)


@pytest.mark.parametrize(
    ("module", "weights"),
    [
        ("lm_head", 129280 * 7168 * 2),
        ("embedding", 129280 * 7168 * 2),
        ("o_proj", 61 * 7168 * 128 * 128),
        ("mlp", 3 * 3 * 7168 * 18432),
    ],
)
@pytest.mark.parametrize(("ranks", "tp"), [(8, 1), (4, 1), (2, 4)])
def test_a_group_of_p_leaves_each_rank_one_part_in_p(module: str, weights: int, ranks: int, tp: int) -> None:
    """R1-W8A8: 8-bit linears, the vocabulary in bfloat16."""
    cost = at(module, ranks, tp=tp)
    assert cost.before.weights == weights / tp
    assert cost.after.weights == weights / tp / ranks
    assert cost.saved == pytest.approx(weights / tp * (1 - 1 / ranks))


def test_weights_are_those_of_the_library_s_model() -> None:
    import torch
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(DeepseekV3Config(), dtype=torch.bfloat16)
    dense = tuple(f"layers.{layer}.mlp." for layer in range(3))
    held = dict.fromkeys(ALONG, 0)
    for name, parameter in built.named_parameters():
        for module, found in (
            ("lm_head", name == "lm_head.weight"),
            ("embedding", "embed_tokens" in name),
            ("o_proj", "o_proj.weight" in name),
            ("mlp", any(layer in name for layer in dense)),
        ):
            held[module] += parameter.numel() * 2 * found
    assert held == {module: at(module, model=V3).before.weights for module in ALONG}


def volumes(cost: ModuleCost) -> list[tuple[str, int, float]]:
    return [(c.kind, c.ranks, c.size) for c in cost.after.collectives]


def test_collectives_by_hand() -> None:
    """8 ranks with 24 rows each: 192 rows; bfloat16, ids of 8 bytes."""
    rows, hidden = 192, 192 * 7168 * 2
    assert volumes(at("lm_head")) == [("all_gather", 8, hidden), ("all_to_all", 8, 24 * 129280 * 2)]
    assert volumes(at("embedding")) == [("all_gather", 8, rows * 8), ("reduce_scatter", 8, hidden)]
    assert volumes(at("o_proj")) == [("all_to_all", 8, 24 * 16384 * 2), ("reduce_scatter", 8, hidden)]
    assert volumes(at("mlp")) == [("all_gather", 8, hidden), ("reduce_scatter", 8, hidden)]
    assert [at(m).layers for m in ALONG] == [1, 1, 61, 3]


def test_tensor_parallelism_leaves_each_rank_its_part_of_the_heads_and_of_the_vocabulary() -> None:
    assert volumes(at("o_proj", 2, tp=4))[0] == ("all_to_all", 2, 24 * 4096 * 2)
    assert volumes(at("lm_head", 2, tp=4))[1] == ("all_to_all", 2, 24 * 129280 / 4 * 2)


def test_time_by_hand() -> None:
    """lm_head, hidden 4, vocabulary 8, two ranks of three rows: at 50 FLOP/s, 200 B/s of memory, 100 B/s of link."""
    toy = replace(V3, hidden=4, vocab=8, weight_bytes=1)
    cost = at("lm_head", 2, 3, model=toy, machine=TOY)
    before = 2 * 3 * 4 * 8 / 50 + (4 * 8 * 2 + 3 * (4 + 8) * 2) / 200
    product = 2 * 6 * 4 * 4 / 50 + (4 * 4 * 2 + 6 * (4 + 4) * 2) / 200
    gathered, exchanged = (1e-3 + size * (1 / 2 / 100 + 2 / 200) for size in (6 * 4 * 2, 3 * 8 * 2))
    assert cost.seconds(cost.before) == pytest.approx(before)
    assert cost.seconds(cost.after) == pytest.approx(product + gathered + exchanged)
    assert cost.change() == pytest.approx(product + gathered + exchanged - before)
    assert cost.change(3.0) == pytest.approx(product + 3 * (gathered + exchanged) - before)
    assert cost.buffers == 6 * (4 + 4) * 2


@pytest.mark.parametrize("module", ["lm_head", "o_proj", "mlp"])
@pytest.mark.parametrize("ranks", [2, 8])
def test_a_rank_s_arithmetic_stays_and_its_reading_shrinks(module: str, ranks: int) -> None:
    cost = at(module, ranks)
    before, after = (sum(w.flops for w in side.work) for side in (cost.before, cost.after))
    assert after == pytest.approx(before)
    fewer = sum(w.moved for w in cost.before.work) - sum(w.moved for w in cost.after.work)
    assert 0.9 < fewer * cost.layers / cost.saved < 1


def test_a_lookup_s_time_knows_nothing_of_the_vocabulary() -> None:
    small, large = (at("embedding", model=replace(R1, vocab=v)) for v in (8000, 800000))
    assert small.change() == large.change() > 0
    assert large.saved == 100 * small.saved


def test_a_lookup_by_hand() -> None:
    """Own rows are read, then written: alone as many, in a group those of all ranks, mostly zeros."""
    cost = at("embedding", 2, 3, model=replace(V3, hidden=4, vocab=8), machine=TOY)
    row, ids, scattered = 4 * 2, 6 * 8, 6 * 4 * 2
    moved = 2e-3 + (ids + scattered) * (1 / 2 / 100 + 2 / 200)
    assert cost.seconds(cost.before) == pytest.approx((3 + 3) * row / 200)
    assert cost.seconds(cost.after) == pytest.approx((3 + 6) * row / 200 + moved)
    assert cost.buffers == ids + scattered


@pytest.mark.parametrize(("module", "pays"), [("lm_head", True), ("embedding", True), ("mlp", True), ("o_proj", False)])
@pytest.mark.parametrize("machine", ["ascend-a2", "ascend-a3"])
def test_verdicts_at_the_published_figures(module: str, pays: bool, machine: str) -> None:
    """vllm-ascend: R1-W8A8, DP32 EP32, groups of 8, 24 tokens per rank; o_proj alone lengthens the step."""
    assert at(module, machine=profile(machine)).pays is pays


@pytest.mark.parametrize("module", [*ALONG, "layer_sharding"])
def test_a_group_of_one_changes_nothing(module: str) -> None:
    cost = at(module, 1)
    assert not cost.after.collectives and cost.saved == cost.buffers == 0 and not cost.pays
    assert cost.change() == pytest.approx(0)


# FlashComm 2


def test_flashcomm2_over_all_of_tp_is_flashcomm1() -> None:
    cost = at("flashcomm2", 8, 512, tp=8)
    assert cost.change() == cost.saved == cost.buffers == 0
    assert volumes(cost) == [("reduce_scatter", 8, 4096 * 7168 * 2)]


@pytest.mark.parametrize("otp", [1, 2, 4])
def test_flashcomm2_by_hand(otp: int) -> None:
    """4,096 rows over tp 8: an all-to-all among 8/otp ranks, 1/otp of o_proj on each, a reduce-scatter among otp."""
    cost, odp = at("flashcomm2", otp, 512, tp=8), 8 // otp
    weights = 61 * 16384 * 7168
    assert (cost.before.weights, cost.after.weights) == (weights / 8, weights / otp)
    exchanged = ("all_to_all", odp, 4096 * 16384 / 8 * 2)
    scattered = ("reduce_scatter", otp, 4096 / odp * 7168 * 2)
    assert volumes(cost) == ([exchanged] if otp == 1 else [exchanged, scattered])
    before, after = (sum(w.flops for w in side.work) for side in (cost.before, cost.after))
    assert before == pytest.approx(after)


def test_flashcomm2_pays_in_prefill_and_not_in_decode() -> None:
    """R1 on 16 ranks, as the published gain over FlashComm 1; a small step would only read more weights."""
    assert at("flashcomm2", 1, 1024, tp=16).pays and not at("flashcomm2", 1, 2, tp=16).pays


# Layer sharding


def test_layer_sharding_holds_whole_layers_and_two_under_way() -> None:
    layer = 16384 * 7168
    cost = at("layer_sharding", 16)
    assert (cost.before.weights, cost.after.weights) == (61 * layer, 4 * layer)
    assert cost.buffers == 2 * layer
    assert volumes(cost) == [("broadcast", 16, layer)] and cost.layers == 61


def test_a_broadcast_costs_what_a_layer_s_work_does_not_hide() -> None:
    decode, prefill = at("layer_sharding", 16, 8), at("layer_sharding", 16, 1024)
    terms = step_cost(R1, Strategy("cp", 16, 1), Step(8 * 16, A3, FUSED)).terms
    work = sum(seconds for term, seconds in terms.items() if term != "collectives")
    sent = Collective("broadcast", "", 16, 16384 * 7168).seconds(A3)
    assert decode.change() == pytest.approx(61 * sent - work) and decode.change() > 0
    assert prefill.change() == prefill.cautious == 0
    assert prefill.pays and not decode.pays


# Refusals


@pytest.mark.parametrize(
    ("module", "ranks", "tp", "world", "message"),
    [
        ("lm_head", 12, 1, None, "lm_head 12: expected vocabulary % (tp · lm_head) = 0 with vocabulary 129280, tp 1; "
         "nearest that work: lm_head 10 or 16"),
        ("lm_head", 12, 1, 96, "nearest that work: lm_head 8 or 16"),
        ("embedding", 3, 2, None, "expected vocabulary % (tp · embedding) = 0 with vocabulary 129280, tp 2; near"),
        ("o_proj", 12, 1, None, "with heads 128, tp 1; nearest that work: o_proj 8 or 16"),
        ("o_proj", 32, 8, None, "heads % (tp · o_proj) = 0 with heads 128, tp 8; nearest that work: o_proj 16"),
        ("mlp", 5, 1, None, "expected intermediate size % (tp · mlp) = 0 with intermediate size 18432, tp 1; "
         "nearest that work: mlp 4 or 6"),
        ("o_proj", 8, 1, 12, "expected ranks / tp % o_proj = 0 with ranks 12, tp 1; nearest that work: o_proj 4"),
        ("o_proj", 8, 4, 16, "expected ranks / tp % o_proj = 0 with ranks 16, tp 4; nearest that work: o_proj 4"),
        ("o_proj", 4, 3, 32, "expected ranks % tp = 0 with ranks 32, tp 3; no size works"),
        ("layer_sharding", 64, 1, None, "expected no more ranks than 61 layers; nearest that work: layer_sharding 61"),
        ("flashcomm2", 3, 16, None, "expected tp % flashcomm2 = 0 with tp 16; nearest that work: flashcomm2 2 or 4"),
        ("flashcomm2", 3, 96, None, "expected heads % tp = 0 with heads 128, tp 96; no size works"),
        ("mlp", 0, 1, None, "nearest that work: mlp 1"),
    ],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused_with_the_nearest(module, ranks, tp, world, message) -> None:
    with pytest.raises(GroupError) as caught:
        check_size(module, R1, ranks, tp, world)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("ranks", range(1, 130))
def test_the_nearest_sizes_are_the_nearest(ranks: int) -> None:
    fits = [n for n in range(1, 129) if 128 % n == 0]
    if ranks in fits:
        check_size("o_proj", R1, ranks, 1)
        return
    with pytest.raises(GroupError) as caught:
        check_size("o_proj", R1, ranks, 1)
    near = [max(n for n in fits if n < ranks), *sorted(n for n in fits if n > ranks)[:1]]
    assert str(caught.value).endswith(f"o_proj {' or '.join(map(str, near))}")


def test_experts_are_no_mlp_and_names_are_known() -> None:
    with pytest.raises(GroupError, match="mlp 8: expected a model with dense MLPs; no size works"):
        at("mlp", model=replace(R1, dense_layers=0))
    with pytest.raises(
        GroupError, match=r"no module 'experts' \(known: embedding, flashcomm2, layer_sharding, lm_head"
    ):
        at("experts")
    assert at("mlp").before.weights == at("mlp", model=replace(R1, experts=512, shared_experts=4)).before.weights
    assert set(ALONG) | {"flashcomm2", "layer_sharding"} == set(MODULES)
