"""The table of mutations, and what they draw from and change."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fuzzing.worlds import World

aten, C10D = torch.ops.aten, torch.ops._c10d_functional
LAST = torch.iinfo(torch.int64).max
ALL_REDUCE, GATHER = C10D.all_reduce.default, C10D.all_gather_into_tensor.default
SCATTER, WAIT = C10D.reduce_scatter_tensor.default, C10D.wait_tensor.default
REDUCING, MOVING = (ALL_REDUCE, SCATTER), (ALL_REDUCE, SCATTER, GATHER)
UNARY = (
    aten.tanh.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.neg.default,
    aten.sin.default,
    aten.abs.default,
)
UNARY += (aten.silu.default, aten.gelu.default, aten.rsqrt.default, aten.cos.default)
BINARY = (
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.maximum.default,
    aten.minimum.default,
    aten.div.Tensor,
)
ORDERED = (aten.sub.Tensor, aten.div.Tensor, aten.mm.default, aten.bmm.default, aten.addmm.default)
VIEWS = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
TURNS = (aten.transpose.int, aten.permute.default, aten.t.default)
ALONG = {
    aten._softmax.default: 1, aten.cumsum.default: 1, aten.mean.dim: 1, aten.amax.default: 1, aten.sum.dim_IntList: 1,
    aten.sort.default: 1, aten.flip.default: 1, aten.roll.default: 2, aten.topk.default: 2, aten.argmax.default: 1,
}  # fmt: skip
COMPARED = {aten.gt: aten.ge, aten.lt: aten.le, aten.ge: aten.gt, aten.le: aten.lt}


class NotHere(Exception):
    """The graph has no place for this mutation."""


@dataclass
class Mutation:
    """A graph to change, and what to draw from."""

    graph: fx.Graph
    rng: random.Random
    world: World
    rank: int

    def one(self, *targets: Any, where: Callable[[fx.Node], Any] = bool) -> fx.Node:
        """A random call of one of ``targets`` (of any op) that is ``where``."""
        calls = (n for n in self.graph.nodes if n.op == "call_function" and (not targets or n.target in targets))
        return self.choice([n for n in calls if where(n)])

    def choice(self, found: Sequence[Any]) -> Any:
        """One of ``found``."""
        if not found:
            raise NotHere
        return self.rng.choice(found)

    def set(self, node: fx.Node, index: int, value: Any) -> str:
        """Change one argument."""
        if index >= len(node.args):
            raise NotHere
        before = node.args[index]
        node.update_arg(index, value)
        node.meta["mutated"] = True
        return f"{node}: argument {index} from {before} to {value}"

    def after(self, node: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call behind ``node``, or behind the one that was put there before."""
        with self.graph.inserting_after(node):
            made = self.graph.call_function(target, args, kwargs)
        made.meta = {**node.meta, "mutated": True}
        return made

    def instead(self, node: fx.Node, value: fx.Node, but: Sequence[fx.Node] = ()) -> str:
        """Whoever reads ``node`` reads ``value``."""
        users = [u for u in node.users if u is not value and u not in but]
        if not users:
            raise NotHere
        for user in users:
            user.replace_input_with(node, value)
            user.meta["mutated"] = True
        return f"{node} became {value}"

    def retarget(self, node: fx.Node, target: Any) -> str:
        """Another op on the same operands."""
        before, node.target = node.target, target
        node.meta["mutated"] = True
        return f"{node}: {before} became {target}"


def shape(node: Any) -> tuple[Any, ...]:
    """Sizes, as they print: symbolic ones are compared without a guard."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(str(s) for s in value.shape) if isinstance(value, torch.Tensor) else ()


def dtype_of(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def like(a: Any, b: Any) -> bool:
    return (
        isinstance(a, fx.Node) and isinstance(b, fx.Node) and shape(a) == shape(b) != () and dtype_of(a) == dtype_of(b)
    )


def floats(node: fx.Node) -> bool:
    return dtype_of(node) is not None and node.meta["val"].is_floating_point() and node.meta["val"].dim() > 0


def wait_of(m: Mutation, *targets: Any) -> fx.Node:
    return m.one(WAIT, where=lambda n: n.args[0].target in targets)


def before(m: Mutation, node: fx.Node) -> list[fx.Node]:
    found = []
    for other in m.graph.nodes:
        if other is node:
            break
        found.append(other)
    return found


Kind = Callable[[Mutation], str]
KINDS: dict[str, Kind] = {}


def kind(made: Kind) -> Kind:
    """Enter a mutation in the table."""
    KINDS[made.__name__] = made
    return made
