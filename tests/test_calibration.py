"""docs/CALIBRATION.md is what ``python -m bench.calibration`` prints, and its rows show misses as misses."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.calibration import Row, kernel_check, main

PAGE = Path(__file__).parent.parent / "docs" / "CALIBRATION.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == main(), "run: python -m bench.calibration > docs/CALIBRATION.md"


@pytest.mark.parametrize(
    ("low", "high", "predicted", "published", "ratio"),
    [
        (30, 30, 15.0, "30 s", "0.50"),
        (30, 30, 45.0, "30 s", "1.50"),
        (0.99, 1.0, 0.995, "0.99–1 s", "within"),
        (0.99, 1.0, 1.1, "0.99–1 s", "1.10"),
        (0, 2, 3.0, "< 2 s", "1.50"),
        (0, 2, 1.0, "< 2 s", "within"),
    ],
)
def test_rows_say_how_far_off_they_are(low: float, high: float, predicted: float, published: str, ratio: str) -> None:
    cells = str(Row("name", "what", low, high, predicted, "s")).split(" | ")
    assert cells[2] == published and cells[4] == f"{ratio} |"


def test_counted_kernels_are_within_a_fifth_of_the_measured_ones() -> None:
    """Measured by bench/op_rates.py on one H200, torch 2.11, milliseconds."""
    measured = {"indexer": 0.7626, "sparse": 0.9246, "sparse_all": 1.192}
    computed = kernel_check()
    for name, took in measured.items():
        assert computed[name] == pytest.approx(took, rel=0.2)
