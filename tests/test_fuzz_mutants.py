"""Mutations of rewritten graphs: none that changes a number gets past the static proof.

``python -m bench.fuzz mutants`` judges more of them, with new seeds. ``docs/FAULTS.md`` lists the kinds.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from fuzzing.mutants import KINDS, Subject, mutate, subject_of
from fuzzing.programs import sample

TABLE = Path(__file__).parents[1] / "docs" / "FAULTS.md"
SEEDS = (0, 1, 4, 6, 9, 12)


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    found = [subject_of(sample(seed), strategy="tp") for seed in SEEDS]
    assert len([s for s in found if s is not None]) >= 3
    return [s for s in found if s is not None]


@pytest.fixture(scope="module")
def verdicts(subjects: list[Subject]) -> dict[str, Counter[str]]:
    """What became of one mutant of each kind in each subject."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for number, subject in enumerate(subjects):
        for kind in KINDS:
            mutant = mutate(subject, kind, number)
            if mutant is not None:
                assert mutant.verdict != "survivor", f"{kind} in {subject.name}: {mutant.detail}"
                found[kind][mutant.verdict] += 1
    return found


def test_no_mutant_that_changes_numbers_is_accepted(verdicts: dict[str, Counter[str]]) -> None:
    assert len(verdicts) >= 30, "too few kinds found a place"
    refused = sum(v["refused"] for v in verdicts.values())
    assert refused > 0.9 * sum(v.total() for v in verdicts.values())


def test_without_a_mutation_the_proof_holds_and_the_numbers_are_the_same(subjects: list[Subject]) -> None:
    for subject in subjects:
        assert subject.holds(subject.rewritten)
        assert not subject.differ(subject.rewritten, range(3))


def test_a_survivor_would_be_found(subjects: list[Subject]) -> None:
    """The positive control: a proof that accepts everything lets mutants through, and their numbers tell."""
    subject = subjects[0]
    blind = Subject(**{**vars(subject), "proofs": [lambda _: True] * subject.world.size})
    found = [mutate(blind, kind, 0) for kind in ("scattered_by_max", "rows_reversed", "output_of_own_rows")]
    assert any(m is not None and m.verdict == "survivor" for m in found)


def test_the_table_names_every_kind() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| mutation \|", TABLE.read_text(encoding="utf-8"), re.M)
    assert [name.replace(" ", "_") for name in rows] == list(KINDS)
