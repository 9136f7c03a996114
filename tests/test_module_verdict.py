"""The criterion: what a gain must survive, what a GB is worth, and the sentence that says so."""

from __future__ import annotations

import pytest

from bench.calibration import V3, scattered_input
from cpcompile.costs import HardwareProfile
from cpcompile.layer_costs import ACTIVATION_BYTES, Collective, Work
from cpcompile.module_verdict import CAUTION, WORTH, ModuleCost, Side

# One byte of memory or link is a second, so that work and collectives are given in seconds.
TOY = HardwareProfile("toy", 1e12, 0.0, 0.0, 1.0, 1e12, "made up")


def cost(saved: float, work: float, moved: float, scattered: float = 0.0, buffers: float = 0.0) -> ModuleCost:
    """A group that frees ``saved`` GB, changes work by ``work`` ms and takes ``moved`` ms instead of ``scattered``."""

    def side(gb: float, ms: float, communicates: float) -> Side:
        size = communicates * 1e-3 / TOY.seconds_per_byte(2)
        return Side(gb * 1e9, (Work(ms * 1e-3, 0.0),), (Collective("all_gather", "", 2, size),))

    before, after = side(saved + 1, 10, scattered), side(1, 10 + work, moved)
    return ModuleCost("o_proj", 2, 1, 24, 1, before, after, buffers * 1e9, 0.0, TOY)


def test_caution_is_how_slow_the_published_timed_collectives_were() -> None:
    timed = [row for row in scattered_input() if row.quantity.startswith("communication")]
    assert len(timed) == 2
    assert round(max(row.low / row.predicted for row in timed), 1) == CAUTION


def test_worth_is_a_gb_s_share_of_a_batch_at_full_context() -> None:
    request = 163840 * V3.latent * ACTIVATION_BYTES * V3.layers
    assert 1e9 / request / 24 * 30e-3 == pytest.approx(WORTH, rel=0.1)


@pytest.mark.parametrize(
    ("found", "pays", "reason"),
    [
        (cost(1, -2, 1), True, "saves 1.00 ms per step, 0.30 on slow links, and frees 1.00 GB per rank"),
        (cost(2, -1.2, 0.8), True, "frees 2.00 GB per rank for 0.16 ms per step at the most, 0.08 ms per GB"),
        (
            cost(1, -1.5, 1),
            False,
            "frees 1.00 GB per rank but may cost 0.20 ms per step, 0.20 ms per GB: only for memory; the 0.50 ms that "
            "it saves as computed are gone on links 1.5 times as slow",
        ),
        (cost(1, 1, 0), False, "frees 1.00 GB per rank but may cost 1.00 ms per step, 1.00 ms per GB: only for memory"),
        (cost(-2, -1, 0), True, "takes 2.00 GB per rank and saves 1.00 ms per step"),
        (cost(-2, -0.1, 0), False, "takes 2.00 GB per rank and saves 0.10 ms per step"),
        (cost(-2, 0.1, 0), False, "takes 2.00 GB per rank and may cost 0.10 ms per step"),
    ],
)
def test_verdict_and_reason(found: ModuleCost, pays: bool, reason: str) -> None:
    assert (found.pays, found.reason) == (pays, reason)


def test_buffers_are_bytes_that_a_group_does_not_free() -> None:
    assert cost(1, 0.05, 0).pays and not cost(1, 0.05, 0, buffers=0.6).pays


def test_caution_takes_the_worse_end() -> None:
    """Where a group moves less than before, slow links are in its favour, and count for nothing."""
    fewer = cost(0, 0, moved=1, scattered=3)
    assert fewer.cautious == fewer.change() == pytest.approx(-2e-3)
    more = cost(0, 0, moved=3, scattered=1)
    assert more.cautious == pytest.approx(CAUTION * 2e-3)
    assert fewer.slack == float("inf")
