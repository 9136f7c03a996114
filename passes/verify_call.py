"""One call as the static proof's table of row-wise ops sees it, and the rules that most ops share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.verify_index import Rows, Shape


@dataclass(frozen=True)
class Call:
    """A call on whole values, of which some are at hand as rows only.

    Args:
        node: the call in the rewritten graph.
        shapes: whole shape of every tensor operand.
        rows: the dim that is split, for operands of which only this rank's rows are there.
        out: whole shapes of the results.
    """

    node: fx.Node
    shapes: Mapping[fx.Node, Shape]
    rows: Mapping[fx.Node, Rows]
    out: tuple[Shape, ...]

    def arg(self, name: str) -> object:
        """An argument by its name in the op's schema."""
        assert isinstance(self.node.target, torch._ops.OpOverload)
        for index, argument in enumerate(self.node.target._schema.arguments):
            if argument.name == name:
                default = argument.default_value if argument.has_default_value() else None
                return self.node.args[index] if index < len(self.node.args) else self.node.kwargs.get(name, default)
        return None

    def dims(self, name: str, ndim: int) -> list[int]:
        """A dim or list of dims, counted from 0; ``[]`` where absent."""
        value = self.arg(name)
        listed = [] if value is None else list(value) if isinstance(value, list | tuple) else [value]
        return [d + ndim if d < 0 else d for d in listed if isinstance(d, int)]

    def first(self) -> tuple[Shape, Rows] | None:
        """Shape and rows of the first operand if it alone is split."""
        operand = self.node.args[0]
        if not isinstance(operand, fx.Node) or set(self.rows) != {operand}:
            return None
        return self.shapes[operand], self.rows[operand]


Rule = Callable[[Call], Rows | str]
ALONE = "only its first operand may be split by rows"
ALONG = "it works along the rows"


def pointwise(call: Call) -> Rows | str:
    """Elementwise with broadcasting: what is not split has one row, or none."""
    out = call.out[0]
    found: Rows | None = None
    for node, rows in call.rows.items():
        here = rows.shifted(len(out) - len(call.shapes[node]))
        if call.shapes[node][rows.dim] != out[here.dim] or found not in (None, here):
            return "its operands are split along different dims"
        found = here
    assert found is not None
    for node, shape in call.shapes.items():
        dim = found.dim - (len(out) - len(shape))
        if node not in call.rows and dim >= 0 and shape[dim] != 1:
            return f"{node} has every row and other operands only this rank's"
    return found if all(shape == out for shape in call.out) else "its results differ in shape"


def along(*names: str) -> Rule:
    """Row-wise as long as no dim that the op works along is that of the rows."""

    def rule(call: Call) -> Rows | str:
        split = call.first()
        if split is None:
            return ALONE
        ndim, rows = len(split[0]), split[1]
        return ALONG if any(rows.dim in call.dims(name, ndim) for name in names) else rows

    return rule
