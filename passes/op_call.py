"""One op call as the placement rules see it, and what a rule can say of it: row-wise or mixing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch.fx as fx

from cpcompile.passes.token_layout import Expr, Shape, TokenDim

Layouts = Mapping[fx.Node, tuple[TokenDim | None, ...]]


class Unused:
    """Demand of an operand whose data the op does not read (``new_ones``, ``sym_size``): any copy will do."""


UNUSED = Unused()
Demand = TokenDim | None | Unused


@dataclass(frozen=True)
class RowWise:
    """The op computes each row from the same row of its operands.

    Args:
        operands: per tensor operand, where its rows lie, ``None`` if every row needs all of it, or ``UNUSED``.
        outputs: per output, where the rows lie.
        size_arg: position of a size list in ``args`` that names the token dim and must be made local in a shard.
        identity: the op passes its input on unchanged (a slice over all tokens).
    """

    operands: Mapping[fx.Node, Demand]
    outputs: tuple[TokenDim | None, ...]
    size_arg: int | None = None
    identity: bool = False


@dataclass(frozen=True)
class Mixing:
    """The op needs whole operands, and why."""

    reason: str


@dataclass(frozen=True)
class Call:
    """One op call as the rules see it: its operands' shapes and token dims, and its outputs' shapes."""

    node: fx.Node
    tokens: Expr
    layouts: Layouts
    shapes: Mapping[fx.Node, tuple[Shape, ...]]

    def shape(self, node: fx.Node) -> Shape:
        """Shape of ``node``'s first output."""
        return self.shapes[node][0]

    def layout(self, node: object) -> TokenDim | None:
        """Token dim of ``node``'s first output, if known."""
        known = self.layouts.get(node) if isinstance(node, fx.Node) else None
        return known[0] if known else None

    def arg(self, index: int, name: str, default: object = None) -> object:
        """The argument at ``index``, or called ``name``."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def dims(self, index: int, name: str) -> list[int]:
        """A dim or list of dims among the arguments; ``[]`` where absent."""
        value = self.arg(index, name)
        if value is None:
            return []
        return list(value) if isinstance(value, list | tuple) else [value]  # type: ignore[list-item]

    @property
    def tensors(self) -> list[fx.Node]:
        """The operands that are tensors, each once, in argument order."""
        return [n for n in self.node.all_input_nodes if self.shapes.get(n)]

    @property
    def out(self) -> Shape:
        """Shape of the first output."""
        return self.shapes[self.node][0]


Rule = Callable[[Call], RowWise | Mixing]
