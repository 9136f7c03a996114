"""Rewritten graphs with one mutation each: does the static proof refuse every one that changes a number?"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch._dispatch.python import enable_python_dispatcher

from cpcompile import axis_rewrite
from cpcompile.axes import Axis
from cpcompile.passes.materialise import fake_mode_of
from cpcompile.pipeline import copy_graph
from fuzzing.interpreter import Failed, Stuck, difference, run_world
from fuzzing.mutations import KINDS, Mutation, NotHere
from fuzzing.programs import Sample
from fuzzing.trials import attempt, call_inputs, changed, counts_of
from fuzzing.worlds import World, on_every_rank

Prove = Callable[[fx.GraphModule], bool]


@dataclass(frozen=True)
class Subject:
    """A rewrite that holds, of every rank.

    Args:
        name: what it is, for messages.
        world: its ranks.
        originals: each rank's graph as it came.
        rewritten: each rank's rewritten graph.
        proofs: each rank's static proof of another graph in the place of its rewritten one.
        steps: for a seed, every rank's inputs.
        tolerance: relative difference that rounding may make.
    """

    name: str
    world: World
    originals: Sequence[fx.GraphModule]
    rewritten: Sequence[fx.GraphModule]
    proofs: Sequence[Prove]
    steps: Callable[[int], list[list[Any]]]
    tolerance: float = 1e-8

    def holds(self, graphs: Sequence[fx.GraphModule]) -> bool:
        """Whether every rank's proof accepts ``graphs``."""
        refused = False

        def ask(rank: int, _: Any) -> bool:
            nonlocal refused
            refused = refused or not self.proofs[rank](graphs[rank])  # one rank's refusal is enough
            return refused

        for verdict in on_every_rank(self.world, ask):
            if isinstance(verdict, BaseException):
                raise verdict
        return not refused

    def differ(self, graphs: Sequence[fx.GraphModule], seeds: Sequence[int]) -> str:
        """How the numbers of ``graphs`` differ from the original's; empty if they do not.

        Raises:
            Failed: an op of ``graphs`` does not run.
        """
        for seed in seeds:
            inputs = self.steps(seed)
            wanted = run_world(self.world, self.originals, inputs)
            try:
                told = difference(wanted, run_world(self.world, graphs, self.steps(seed)), self.tolerance)
            except Failed:
                raise
            except Stuck as stuck:
                told = str(stuck)
            if told:
                return told
        return ""


@contextlib.contextmanager
def proofs_noted() -> Iterator[dict[int, list[Prove]]]:
    """Notes every proof that the pipeline runs, by rank, so that it can be refused about another rewritten graph."""
    noted: dict[int, list[Prove]] = {}
    prove = axis_rewrite.prove

    def note(before: fx.GraphModule, gm: fx.GraphModule, axis: Axis, *args: Any, **kwargs: Any) -> Any:
        def again(other: fx.GraphModule) -> bool:
            return prove(before, other, axis, *args, **kwargs).holds

        noted.setdefault(axis.ranks[axis.rank], []).append(again)
        return prove(before, gm, axis, *args, **kwargs)

    axis_rewrite.prove = note  # type: ignore[assignment]
    try:
        yield noted
    finally:
        axis_rewrite.prove = prove


def subject_of(sample: Sample, **options: Any) -> Subject | None:
    """The rewrite of one axis of ``sample``; None where it is of several, or none."""
    with proofs_noted() as noted:
        trial = attempt(sample, **options)
    steps = [s for c in trial.compiled for v in c.variants for s in v.steps]
    once = [len(noted.get(rank, ())) for rank in range(sample.world.size)] == [1] * sample.world.size
    if (
        trial.outcome != "rewritten"
        or len(steps) != sample.world.size
        or not once
        or not all(map(changed, trial.compiled))
    ):
        return None
    counts = counts_of(sample)
    more = [t + d for t in counts for d in (0, 1)] if counts != [0] else counts

    def inputs(seed: int) -> list[list[Any]]:
        return call_inputs(sample, sample.graphs[0], more[seed % len(more)], seed)

    rewritten = [c.variants[-1].gm for c in trial.compiled]
    proofs = [noted[rank][0] for rank in range(sample.world.size)]
    return Subject(_named(sample), sample.world, sample.graphs, rewritten, proofs, inputs)


def _named(sample: Sample) -> str:
    return f"graph {sample.seed} ({sample.form}, {sample.world.size} ranks: {', '.join(sample.names)})"


@dataclass(frozen=True)
class Mutant:
    """One mutation of a subject.

    Args:
        kind: a key of ``KINDS``.
        verdict: ``"refused"``, ``"equivalent"`` (accepted, and the numbers are the same), ``"survivor"`` (accepted, and
            they are not: a fault), ``"raises"`` (accepted, and an op refuses to run, as a view of strided memory does).
        detail: what it changed, and how the numbers differ.
    """

    kind: str
    verdict: str
    detail: str


def mutate(subject: Subject, kind: str, seed: int) -> Mutant | None:
    """Put a mutation of ``kind`` into every rank's graph alike; None where there is no place for it."""
    graphs, told = [], ""
    for rank, gm in enumerate(subject.rewritten):
        mutant = fx.GraphModule(gm, copy_graph(gm.graph))
        # Ranks' graphs have the same nodes in the same order: the same draws find the same place.
        site = Mutation(mutant.graph, random.Random(seed), subject.world, rank)
        try:
            told = KINDS[kind](site)
            _retold(mutant)
        except NotHere:
            return None
        graphs.append(mutant)
    return _judged(subject, kind, graphs, told)


def _judged(subject: Subject, kind: str, graphs: Sequence[fx.GraphModule], told: str) -> Mutant:
    if not subject.holds(graphs):
        return Mutant(kind, "refused", told)
    try:
        differ = subject.differ(graphs, range(6))
    except Failed as failed:
        return Mutant(kind, "raises", f"{told}: {failed}")
    return Mutant(kind, "survivor" if differ else "equivalent", f"{told}: {differ}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Shapes that do not go together are no news here."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = False


def _retold(gm: fx.GraphModule) -> None:
    """Say what the mutated graph's shapes are: a planner's fault has shapes that agree with each other."""
    mode = fake_mode_of(gm)
    assert mode is not None and mode.shape_env is not None
    with _quiet(), enable_python_dispatcher(), mode, mode.shape_env.suppress_guards():  # type: ignore[no-untyped-call]
        for node in gm.graph.nodes:
            if node.op != "call_function":
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
            if node.meta.pop("mutated", False) or any(n.meta.get("moved") for n in node.all_input_nodes):
                node.meta["moved"] = True
                try:
                    node.meta["val"] = node.target(*args, **kwargs)
                except Exception as error:
                    raise NotHere(f"{node}: {error}") from error
    gm.graph.lint()
    gm.recompile()
