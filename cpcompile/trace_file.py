"""Trace files: a captured graph with its axes and facts, in one file that explains the same as the model did.

A trace file is a zip archive of ``header.json``, ``graph.json`` (``trace_writer``) and ``constants.bin``: data alone,
so that loading one from a stranger runs nothing of it. Its members are not compressed: what is read is no larger than
the file. Shapes stay symbolic, values of parameters are not stored.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.fx as fx

from cpcompile.axes import Axis, is_group, resolve_group
from cpcompile.capture import Trace
from cpcompile.errors import CpcompileError, TraceError
from cpcompile.exchange import OfflineExchange
from cpcompile.graph_inputs import GraphInput, unique_names
from cpcompile.layouts import KINDS
from cpcompile.passes.collectives import group_name_of, is_collective
from cpcompile.passes.context import KEY, GraphContext
from cpcompile.replication import InputFact, Kind, input_facts
from cpcompile.strict_json import read_json
from cpcompile.trace_reader import GraphReader
from cpcompile.trace_sizes import checked, integer, told
from cpcompile.trace_writer import GraphWriter

FORMAT = 2
SUFFIX = ".pt2"
MEMBERS = ("header.json", "graph.json", "constants.bin")
MOST_BYTES = 1 << 30  # of a file
_KINDS = get_args(Kind)


@dataclass
class SavedTrace:
    """A trace as it was read from a file.

    Args:
        trace: graph, inputs (with fake values) and seconds. ``trace.gm.meta`` has the :class:`GraphContext`.
        axes: the mesh axes that the model was sharded over.
        replicated: the facts that were established when it was saved, as the ``replicated`` option declares them.
        groups: group that the graph names → its ranks, as far as they were known where it was saved.
    """

    trace: Trace
    axes: list[Axis]
    replicated: tuple[str, ...]
    groups: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)


def save_trace(path: str | Path, trace: Trace, axes: Sequence[Axis], replicated: Sequence[str] = ()) -> None:
    """Write ``trace`` to ``path``.

    Args:
        path: the file, by convention ``*.pt2``.
        trace: what ``capture`` made; left as it is.
        axes: the mesh axes.
        replicated: patterns of inputs that are the same on every rank, as in ``Options``.

    Raises:
        TraceError: the graph holds something that cannot be stored, or the file cannot be written.
    """
    header = {
        "format": FORMAT,
        "cpcompile": version("cpcompile"),
        "torch": torch.__version__,
        "axes": [dataclasses.asdict(axis) for axis in axes],
        "groups": _groups(trace.gm, axes),
        "inputs": [{"name": i.name, "kind": i.kind} for i in trace.inputs],
        "facts": {axis.name: [[f.replicated, f.source] for f in _facts(trace, axis, replicated)] for axis in axes},
        "seconds": dict(trace.seconds),
    }
    writer = GraphWriter()
    try:
        texts = [json.dumps(header, indent=1), json.dumps(writer.data(trace.gm), separators=(",", ":"))]
        members = [*(text.encode() for text in texts), bytes(writer.raw)]
    except Exception as error:  # whatever a constant of the graph raises
        raise TraceError(f"the graph cannot be stored: {_why(error)}") from error
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in zip(MEMBERS, members, strict=True):
                archive.writestr(name, data)
    except OSError as error:
        raise TraceError(f"cannot write the trace {path}: {error.strerror}") from error


def load_trace(path: str | Path, libraries: Collection[str] | None = None) -> SavedTrace:
    """Read a trace. Nothing of the file is run.

    Args:
        path: the file.
        libraries: of ops that the graph may call beside those that cpcompile knows; None takes those that the
            environment variable ``CPCOMPILE_TRACE_LIBRARIES`` names, by commas. Their ops must be registered.

    Raises:
        TraceError: the file is missing, damaged, of another format, or no trace.
    """
    header, graph, constants = _read(path)
    if libraries is None:
        libraries = os.environ.get("CPCOMPILE_TRACE_LIBRARIES", "").split(",")
    try:
        return _assemble(header, GraphReader(graph, constants, libraries).read())
    except Exception as error:  # a wrong graph can fail in any way
        made = f"made with cpcompile {told(header.get('cpcompile'))} and torch {told(header.get('torch'))}"
        raise TraceError(f"{path}: the graph cannot be read ({_why(error)}); it was {made}: trace again") from error


@contextmanager
def blaming(path: str | Path) -> Iterator[None]:
    """Errors of what is done with a loaded trace, in one line that names the file: it may say what cannot be."""
    try:
        yield
    except CpcompileError:
        raise
    except Exception as error:
        raise TraceError(f"{path}: the trace cannot be used ({_why(error)}): trace again, or report it") from error


def _groups(gm: fx.GraphModule, axes: Sequence[Axis]) -> dict[str, list[int]]:
    """The ranks of every group that the graph names."""
    found = {axis.group_name: list(axis.ranks) for axis in axes}
    for node in gm.graph.nodes:
        name = group_name_of(node) if is_collective(node) else ""
        if name and name not in found and is_group(name):
            found[name] = list(dist.get_process_group_ranks(resolve_group(name)))
    return found


def _facts(trace: Trace, axis: Axis, replicated: Sequence[str]) -> list[InputFact]:
    values, kinds = [i.value for i in trace.inputs], [i.kind for i in trace.inputs]
    exchange = OfflineExchange(axis.size, axis.rank)
    return input_facts(unique_names(trace.inputs), values, kinds, axis, exchange, declared=replicated)


def _read(path: str | Path) -> tuple[dict[str, Any], object, bytes]:
    try:
        if os.path.getsize(path) > MOST_BYTES:
            raise TraceError(f"{path} has more than {MOST_BYTES} bytes: not a trace of `cpcompile trace`")
        with zipfile.ZipFile(path) as archive:
            infos = {info.filename: info for info in archive.infolist()}
            if "graph.pkl" in infos:
                raise TraceError(f"{path} is of an earlier version and holds a pickle: trace again with this version")
            if len(infos) != len(archive.infolist()) or infos.keys() != set(MEMBERS):
                raise TraceError(f"{path} is damaged or not a trace of `cpcompile trace`: it has other members")
            if any(i.compress_type != zipfile.ZIP_STORED or i.file_size != i.compress_size for i in infos.values()):
                raise TraceError(f"{path} is damaged or not a trace of `cpcompile trace`: its members are compressed")
            header = read_json(archive.read(MEMBERS[0]).decode())
            if not isinstance(header, dict) or header.get("format") != FORMAT:
                found = told(header.get("format") if isinstance(header, dict) else header)
                raise TraceError(
                    f"{path}: expected trace format {FORMAT}, found {found}: trace again with this version"
                )
            return header, read_json(archive.read(MEMBERS[1]).decode()), archive.read(MEMBERS[2])
    except TraceError:
        raise
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, KeyError, ValueError, EOFError, NotImplementedError) as error:
        raise TraceError(f"{path} is damaged or not a trace of `cpcompile trace`: {_first_line(error)}") from error
    except Exception as error:  # struct.error and others have no common base
        raise TraceError(f"{path} is damaged: {_first_line(error)}") from error


def _assemble(header: Mapping[str, Any], gm: fx.GraphModule) -> SavedTrace:
    nodes = gm.graph.find_nodes(op="placeholder")
    given = [checked(i, dict, "an input") for i in checked(header.get("inputs"), list, "inputs")]
    inputs = [
        GraphInput(checked(i.get("name"), str, "an input"), node.meta.get("val"), _one_of(i.get("kind"), _KINDS))
        for node, i in zip(nodes, given, strict=True)
    ]
    axes = [_axis(axis) for axis in checked(header.get("axes"), list, "axes")]
    if len({axis.name for axis in axes}) != len(axes):
        raise TraceError("expected axes of different names")
    facts = {name: _facts_of(found, len(nodes)) for name, found in checked(header.get("facts"), dict, "facts").items()}
    known = {a.name: {n.name: same for n, (same, _) in zip(nodes, facts[a.name], strict=True)} for a in axes}
    gm.meta[KEY] = GraphContext(tuple(axes), known)
    groups = {name: _ranks(ranks) for name, ranks in checked(header.get("groups"), dict, "groups").items()}
    seconds = {name: _number(value) for name, value in checked(header.get("seconds"), dict, "seconds").items()}
    return SavedTrace(
        Trace(gm, inputs, seconds), axes, _declared({a.name: facts[a.name] for a in axes}, inputs), groups
    )


def _axis(data: object) -> Axis:
    about = checked(data, dict, "an axis")
    name, group = (checked(about.get(key), str, "an axis") for key in ("name", "group_name"))
    ranks, layout = _ranks(about.get("ranks")), _one_of(about.get("layout"), KINDS)
    size, rank = integer(about.get("size")), integer(about.get("rank"))
    if size != len(ranks) or not 0 <= rank < size:
        raise TraceError(f"axis {name[:40]!r}: expected one of {len(ranks)} ranks; found rank {rank} of {size}")
    stored = checked(about.get("groups"), dict, "groups of an axis")
    groups = {key: tuple(_ranks(r) for r in checked(lists, list, "rank lists")) for key, lists in stored.items()}
    return Axis(name, group, size, rank, ranks, layout, groups)


def _ranks(data: object) -> tuple[int, ...]:
    ranks = tuple(integer(rank) for rank in checked(data, list, "ranks"))
    if not ranks or min(ranks) < 0 or len(set(ranks)) != len(ranks):
        raise TraceError("expected ranks, each once")
    return ranks


def _facts_of(data: object, inputs: int) -> list[tuple[bool, str]]:
    pairs = [checked(pair, list, "a fact") for pair in checked(data, list, "facts")]
    if len(pairs) != inputs or any(len(pair) != 2 for pair in pairs):
        raise TraceError(f"expected a fact for each of {inputs} inputs; found {len(pairs)}")
    return [(checked(same, bool, "a fact"), checked(source, str, "a fact")) for same, source in pairs]


def _one_of(value: object, known: Collection[str]) -> Any:
    if not isinstance(value, str) or value not in known:
        raise TraceError(f"expected one of {', '.join(known)}; found {told(value)}")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise TraceError(f"expected seconds; found {told(value)}")
    return float(value)


def _declared(facts: Mapping[str, Sequence[tuple[bool, str]]], inputs: Sequence[GraphInput]) -> tuple[str, ...]:
    """Patterns that declare the facts which cannot be seen again without the original values.

    An input that is replicated over some axes only counts as not replicated: that loses an opportunity, never rows.
    """
    patterns = []
    for name, *found in zip(unique_names(inputs), *facts.values(), strict=True):
        if any(source != "integer input" and not source.startswith("unknown") for _, source in found):
            patterns.append(("" if all(same for same, _ in found) else "!") + glob.escape(name))
    return tuple(patterns)


def _why(error: Exception) -> str:
    return _first_line(error) if isinstance(error, TraceError) else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line[:300] for line in str(error).splitlines() if line.strip()), type(error).__name__)
