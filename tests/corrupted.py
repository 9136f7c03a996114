"""Damaged and hostile copies of traces and plans, from a seed, and what the command line makes of them; for tests."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from cpcompile.cli import app
from cpcompile.errors import CpcompileError
from cpcompile.plan import Plan
from cpcompile.trace_file import load_trace

HARMED = "HARMED"  # what hostile code would make in the current folder
EVIL = f"__import__('pathlib').Path('{HARMED}').touch()"
_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 10**9, 2**63, 10**4000, 1.5, float("nan"), float("inf"), "", "x", EVIL, "a" * 10_000, [], [[]],
    {}, {"node": "x"}, {"tuple": [1]}, {"graph": {}}, ["Pow", 10, 10**9], ["Mul", 2**62, 2**62], "os.system", "s0",
)  # fmt: skip


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(HARMED),)


def _flipped(data: bytes, dice: random.Random) -> bytes:
    found = bytearray(data)
    for _ in range(dice.randint(1, 8)):
        found[dice.randrange(len(found))] ^= dice.randint(1, 255)
    return bytes(found)


def _cut(data: bytes, dice: random.Random) -> bytes:
    first, last = sorted(dice.sample(range(len(data)), 2))
    return dice.choice([data[:first], data[:first] + data[last:], data[last:] + data[:first]])


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in ``value`` with every key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def _swapped(text: bytes, dice: random.Random) -> bytes:
    """JSON with another value, of any type, in some places; or a key, an item or a value of its own elsewhere."""
    data = json.loads(text)
    for _ in range(dice.choice([1, 1, 1, 3])):
        places = list(_places(data))
        if not places:
            break
        owner, key = dice.choice(places)
        other, at = dice.choice(places)
        match dice.randrange(5):
            case 0 if isinstance(owner, dict):
                owner[dice.choice(["x", EVIL, "format"])] = owner.pop(key)
            case 1:
                del owner[key]
            case 2:
                owner[key] = json.loads(json.dumps(other[at]))
            case _:
                owner[key] = dice.choice(_VALUES)
    return json.dumps(data).encode()


def _nested(text: bytes, dice: random.Random) -> bytes:
    data = json.loads(text)
    owner, key = dice.choice(list(_places(data)))
    owner[key] = "@"
    depth = dice.choice([8, 30, 300, 900, 5000])
    opened, closed = dice.choice([("[", "]"), ('{"tuple":[', "]}"), ('["Add",1,', "]"), ('{"graph":', "}")])
    return json.dumps(data).encode().replace(b'"@"', (opened * depth + "1" + closed * depth).encode())


def _doubled(text: bytes, dice: random.Random) -> bytes:
    """An object with a key twice, or a number of many digits."""
    places = [i for i in range(len(text)) if text[i : i + 1] == b"{"]
    at = dice.choice(places) + 1
    more = dice.choice([b'"name":1,"name":2,', b'"x":' + b"9" * dice.choice([100, 5000]) + b",", b'"format":2,"op":0,'])
    return text[:at] + more + text[at:]


TEXTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_swapped, _swapped, _swapped, _nested, _doubled)


def _resealed(data: bytes, dice: random.Random) -> bytes:
    """A trace of which one member is other JSON, with right checksums."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = dice.choice(["header.json", "graph.json", "graph.json", "graph.json"])
    members[name] = dice.choice(TEXTS)(members[name], dice)
    return _zipped(members)


def _zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def _archive(data: bytes, dice: random.Random) -> bytes:
    """Members twice, pickles, and bombs, whose sizes are told or hidden."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    kind = dice.randrange(4)
    if kind == 0:
        first = _zipped(members)
        file = io.BytesIO(first)
        with zipfile.ZipFile(file, "a") as archive, warnings.catch_warnings(action="ignore"):
            archive.writestr("constants.bin", b"more")
        return file.getvalue()
    if kind == 1:
        return _zipped({**members, dice.choice(["graph.pkl", "graph.json", "constants.bin"]): pickle.dumps(_Evil())})
    name = dice.choice(list(members))
    bomb = _zipped({**members, name: b" " * (8 << 20) + members[name]}, zipfile.ZIP_DEFLATED)
    if kind == 2:
        return bomb
    small = len(members[name]).to_bytes(4, "little")
    return bomb.replace((len(members[name]) + (8 << 20)).to_bytes(4, "little"), small).replace(b"\x08\x00", b"\x00\x00")


TRACES = (_flipped, _cut, _resealed, _resealed, _resealed, _resealed, _archive)
PLANS = (_flipped, _cut, *TEXTS)


@dataclass(frozen=True)
class Outcome:
    """What became of one file: its kind, the exit status, what was told, and the most memory that was taken."""

    kind: str
    status: int
    told: str
    bytes_at_most: int
    fault: str


def judge(kind: str, path: Path, arguments: list[str], honest: int = 0) -> Outcome:
    """Load a file, in no more than twice the memory; give it to the command line: taken, or refused in one line."""
    tracemalloc.start()
    with contextlib.suppress(CpcompileError):
        load_trace(path) if path.suffix == ".pt2" else Plan.load(path)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    result = CliRunner().invoke(app, arguments)
    fault = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        fault = f"{type(result.exception).__name__}: {result.exception}"
    elif len(result.stderr.strip().splitlines()) != {1: 0, 2: 1}.get(result.exit_code, -1) and result.exit_code:
        fault = f"exit status {result.exit_code}: {result.stderr[-300:]}"  # 1: plans differ; 2: an error, in one line
    elif honest and most > max(2 * honest, 1 << 18):  # below that, it is the depth of a stack that was tried
        fault = f"{most} bytes, where the honest file took {honest}"
    elif os.path.exists(HARMED):
        fault = "code of the file was run"
    return Outcome(kind, result.exit_code, result.stderr.strip(), most, fault)


def corruptions(
    data: bytes, kinds: tuple[Callable[[bytes, random.Random], bytes], ...], count: int, seed: int
) -> Iterator[tuple[str, bytes]]:
    """``count`` corrupted copies of ``data``, each with what was done to it."""
    for number in range(seed, seed + count):
        dice = random.Random(number)
        kind = dice.choice(kinds)
        yield f"{kind.__name__.strip('_')}, seed {number}", kind(data, dice)


def trial(
    folder: Path, data: bytes, suffix: str, count: int, seed: int, arguments: Callable[[Path], list[str]]
) -> Iterator[Outcome]:
    """Corrupt a file ``count`` times and judge each; the first outcome is that of the honest file.

    Args:
        folder: where files may be made; becomes the current folder.
        data: the honest file.
        suffix: ``".pt2"`` for a trace, ``".json"`` for a plan.
        count: corruptions.
        seed: of the first one.
        arguments: of the command line, for a file.
    """
    os.chdir(folder)
    path = folder / f"honest{suffix}"
    path.write_bytes(data)
    judge("warm", path, arguments(path))
    honest = judge("honest", path, arguments(path))
    yield honest
    for kind, other in corruptions(data, TRACES if suffix == ".pt2" else PLANS, count, seed):
        target = folder / f"other{suffix}"
        target.write_bytes(other)
        yield judge(kind, target, arguments(target), honest.bytes_at_most)
