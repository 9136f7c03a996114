"""Execute GE graphs with torch on CPU: one per rank, op by op; a collective runs when its group's ranks are there.

An op that writes an input (its output has the input's name) writes that value in place, as on the device; inputs of
the graph are then the caller's own tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cpcompile.errors import nearest
from cpcompile.lowering.ge import (  # noqa: F401 (they fill the table)
    dtypes,
    ops_attention,
    ops_collectives,
    ops_elementwise,
    ops_fused_attention,
    ops_index,
    ops_matmul,
    ops_mla,
    ops_moe,
    ops_moe_combine,
    ops_moe_exchange,
    ops_moe_routing,
    ops_norms,
    ops_quantised,
    ops_reduce,
    ops_rope,
    ops_shape,
    ops_slice,
)
from cpcompile.lowering.ge.graph import UNFED, GeError, GeGraph, GeOp
from cpcompile.lowering.ge.ops_collectives import Talk
from cpcompile.lowering.ge.signatures import (
    OPS,
    OpSpec,
    Refusal,
    bind_attrs,
    bind_inputs,
    check_inputs,
    check_outputs,
    spec_of,
)
from cpcompile.passes.lockstep import Arrival, LockstepError, check_alone, drive

_SOURCES = frozenset({"Data", "RefData", "Const", "Constant", "FileConstant"})


def op_types() -> frozenset[str]:
    """The op types that can be executed, without those that hold values and the graph's outputs."""
    return frozenset(OPS)


@dataclass(frozen=True)
class GeProgram:
    """What one rank runs.

    Args:
        graph: the rank's graph.
        inputs: a value for each of ``graph.inputs``, in order, or by its op's name: a tensor, or an int for a size.
            By name there may be more than the graph takes. Tensors that the graph writes are written in place.
        groups: name of a group, as the graph says it, to the group's global ranks in group order. Names that have a
            ``rank_list`` in them, as torchair names groups that are no HCCL groups, need not be here.
    """

    graph: GeGraph
    inputs: Sequence[Tensor | int] | Mapping[str, Tensor | int]
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@torch.no_grad()
def interpret(programs: Sequence[GeProgram]) -> list[list[Tensor]]:
    """Run every rank's GE graph in lockstep.

    Args:
        programs: one program per global rank; ``programs[r]`` is what rank ``r`` runs.

    Returns:
        Each rank's outputs, in the order of its graph's NetOutput.

    Raises:
        GeError: inputs do not fit, an op type or attribute is unknown, a dtype or shape is not what the op takes.
        LockstepError: ranks issue different or differently ordered collectives, or on operands that do not go together.
    """
    runs = [_Rank(rank, len(programs), program).run() for rank, program in enumerate(programs)]
    return drive(runs)  # type: ignore[return-value]


class _Rank:
    """One rank: a generator that yields where it stands and is sent the result of that collective."""

    def __init__(self, rank: int, world_size: int, program: GeProgram) -> None:
        self.rank, self.world_size, self.program = rank, world_size, program
        self.graph = program.graph
        self.values: dict[str, Tensor] = {}
        self.writable: set[str] = set()
        self.uses = Counter(value for op in self.graph.ops for value in op.inputs)

    def run(self) -> Generator[Arrival, object, object]:
        try:
            self._bind()
        except GeError as error:
            raise GeError(f"rank {self.rank}: {error}") from error
        outputs: list[Tensor] = []
        for op in self.graph.ops:
            try:
                if op.type == "NetOutput":
                    outputs = self._outputs(op)
                elif op.type not in _SOURCES:
                    yield from self._execute(op)
            except GeError as error:
                raise GeError(f"rank {self.rank}: {error}") from error
            self._free(op)
        return outputs

    def _bind(self) -> None:
        """Give the graph's inputs and constants their values."""
        ops, given = self.graph.inputs, self.program.inputs
        if isinstance(given, Mapping):
            missing = [op.name for op in ops if op.name not in given]
            if missing:
                raise GeError(f"input {missing[0]!r} is not given{nearest(missing[0], given)}")
            values = [given[op.name] for op in ops]
        else:
            values = list(given)
        if len(values) != len(ops):
            raise GeError(f"expected {len(ops)} inputs, {_listed(ops)}, found {len(values)}")
        for op, value in zip(ops, values, strict=True):
            self.values[f"{op.name}:0"] = _input(op, value)
            self.writable.add(f"{op.name}:0")
        for op in self.graph.ops:
            if op.data is not None:
                self.values[f"{op.name}:0"] = op.data
            elif op.type in ("Const", "Constant", "FileConstant"):
                raise op.error("expected a constant's data, found none")

    def _execute(self, op: GeOp) -> Generator[Arrival, object, None]:
        spec = spec_of(op)
        attrs = bind_attrs(op, spec)
        arguments = self._own(op, spec, bind_inputs(op, spec, self.values))
        bound = check_inputs(op, spec, arguments)
        try:
            found = spec.run(*arguments, **attrs)
            if spec.collective:
                found = yield from self._communicate(op, found)
        except (GeError, LockstepError, AssertionError):
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise op.error(reason if isinstance(error, Refusal) else f"failed: {reason}") from error
        results = [found] if isinstance(found, Tensor) else list(found)
        check_outputs(op, spec, results, bound, attrs)
        for position, result in enumerate(results):
            self.values[f"{op.name}:{position}"] = result
        for position, operand in enumerate(spec.outputs):
            if operand.name in spec.references or op.type == "TensorMove":
                self.writable.add(f"{op.name}:{position}")

    def _own(self, op: GeOp, spec: OpSpec, arguments: list[Any]) -> list[Any]:
        """Let the op write inputs of the graph, and what was moved or written before; copies of all else."""
        sources = dict(zip((desc.name for desc in op.input_descs), op.inputs, strict=True))
        for position, operand in enumerate(spec.inputs):
            if operand.name in spec.references and sources.get(operand.name) not in self.writable:
                value = arguments[position]
                arguments[position] = None if value is None else value.clone()
        return arguments

    def _communicate(self, op: GeOp, kernel: Talk) -> Generator[Arrival, object, Any]:
        result: Any = None
        while True:
            try:
                wanted = kernel.send(result)
            except StopIteration as finished:
                return finished.value
            members = self._members(op, wanted if isinstance(wanted, str) else wanted.group)
            if isinstance(wanted, str):
                result = len(members)
                continue
            arguments = dict(wanted.arguments)
            arrival = Arrival(self.rank, op.name, wanted.target, wanted.group, members, [wanted.operand], arguments)
            check_alone(arrival, self.world_size)
            result = yield arrival

    def _members(self, op: GeOp, group: str) -> tuple[int, ...]:
        if group in self.program.groups:
            return tuple(self.program.groups[group])
        named = re.search(r"rank_list=([0-9,]+)", group)
        if named is None:
            raise op.error(f"group {group!r} is not given{nearest(group, self.program.groups)}")
        return tuple(int(rank) for rank in named.group(1).split(","))

    def _outputs(self, op: GeOp) -> list[Tensor]:
        found = []
        for position, (source, desc) in enumerate(zip(op.inputs, op.input_descs, strict=True)):
            value = self.values[source]
            if desc.dtype is not None and value.dtype != desc.dtype:
                expected = dtypes.short(desc.dtype)
                raise op.error(f"output {position}: expected {expected}, found {dtypes.short(value.dtype)}")
            if desc.shape is not None and not _fits(desc.shape, value):
                raise op.error(f"output {position}: expected shape {list(desc.shape)}, found {list(value.shape)}")
            found.append(value)
        return found

    def _free(self, op: GeOp) -> None:
        for source in op.inputs:
            self.uses[source] -= 1
            if source != UNFED and not self.uses[source]:
                self.values.pop(source, None)


def _input(op: GeOp, value: Tensor | int) -> Tensor:
    desc = op.output_descs[0]
    if desc.dtype is None:
        raise op.error("expected a dtype that torch has")
    if isinstance(value, int) and not isinstance(value, bool):
        value = torch.tensor(value, dtype=desc.dtype)
    if not isinstance(value, Tensor):
        raise op.error(f"expected a tensor or an int, found {type(value).__name__}")
    if value.dtype != desc.dtype:
        raise op.error(f"expected {dtypes.short(desc.dtype)}, found {dtypes.short(value.dtype)}")
    if desc.shape is not None and not _fits(desc.shape, value):
        raise op.error(f"expected shape {list(desc.shape)}, found {list(value.shape)}")
    return value.detach()


def _fits(shape: Sequence[int], value: Tensor) -> bool:
    return len(shape) == value.ndim and all(s in (-1, size) for s, size in zip(shape, value.shape, strict=True))


def _listed(ops: Sequence[GeOp]) -> str:
    names = [op.name for op in ops]
    return ", ".join(names if len(names) < 6 else [*names[:5], "..."])
