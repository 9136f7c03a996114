"""Place: choose a placement for every value of one axis so that communication and computation take least time.

The optimum is found at the ends of the range of token counts and, where the two plans differ, at the token count at
which they cost the same, until no better plan turns up in between (Eisner and Severance, "Mathematical techniques
for efficient record segmentation in large shared databases", 1976): the intervals of T with their best plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from cpcompile.costs import PICOSECONDS, HardwareProfile
from cpcompile.passes.cluster import lower_bound, solve_clustered
from cpcompile.passes.mincut import (
    LABELS,
    P,
    Problem,
    R,
    S,
    Solution,
    available_levels,
    cost_of,
    is_exact,
    raise_route,
    solve,
)
from cpcompile.passes.placement_problem import PlacementGraph, Polynomial, evaluate, latency_free
from cpcompile.plan import AxisPlan, Interval

MANY_TOKENS = 1 << 20
LARGE_STEP = 1 << 16
MOST_SOLVES = 8
MANY_CHOICES = 200
WORTH_A_GRAPH = 0.05


@dataclass(frozen=True)
class Candidate:
    """A labelling that was the optimum at ``at`` tokens, and its cost as a function of T."""

    at: int
    solution: Solution
    raises: tuple[str, ...]
    seconds: Callable[[int], float]


def place(
    graph: PlacementGraph, hardware: HardwareProfile, strategy: str, fingerprint: str, at: int | None = None
) -> AxisPlan:
    """Make the plan of one axis.

    Args:
        graph: choices, values and uses.
        hardware: the machine's profile.
        strategy: ``"auto"`` (best plan per interval of T); for all others the plan of a large step, at every T.
        fingerprint: identifies the graph.
        at: the token count whose best plan ``"auto"`` takes for all; None for intervals.
    """
    tokens = graph.known.tokens
    static = int(tokens) if tokens is not None and tokens.is_number else None
    if strategy != "auto":
        free = latency_free(hardware)
        best = _optimum(graph, free, static or LARGE_STEP)
        pieces: list[tuple[int, int | None, Candidate]] = [(0, None, best)]
        hardware = free
    elif static is not None or at is not None:
        pieces = [(0, None, _optimum(graph, hardware, static or at or 1))]
    else:
        pieces = _intervals(graph, hardware)
    intervals = tuple(_interval(graph, hardware, *piece) for piece in pieces)
    axis = graph.known.axis
    return AxisPlan(
        axis.name, axis.size, str(tokens), fingerprint, strategy, hardware.name, intervals, layout=axis.layout
    )


def _optimum(graph: PlacementGraph, hardware: HardwareProfile, tokens: int) -> Candidate:
    problem = graph.problem(tokens, hardware)
    solution = _solve(problem)
    levels = available_levels(problem, solution.labels)
    raises = tuple(
        raise_route(value, solution.labels[value.op], level)[1]
        for value, level in zip(problem.values, levels, strict=True)
    )
    return Candidate(tokens, solution, raises, _cost_function(graph, hardware, solution.labels, raises))


def _solve(problem: Problem) -> Solution:
    """The minimum cut where it is exact, else the integer programme; by kinds of layers where that is large."""
    small = is_exact(problem) or len(problem.ops) <= MANY_CHOICES
    return solve(problem) if small else solve_clustered(problem)


def _cost_function(
    graph: PlacementGraph,
    hardware: HardwareProfile,
    labels: tuple[int, ...],
    raises: tuple[str, ...],
    left_out: Collection[int] = (),
) -> Callable[[int], float]:
    """Seconds of a labelling in T: a polynomial for whole values, and one for what a shard's padding stretches.

    Choices whose numbers are ``left_out`` count nothing.
    """
    size = graph.known.axis.size
    whole: list[float] = [0.0, 0.0, 0.0, 0.0]
    stretched: list[float] = [0.0, 0.0, 0.0, 0.0]

    def add(to: list[float], polynomial: Polynomial, factor: float, shift: int = 0) -> None:
        for power, c in enumerate(polynomial):
            to[min(power + shift, 3)] += c * factor

    for number, (choice, label) in enumerate(zip(graph.choices, labels, strict=True)):
        if not choice.reduced and number not in left_out:
            add(stretched if label == S else whole, choice.seconds, 1 / size if label == S else 1.0)
    for (number, per_token), route in zip(graph.values.values(), raises, strict=True):
        if route == "reduce":
            whole[0] += hardware.all_reduce_latency
            shift = 0 if graph.choices[number].picks else 1
            add(whole, per_token, 2 * hardware.seconds_per_byte(size), shift=shift)
        elif route:
            steps = route.count("+") + 1
            whole[0] += steps * hardware.latency
            add(stretched, per_token, steps * hardware.seconds_per_byte(size), shift=1)

    def seconds(tokens: int) -> float:
        padded = graph.known.axis.rows(tokens) * size
        return evaluate(tuple(whole), tokens) + evaluate(tuple(stretched), tokens) * padded / max(tokens, 1)

    return seconds


def _intervals(graph: PlacementGraph, hardware: HardwareProfile) -> list[tuple[int, int | None, Candidate]]:
    """Pieces ``(first, last, candidate)`` by ascending T, from 0, without gaps."""
    solves = 2
    found = {t: _optimum(graph, hardware, t) for t in (1, MANY_TOKENS)}
    pending = [(1, MANY_TOKENS)]
    while pending and solves < MOST_SOLVES:
        low, high = pending.pop()
        a, b = found[low], found[high]
        if a.solution.labels == b.solution.labels:
            continue
        middle = _crossing(a.seconds, b.seconds, low, high)
        if middle is None or middle in found:
            continue
        solves += 1
        best = _optimum(graph, hardware, middle)
        if best.seconds(middle) < min(a.seconds(middle), b.seconds(middle)) * (1 - 1e-9):
            found[middle] = best
            pending += [(low, middle), (middle, high)]
    candidates = [found[t] for t in sorted(found)]
    # What all of them compute alike says nothing of which to keep, and with attention's T*T would drown the rest.
    labels = zip(*(c.solution.labels for c in candidates), strict=True)
    alike = {number for number, each in enumerate(labels) if len(set(each)) == 1}
    return _fewer(
        [replace(c, seconds=_cost_function(graph, hardware, c.solution.labels, c.raises, alike)) for c in candidates]
    )


def _fewer(candidates: list[Candidate]) -> list[tuple[int, int | None, Candidate]]:
    """Drop candidates that gain less than ``WORTH_A_GRAPH`` wherever they are best: each is a graph to compile.

    The gain is relative to the time of collectives and of what the candidates compute differently.
    """
    while True:
        pieces = _envelope(candidates)
        regrets = [
            (_regret(piece, [other for _, _, other in pieces if other is not piece[2]]), number)
            for number, piece in enumerate(pieces)
        ]
        least, number = min(regrets)
        if least > WORTH_A_GRAPH:
            return pieces
        candidates = [candidate for i, (_, _, candidate) in enumerate(pieces) if i != number]


def _regret(piece: tuple[int, int | None, Candidate], others: list[Candidate]) -> float:
    """Largest relative loss within ``piece`` if the best of ``others`` took its place."""
    first, last, candidate = piece
    low, high = max(first, 1), MANY_TOKENS if last is None else last
    samples = {low, high, *(round(low * (high / low) ** (k / 8)) for k in range(1, 8))}
    return max(_loss(candidate.seconds(t), [o.seconds(t) for o in others]) for t in samples)


def _loss(best: float, others: list[float]) -> float:
    """By how much more the best of ``others`` takes, relative to ``best``, which may take no time at all."""
    least = min(others, default=float("inf"))
    return 0.0 if least <= best else least / best - 1 if best else float("inf")


def _crossing(a: Callable[[int], float], b: Callable[[int], float], low: int, high: int) -> int | None:
    """The last token count in ``[low, high)`` at which ``a`` still costs no more than ``b``; None if there is none."""
    if a(low) > b(low) or a(high) <= b(high):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a(middle) <= b(middle) else (low, middle)
    return low


def _envelope(candidates: list[Candidate]) -> list[tuple[int, int | None, Candidate]]:
    """Neighbouring candidates meet where their costs cross; equal labellings become one piece."""
    pieces: list[tuple[int, int | None, Candidate]] = []
    first = 0
    for a, b in itertools.pairwise(candidates):
        if a.solution.labels == b.solution.labels and a.raises == b.raises:
            continue
        last = _crossing(a.seconds, b.seconds, a.at, b.at)
        last = a.at if last is None else last
        pieces.append((first, last, a))
        first = last + 1
    return [*pieces, (first, None, candidates[-1])]


def _interval(
    graph: PlacementGraph, hardware: HardwareProfile, first: int, last: int | None, best: Candidate
) -> Interval:
    problem = graph.problem(best.at, hardware)
    bound = best.solution.bound or lower_bound(problem)
    unchanged = cost_of(problem, [P if c.reduced else S if c.gathered else R for c in graph.choices])
    assert unchanged is not None
    labels = {
        choice.node.name: LABELS[label]
        for choice, label in zip(graph.choices, best.solution.labels, strict=True)
        if label != R and not choice.reduced and not choice.gathered
    }
    raises = {node.name: route for node, route in zip(graph.values, best.raises, strict=True) if route}
    return Interval(
        first,
        last,
        labels,
        raises,
        best.solution.solver,
        best.solution.cost / PICOSECONDS,
        unchanged / PICOSECONDS,
        bound / PICOSECONDS,
        best.at,
    )
