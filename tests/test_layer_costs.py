"""Terms of the strategy costs by hand: volumes, pairs, products, scaling laws."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.calibration import V3, V32
from cpcompile.comparison import step_cost
from cpcompile.costs import HardwareProfile, profile
from cpcompile.layer_costs import (
    Collective,
    Work,
    attention_half,
    causal_pairs,
    linear,
    mlp_half,
    picked_pairs,
)
from cpcompile.strategies import KERNELS, Step, Strategy

A3 = profile("ascend-a3")
FUSED, EAGER = KERNELS["fused"], KERNELS["eager"]
TOY = HardwareProfile("toy", 100.0, 1e-3, 1.5e-3, 50.0, 200.0, "made up")


def off(n: int) -> Strategy:
    return Strategy("off", 1, n, scatter=False)


def step(tokens: int, prefix: int = 0, kernels=FUSED, machine=A3) -> Step:
    return Step(tokens, machine, kernels, prefix)


@pytest.mark.parametrize(
    ("model", "make", "elements"),
    [
        (V32, off, 14336),
        (V32, lambda n: Strategy("hidden", 1, n, gather_hidden=True), 14336),
        (V32, lambda n: Strategy("tp", 1, n), 9472),
        (V3, lambda n: Strategy("tp", 1, n), 7168 + 2112),
        (V32, lambda n: Strategy("cp", n, 1), 704),
        (V3, lambda n: Strategy("cp", n, 1), 576),
        (V32, lambda n: Strategy("tp", 1, n, shard_indexer=True), 9472 + 2 * 2048),  # indices of 4 bytes
    ],
)
@pytest.mark.parametrize("n", [2, 8, 32])
def test_volume_of_the_attention_half_per_token(model, make, elements: int, n: int) -> None:
    sent = sum(c.wire for c in attention_half(model, make(n), step(8192)).collectives)
    assert sent / 8192 / 2 == pytest.approx(elements * (n - 1) / n)


def test_a_hybrid_gathers_latents_over_tp_and_keys_over_cp() -> None:
    found = attention_half(V32, Strategy("hybrid", 4, 8), step(8192)).collectives
    assert [(c.kind, c.ranks, c.size) for c in found] == [
        ("reduce_scatter", 8, 2048 * 7168 * 2),
        ("all_gather", 8, 2048 * 2304 * 2),
        ("all_gather", 4, 8192 * 704 * 2),
    ]


def test_one_rank_sends_nothing() -> None:
    for strategy in (off(1), Strategy("cp", 1, 1)):
        assert sum(c.wire for c in step_cost(V32, strategy, step(4096)).collectives) == 0


def test_padding_is_sent() -> None:
    scattered = attention_half(V3, Strategy("tp", 1, 8), step(17)).collectives
    assert [c.size for c in scattered] == [24 * 7168 * 2, 24 * 2112 * 2]
    (reduced,) = attention_half(V3, off(8), step(17)).collectives
    assert reduced.size == 17 * 7168 * 2


@pytest.mark.parametrize(
    ("kind", "seconds", "wire"),
    [("all_gather", 1e-3 + 6 + 8, 600), ("all_to_all", 1e-3 + 6 + 8, 600), ("all_reduce", 1.5e-3 + 12 + 16, 1200)],
)
def test_collective_by_hand(kind: str, seconds: float, wire: float) -> None:
    """800 bytes over 4 ranks: 3/4 of them at 100 bytes/s, and read and written at 200 bytes/s; twice that reduced."""
    found = Collective(kind, "x", 4, 800.0, 3)
    assert found.seconds(TOY) == pytest.approx(3 * seconds)
    assert found.wire == pytest.approx(3 * wire)


@pytest.mark.parametrize("make", [off, lambda n: Strategy("tp", 1, n), lambda n: Strategy("cp", n, 1)])
def test_half_the_bandwidth_doubles_the_wire_term(make) -> None:
    free = replace(A3, latency=0.0, all_reduce_latency=0.0, memory_bandwidth=1e30)
    slow = replace(free, bandwidth=free.bandwidth / 2)
    fast_s, slow_s = (step_cost(V32, make(16), step(32768, machine=m)).terms["collectives"] for m in (free, slow))
    assert slow_s == pytest.approx(2 * fast_s)


@pytest.mark.parametrize("kernels", [FUSED, EAGER], ids=["fused", "eager"])
def test_the_indexer_grows_with_the_square(kernels) -> None:
    small, large = (step_cost(V32, off(8), step(t, kernels=kernels)).terms["indexer"] for t in (131072, 262144))
    assert large / small == pytest.approx(4, rel=0.03)


def test_the_indexer_by_hand() -> None:
    """Scores of T²/2 pairs: 64 heads of 128."""
    (*_, scores) = [w for term, w in attention_half(V32, off(8), step(4096)).work if term == "indexer"]
    assert scores == Work(2 * 4096**2 / 2 * 64 * 128, 0.0)
    (*_, eager) = [w for term, w in attention_half(V32, off(8), step(4096, kernels=EAGER)).work if term == "indexer"]
    assert eager.moved == 4096**2 / 2 * (64 * 8 + 60)


def test_attention_by_hand() -> None:
    """FLOPs per pair and head: 2 (192 + 128) expanded, 2 (576 + 512) on the latent."""

    def flops(model, strategy: Strategy) -> float:
        (work,) = [w for term, w in attention_half(model, strategy, step(4096)).work if term == "attention"]
        return work.flops

    pairs = 4096**2 / 2
    assert flops(V3, off(8)) == pairs * 16 * 640
    assert flops(V3, Strategy("cp", 8, 1)) == pairs / 8 * 128 * 640
    assert flops(V3, Strategy("cp", 8, 1, absorbed=True)) == pairs / 8 * 128 * 2176
    assert flops(V32, off(8)) == (2048**2 / 2 + 2048 * 2048) * 16 * 2176


def test_picked_rows_serve_all_heads() -> None:
    """Their traffic is the same at any width of tensor parallelism; context parallelism divides it."""

    def moved(strategy: Strategy) -> float:
        (work,) = [w for term, w in attention_half(V32, strategy, step(65536)).work if term == "attention"]
        return work.moved

    assert moved(off(32)) == moved(off(2)) == moved(Strategy("cp", 32, 1)) * 32


@pytest.mark.parametrize("ranks", [2, 4, 32])
def test_the_last_contiguous_rank_has_more_and_zigzag_is_even(ranks: int) -> None:
    mean = causal_pairs(step(65536), ranks, "zigzag")
    assert mean == 65536**2 / 2 / ranks
    assert causal_pairs(step(65536), ranks, "contiguous") / mean == pytest.approx(2 - 1 / ranks)


def test_a_long_prefix_evens_contiguous_out() -> None:
    for prefix, most in ((0, 1.75), (8192, 1.26), (1 << 20, 1.01)):
        found = step(8192, prefix)
        assert causal_pairs(found, 4, "contiguous") / causal_pairs(found, 4, "zigzag") <= most


def test_pairs_equal_a_count() -> None:
    """Each query with the keys before it, half of its own: contiguous ranks one by one, and top-k of them."""
    model = replace(V32, index_topk=40)
    last = sum(30 + i + 0.5 for i in range(48, 64))
    assert causal_pairs(step(64, 30), 4, "contiguous") == last
    assert causal_pairs(step(64, 30), 4, "zigzag") * 4 == sum(30 + i + 0.5 for i in range(64))
    assert picked_pairs(model, step(64, 30), 4, "contiguous") == 16 * 40
    assert picked_pairs(model, step(64, 30), 4, "zigzag") * 4 == sum(min(30 + i + 0.5, 40) for i in range(64))
    assert picked_pairs(model, step(64, 30, EAGER), 4, "zigzag") == 16 * 40


def test_linear_by_hand_and_at_eight_bits() -> None:
    assert linear(V3, 3, 5, 7) == Work(2 * 3 * 5 * 7, 5 * 7 * 2 + 3 * 12 * 2)
    assert linear(replace(V3, weight_bytes=1), 3, 5, 7) == Work(3 * 5 * 7, 5 * 7 + 3 * 12 * 2)


def test_late_queries_are_slower_where_kernels_say_so() -> None:
    def rate(strategy: Strategy, prefix: int = 0) -> float:
        half = attention_half(V3, strategy, step(4096, prefix, EAGER))
        return next(w.rate for term, w in half.work if term == "attention")

    assert rate(off(8)) == 1.0
    assert rate(Strategy("cp", 8, 1)) == rate(off(8), prefix=1) == EAGER.offset_rate


def test_all_ranks_together_do_the_model_s_products() -> None:
    """DeepSeek-V3's experts: 8 of 256 routed and one shared, 3 products each; the same under every strategy."""
    tokens, per_token = 4096, 2 * 3 * 7168 * 2048 * 9
    for strategy in (off(8), Strategy("tp", 1, 8), Strategy("cp", 8, 1)):
        half = mlp_half(V3, strategy, step(tokens), moe=True)
        router = 2 * (tokens if strategy.name == "off" else tokens / 8) * 7168 * 256
        assert sum(w.flops for _, w in half.work) == pytest.approx(tokens * per_token / 8 + router)


def test_experts_get_all_tokens_unless_the_model_dispatches_them() -> None:
    for strategy in (Strategy("cp", 32, 1), Strategy("tp", 1, 32)):
        found = mlp_half(V3, strategy, step(65536), moe=True).collectives
        assert [(c.kind, c.size) for c in found] == [(k, 65536 * 7168 * 2) for k in ("all_gather", "reduce_scatter")]
    found = mlp_half(V3, Strategy("cp", 32, 1, dispatch=True), step(65536), moe=True).collectives
    assert [(c.kind, c.size, c.count) for c in found] == [("all_to_all", 2048 * 8 * 7168 * 2, 2)]
    dense = mlp_half(V3, Strategy("cp", 32, 1, dispatch=True), step(65536), moe=False).collectives
    assert [c.kind for c in dense] == ["all_gather", "reduce_scatter"]
