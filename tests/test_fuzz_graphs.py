"""Random graphs through the pipeline on all ranks; ``python -m bench.fuzz graphs`` runs others, with new seeds."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

import pytest
import torch
import torch.fx as fx
from fuzzing import trials
from fuzzing.interpreter import Stuck, run_world
from fuzzing.programs import sample
from fuzzing.trials import FAULTS, attempt
from fuzzing.worlds import AXIS, World

from cpcompile.compiled import Compiled

SEEDS = range(30)
PAIR = World(2, {AXIS: ((0, 1),)})


@pytest.fixture(scope="module")
def outcomes() -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for seed in SEEDS:
        trial = attempt(sample(seed), strategy="tp")
        assert trial.outcome not in FAULTS, f"seed {seed}: {trial.detail}"
        found[trial.outcome] += 1
    return found


def test_no_graph_gets_other_numbers_and_most_are_rewritten(outcomes: collections.Counter[str]) -> None:
    assert outcomes["rewritten"] > 0.5 * len(SEEDS)


def test_a_wrong_rewrite_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control: with one rank's rewritten graph off in one constant, the fuzzer says so."""
    compile_sample = trials.compile_sample

    def spoilt(*args: Any, **kwargs: Any) -> list[Compiled]:
        compiled: list[Compiled] = compile_sample(*args, **kwargs)
        for variant in compiled[-1].variants:
            output = variant.gm.graph.output_node()
            with variant.gm.graph.inserting_before(output):
                node = variant.gm.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0][0], 1.001))
            output.args = ((node, *output.args[0][1:]),)
        return compiled

    monkeypatch.setattr(trials, "compile_sample", spoilt)
    assert attempt(sample(0), strategy="tp").outcome == "wrong numbers"


def test_the_same_seed_makes_the_same_graph() -> None:
    first, again = sample(5), sample(5)
    assert [str(g.graph) for g in first.graphs] == [str(g.graph) for g in again.graphs]
    assert dataclasses.replace(first, graphs=()) == dataclasses.replace(again, graphs=())


def graph(*ops: Any) -> fx.GraphModule:
    """``x`` through collectives with their waits, one after another."""
    made = fx.Graph()
    node = made.placeholder("x")
    for target, *args in ops:
        node = made.call_function(target, (node, *args))
    made.output((node,))
    return fx.GraphModule({}, made)


C10D = torch.ops._c10d_functional
WAIT = (C10D.wait_tensor.default,)
ROWS = [[torch.tensor([[1.0], [2.0]])], [torch.tensor([[3.0], [5.0]])]]


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        ((C10D.all_reduce.default, "sum", AXIS), [[[4.0], [7.0]]] * 2),
        ((C10D.all_reduce.default, "max", AXIS), [[[3.0], [5.0]]] * 2),
        ((C10D.all_reduce.default, "avg", AXIS), [[[2.0], [3.5]]] * 2),
        ((C10D.all_reduce.default, "product", AXIS), [[[3.0], [10.0]]] * 2),
        ((C10D.reduce_scatter_tensor.default, "sum", 2, AXIS), [[[4.0]], [[7.0]]]),
        ((C10D.all_gather_into_tensor.default, 2, AXIS), [[[1.0], [2.0], [3.0], [5.0]]] * 2),
        ((C10D.broadcast.default, 1, AXIS), [[[3.0], [5.0]]] * 2),
    ],
    ids=lambda x: x[0]._opname if isinstance(x, tuple) else "",
)
def test_the_interpreter_communicates(op: tuple[Any, ...], wanted: list[Any]) -> None:
    found = run_world(PAIR, [graph(op, WAIT)] * 2, ROWS)
    assert [values[0].tolist() for values in found] == wanted


def test_what_is_read_before_its_wait_is_not_there() -> None:
    found = run_world(PAIR, [graph((C10D.all_reduce.default, "sum", AXIS))] * 2, ROWS)
    assert all(values[0].isnan().all() for values in found)


def test_ranks_that_do_not_meet_are_stuck() -> None:
    with pytest.raises(Stuck, match="wait for ever"):
        run_world(PAIR, [graph((C10D.all_reduce.default, "sum", AXIS), WAIT), graph(WAIT)], ROWS)
