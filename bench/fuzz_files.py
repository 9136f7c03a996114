"""``python -m bench.fuzz_files [--count 2000] [--seed S]``: traces and plans damaged in thousands of ways.

Each goes through the command line, which must take it or refuse it in one line, run nothing of it, and take no more
than twice the memory that the honest file takes. Prints the seed first and every fault with its own; fails on one.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cpcompile.axes import axis_of
from cpcompile.capture import capture
from cpcompile.model_spec import fake_mesh
from cpcompile.plan import Plan
from cpcompile.trace_file import save_trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
corrupted, toy_models = (importlib.import_module(name) for name in ("corrupted", "toy_models"))


def main() -> int:
    """Run it; returns the process's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="of each kind of file")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--minutes", type=float, default=60, help="for each kind of file")
    given = parser.parse_args()
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with fake_mesh({"tp": 4}, 2) as mesh:
            assert mesh is not None
            model, args = toy_models.toy(mesh)
            save_trace(folder / "toy.pt2", capture(model, *args), [axis_of("tp", mesh["tp"])])
        saving = [
            "explain",
            str(folder / "toy.pt2"),
            "--profile",
            "ascend-a3",
            "--save-plan",
            str(folder / "plan.json"),
        ]
        assert not corrupted.judge("honest", folder / "toy.pt2", saving).status and Plan.load(folder / "plan.json").axes
        differ = ["plan", "diff", str(folder / "plan.json")]
        commands = {
            "plan.json": lambda path: [*differ, str(path)],
            "toy.pt2": lambda path: ["explain", str(path), "--profile", "ascend-a3"],
        }
        return sum(_fuzz(folder, file, command, given) for file, command in commands.items()) and 1


def _fuzz(folder: Path, file: str, command: Callable[[Path], list[str]], given: argparse.Namespace) -> int:
    """Corrupt one file; returns the number of faults."""
    outcomes: Counter[str] = Counter()
    most, ends, faults = 0.0, time.monotonic() + 60 * given.minutes, 0
    suffix, data = Path(file).suffix, (folder / file).read_bytes()
    trials = corrupted.trial(folder, data, suffix, given.count, given.seed, command)
    honest = next(trials)
    for outcome in trials:
        kind = outcome.kind.partition(",")[0]
        outcomes[f"{kind} {'refused' if outcome.status else 'taken'}"] += 1
        most = max(most, outcome.bytes_at_most / honest.bytes_at_most)
        if outcome.fault:
            faults += 1
            print(f"{file}: {outcome.kind}: {outcome.fault}", flush=True)
        if time.monotonic() > ends:
            break
    told = ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items()))
    print(f"{file}, {len(data)} bytes: {outcomes.total()} corruptions: {told}")
    print(f"{file}: {faults} faults; memory at most {most:.2f} x the honest file's {honest.bytes_at_most}", flush=True)
    return faults


if __name__ == "__main__":
    sys.exit(main())
