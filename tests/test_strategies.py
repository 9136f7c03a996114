"""What is known of the strategies, as assertions on their computed costs; the figures are in docs/CALIBRATION.md."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest

from bench.calibration import KIMI, V3, V32
from cpcompile.comparison import Cost, best_strategies, step_cost
from cpcompile.costs import profile
from cpcompile.layer_costs import attention_half
from cpcompile.strategies import KERNELS, Step, Strategy, candidates, default_kernels, impossible

A3, H200, H100 = profile("ascend-a3"), profile("h200-nvlink"), profile("h100-nvlink")
EAGER, FUSED = KERNELS["eager"], KERNELS["fused"]


def costs(model, ranks: int, step: Step) -> dict[str, Cost]:
    return {s.name: step_cost(model, s, step) for s in candidates(model, ranks)}


@pytest.mark.parametrize("tokens", [4096, 16384, 65536])
def test_dense_context_parallelism_on_two_fast_linked_gpus_loses(tokens: int) -> None:
    found = costs(V3, 2, Step(tokens, H200, default_kernels(H200)))
    baseline = found["off"].seconds
    assert found["cp contiguous"].seconds > found["cp zigzag"].seconds > 1.05 * baseline
    assert baseline / found["tp"].seconds == pytest.approx(1.0, abs=0.05)  # nothing to win there


def test_contiguous_loses_with_ideal_kernels_too() -> None:
    found = costs(V3, 2, Step(65536, H200, FUSED))
    assert found["cp contiguous"].seconds > 1.2 * found["off"].seconds


def test_sparse_context_parallelism_on_32_ascend_ranks_wins() -> None:
    found = costs(V32, 32, Step(65536, A3, default_kernels(A3)))
    assert 3 < found["off"].seconds / found["cp zigzag"].seconds < 12  # published: 6
    assert 3 < found["off"].seconds / found["cp contiguous"].seconds < 12
    assert 15 < found["off"].seconds < 45  # published: 30 s
    assert 1.6 < found["cp zigzag"].seconds < 15  # published: 5 s


def test_sparse_tensor_parallelism_is_bound_by_the_indexer_that_it_does_not_divide() -> None:
    found = costs(V32, 32, Step(65536, A3, FUSED))
    assert found["off"].terms["indexer"] > 0.4 * found["off"].seconds
    assert found["off"].terms["indexer"] / found["cp zigzag"].terms["indexer"] == pytest.approx(32, rel=0.01)
    assert found["tp"].terms["indexer"] == pytest.approx(found["off"].terms["indexer"], rel=0.02)
    sharded = found["tp, indexer sharded"].terms["indexer"]
    assert found["tp"].terms["indexer"] / sharded == pytest.approx(32, rel=0.02)


@pytest.mark.parametrize("tokens", [8192, 131072])
def test_absorbed_context_parallelism_is_slower_than_expanded_tensor_parallelism(tokens: int) -> None:
    """sglang #34059: 1.92x at 8K to 2.80x at 128K."""
    cp = Strategy("cp", 4, 1, layout="contiguous", absorbed=True)
    for model in (KIMI, V3):
        steps = [Step(8192, H100, FUSED, prefix) for prefix in range(0, tokens, 8192)]
        tp = sum(step_cost(model, Strategy("off", 1, 4, scatter=False), s).seconds for s in steps)
        assert sum(step_cost(model, cp, s).seconds for s in steps) > 1.1 * tp


def test_sharding_the_indexer_pays_on_two_gpus_and_more_so_with_length() -> None:
    ratios = []
    for tokens in (8192, 32768, 65536):
        step = Step(tokens, H200, EAGER)
        halves = {s.name: sum(attention_half(V32, s, step).seconds(H200).values()) for s in candidates(V32, 2)}
        ratios.append(halves["off"] / halves["tp, indexer sharded"])
        assert 1.4 < halves["off"] / halves["cp zigzag"] < 2  # published: 1.76, 1.74, 1.53
    assert 1.05 < ratios[0] < ratios[1] < ratios[2] < 2  # published: 1.33, 1.42, 1.51


@pytest.mark.parametrize("model", [V3, V32], ids=["v3", "v32"])
@pytest.mark.parametrize(("ranks", "machine"), [(32, A3), (8, H200)])
@pytest.mark.parametrize("tokens", [1, 8, 32])
def test_decode_steps_are_left_alone(model, ranks: int, machine, tokens: int) -> None:
    step = Step(tokens, machine, default_kernels(machine))
    found = {s.name: step_cost(model, s, step) for s in candidates(model, ranks) if not impossible(model, s, tokens)}
    assert min(found, key=lambda name: found[name].seconds) == "off"
    assert best_strategies(model, ranks, step)[0] == (1, "off")


def test_candidates_hold_every_factorisation_once() -> None:
    found = candidates(V32, 12)
    assert all(s.ranks == 12 for s in found)
    assert [(s.cp, s.tp) for s in found if s.name.startswith("hybrid")] == [(2, 6), (3, 4), (4, 3), (6, 2)]
    assert len({s.name for s in found}) == len(found)
    assert not any(s.absorbed for s in found) and any(s.absorbed for s in candidates(V3, 12))


def test_impossible_strategies_say_why() -> None:
    tp, zigzag = Strategy("tp", 1, 24), Strategy("cp", 24, 1)
    assert impossible(V3, tp, 4096) == "128 heads do not divide by 24 ranks"
    assert impossible(V3, zigzag, 4096) == "the shared experts' width 2048 does not divide by 24 ranks"
    assert impossible(V3, Strategy("cp", 5, 1), 4096) == "the MLP's width 18432 does not divide by 5 ranks"
    assert impossible(V3, Strategy("cp", 8, 1), 15) == "zigzag needs 2 tokens per rank, 16 in all"
    assert impossible(V3, Strategy("cp", 8, 1), 16) is None
    assert impossible(V3, Strategy("cp", 8, 1, layout="contiguous"), 3) is None


def test_kernels_are_by_machine_and_the_measured_rate_is_the_measured_one() -> None:
    assert default_kernels(A3) is FUSED and default_kernels(H200) is EAGER
    assert 264 / 608 < EAGER.offset_rate < 281 / 562  # bench/op_rates.py on one H200
    with pytest.raises(dataclasses.FrozenInstanceError):
        EAGER.offset_rate = 1.0  # type: ignore[misc]
    assert replace(EAGER, name="mine").name == "mine"
