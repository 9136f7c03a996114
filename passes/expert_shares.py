"""Experts split over ranks: which of them a rank has, read off what the graph makes of the router's numbers."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx
from torch import Tensor

from cpcompile.passes.collectives import arguments, op_name, sizes

aten = torch.ops.aten
RESHAPES = frozenset({"aten::view", "aten::reshape", "aten::_unsafe_view"})
_MOST = 1 << 16  # experts that a router may have, for what is tried below


class Numbers:
    """Values that the graph computes, element by element, from the expert numbers that a router chose.

    They are not matched but tried: computed for every number that there is.
    """

    def __init__(self, slots: fx.Node) -> None:
        """Follow ``slots``, integers ``[S]`` or ``[N, K]``, back to the router's choice."""
        self.chosen = _origin(slots)
        self.total = _choices(self.chosen) if self.chosen is not None else 0
        self._known: dict[fx.Node, Tensor | None] = {}
        if self.chosen is not None:
            self._known[self.chosen] = torch.arange(self.total)

    def of(self, node: object) -> Tensor | None:
        """``[total]``: what ``node`` is for each expert number; None where it is not computed from them alone."""
        if not isinstance(node, fx.Node) or not self.total:
            return None
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: fx.Node) -> Tensor | None:
        if op_name(node.target) in RESHAPES:
            return self.of(node.args[0])
        if not _elementwise(node) or any(sizes(n) != sizes(node) for n in node.all_input_nodes):
            return None
        found = {n: self.of(n) for n in node.all_input_nodes}
        if any(value is None for value in found.values()):
            return None
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
        result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
        return result

    def first(self, slots: fx.Node, count: int) -> int | None:
        """The first of the ``count`` experts that ``slots`` counts from 0, others from ``count``; None if it does not.

        ``count`` itself is what stands for an expert of another rank.
        """
        found = self.of(slots)
        if found is None:
            return None
        here = (found >= 0) & (found < count)
        first = int(here.int().argmax())
        expected = torch.arange(self.total) - first
        expected = expected.masked_fill((expected < 0) | (expected >= count), count)
        whole = int(here.sum()) == count and self.total % count == 0 and first % count == 0
        return first if whole and torch.equal(found, expected) else None

    def without_mask(self, weights: fx.Node, first: int, count: int) -> fx.Node:
        """``weights`` before they were set to 0 where the expert is of another rank."""
        if weights.target is not aten.masked_fill.Scalar or arguments(weights)["value"] != 0:
            return weights
        mask, numbers = self.of(arguments(weights)["mask"]), torch.arange(self.total)
        others = (numbers < first) | (numbers >= first + count)
        same = mask is not None and torch.equal(mask, others)
        return arguments(weights)["self"] if same else weights


def _elementwise(node: fx.Node) -> bool:
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return node.op == "call_function" and (pointwise or node.target is aten.floor_divide.default)


def _origin(slots: fx.Node) -> fx.Node | None:
    """The numbers of the largest, ``topk(...)[1]``, that ``slots`` is computed from."""
    pending, seen = [slots], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.target is operator.getitem:
            return node if _choices(node) else None
        if node not in seen and node.op == "call_function":
            seen.add(node)
            pending += node.all_input_nodes
    return None


def _choices(chosen: fx.Node) -> int:
    """Among how many experts ``chosen``, ``[N, K]``, are the router's; 0 if they are no router's choice."""
    top = chosen.args[0]
    if chosen.args[1:] != (1,) or not isinstance(top, fx.Node) or top.target is not aten.topk.default:
        return 0
    given = arguments(top)
    scores = given["self"].meta["val"]
    total = scores.shape[-1]
    along = given["dim"] in (-1, scores.ndim - 1) and given["largest"]
    return total if along and isinstance(total, int) and total <= _MOST else 0
