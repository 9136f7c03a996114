"""How many rows ranks have, for the static proof of module tensor parallelism: N, and how it is agreed on.

Ranks may have different numbers of rows R. They agree on N by the largest R of all ranks, or the caller states N, or
that all have as many.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import sympy
import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import group_name_of
from cpcompile.passes.verify_arguments import Arguments, Refused, op_name
from cpcompile.passes.verify_index import Shape, Size, same


@dataclass
class RowNumbers:
    """Which numbers N are at least R on every rank of a group, and the same on all of them.

    Args:
        fixed: a number that the caller states to be enough for all rows.
        equal: groups whose ranks have equal numbers of rows, by name; ``None`` all groups.
        exchanged: N → the largest of which R it is, and over which ranks.
    """

    fixed: int | None
    equal: Collection[str] | None
    exchanged: dict[Size, tuple[Size, Axis]] = field(default_factory=dict)

    def is_equal(self, axis: Axis) -> bool:
        """Whether all ranks of ``axis`` have as many rows as this one."""
        return self.equal is None or axis.group_name in self.equal

    def check(self, count: Size, rows: Size) -> None:
        """``count`` rows hold ``rows``, on every rank of some group.

        Raises:
            Refused: not known to.
        """
        largest = self.exchanged.get(count)
        if largest is not None and same(largest[0], rows):
            return
        fits = self.fixed is not None and (not isinstance(rows, int) or rows <= self.fixed)
        if largest is None and fits and self.fixed is not None and same(count, self.fixed):
            return
        known = "the largest of all ranks" if self.fixed is None else str(self.fixed)
        raise Refused(f"expected {rows} rows padded to {known}; found {count}", 3)

    def covers(self, count: Size, axis: Axis) -> bool:
        """Whether every rank of ``axis`` has padded to ``count``."""
        largest = self.exchanged.get(count)
        return largest is None or set(axis.ranks) <= set(largest[1].ranks)


@dataclass(frozen=True)
class RowCount:
    """Numbers of rows as a tensor of integers.

    Args:
        rows: R of this rank, or what the largest of all ranks' is taken of.
        sizes: the tensor's shape.
        axis: the ranks of which it is the largest; None before they agree.
    """

    rows: tuple[Size, ...]
    sizes: Shape
    axis: Axis | None = None


class Counts:
    """Follows numbers of rows through the exchange.

    Args:
        arguments: reads the shared graph; N is noted among its sizes.
        groups: by their names.
        numbers: what is known of N; what is exchanged is noted.
    """

    def __init__(self, arguments: Arguments, groups: Mapping[str, Axis], numbers: RowNumbers) -> None:
        """See the class."""
        self.arguments, self.groups, self.numbers = arguments, groups, numbers

    def counted(self, node: fx.Node, at: Mapping[fx.Node, object]) -> list[tuple[RowCount, ...]]:
        """Numbers of rows on their way to all ranks."""
        name, args = op_name(node.target), self.arguments.arguments(node)
        counts = [v for v in at.values() if isinstance(v, RowCount)]
        if name == "aten::full" and args["size"] == (1,) and not at:
            rows, dtype = args["fill_value"], args["dtype"]
            whole = isinstance(rows, int | sympy.Expr) and not isinstance(rows, bool) and dtype == torch.int64
            return [(RowCount((rows,), (1,)),)] if whole else []
        if not counts or len(counts) != len(at):
            return []
        in_order = list(at) == list(node.args[0]) if name == "aten::cat" else False  # type: ignore[arg-type]
        if in_order and args["dim"] in (0, -1) and all(c.axis is None and c.sizes for c in counts):
            joined = [r for count in counts for r in count.rows]
            return [(RowCount(tuple(joined), (len(joined),)),)]
        (count,) = counts if len(counts) == 1 else (None,)
        if count is None:
            return []
        if name == "_c10d_functional::all_reduce":
            axis = self.groups.get(group_name_of(node))
            if axis is None or args["reduce_op"] != "max" or count.axis is not None:
                expected = "the largest number of rows of all ranks of a group that shares weights"
                raise Refused(f"expected {expected}; found the {args['reduce_op']} over {group_name_of(node)}", 3)
            return [(replace(count, axis=axis),)]
        if (
            name == "aten::select"
            and args["dim"] in (0, -1)
            and count.sizes
            and args["index"] in range(len(count.rows))
        ):
            return [(replace(count, rows=(count.rows[args["index"]],), sizes=()),)]
        return []

    def number(self, node: fx.Node, told: Sequence[object]) -> str:
        """Note ``node`` among the sizes if it is an N, of which ``told`` is the tensor; returns what it is, or "".

        Raises:
            Refused: its meta does not give it a symbol of its own.
        """
        if op_name(node.target) not in ("aten::_local_scalar_dense", "aten::item"):
            return ""
        count = next((r for r in told if isinstance(r, RowCount) and r.axis is not None and r.sizes == ()), None)
        if count is None:
            return ""
        assert count.axis is not None
        (rows,) = count.rows
        symbol = node.meta["val"].node.expr
        known = set().union(*(sympy.sympify(s).free_symbols for s in self.arguments.sizes.values()))
        if not isinstance(symbol, sympy.Symbol) or symbol in known or symbol in self.numbers.exchanged:
            raise Refused(f"expected a number of its own; its meta says {symbol}", 3)
        self.arguments.sizes[node] = symbol
        self.numbers.exchanged[symbol] = (rows, count.axis)
        return f"the most rows of any rank of {count.axis.group_name}, {rows} on this one"
