"""Prove from the graphs alone that all ranks issue the same collectives in the same order, and so cannot hang.

Nothing runs: the ranks' sequences are matched as device streams would meet, each rank blocked until all members of the
group stand at the same collective. Which collective comes next depends on no value, so that this one run of the
sequences speaks for all. Ranks may use different groups of one kind (o_proj over {0, 2} and over {1, 3}), have other
work between collectives, or none at all: an idle rank's graph. What each collective computes is not looked at, nor
whether its operands divide: :mod:`cpcompile.passes.lockstep` does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx
from torch import SymInt

from cpcompile.errors import nearest
from cpcompile.passes.collectives import arguments, op_name
from cpcompile.passes.lockstep import LockstepError, collective_trace
from cpcompile.passes.lockstep_collectives import ALL_TO_ALL, REDUCTIONS
from cpcompile.passes.token_layout import Expr, shape_of, size_expr

Groups = Mapping[str, tuple[int, ...]]

# Collectives whose results are the same on all ranks of the group.
_GIVES_ALL_ALIKE = frozenset(f"_c10d_functional::{n}" for n in ("all_reduce", "all_gather_into_tensor", "broadcast"))


@dataclass(frozen=True)
class OrderProof:
    """Whether the ranks' collectives meet.

    Args:
        collectives: how many met, each counted once for all its ranks.
        failures: why not, one line each: ranks, nodes, what was expected and what was found.
        assumed: ``(symbol, ranks)``: sizes of operands that the proof takes to be equal on those ranks at every call,
            such as the rows of ranks along DP. Whoever calls the graphs must see to it, by padding. Sizes that the
            ranks read from a result that all of them have (an all-reduce of their rows) need no assumption.
    """

    collectives: int
    failures: tuple[str, ...]
    assumed: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every rank gets through its graph."""
        return not self.failures


@dataclass(frozen=True)
class Issue:
    """A collective as one rank's graph issues it; ``facets`` must agree over the group, in the order of reporting."""

    rank: int
    node: str
    kind: str
    group: str
    members: tuple[int, ...]
    facets: tuple[tuple[str, str], ...]
    sends: tuple[Expr | None, ...]
    receives: tuple[Expr | None, ...]
    symbols: tuple[str, ...]

    @property
    def place(self) -> str:
        """Where the rank stands, for a message."""
        return f"rank {self.rank} at {self.kind} {self.node!r} of group {self.group} {list(self.members)}"


def check_collective_order(graphs: Sequence[fx.GraphModule], groups: Sequence[Groups]) -> OrderProof:
    """Match the collectives of ``graphs``.

    Sizes agree where they are the same number, or the same expression in symbols of the same names, which ranks that
    were traced apart must mean alike: see ``assumed`` of :class:`OrderProof`.

    Args:
        graphs: one functional ATen graph per global rank, with the fake tensors in ``meta["val"]`` that traces have.
        groups: per global rank, group name to the group's global ranks in group order.

    Returns:
        The proof. After a collective of another kind, or a rank that waits for ever, nothing further is matched.
    """
    sequences, failures = [], []
    for rank, (gm, known) in enumerate(zip(graphs, groups, strict=True)):
        try:
            trace, nodes = collective_trace(gm), {node.name: node for node in gm.graph.nodes}
        except LockstepError as error:
            failures.append(f"rank {rank}: {error}")
            continue
        alike = _alike(gm, [(nodes[name], known.get(group)) for _, group, name in trace])
        sequences.append(
            [_issue(rank, nodes[name], kind, known.get(group), group, alike) for kind, group, name in trace]
        )
    failures += [line for sequence in sequences for issue in sequence for line in _alone(issue, len(graphs), groups)]
    return OrderProof(0, tuple(failures)) if failures else _match(sequences)


def _alike(gm: fx.GraphModule, issued: Sequence[tuple[fx.Node, tuple[int, ...] | None]]) -> dict[Expr, Expr]:
    """Sizes that are read from what a collective gives all its ranks alike, by names that all its ranks give them."""
    names, counts = {}, Counter[tuple[int, ...]]()
    for node, members in issued:
        counts[members or ()] += 1
        if op_name(node.target) in _GIVES_ALL_ALIKE:
            names[node] = f"{op_name(node.target)} {counts[members or ()]} of {members}"
    found = {}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten._local_scalar_dense.default):
        path, source = "", node.args[0]
        while isinstance(source, fx.Node) and op_name(source.target) in (
            "aten::select",
            "_c10d_functional::wait_tensor",
        ):
            path = f"{list(source.args[1:])}{path}" if op_name(source.target) == "aten::select" else path
            source = source.args[0]
        value = node.meta.get("val")
        if source in names and isinstance(value, SymInt):
            found[value.node.expr] = sympy.Symbol(f"{names[source]}{path}", integer=True, nonnegative=True)
    return found


def _issue(
    rank: int, node: fx.Node, kind: str, members: tuple[int, ...] | None, group: str, alike: Mapping[Expr, Expr]
) -> Issue:
    given = arguments(node)
    operands = next(iter(given.values()))
    values = [_value(o) for o in (operands if isinstance(operands, (list, tuple)) else [operands])]
    sends, receives = (_sizes(given.get(f"{way}_split_sizes", ()), alike) for way in ("input", "output"))
    shapes = [None if v is None else [size.xreplace(alike) for size in shape_of(v)] for v in values]
    free = node.target is ALL_TO_ALL
    tensors = [_described(v, shape, free) for v, shape in zip(values, shapes, strict=True)]
    shown = [size for shape in shapes if shape is not None for size in shape[free:]]
    symbols = {s for size in (*shown, *sends, *receives) if size is not None for s in size.free_symbols}
    facets = [("kind", kind), *((key, str(given[key])) for key in ("reduce_op", "src", "group_size") if key in given)]
    facets += [("dtype", ", ".join(d for d, _ in tensors)), ("shape", ", ".join(s for _, s in tensors))]
    return Issue(
        rank,
        node.name,
        kind,
        group,
        tuple(members or ()),
        tuple(facets),
        sends,
        receives,
        tuple(sorted(str(symbol) for symbol in symbols - set(alike.values()))),
    )


def _value(operand: object) -> torch.Tensor | None:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _described(value: torch.Tensor | None, shape: Sequence[Expr] | None, free: bool) -> tuple[str, str]:
    """Type and shape of an operand; of an all-to-all without dim 0, which each rank has its own of."""
    if value is None or shape is None:
        return "unknown", "unknown"
    sizes = [str(size) for size in shape]
    return str(value.dtype).removeprefix("torch."), f"[{', '.join(['*', *sizes[1:]] if free else sizes)}]"


def _sizes(sizes: Sequence[object], alike: Mapping[Expr, Expr]) -> tuple[Expr | None, ...]:
    """Split sizes; None for one that the graph does not tell."""
    values = (size.meta.get("val") if isinstance(size, fx.Node) else size for size in sizes)
    return tuple(size_expr(v).xreplace(alike) if isinstance(v, (int, SymInt)) else None for v in values)


def _alone(issue: Issue, world: int, groups: Sequence[Groups]) -> Iterator[str]:
    """What is wrong with a collective whatever the other ranks do."""
    members, facets = issue.members, dict(issue.facets)
    if not members:
        yield f"{issue.place}: expected a group of this rank, found none{nearest(issue.group, groups[issue.rank])}"
        return
    if issue.rank not in members or len(set(members)) != len(members) or not set(members) <= set(range(world)):
        yield f"{issue.place}: expected distinct ranks of 0 to {world - 1}, rank {issue.rank} among them"
    if facets.get("group_size", str(len(members))) != str(len(members)):
        yield f"{issue.place}: expected group_size {len(members)}, found {facets['group_size']}"
    reduce_op = facets.get("reduce_op", "sum")
    if reduce_op not in REDUCTIONS:
        yield f"{issue.place}: expected a reduce_op, found {reduce_op!r}{nearest(reduce_op, REDUCTIONS)}"
    if "unknown" in facets["dtype"] or None in (*issue.sends, *issue.receives):
        yield f"{issue.place}: expected operands and sizes with meta['val'], found none: trace it with fake tensors"
    if issue.kind == "all_to_all_single":
        for way, sizes in (("input", issue.sends), ("output", issue.receives)):
            if len(sizes) != len(members):
                yield f"{issue.place}: expected {len(members)} {way}_split_sizes, found {len(sizes)}"


def _match(sequences: Sequence[Sequence[Issue]]) -> OrderProof:
    """Let every rank go as far as it can."""
    failures: list[str] = []
    assumed: dict[tuple[str, tuple[int, ...]], None] = {}
    passed, met = [0] * len(sequences), 0
    while True:
        waiting = {r: issues[passed[r]] for r, issues in enumerate(sequences) if passed[r] < len(issues)}
        rooms: dict[tuple[str, tuple[int, ...]], list[Issue]] = {}
        for issue in waiting.values():
            rooms.setdefault((issue.group, issue.members), []).append(issue)
        swapped = [line for room in rooms.values() for line in _other_kinds(room)]
        full = [room for (_, members), room in rooms.items() if len(room) == len(members)]
        if swapped or not full:
            failures += swapped or ([_stalled(waiting)] if waiting else [])
            return OrderProof(met, tuple(failures), tuple(assumed))
        for room in full:
            failures += _differences(room)
            assumed |= {(symbol, room[0].members): None for symbol in room[0].symbols if len(room) > 1}
            met += 1
            for issue in room:
                passed[issue.rank] += 1


def _usual(room: Sequence[Issue]) -> Issue:
    """The first of those that most of ``room`` agree with: the odd one out is to be reported, not the others."""
    return max(room, key=lambda issue: sum(other.facets == issue.facets for other in room))


def _other_kinds(room: Sequence[Issue]) -> list[str]:
    """Members of one group that stand at another kind of collective than the others; some may yet have to come."""
    usual = _usual(room)
    expected = f"expected {usual.kind} {usual.node!r} as on rank {usual.rank}"
    why = "in another order, or one is missing"
    return [f"{i.place}: {expected}, found {i.kind}: {why}" for i in room if i.kind != usual.kind]


def _differences(room: Sequence[Issue]) -> Iterator[str]:
    """How operands of one collective do not go together."""
    first, usual = room[0], _usual(room)
    for issue in room:
        for (name, theirs), (_, found) in zip(usual.facets, issue.facets, strict=True):
            if found != theirs:
                yield f"{issue.place}: expected {name} {theirs} as {usual.node!r} of rank {usual.rank}, found {found}"
    if first.kind == "all_to_all_single":
        members = {issue.rank: issue for issue in room}
        for i, sender in enumerate(first.members):
            for j, receiver in enumerate(first.members):
                sent, awaited = members[sender].sends[j], members[receiver].receives[i]
                if sent != awaited:
                    rows = f"expected {sent} rows from rank {sender} at {members[sender].node!r}"
                    yield f"{members[receiver].place}: {rows}, found {awaited} in output_split_sizes"


def _stalled(waiting: Mapping[int, Issue]) -> str:
    """Why nobody can go on: a rank has ended, sees a group otherwise, or ranks wait for each other in a circle."""
    for issue in waiting.values():
        ended = [rank for rank in issue.members if rank not in waiting]
        if ended:
            return f"{issue.place}: expected rank {ended[0]} there, found the end of its graph: a collective is missing"
    for issue in waiting.values():
        for other in (waiting[rank] for rank in issue.members):
            if other.group == issue.group and other.members != issue.members:
                seen = f"found {list(other.members)} at {other.kind} {other.node!r}"
                return f"{issue.place}: expected the same ranks of the group on rank {other.rank}, {seen}"
    return _circle(waiting)


def _circle(waiting: Mapping[int, Issue]) -> str:
    """Ranks that each wait for the next, from the lowest rank that leads into such a circle."""
    path = [min(waiting)]
    while True:
        here = waiting[path[-1]]
        awaited = next(r for r in here.members if (waiting[r].group, waiting[r].members) != (here.group, here.members))
        if awaited in path:
            circle = path[path.index(awaited) :]
            text = ", ".join(
                f"{waiting[r].place} for rank {n}" for r, n in zip(circle, [*circle[1:], awaited], strict=True)
            )
            return f"deadlock: expected one order of collectives on all ranks, found {text}"
        path.append(awaited)
