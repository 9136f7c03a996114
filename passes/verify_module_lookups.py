"""A table of which every rank of a group has some rows: the masked lookup that makes a summand of it.

Of ids shifted by this rank's first row, those that clamping leaves as they are lie in this rank's rows; the others'
results are replaced by zero. So each id's row is in one rank's summand, and zeros in all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.fx as fx

from cpcompile.passes.verify_arguments import Arguments, Refused, op_name
from cpcompile.passes.verify_index import Shape, Size, product, regroup, shape
from cpcompile.passes.verify_module_rules import Rules
from cpcompile.passes.verify_module_values import Form


@dataclass(frozen=True)
class Lookup:
    """What is said of a tensor on the way from ids to rows of a table.

    Args:
        stage: ``"shifted"`` ids less ``offset``, ``"clamped"`` these to ``0 .. last``, ``"outside"`` whether that
            changed them, ``"rows"`` the rows of the table at the clamped ones.
        ids: what they are.
        sizes: the tensor's shape.
        offset: the number taken from each id.
        last: the largest row number.
        table: of which this rank's rows were looked up.
    """

    stage: str
    ids: Form
    sizes: Shape
    offset: Size
    last: Size | None = None
    table: Form | None = None


class Lookups:
    """Follows masked lookups in the shared graph."""

    def __init__(self, rules: Rules, arguments: Arguments) -> None:
        """``rules`` know the original's lookups, ``arguments`` reads the shared graph."""
        self.rules, self.arguments = rules, arguments

    def followed(
        self, node: fx.Node, at: Mapping[fx.Node, Form | Lookup], shapes: Mapping[fx.Node, Shape]
    ) -> Lookup | Form | None:
        """What ``node`` makes of its operands, None if it has no part in a lookup.

        Raises:
            Refused: it takes part in one and does not do what it should.
        """
        args = self.arguments.arguments(node)
        given = [at[a] for a in node.args if isinstance(a, fx.Node) and a in at]
        name = op_name(node.target)
        match (name, *given):
            case ("aten::sub", Form() as ids) if len(shapes[args["self"]]) == 1 and _is_int(args["other"]):
                counts = _dtype(node.args[0]) in (torch.int32, torch.int64)  # others may wrap around
                plain = counts and args["alpha"] == 1 and not ids.partial and ids.cut is None and ids.rows != "own"
                return Lookup("shifted", ids, shapes[args["self"]], args["other"]) if plain else None
            case ("aten::clamp", Lookup(stage="shifted") as shifted) if same_number(args["min"], 0):
                return replace(shifted, stage="clamped", last=args["max"]) if _is_int(args["max"]) else None
            case ("aten::ne", Lookup() as a, Lookup() as b) if {a.stage, b.stage} == {"shifted", "clamped"}:
                clamped = a if a.stage == "clamped" else b
                alike = replace(a, stage="", last=None) == replace(b, stage="", last=None)
                return replace(clamped, stage="outside") if alike else None
            case ("aten::unsqueeze", Lookup(stage="outside") as outside) if args["dim"] in (1, -1):
                return replace(outside, sizes=(*outside.sizes, 1))
            case ("aten::embedding", Form() as table, Lookup(stage="clamped") as clamped):
                return self._looked_up(table, clamped)
            case ("aten::masked_fill", Lookup(stage="rows") as rows, Lookup(stage="outside") as outside):
                return self._masked(rows, outside, args["value"])
        return None

    def _looked_up(self, table: Form, clamped: Lookup) -> Lookup:
        if table.cut is None or table.axis is None or table.rows or (table.cut.dim, table.cut.outer) != (0, 1):
            raise Refused("expected this rank's rows of the table; found others", 3)
        mine = table.cut.inner
        if clamped.offset != mine * table.axis.rank or clamped.last != mine - 1:
            first = mine * table.axis.rank
            found = f"{clamped.offset} and a last row {clamped.last}"
            raise Refused(f"expected ids less {first}, clamped to 0:{mine - 1}; found {found}", 3)
        return replace(clamped, stage="rows", sizes=(*clamped.sizes, table.sizes[1]), table=table)

    def _masked(self, rows: Lookup, outside: Lookup, value: object) -> Form:
        """A summand of the original's lookup."""
        table, ids = rows.table, rows.ids
        assert table is not None
        asked = (outside.ids, outside.offset, outside.last) == (ids, rows.offset, rows.last)
        if not asked or len(outside.sizes) != 2 or value not in (0, 0.0):
            raise Refused("expected zeros in the rows of ids that other ranks have; found another mask", 3)
        if ids.axis not in (None, table.axis):
            raise Refused("expected ids of the group that shares the table; found another's", 3)
        if not ids.rows and not self.rules.common(ids.view[0], table.axis):
            raise Refused("expected ids that all ranks have; found this rank's own", 3)
        if not self.rules.common(table.view[0], table.axis):
            raise Refused("expected a table that all ranks share; it is not known to be", 3)
        line = regroup(ids.view[1], (product(shape(ids.view[1])),))
        found = None if line is None else self.rules.original.lookups.get((table.view, (ids.view[0], line)))
        if found is None:
            raise Refused(f"expected a lookup of the original; found one of {self.rules.original.name(ids.view)}", 1)
        return Form(found, ids.rows, ids.count, None, True, table.axis)


def _dtype(node: object) -> torch.dtype | None:
    return node.meta["val"].dtype if isinstance(node, fx.Node) else None


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def same_number(value: object, wanted: int) -> bool:
    """Whether ``value`` is the integer ``wanted``."""
    return _is_int(value) and value == wanted
