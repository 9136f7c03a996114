"""The proof follows rows of values whose dims lie in another order than their elements: ``[T, B, H]``, ``[H, T]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzzing.mutants import mutate, subject_of
from fuzzing.programs import C10D, HIDDEN, VOCAB, Sample, of_rank
from fuzzing.recorder import Input, record
from fuzzing.trials import attempt
from fuzzing.worlds import AXIS, World

WORLD = World(2, {AXIS: ((0, 1),)}, {AXIS: "axis"})
Values = dict[str, Any]


def summed(x: torch.Tensor) -> torch.Tensor:
    return C10D.wait_tensor(C10D.all_reduce(x, "sum", AXIS))  # type: ignore[no-any-return]


def batch_second(values: Values) -> torch.Tensor:
    """``[B, T]`` ids, hidden ``[T, B, H]`` in the embedding's memory."""
    x = torch.nn.functional.embedding(values["ids"], values["table"]).transpose(0, 1)
    return torch.tanh(x + summed(x @ values["own_0"])) @ values["shared_0"]


def features_first(values: Values) -> torch.Tensor:
    """``[H, T]``, and a product of the transposes, all-reduced."""
    x = torch.nn.functional.embedding(values["ids"], values["table"])[0].t()
    return torch.tanh(x + summed(values["own_0"].t() @ x))


def product_turned(values: Values) -> torch.Tensor:
    """What is all-reduced is a product's transpose."""
    x = torch.nn.functional.embedding(values["ids"], values["table"])
    return torch.tanh(x.transpose(0, 1) + summed((x @ values["own_0"]).transpose(0, 1)))


def turned_back(values: Values) -> torch.Tensor:
    """A sum of rows that were moved is row-major, and turned back it is not: the traced strides say the contrary."""
    x = torch.nn.functional.embedding(values["ids"], values["table"]).transpose(0, 1)
    return torch.tanh(x + summed((x @ values["own_0"]).contiguous())).transpose(0, 1).sin()


def made(program: Callable[[Values], torch.Tensor], *ids: int | str) -> Sample:
    inputs = [Input("ids", ids, torch.int64), Input("table", (VOCAB, HIDDEN))]
    inputs += [Input("own_0", (HIDDEN, HIDDEN)), Input("shared_0", (HIDDEN, HIDDEN))]
    sizes = {s: {"T": 13, "B": 3}[s] for s in ids if isinstance(s, str)}
    gm = record(lambda _, values: [program(values)], inputs, sizes)
    graphs = [of_rank(gm, (), rank) for rank in range(WORLD.size)]
    return Sample(0, 0, WORLD, "", graphs, inputs, [program.__name__], False)


CASES = [(batch_second, ("B", "T")), (batch_second, (2, "T")), (batch_second, (2, 6)), (features_first, (1, "T"))]
CASES += [
    (turned_back, (2, "T")),
    (turned_back, ("B", "T")),
    (turned_back, (3, "T")),
    (product_turned, (2, "T")),
    (product_turned, ("B", "T")),
]


@pytest.mark.parametrize(("program", "ids"), CASES)
def test_a_rewrite_of_turned_values_is_proven(program: Any, ids: Any) -> None:
    trial = attempt(made(program, *ids), strategy="tp")
    assert trial.outcome == "rewritten", trial.detail


@pytest.mark.parametrize("kind", ["first_rows_for_all", "pieces_swapped", "rows_reversed", "turn_dropped"])
def test_a_fault_among_turned_values_is_refuted(kind: str) -> None:
    subject = subject_of(made(batch_second, 2, "T"), strategy="tp")
    assert subject is not None
    mutants = [m for m in (mutate(subject, kind, seed) for seed in range(3)) if m is not None]
    assert mutants and all(m.verdict == "refused" for m in mutants)
