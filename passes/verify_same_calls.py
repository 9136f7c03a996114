"""That a rewritten graph makes the calls of the original but for what a proof accounts for otherwise.

Calls of the original are numbered: calls of one op with the same arguments on the same values are one value. A node of
the rewritten graph is a copy if the original makes its call. Sizes are computed, in-place writes and random numbers
keep their order, and what is a copy has the shape of the original.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.verify_arguments import (
    Arguments,
    Refused,
    View,
    aliases,
    communicates,
    op_name,
)
from cpcompile.passes.verify_index import Shape, plain, row_major, same, tensor_shape


class Original:
    """The original graph, numbered.

    Args:
        gm: functional ATen graph of one rank, ``meta["val"]`` set.
        axis: a mesh axis; its group has one name in both graphs.
    """

    def __init__(self, gm: fx.GraphModule, axis: Axis) -> None:
        self.gm, self.arguments = gm, Arguments(gm, axis)
        self.at: dict[fx.Node, View] = {}
        self.nodes: list[fx.Node] = []
        self.calls: dict[object, View] = {}
        self.volatile: set[int] = set()
        for node in gm.graph.nodes:
            if node.op != "output" and not self.arguments.visit_size(node, _stated_shape):
                self._number(node)

    def _number(self, node: fx.Node) -> None:
        key = self._key(node)
        view = self.calls.get(key)
        if view is None:
            value = node.meta.get("val")
            dims = row_major(tensor_shape(value)) if isinstance(value, torch.Tensor) else ()
            view = self.calls[key] = (len(self.nodes), dims)
            self.nodes.append(node)
        self.at[node] = view
        written = aliases(node) and any(self.at[n][0] in self.volatile for n in node.all_input_nodes if n in self.at)
        if node in self.arguments.mutated or written:
            self.volatile.add(view[0])
        if isinstance(node.meta.get("val"), torch.SymInt):
            self.arguments.sizes[node] = plain(node.meta["val"])

    def _key(self, node: fx.Node) -> object:
        if node.op in ("placeholder", "get_attr"):
            return node.op, node.target
        return self.arguments.key(node, self.at, self.volatile)

    def number(self, node: fx.Node) -> int:
        """The number of ``node``'s value."""
        return self.at[node][0]


class Copies:
    """Follows the copies of the original's calls in a rewritten graph.

    Args:
        original: the numbered original.
        gm: the rewritten graph.
        axis: as for ``Original``.
    """

    def __init__(self, original: Original, gm: fx.GraphModule, axis: Axis) -> None:
        self.original, self.gm, self.arguments = original, gm, Arguments(gm, axis)
        self.at: dict[fx.Node, View] = {}
        self.copied: list[int] = []

    def copy(self, node: fx.Node) -> None:
        """Take ``node`` for a copy.

        Raises:
            Refused: the original makes no such call, or with other results.
        """
        if node.op in ("placeholder", "get_attr"):
            key: object = (node.op, node.target)
        else:
            unknown = next(
                (n for n in node.all_input_nodes if n not in self.at and n not in self.arguments.sizes), None
            )
            if unknown is not None:
                raise Refused(f"expected a value of the original; found {unknown}, which was not proven to be one")
            key = self.arguments.key(node, self.at, self.original.volatile)
        view = self.original.calls.get(key)
        if view is None:
            found = ", ".join(self.name(n) for n in node.all_input_nodes) or "no values"
            raise Refused(f"expected a call of the original; found {op_name(node.target)} of {found}", 1)
        self.take(node, view)
        if communicates(node):
            self.copied.append(view[0])

    def take(self, node: fx.Node, view: View) -> None:
        """``node`` is the original's value ``view``.

        Raises:
            Refused: its shape is another, or it is another constant.
        """
        theirs = self.original.nodes[view[0]]
        check_shape(node, _shape_or_none(theirs))
        if node.op == "get_attr" and _attribute(self.gm, node) is not _attribute(self.original.gm, theirs):
            raise Refused(f"expected the constant {node.target} of the original; found another")
        if theirs in self.original.arguments.sizes:
            self.arguments.sizes[node] = self.original.arguments.sizes[theirs]
        self.at[node] = view

    def name(self, node: fx.Node) -> str:
        """The original's node that ``node`` is, or that it is none."""
        return str(self.original.nodes[self.at[node][0]]) if node in self.at else f"{node}, which was not proven"

    def check_rest(self, replaced: Collection[int]) -> list[tuple[str, str]]:
        """What is wrong with inputs, effects, outputs, and the order of collectives, of which ``replaced`` are gone."""
        found = []
        mine, theirs = ([n.target for n in g.graph.find_nodes(op="placeholder")] for g in (self.gm, self.original.gm))
        if mine != theirs:
            found.append(("placeholder", f"expected the graph inputs {theirs}; found {mine}"))
        if len(self.arguments.effects) != len(self.original.arguments.effects):
            found.append(("output", "expected every call with effects of the original, once; found others"))
        numbers = [self.original.number(n) for n in self.original.gm.graph.nodes if communicates(n)]
        wanted = [n for n in numbers if n not in replaced]
        if self.copied != wanted:
            names = [str(self.original.nodes[n]) for n in self.copied]
            found.append(("output", f"expected the other collectives in the original's order; found {names}"))
        return found + self._outputs()

    def _outputs(self) -> list[tuple[str, str]]:
        found = []
        mine, theirs = (_leaves(g.graph.output_node().args[0]) for g in (self.gm, self.original.gm))
        if len(mine) != len(theirs):
            return [("output", f"expected {len(theirs)} outputs; found {len(mine)}")]
        for index, (new, old) in enumerate(zip(mine, theirs, strict=True)):
            if isinstance(old, fx.Node) and old in self.original.at:
                alike = isinstance(new, fx.Node) and self.at.get(new) == self.original.at[old]
            else:
                alike = self.arguments.constant(new) == self.original.arguments.constant(old)
            if not alike:
                found.append((str(new), f"{new}: expected output {index} to be {old}"))
        return found


def check_shape(node: fx.Node, shape: Shape | None) -> None:
    """What the graph says of the shape of ``node`` is ``shape``; None where it is no one tensor.

    Raises:
        Refused: it says otherwise.
    """
    stated = _shape_or_none(node)
    if stated is None or shape is None:
        if stated != shape:
            raise Refused(f"expected {shape}; its meta says {stated}", 2)
    elif len(stated) != len(shape) or not all(map(same, stated, shape)):
        raise Refused(f"expected shape {list(shape)}; its meta says {list(stated)}", 2)


def _stated_shape(node: fx.Node) -> Shape:
    return tensor_shape(node.meta["val"])


def _shape_or_none(node: fx.Node) -> Shape | None:
    value = node.meta.get("val")
    return tensor_shape(value) if isinstance(value, torch.Tensor) else None


def _attribute(gm: fx.GraphModule, node: fx.Node) -> object:
    value: object = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _leaves(values: object) -> Sequence[object]:
    return list(values) if isinstance(values, list | tuple) else [values]
