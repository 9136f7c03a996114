"""For the proof of FlashComm 2: which values are weights of ODP's ranks one after another, and which are their sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.fx as fx
from torch._ops import OpOverload

from cpcompile.axes import Axis
from cpcompile.passes.verify_arguments import Refused, communicates, is_mutable, is_random, op_name
from cpcompile.passes.verify_index import Shape, tensor_shape
from cpcompile.passes.verify_same_calls import Copies, Original, check_shape
from cpcompile.passes.weight_recipes import Gather, Sum

_UNCHANGED = frozenset(f"aten::{n}" for n in ("clone", "contiguous", "alias", "detach", "_to_copy"))


class GatheredWeights:
    """Follows graph inputs that recipes change, through casts, transpositions and scaling.

    Args:
        original: the numbered original.
        copies: the copies in the rewritten graph.
        odp: the ranks that the recipes must be over.
        recipes: graph input → its recipe.
        same_on_ranks: whether a graph input is the same on all ranks.
    """

    def __init__(
        self,
        original: Original,
        copies: Copies,
        odp: Axis,
        recipes: Mapping[str, Any],
        same_on_ranks: Callable[[str], bool],
    ) -> None:
        self.original, self.copies, self.odp, self.recipes = original, copies, odp, recipes
        self.same_on_ranks = same_on_ranks
        self.at: dict[fx.Node, tuple[int, int]] = {}
        self.summed: dict[fx.Node, int] = {}
        self.shared: dict[fx.Node, bool] = {}

    def check_recipes(self) -> list[tuple[str, str]]:
        """Recipes that are not over ODP in its order."""
        found = []
        for name, recipe in self.recipes.items():
            fits = isinstance(recipe, Gather | Sum) and recipe.axis == self.odp
            if not fits or (isinstance(recipe, Gather) and recipe.parts != self.odp.size):
                found.append((name, f"{name}: expected a Gather or Sum over {self.odp.name}, in order; found {recipe}"))
        return found

    def visit(self, node: fx.Node) -> bool:
        """Take ``node`` for a gathered weight or a summed bias, where it is one; returns whether it is."""
        recipe = self.recipes.get(node.name) if node.op == "placeholder" else None
        if recipe is not None:
            self._input(node, recipe)
            return True
        read = [n for n in node.all_input_nodes if n in self.at]
        if not read or node.op != "call_function" or op_name(node.target) not in _UNCHANGED | _OTHERS:
            return False
        self._call(node)
        return True

    def is_sum(self, mine: object, theirs: object) -> bool:
        """Whether ``mine`` is the sum over ODP of the original's ``theirs``; or both are nothing."""
        if not isinstance(theirs, fx.Node):
            return mine == theirs
        return isinstance(mine, fx.Node) and self.summed.get(mine) == self.original.number(theirs)

    def is_same(self, node: fx.Node) -> bool:
        """Whether the original's ``node`` is the same on all ranks, as it is computed from what is."""
        if node not in self.shared:
            if node.op == "placeholder":
                self.shared[node] = not isinstance(node.meta.get("val"), torch.Tensor) or self.same_on_ranks(node.name)
            else:
                plain = isinstance(node.target, OpOverload) and not (is_random(node) or is_mutable(node))
                plain = plain and not communicates(node)
                self.shared[node] = plain and all(self.is_same(n) for n in node.all_input_nodes)
        return self.shared[node]

    def _input(self, node: fx.Node, recipe: Gather | Sum) -> None:
        theirs = next(n for n in self.original.gm.graph.find_nodes(op="placeholder") if n.target == node.target)
        number, sizes = self.original.number(theirs), tensor_shape(theirs.meta["val"])
        if isinstance(recipe, Sum):
            check_shape(node, sizes)
            self.summed[node] = number
            return
        check_shape(node, self._wider(sizes, recipe.dim))
        self.at[node] = (number, recipe.dim)

    def _wider(self, sizes: Shape, dim: int) -> Shape:
        return tuple(s * self.odp.size if d == dim else s for d, s in enumerate(sizes))

    def _call(self, node: fx.Node) -> None:
        """``node`` is what the original's call makes of every rank's weights, one rank's after another's."""
        operands = dict(self.copies.at)
        operands.update({n: (self.at[n][0], ()) for n in node.all_input_nodes if n in self.at})
        old = next((n for n in self.original.gm.graph.nodes if self._matches(node, n, operands)), None)
        if old is None:
            raise Refused(f"expected a call of the original; found {op_name(node.target)} of gathered weights", 2)
        mine = {o: self.at.get(n) for n, o in zip(node.all_input_nodes, old.all_input_nodes, strict=True)}
        dims = {self._dim(old, o, found[1]) for o, found in mine.items() if found is not None}
        sizes = tensor_shape(old.meta["val"])
        for other in (o for o, found in mine.items() if found is None):
            shape = tensor_shape(other.meta["val"])
            lacks = all(len(sizes) - len(shape) > d or shape[d - len(sizes)] == 1 for d in dims)
            if not lacks or not self.is_same(other):
                raise Refused(f"expected {other} to be gathered, or the same for all ranks' columns; it is not", 3)
        if len(dims) != 1:
            raise Refused("expected operands gathered along one dim; found several", 2)
        (dim,) = dims
        check_shape(node, self._wider(sizes, dim))
        self.at[node] = (self.original.number(old), dim)

    def _matches(self, node: fx.Node, old: fx.Node, operands: Mapping[fx.Node, tuple[int, Any]]) -> bool:
        if old.target is not node.target or len(old.all_input_nodes) != len(node.all_input_nodes):
            return False

        def numbered(n: fx.Node, of: Callable[[fx.Node], object]) -> object:
            return fx.node.map_arg((n.args, n.kwargs), of)  # type: ignore[arg-type]

        theirs = numbered(old, lambda n: f"#{self.original.number(n)}" if n in self.original.at else n.name)
        return bool(numbered(node, lambda n: f"#{operands[n][0]}" if n in operands else None) == theirs)

    def _dim(self, old: fx.Node, operand: fx.Node, dim: int) -> int:
        """Where dim ``dim`` of ``operand`` is in the result of ``old``."""
        name, ndim = op_name(old.target), len(tensor_shape(operand.meta["val"]))
        args = self.original.arguments.arguments(old)
        if name in _UNCHANGED:
            return dim
        if name == "aten::permute":
            order: list[int] = [d % ndim for d in args["dims"]]
            return order.index(dim)
        if name in ("aten::t", "aten::transpose"):
            a, b = (args["dim0"] % ndim, args["dim1"] % ndim) if name == "aten::transpose" else (0, ndim - 1)
            return int({a: b, b: a}.get(dim, dim))
        return dim + len(tensor_shape(old.meta["val"])) - ndim


_OTHERS = frozenset({"aten::permute", "aten::t", "aten::transpose", "aten::mul"})
