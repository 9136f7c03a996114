"""Which columns of an MLP's first products meet which rows of its last weight, read backwards from the last product.

The last product sums over I columns, of which rank r of P takes those from r*I/P to (r+1)*I/P. What every op on the
way reads for them is found by index: an activation or a product of values reads the same columns of each, a slice or
split those that it takes, in one piece (gate and up side by side, in any order) or with a step (interleaved). All
readers of a value must ask for the same columns of it; then each rank's part of the first weights is what they ask.
Refuses: columns that are regrouped, moved or taken in another way; operands that are repeated over rows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx

from cpcompile.passes.collectives import arguments, op_name
from cpcompile.passes.module_roles import HALVING, SPLITS, VIEWS, between, is_elementwise
from cpcompile.passes.products import Product
from cpcompile.passes.token_layout import shape_of
from cpcompile.passes.weight_cuts import CutRefused

KEEPS_ROWS = VIEWS - {f"aten::{n}" for n in ("permute", "t", "transpose", "expand", "slice", "_to_copy")}


@dataclass(frozen=True)
class Columns:
    """Of a last dim in ``segments`` segments of ``P * inner`` columns, rank r's are the r-th ``inner`` of each."""

    segments: int
    inner: int


@dataclass
class InnerColumns:
    """What lies between the products of one MLP.

    Args:
        middle: its nodes, the last one first.
        of: node → its columns; the first products' too.
        divided: slice or split → the arguments by which a rank takes the same columns from its own.
    """

    middle: tuple[fx.Node, ...] = ()
    of: dict[fx.Node, Columns] = field(default_factory=dict)
    divided: dict[fx.Node, Mapping[str, Any]] = field(default_factory=dict)


def inner_columns(down: Product, products: Collection[fx.Node], parts: int) -> InnerColumns:
    """The columns of all values between ``products`` and ``down``, one of them, that one of ``parts`` ranks takes.

    Raises:
        CutRefused: they cannot be told, or two readers of a value ask for different ones.
    """
    middle = between(down.rows, products)
    if middle is None:
        raise CutRefused(f"more lies before {down.node} than activations and products of values")
    own = {*middle, *products}
    for node in own - {down.node}:
        other = next((user for user in node.users if user not in own), None)
        if other is not None:
            raise CutRefused(f"{node} is also read by {other}, which needs all of its columns")
    reader = _Reader(parts)
    reader.ask(down.rows, Columns(1, _width(down.rows) // parts))
    reader.found.middle = tuple(sorted(middle, reverse=True))
    for node in reader.found.middle:
        reader.read(node)
    return reader.found


class _Reader:
    def __init__(self, parts: int) -> None:
        self.parts, self.found = parts, InnerColumns()
        self.pieces: dict[fx.Node, dict[int, Columns]] = {}

    def ask(self, node: fx.Node, columns: Columns) -> None:
        if self.found.of.setdefault(node, columns) != columns:
            raise CutRefused(f"{node} is read in two ways, for which a rank would need different columns of it")

    def read(self, node: fx.Node) -> None:
        """Ask the operands of ``node`` for what is asked of it."""
        name, source = op_name(node.target), node.all_input_nodes[0]
        if name in SPLITS:
            self._split(node, source)
        elif name == "getitem":
            self.pieces.setdefault(source, {})[int(node.args[1])] = self.found.of[node]  # type: ignore[arg-type]
        elif name == "aten::slice":
            self._slice(node, source)
        elif name in HALVING:
            self._halves(node, source, arguments(node)[HALVING[name]])
        elif name in KEEPS_ROWS:
            old, new = source.meta["val"], node.meta["val"]
            if _width(node) != _width(source) or old.dtype != new.dtype:
                raise CutRefused(f"{node} regroups columns")
            self.ask(source, self.found.of[node])
        elif is_elementwise(node):
            for operand in node.all_input_nodes:
                if not isinstance(operand.meta["val"], torch.Tensor):
                    raise CutRefused(f"{node} computes with {operand}, a number that other ranks' rows may not have")
                if _ones(operand) != _ones(node):
                    raise CutRefused(f"{node} repeats {operand} over rows or columns")
                self.ask(operand, self.found.of[node])
        else:
            raise CutRefused(f"{node} moves columns")

    def _slice(self, node: fx.Node, source: fx.Node) -> None:
        given, width = arguments(node), _width(source)
        _check_last(node, source, given["dim"])
        if any(not isinstance(given[key], int | None) for key in ("start", "end", "step")):
            raise CutRefused(f"{node} takes columns whose numbers are not known")
        first, last, step = slice(given["start"], given["end"], given["step"]).indices(width)
        if step == 1:
            self.ask(source, self._around(node, source, first, self.found.of[node]))
            self.found.divided[node] = {"start": first // self.parts, "end": last // self.parts, "step": 1}
            return
        columns = self.found.of[node]
        if first >= step or _width(node) * step != width:
            raise CutRefused(f"{node} takes columns {first}:{last}:{step} of {width}, not every {step}th of all")
        self.ask(source, Columns(columns.segments, columns.inner * step))
        self.found.divided[node] = {"start": first, "end": width // self.parts, "step": step}

    def _split(self, node: fx.Node, source: fx.Node) -> None:
        given, values = arguments(node), node.meta["val"]
        _check_last(node, source, given["dim"])
        widths = [int(shape_of(value)[-1]) for value in values]
        for index, columns in self.pieces[node].items():
            self.ask(source, self._around(node, source, sum(widths[:index]), columns))
        if any(width % self.parts for width in widths):
            raise CutRefused(f"{node} splits columns by {widths}, which {self.parts} does not divide")
        key = "split_size" if op_name(node.target) == "aten::split" else "split_sizes"
        own = [width // self.parts for width in widths]
        self.found.divided[node] = {key: own[0] if key == "split_size" else own}

    def _halves(self, node: fx.Node, source: fx.Node, dim: int) -> None:
        _check_last(node, source, dim)
        columns = self.found.of[node]
        self.ask(source, Columns(2 * columns.segments, columns.inner))

    def _around(self, node: fx.Node, source: fx.Node, first: int, columns: Columns) -> Columns:
        """Columns of ``source``, of which those from ``first`` on are ``columns``: all of its segments are alike."""
        segment, width = self.parts * columns.inner, _width(source)
        if first % segment or width % segment:
            raise CutRefused(f"{node} takes columns from {first} of {width}: not one of several pieces alike")
        return Columns(width // segment, columns.inner)


def _check_last(node: fx.Node, source: fx.Node, dim: int) -> None:
    ndim = source.meta["val"].dim()
    if dim % ndim != ndim - 1:
        raise CutRefused(f"{node} divides rows")


def _ones(node: fx.Node) -> list[bool]:
    """Which dims are of size 1, leading ones left out: what an elementwise op repeats has more of them."""
    sizes = shape_of(node.meta["val"])
    leading = next((i for i, size in enumerate(sizes) if size != 1), len(sizes))
    return [size == 1 for size in sizes[leading:]]


def _width(node: fx.Node) -> int:
    width = shape_of(node.meta["val"])[-1]
    if not width.is_number:
        raise CutRefused(f"{node} has {width} columns, a number that is not fixed")
    return int(width)
