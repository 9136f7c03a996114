"""Random graphs through the pipeline, and mutations of what it makes of them, with new seeds.

``python -m bench.fuzz graphs [--count 10000] [--seed S]`` compiles small random graphs of 2 to 8 ranks and compares
what each rank's outputs were with what they become. ``python -m bench.fuzz mutants [--count 2000] [--seed S]`` mutates
rewritten graphs and asks the static proof about each. Both print their seed first, every fault with its own, and fail
if there is one.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fuzzing.mutants import KINDS, mutate, subject_of
from fuzzing.programs import Switches, sample
from fuzzing.trials import FAULTS, Trial, attempt, fresh_seed

MOST_FALSE_REFUSALS = 0.01


def graphs(count: int, seed: int, switches: Switches, minutes: float) -> int:
    """Compile ``count`` graphs; returns the process's exit status."""
    outcomes: Counter[str] = Counter()
    alone: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    ends = time.monotonic() + 60 * minutes
    for number in range(seed, seed + count):
        trial = attempt(sample(number, switches), strategy="tp")
        outcomes[trial.outcome] += 1
        steps.update(trial.sample.names)
        if trial.outcome == "left alone":
            alone[trial.detail] += 1
        elif trial.outcome not in ("rewritten", "left alone"):
            print(
                f"graph {number}: {trial.outcome}: {_where(trial)}: {trial.detail.strip().splitlines()[-1][:300]}",
                flush=True,
            )
        if trial.outcome in FAULTS:
            _print_smallest(number, switches)
        if time.monotonic() > ends:
            break
    total = sum(outcomes.values())
    print(f"{total} graphs of {len(steps)} kinds of step: " + ", ".join(f"{n} {o}" for o, n in outcomes.most_common()))
    print("left alone: " + "; ".join(f"{n} × {why or 'the plan changes nothing'}" for why, n in alone.most_common()))
    false = outcomes["refused falsely"] / total
    print(f"rewritten: {outcomes['rewritten'] / total:.1%}; false refusals: {false:.2%}")
    return int(any(outcomes[fault] for fault in FAULTS) or false > MOST_FALSE_REFUSALS)


def _where(trial: Trial) -> str:
    world = trial.sample.world
    groups = ", ".join(f"{name} {kind}" for name, kind in world.kinds.items())
    return f"{trial.sample.form}, {world.size} ranks ({groups}), {' '.join(trial.sample.names)}"


def _print_smallest(seed: int, switches: Switches) -> None:
    """The module of fewest steps that fails for this seed, on the last rank."""
    for most in range(10):
        smaller = attempt(sample(seed, switches, most), strategy="tp")
        if smaller.outcome in FAULTS:
            print(f"  smallest: sample({seed}, most={most}): {_where(smaller)}\n{smaller.detail}")
            print(smaller.sample.graphs[-1].graph)
            return


def mutants(count: int, seed: int, switches: Switches, minutes: float) -> int:
    """Judge ``count`` mutants; returns the process's exit status."""
    found: defaultdict[str, Counter[str]] = defaultdict(Counter)
    ends, number = time.monotonic() + 60 * minutes, seed
    while sum(sum(c.values()) for c in found.values()) < count and time.monotonic() < ends:
        subject = subject_of(sample(number, switches), strategy="tp")
        for kind in KINDS if subject is not None else ():
            assert subject is not None
            mutant = mutate(subject, kind, number)
            if mutant is None:
                continue
            found[kind][mutant.verdict] += 1
            if mutant.verdict == "survivor":
                print(f"SURVIVOR: {kind} in {subject.name}: {mutant.detail}", flush=True)
        number += 1
    for kind in KINDS:
        print(f"{kind:28} " + ", ".join(f"{n} {verdict}" for verdict, n in found[kind].most_common()))
    verdicts = sum(found.values(), Counter())
    print(f"{verdicts.total()} mutants of {sum(map(bool, found.values()))} kinds: {dict(verdicts)}")
    return int(verdicts["survivor"] > 0)


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("what", choices=("graphs", "mutants"))
    parser.add_argument("--count", type=int, default=0, help="how many (10000 graphs, 2000 mutants)")
    parser.add_argument("--seed", type=int, default=None, help="the first seed; a new one if not given")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long")
    parser.add_argument("--without", nargs="*", default=[], help="switches to turn off: " + ", ".join(vars(Switches())))
    given = parser.parse_args()
    logging.getLogger("cpcompile").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    seed = fresh_seed() if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    run = {"graphs": graphs, "mutants": mutants}[given.what]
    count = given.count or {"graphs": 10000, "mutants": 2000}[given.what]
    return run(count, seed, Switches(**dict.fromkeys(given.without, False)), given.minutes)


if __name__ == "__main__":
    sys.exit(main())
