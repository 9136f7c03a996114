"""Run every rank's FX graph in one process, node by node; a collective runs once all ranks of its group have arrived.

No process group is needed and each rank may have its own graph. Unlike a simulation that runs one graph for all ranks,
it finds what would hang or abort a real run: mismatched, reordered or missing collectives, uneven shapes, wrong groups.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import Tensor
from torch._ops import OpOverload

from cpcompile.errors import CpcompileError, nearest
from cpcompile.passes.lockstep_collectives import (
    REDUCTIONS,
    RULES,
    Arguments,
    bind,
    facets_of,
    kind_of,
    refusal,
    split_conflict,
)


class LockstepError(CpcompileError):
    """The ranks' graphs cannot run together: one line with the ranks, the nodes and what differs."""


@dataclass(frozen=True)
class RankProgram:
    """What one rank runs.

    Args:
        gm: functional ATen graph with ``_c10d_functional`` collectives. It may differ from rank to rank.
        inputs: one value per placeholder, in order: tensors, ints for SymInt placeholders, any object for unused ones.
            A graph that mutates an input mutates this object, so ranks must not share it then.
        groups: group name, as the graph's collectives say it, to the group's global ranks in group order.
    """

    gm: fx.GraphModule
    inputs: Sequence[object]
    groups: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Arrival:
    """A rank that stands at a collective: ``tensors`` are its operands, ``arguments`` the rest, by schema name."""

    rank: int
    node: str
    target: OpOverload
    group: str
    members: tuple[int, ...]
    tensors: Sequence[Tensor]
    arguments: Arguments

    @property
    def kind(self) -> str:
        """The collective's name, such as ``"all_reduce"``."""
        return kind_of(self.target)

    @functools.cached_property
    def facets(self) -> list[tuple[str, object]]:
        """What must agree over the group."""
        return facets_of(self.target, self.tensors, self.arguments)

    def fault(self, reason: str) -> LockstepError:
        """An error at this collective."""
        return LockstepError(f"rank {self.rank}: {self.kind} {self.node!r} of group {self.group}: {reason}")


class _Rank(fx.Interpreter):
    """One rank: a generator that yields where it stands and is sent the result of that collective."""

    def __init__(self, rank: int, world_size: int, program: RankProgram) -> None:
        super().__init__(program.gm)
        self.rank, self.world_size, self.program = rank, world_size, program
        expected = sum(node.op == "placeholder" for node in self.graph.nodes)
        if len(program.inputs) != expected:
            found = len(program.inputs)
            raise LockstepError(f"rank {rank}: expected {expected} inputs, one per placeholder, found {found}")
        self.args_iter = iter(program.inputs)

    def run_until_collectives(self) -> Generator[Arrival, object, object]:
        output: object = None
        for node in self.graph.nodes:
            # wait_tensor runs as any other node: without pending work it is the identity.
            if node.op == "call_function" and node.target in RULES:
                self.env[node] = yield self._arrive(node)
            else:
                self.env[node] = self._run_locally(node)
            if node.op == "output":
                output = self.env[node]
            self._free_after(node)
        return output

    def _run_locally(self, node: fx.Node) -> object:
        reason = refusal(self.program.gm, node)
        if reason:
            raise LockstepError(f"rank {self.rank}: node {node.name!r} {reason}")
        try:
            return self.run_node(node)
        except Exception as error:
            where = f"rank {self.rank}: node {node.name!r} ({node.target})"
            raise LockstepError(f"{where} failed: {_line(error)}") from error

    def _free_after(self, node: fx.Node) -> None:
        for used in self.user_to_last_uses.get(node, ()):
            del self.env[used]
        if not node.users:
            del self.env[node]

    def _arrive(self, node: fx.Node) -> Arrival:
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        assert isinstance(node.target, OpOverload)
        arguments = bind(node.target, args, kwargs)
        operands = arguments.pop(node.target._schema.arguments[0].name)
        tensors = list(operands) if isinstance(operands, (list, tuple)) else [operands]
        group = arguments.pop("group_name")
        members = self.program.groups.get(group)
        arrival = Arrival(self.rank, node.name, node.target, group, tuple(members or ()), tensors, arguments)
        if members is None:
            raise arrival.fault(f"this rank does not know the group{nearest(str(group), self.program.groups)}")
        check_alone(arrival, self.world_size)
        return arrival


def check_alone(arrival: Arrival, world_size: int) -> None:
    """Check what one rank can know: membership, group size, reduce op, operands."""
    members, arguments = arrival.members, arrival.arguments
    if arrival.rank not in members:
        raise arrival.fault(f"this rank is not one of the group's {_ranks(members)}")
    if len(set(members)) != len(members) or not set(members) <= set(range(world_size)):
        raise arrival.fault(f"expected distinct ranks of 0 to {world_size - 1}, found {list(members)}")
    if arguments.get("group_size", len(members)) != len(members):
        raise arrival.fault(f"expected group_size {len(members)}, found {arguments['group_size']}")
    if arguments.get("reduce_op", "sum") not in REDUCTIONS:
        found = str(arguments["reduce_op"])
        raise arrival.fault(f"unknown reduce_op {found!r}{nearest(found, REDUCTIONS)}")
    for tensor in arrival.tensors:
        if not isinstance(tensor, Tensor):
            raise arrival.fault(f"expected a tensor, found {type(tensor).__name__}")
        reason = RULES[arrival.target].fits(tensor, len(members), arguments)
        if reason:
            raise arrival.fault(reason)


def _check_alike(one: Arrival, other: Arrival) -> None:
    """Check that two ranks that wait for the same group stand at the same collective, on operands that go together."""
    for (facet, mine), (_, theirs) in zip(one.facets, other.facets, strict=True):
        if mine != theirs:
            first, second = ("", "") if facet == "kind" else (f" with {facet} {mine}", f" with {facet} {theirs}")
            raise LockstepError(
                f"rank {one.rank} is at {one.kind} {one.node!r}{first} and rank {other.rank} at {other.kind} "
                f"{other.node!r}{second} of group {one.group}: "
                "every rank of a group must issue the same collectives in the same order, on equal shapes and dtypes"
            )


def _perform(arrivals: Sequence[Arrival]) -> dict[int, object]:
    """Run one collective whose ranks are all here, in group order; return each rank's result."""
    operands = zip(*(arrival.tensors for arrival in arrivals), strict=True)
    arguments = [arrival.arguments for arrival in arrivals]
    conflict = split_conflict(arguments)
    if conflict:
        sender, receiver = (arrivals[i] for i in conflict)
        sent, expected = sender.arguments["input_split_sizes"], receiver.arguments["output_split_sizes"]
        raise receiver.fault(
            f"output_split_sizes {list(expected)} do not match what rank {sender.rank} sends at {sender.node!r}, "
            f"input_split_sizes {list(sent)}"
        )
    try:
        per_operand = [RULES[arrivals[0].target].perform(shards, arguments) for shards in operands]
    except Exception as error:
        raise arrivals[0].fault(f"failed on {_ranks(a.rank for a in arrivals)}: {_line(error)}") from error
    single = not arrivals[0].kind.endswith("_coalesced")
    return {
        arrival.rank: per_operand[0][i] if single else [results[i] for results in per_operand]
        for i, arrival in enumerate(arrivals)
    }


def _perform_ready(waiting: dict[int, Arrival]) -> dict[int, object]:
    """Run every collective that is complete, take its ranks out of ``waiting`` and return what each is resumed with."""
    rooms: dict[tuple[str, tuple[int, ...]], list[Arrival]] = {}
    for arrival in waiting.values():
        room = rooms.setdefault((arrival.group, arrival.members), [])
        room.append(arrival)
        # Also before all have arrived: each waits for the same one, because the earlier ones of the group are complete.
        _check_alike(room[0], arrival)
    results: dict[int, object] = {}
    for (_, members), room in rooms.items():
        if len(room) == len(members):
            results |= _perform([waiting.pop(rank) for rank in members])
    return results


def _stalled(waiting: Mapping[int, Arrival]) -> LockstepError:
    """Say who ended too early, who sees a group differently, or where everybody waits, when nobody can go on."""
    for _, arrival in sorted(waiting.items()):
        place = f"rank {arrival.rank} waits at {arrival.kind} {arrival.node!r} of group {arrival.group}"
        gone = [rank for rank in arrival.members if rank not in waiting]
        if gone:
            verb = "has" if len(gone) == 1 else "have"
            return LockstepError(f"{_ranks(gone)} {verb} finished while {place}: a collective is missing")
        for peer in (waiting[rank] for rank in arrival.members):
            if peer.group == arrival.group and peer.members != arrival.members:
                return LockstepError(
                    f"{place} as ranks {list(arrival.members)}, rank {peer.rank} at {peer.kind} {peer.node!r} as ranks "
                    f"{list(peer.members)}: every member must see a group alike"
                )
    places: dict[str, list[int]] = {}
    for rank, arrival in sorted(waiting.items()):
        place = f"{arrival.kind} {arrival.node!r} of group {arrival.group} {list(arrival.members)}"
        places.setdefault(place, []).append(rank)
    listed = ", ".join(f"{_ranks(ranks)} at {place}" for place, ranks in places.items())
    return LockstepError(f"deadlock, {listed}: every rank must issue its collectives in the same order")


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, or ``ranks 0-3, 6``."""
    spans: list[list[int]] = []
    for rank in sorted(ranks):
        if spans and rank == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], rank]
        else:
            spans.append([rank])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


@torch.no_grad()
def run_lockstep(programs: Sequence[RankProgram]) -> list[object]:
    """Run the graphs of all ranks together and return each rank's output, structured as its graph's output.

    A collective blocks its rank, as on a device stream that all groups share; so ranks that issue two collectives in
    different orders are reported even where a backend with one queue a group might get through.

    Reductions go left to right from group rank 0 in the operands' own dtype, rounding at each step as gloo and NCCL do;
    float32 would flatter bfloat16. Backends choose other orders by size: two ranks' ``sum`` has gloo's very bits, more
    ranks' agree up to rounding. A result is computed once and copied: every rank gets the same bits, and ``all_reduce``
    those of ``reduce_scatter_tensor`` and ``all_gather_into_tensor``. ``src`` of ``broadcast`` is a rank in the group.

    Args:
        programs: one program per global rank; ``programs[r]`` is what rank ``r`` runs.

    Returns:
        One output per global rank.

    Raises:
        LockstepError: ranks issue different or differently ordered collectives, or one ends while others wait;
            operands differ in shape or dtype, or do not divide; a group is unknown, differs or lacks the rank; a
            node is no known collective (see ``lockstep_collectives.refusal``), or fails (the cause is chained).
    """
    return drive([_Rank(rank, len(programs), program).run_until_collectives() for rank, program in enumerate(programs)])


def drive(runs: Sequence[Generator[Arrival, object, object]]) -> list[object]:
    """Run one generator per global rank in lockstep: each yields where it stands and is sent that collective's result.

    Returns:
        What each generator returns.

    Raises:
        LockstepError: the ranks' collectives do not go together, or one ends while others wait.
    """
    outputs: list[object] = [None] * len(runs)
    waiting: dict[int, Arrival] = {}
    results: dict[int, object] = dict.fromkeys(range(len(runs)))
    while results:
        for rank in sorted(results):
            try:
                waiting[rank] = runs[rank].send(results.pop(rank))
            except StopIteration as finished:
                outputs[rank] = finished.value
        results = _perform_ready(waiting)
    if waiting:
        raise _stalled(waiting)
    return outputs


def collective_trace(gm: fx.GraphModule) -> list[tuple[str, str, str]]:
    """List the collectives of ``gm`` in graph order, without running it; ``wait_tensor`` is not one.

    Returns:
        ``(kind, group, node name)`` of each, such as ``("all_reduce", "tp", "all_reduce_3")``.

    Raises:
        LockstepError: a node is a collective that is not in the table, or hides collectives in a subgraph.
    """
    trace = []
    for node in gm.graph.nodes:
        reason = refusal(gm, node)
        if reason:
            raise LockstepError(f"node {node.name!r} {reason}")
        if node.op == "call_function" and node.target in RULES:
            group = bind(node.target, node.args, node.kwargs)["group_name"]
            trace.append((kind_of(node.target), str(group), node.name))
    return trace
