"""How the weight of a product comes from the graph's inputs, and which part of each input a cut of the product reads.

A weight may be transposed, cast and scaled on its way (quantised weights): a cut of the product's operand is then a cut
of every tensor on the way that has the dim, and scales that do not have it stay whole.
Refuses: a weight that something else reads, that goes through another op, or whose dim does not divide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from cpcompile.passes.collectives import arguments, op_name
from cpcompile.passes.token_layout import shape_of

_SAME = frozenset(f"aten::{n}" for n in ("clone", "contiguous", "alias", "detach", "_to_copy"))


class CutRefused(Exception):
    """A weight cannot be cut; the message is the reason, in one line."""


@dataclass(frozen=True)
class Cut:
    """Each rank of a group keeps its part of one dim.

    Args:
        dim: the dim of the input.
        segments: parts of the dim that are each cut: 2 where two weights lie side by side (gate and up in one).
        parts: ranks that share the weight.
    """

    dim: int
    segments: int
    parts: int


@dataclass
class Cuts:
    """What cutting one or more products does to the nodes that their weights come through.

    Args:
        parts: ranks that share the weights.
        nodes: node → the cut of its result; graph inputs too.
        readers: what may read them: the products, and nodes that are cut themselves.
    """

    parts: int
    nodes: dict[fx.Node, Cut] = field(default_factory=dict)
    readers: set[fx.Node] = field(default_factory=set)

    def cut(self, node: fx.Node, dim: int, reader: fx.Node, segments: int = 1) -> None:
        """Cut ``dim`` of ``node``, which ``reader`` reads.

        Raises:
            CutRefused: it cannot be cut, or is cut in another way already.
        """
        wanted = Cut(dim, segments, self.parts)
        self.readers.add(reader)
        if node in self.nodes:
            if self.nodes[node] != wanted:
                raise CutRefused(f"{node} is read twice and would be cut in two ways")
            return
        size = shape_of(node.meta["val"])[dim]
        if not size.is_number or int(size) % (segments * self.parts):
            parts = f"{segments} x {self.parts}" if segments > 1 else str(self.parts)
            raise CutRefused(f"dim {dim} of {node} has {size} elements, which {parts} does not divide")
        self.nodes[node] = wanted
        if node.op != "placeholder":
            for source, source_dim in _sources(node, dim):
                self.cut(source, source_dim, node, segments)

    def check_readers(self) -> None:
        """Every reader of what is cut knows that it is.

        Raises:
            CutRefused: something else reads it whole.
        """
        for node in self.nodes:
            other = next((u for u in node.users if u not in self.nodes and u not in self.readers), None)
            if other is not None:
                raise CutRefused(f"{node} is also read by {other}, which needs it whole")

    def inputs(self) -> Mapping[str, Cut]:
        """The cut of each graph input, by its name in the graph."""
        return {node.name: cut for node, cut in self.nodes.items() if node.op == "placeholder"}


def _sources(node: fx.Node, dim: int) -> Iterable[tuple[fx.Node, int]]:
    """The tensors that ``node`` is made of and that have its dim ``dim``, each with that dim's number there."""
    name = op_name(node.target)
    if node.op != "call_function":
        raise CutRefused(f"{node} is no input of the graph")
    ndim = len(shape_of(node.meta["val"]))
    if name in _SAME:
        yield node.all_input_nodes[0], dim
    elif name in ("aten::t", "aten::transpose", "aten::permute"):
        yield node.all_input_nodes[0], _order(node, ndim)[dim]
    elif name == "aten::mul":
        for source in node.all_input_nodes:
            shape = shape_of(source.meta["val"])
            own = dim - (ndim - len(shape))
            if own >= 0 and shape[own] != 1:
                yield source, own
    else:
        raise CutRefused(f"it comes through {node} ({name}), of which no cut is known")


def _order(node: fx.Node, ndim: int) -> list[int]:
    """Which dim of its operand each dim of a transposition is."""
    given = arguments(node)
    order = list(range(ndim))
    if "dims" in given:
        return [d % ndim for d in given["dims"]]
    a, b = (given["dim0"] % ndim, given["dim1"] % ndim) if "dim0" in given else (0, 1)
    order[a], order[b] = order[b], order[a]
    return order if ndim > 1 else [0]


def cut_tensor(tensor: torch.Tensor, cut: Cut, part: int) -> torch.Tensor:
    """Rank ``part``'s share of ``tensor``, in memory of its own."""
    segments = tensor.chunk(cut.segments, cut.dim)
    mine = [segment.chunk(cut.parts, cut.dim)[part] for segment in segments]
    return torch.cat(mine, cut.dim) if len(mine) > 1 else mine[0].clone(memory_format=torch.contiguous_format)
