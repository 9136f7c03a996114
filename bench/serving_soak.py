"""vLLM's server under lasting load with this backend: the same tokens all along, and no growth.

``python -m bench.serving_soak [--minutes 10] [--plain] [--json FILE]`` in vLLM's environment. Two ranks on the CPU, the
tests' small V3, on the loopback interface: waves of 64 requests at once, 15 prompts of 6 to 65 tokens, 8 new ones each.
Every answer is compared with transformers'. After each wave: resident memory, open files and threads of every
process of the server. It fails where, over the time after warm-up (the first fifth), a straight line through the memory
of a process rises by more than GROWTH_MIB, or its second half has more files or threads than its first ever had.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "serving"))

from expected import transformers_says
from model_folder import VOCAB, make_folder
from processes import COMPILED, end
from server import Server

AT_ONCE, NEW_TOKENS, LENGTHS = 64, 8, (6, 10, 18, 31, 65) * 3
GROWTH_MIB, WARM_UP = 16.0, 0.2


@dataclass
class Samples:
    """One process after each wave: seconds since the first, MiB, open files, threads."""

    name: str
    seconds: list[float] = field(default_factory=list)
    mib: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def add(self, process: Path, seconds: float) -> None:
        pages = int((process / "statm").read_text().split()[1])
        self.seconds.append(seconds)
        self.mib.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.files.append(len(list((process / "fd").iterdir())))
        self.threads.append(len(list((process / "task").iterdir())))

    def growth(self) -> dict[str, float]:
        """What was added after warm-up: memory by a straight line, the others by their largest values."""
        begin = int(len(self.seconds) * WARM_UP)
        at = np.array(self.seconds[begin:])
        slope = float(np.polyfit(at, np.array(self.mib[begin:]), 1)[0])
        middle = (begin + len(self.seconds)) // 2
        more = {
            k: max(v[middle:]) - max(v[begin:middle]) for k, v in (("files", self.files), ("threads", self.threads))
        }
        return {"mib": slope * float(at[-1] - at[0]), **more}


def processes_of(session: int) -> list[Path]:
    """The live processes that a server has started, itself included."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = status.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.append(status.parent)
    return sorted(found)


def soak(server: Server, prompts: list[list[int]], expected: list[list[int]], minutes: float) -> dict[str, Samples]:
    """Ask waves of ``prompts`` for that long.

    Raises:
        RuntimeError: an answer differs, or a process has come or gone.
    """
    samples: dict[str, Samples] = {}
    began, wave = time.monotonic(), 0
    while time.monotonic() - began < minutes * 60:
        answers = server.ask_at_once(prompts, NEW_TOKENS)
        wrong = [n for n, (found, wanted) in enumerate(zip(answers, expected, strict=True)) if found != wanted]
        if wrong:
            raise RuntimeError(f"wave {wave}: prompts {wrong} have other tokens than transformers'")
        time.sleep(0.5)  # connections are closed
        seconds = time.monotonic() - began
        live = processes_of(server.process.pid)
        if wave and {p.name for p in live} != samples.keys():
            raise RuntimeError(f"wave {wave}: processes were {sorted(samples)}, found {[p.name for p in live]}")
        for process in live:
            name = (process / "cmdline").read_text().replace("\0", " ").strip()
            samples.setdefault(process.name, Samples(name)).add(process, seconds)
        wave += 1
        if wave % 10 == 1:
            print(f"wave {wave}, {seconds:.0f} s:", {k: round(s.mib[-1], 1) for k, s in samples.items()}, flush=True)
    return samples


def report(samples: dict[str, Samples]) -> bool:
    """Print a table; whether nothing has grown."""
    print("| process | waves | minutes | MiB at first, at last | growth after warm-up: MiB | files | threads |")
    print("|---|---|---|---|---|---|---|")
    for number, process in samples.items():
        grown = process.growth()
        told = f"{len(process.mib)} | {process.seconds[-1] / 60:.1f} | {process.mib[0]:.0f}, {process.mib[-1]:.0f}"
        told += f" | {grown['mib']:+.1f} | {grown['files']:+d} | {grown['threads']:+d}"
        print(f"| {number} {process.name[:60]} | {told} |")
    grown_by = [process.growth() for process in samples.values()]
    return all(g["mib"] <= GROWTH_MIB and g["files"] <= 0 and g["threads"] <= 0 for g in grown_by)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.serving_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--plain", action="store_true", help="without this backend, to compare")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    different = [torch.randint(3, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]
    which = [n % len(different) for n in range(AT_ONCE)]
    options = {"cpcompile": {"strategy": "tp", "require": ["*"]}}
    flags: dict[str, Any] = {"compilation-config": COMPILED, "additional-config": options}
    with tempfile.TemporaryDirectory() as name:
        model = make_folder(Path(name) / "model", "v3")
        wanted = [answer["tokens"] for answer in transformers_says(model, different, NEW_TOKENS)]
        server = Server(model, Path(name), {"compilation-config": {"mode": "NONE"}} if arguments.plain else flags)
        try:
            server.wait_until_ready()
            samples = soak(server, [different[n] for n in which], [wanted[n] for n in which], arguments.minutes)
        finally:
            end(server.process)
        rewritten = server.said().count("7 of 7 all-reduces rewritten")
    print(f"{rewritten} ranks rewrote all of 7 all-reduces")
    if arguments.json:
        arguments.json.write_text(json.dumps({key: asdict(value) for key, value in samples.items()}))
    return 0 if report(samples) and rewritten == (0 if arguments.plain else 2) else 1


if __name__ == "__main__":
    sys.exit(main())
