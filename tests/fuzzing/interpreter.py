"""All ranks of a world, node by node: a collective is what its op, its reduction and its group's rank list say.

Written for the fuzzer alone. It shares nothing with ``passes/lockstep.py`` and the numeric check, which it judges.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from fuzzing.worlds import Ranks, World

C10D = torch.ops._c10d_functional
TOLERANCE = 1e-8  # relative, of float64
ROUNDING = 1e-12  # what is left where terms cancel

_REDUCE: Mapping[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "sum": lambda xs: functools.reduce(torch.add, xs),
    "avg": lambda xs: functools.reduce(torch.add, xs) / len(xs),
    "max": lambda xs: functools.reduce(torch.maximum, xs),
    "min": lambda xs: functools.reduce(torch.minimum, xs),
    "product": lambda xs: functools.reduce(torch.mul, xs),
}


class Stuck(Exception):
    """The ranks cannot go on together."""


class Failed(Stuck):
    """An op of one rank raises: nothing that goes unseen."""


@dataclass(frozen=True)
class _Unwaited:
    """A collective's result before its wait: not to be read."""

    value: Tensor


@dataclass(frozen=True)
class _Stand:
    """A rank at a collective: its operand, and the arguments that all ranks must give alike."""

    rank: int
    ranks: Ranks
    kind: str
    operand: Tensor
    rest: tuple[Any, ...]


def run_world(world: World, graphs: Sequence[fx.GraphModule], inputs: Sequence[Sequence[object]]) -> list[list[object]]:
    """Every rank's outputs.

    Raises:
        Stuck: the collectives do not meet, or an op fails.
    """
    runs = [_run(world, rank, gm, given) for rank, (gm, given) in enumerate(zip(graphs, inputs, strict=True))]
    outputs: list[Any] = [None] * world.size
    answers: dict[int, Any] = dict.fromkeys(range(world.size))
    standing: dict[int, _Stand] = {}
    with torch.no_grad():
        while answers:
            for rank, answer in answers.items():
                try:
                    standing[rank] = runs[rank].send(answer)
                except StopIteration as ended:
                    outputs[rank] = ended.value
            answers = _meet(standing)
            for rank in answers:
                del standing[rank]
    if standing:
        raise Stuck(f"ranks {sorted(standing)} wait for ever: {[(s.kind, s.ranks) for s in standing.values()]}")
    return outputs


def _run(
    world: World, rank: int, gm: fx.GraphModule, inputs: Sequence[object]
) -> Generator[_Stand, Tensor, list[object]]:
    env: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = functools.reduce(getattr, node.target.split("."), gm)
        elif node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (list, tuple)) else [node.args[0]]
            return [_readable(env[v]) if isinstance(v, fx.Node) else v for v in values]
        elif node.target is C10D.wait_tensor.default:
            value = env[node.args[0]]
            env[node] = value.value if isinstance(value, _Unwaited) else value
        else:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _readable(env[n]))
            if getattr(node.target, "namespace", "") == "_c10d_functional":
                env[node] = _Unwaited((yield _stand(world, rank, node, args)))
                continue
            try:
                env[node] = node.target(*args, **kwargs)
            except Exception as error:
                raise Failed(f"rank {rank}: {node.format_node()}: {str(error).splitlines()[:1]}") from error
    raise AssertionError("a graph without outputs")


def _readable(value: Any) -> Any:
    """What is read too early is not there yet: anything may lie in its memory."""
    if isinstance(value, _Unwaited):
        return torch.full_like(value.value, float("nan") if value.value.is_floating_point() else -77)
    return value


def _stand(world: World, rank: int, node: fx.Node, args: tuple[Any, ...]) -> _Stand:
    kind = node.target._opname  # type: ignore[union-attr]
    ranks = world.members(args[-1], rank) if args[-1] in world.groups else ()
    if not ranks:
        raise Stuck(f"rank {rank}: {node}: no group {args[-1]!r}")
    rest = tuple(tuple(a) if isinstance(a, list) else a for a in args[1:-1])
    if kind in ("all_gather_into_tensor", "reduce_scatter_tensor") and rest[-1] != len(ranks):
        raise Stuck(f"rank {rank}: {node}: {rest[-1]} ranks said, {len(ranks)} there")
    return _Stand(rank, ranks, kind, args[0], rest)


def _meet(standing: Mapping[int, _Stand]) -> dict[int, Tensor]:
    """Results of the collectives at which all ranks of the group stand."""
    answers: dict[int, Tensor] = {}
    for stand in standing.values():
        others = [standing.get(r) for r in stand.ranks]
        if stand.rank != stand.ranks[0] or any(o is None or o.ranks != stand.ranks for o in others):
            continue
        here = [o for o in others if o is not None]
        alike = {(o.kind, *(() if o.kind == "all_to_all_single" else (o.rest, o.operand.shape))) for o in here}
        if len(alike) > 1:
            raise Stuck(f"ranks {stand.ranks} do different things: {alike}")
        answers |= zip(stand.ranks, _communicate(here), strict=True)
    return answers


def _communicate(stands: Sequence[_Stand]) -> list[Tensor]:
    kind, rest, operands = stands[0].kind, stands[0].rest, [s.operand for s in stands]
    n = len(stands)
    if kind == "all_reduce":
        return [_REDUCE[rest[0]](operands)] * n
    if kind == "all_gather_into_tensor":
        return [torch.cat(operands)] * n
    if kind == "reduce_scatter_tensor":
        if operands[0].shape[0] % n:
            raise Stuck(f"reduce_scatter of {list(operands[0].shape)} over {n} ranks")
        return list(_REDUCE[rest[0]](operands).chunk(n)) if operands[0].numel() else [operands[0]] * n
    if kind == "broadcast":
        return [operands[rest[0]]] * n
    if kind == "all_to_all_single":
        sent = [s.operand.split(list(s.rest[1])) for s in stands]
        return [torch.cat([pieces[i] for pieces in sent]) for i in range(n)]
    raise Stuck(f"{kind} is not simulated")


def difference(
    wanted: Sequence[Sequence[object]], found: Sequence[Sequence[object]], tolerance: float = TOLERANCE
) -> str:
    """How all ranks' outputs differ by more than ``tolerance``, one line; empty if they do not."""
    for rank, (mine, theirs) in enumerate(zip(wanted, found, strict=True)):
        if len(mine) != len(theirs):
            return f"rank {rank}: {len(mine)} outputs, found {len(theirs)}"
        for index, (a, b) in enumerate(zip(mine, theirs, strict=True)):
            if told := _differs(a, b, tolerance):
                return f"rank {rank}, output {index}: {told}"
    return ""


def _differs(a: object, b: object, tolerance: float) -> str:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return "" if operator.eq(a, b) else f"{a} became {b}"
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{a.dtype} {list(a.shape)} became {b.dtype} {list(b.shape)}"
    a, b = a.to(torch.float64), b.to(torch.float64)
    if not torch.equal(a.isnan(), b.isnan()):
        return "NaN in other places"
    a, b = a.nan_to_num(0, 1e300, -1e300), b.nan_to_num(0, 1e300, -1e300)
    if a.numel() == 0:
        return ""
    size, error = float(a.abs().max()), float((a - b).abs().max())
    return f"off by {error / size if size else error:.1e}" if error > tolerance * size + ROUNDING else ""
