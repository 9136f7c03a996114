"""The cost model: the formulas by hand, and the presets."""

from __future__ import annotations

import dataclasses

import pytest

from cpcompile.costs import PROFILES, HardwareProfile, profile
from cpcompile.errors import OptionError

TOY = HardwareProfile("toy", 100.0, 1e-3, 1.5e-3, 50.0, 200.0, "made up")


@pytest.mark.parametrize(("size", "seconds"), [(1, 0.0), (2, 4.0), (4, 6.0), (8, 7.0)])
def test_a_half_moves_all_but_the_ranks_own_part(size: int, seconds: float) -> None:
    """(n-1)/n of 800 bytes at 100 bytes/s on the wire, and 800 bytes read and written at 200 bytes/s in memory."""
    assert 800 * TOY.seconds_per_byte(size) == pytest.approx(seconds + 8.0)


def test_compute_is_the_sum_of_flops_and_bytes() -> None:
    assert TOY.compute(100.0, 0.0) == pytest.approx(2.0)
    assert TOY.compute(0.0, 100.0) == pytest.approx(0.5)
    assert TOY.compute(100.0, 100.0) == pytest.approx(2.5)


@pytest.mark.parametrize("name", PROFILES)
def test_presets_are_complete_and_sensible(name: str) -> None:
    found = profile(name)
    assert found.name == name and found.source
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        assert isinstance(value, str) or value > 0
    # An all-reduce is one launch of both halves: dearer than one of them, not dearer than two.
    assert found.latency < found.all_reduce_latency <= 2 * found.latency
    # A reduce-scatter of 1 GB takes between a millisecond and a few seconds; memory is faster than the link.
    assert 1e-3 < 1e9 * found.seconds_per_byte(8) < 5.0
    assert found.memory_bandwidth > found.bandwidth


def test_a_profile_of_ones_own_is_taken_as_it_is() -> None:
    assert profile(TOY) is TOY


def test_profiles_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        TOY.latency = 0.0  # type: ignore[misc]


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(OptionError) as caught:
        profile("ascend_a3")
    assert str(caught.value) == "unknown hardware profile 'ascend_a3' (did you mean 'ascend-a3'?)"


def test_a_name_like_no_other_gives_the_list() -> None:
    with pytest.raises(OptionError) as caught:
        profile("zzz")
    message = str(caught.value)
    assert "\n" not in message and all(name in message for name in PROFILES)
