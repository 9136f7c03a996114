"""The static proof's rules for ops that look rows up, or write where numbers or a mask say."""

from __future__ import annotations

import torch
import torch.fx as fx

from cpcompile.passes.verify_call import ALONG, Call, Rule, pointwise
from cpcompile.passes.verify_index import Rows


def embedding(call: Call) -> Rows | str:
    """Rows of the indices, with the whole table."""
    weight, indices = call.node.args[:2]
    assert isinstance(indices, fx.Node)
    return call.rows[indices] if set(call.rows) == {indices} and weight is not indices else "it looks rows up"


def _is_boolean(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def index(call: Call) -> Rows | str:
    """Rows of the numbers that index the first dims of a table of which every row is there."""
    table, numbers = call.arg("self"), call.arg("indices")
    if not isinstance(numbers, list | tuple) or table in call.rows:
        return "it looks rows up"
    if any(not isinstance(n, fx.Node) or _is_boolean(n) for n in numbers):
        return "it does not look up a row for each number"
    lead = call.out[0][: len(call.out[0]) - len(call.shapes[table]) + len(numbers)]  # type: ignore[index]
    return pointwise(Call(call.node, {n: call.shapes[n] for n in numbers}, call.rows, (lead,)))


def index_put(call: Call) -> Rows | str:
    """One value written wherever a mask over the leading dims says."""
    below, masks, value = call.arg("self"), call.arg("indices"), call.arg("values")
    assert isinstance(below, fx.Node) and isinstance(masks, list | tuple)
    if len(masks) != 1 or not isinstance(masks[0], fx.Node) or not _is_boolean(masks[0]) or call.shapes[value] != ():  # type: ignore[index]
        return "it writes to rows that it names"
    rows = call.rows.get(below)
    if rows is None:
        return "its mask is of rows and what it writes to is not"
    if rows.dim >= len(call.shapes[masks[0]]):
        return rows if set(call.rows) == {below} else "its mask is of other rows"
    return rows if call.rows.get(masks[0]) == rows else "its mask is not split as what it writes to"


def looks_up(call: Call) -> Rows | str:
    """``index_select``: rows of the indices from a whole table, or of a table along another dim."""
    table, index = call.arg("self"), call.arg("index")
    (dim,) = call.dims("dim", len(call.shapes[table]))  # type: ignore[index]
    if set(call.rows) == {index} and table is not index:
        return call.rows[index].shifted(dim)  # type: ignore[index]
    if set(call.rows) == {table} and table is not index:
        return ALONG if call.rows[table].dim == dim else call.rows[table]  # type: ignore[index]
    return "its table and its indices are both split"


def numbered_write(call: Call) -> Rows | str:
    """``index_copy``, ``index_add``, ``index_fill``: every row is written at the same numbers along another dim."""
    below, value = call.arg("self"), call.arg("source") or call.arg("value")
    wanted = {below, value} if isinstance(value, fx.Node) and call.shapes[value] else {below}
    rows = call.rows.get(below)  # type: ignore[call-overload]
    if rows is None or call.arg("index") in wanted or set(call.rows) != wanted or set(call.rows.values()) != {rows}:
        return "what is written and what it is written to are not split alike"
    if rows.dim in call.dims("dim", len(call.out[0])):
        return ALONG
    extents = {call.shapes[n][rows.dim] for n in call.rows}
    return rows if extents == {call.out[0][rows.dim]} else "what is written has other rows"


def select_scatter(call: Call) -> Rows | str:
    """A value with a dim less, written at one place of that dim."""
    below, value = call.arg("self"), call.arg("src")
    rows = call.rows.get(below)  # type: ignore[call-overload]
    (dim,) = call.dims("dim", len(call.out[0]))
    if rows is None or rows.dim == dim or below is value:
        return ALONG
    inner = rows.shifted(-1) if dim < rows.dim else rows
    return rows if call.rows == {below: rows, value: inner} else "what is written is not split as what it is written to"


def searches(call: Call) -> Rows | str:
    """``searchsorted``: numbers in one sequence that is whole, or those of each row in that row's own sequence."""
    sequence, numbers = call.arg("sorted_sequence"), call.arg("self")
    if not isinstance(sequence, fx.Node) or not isinstance(numbers, fx.Node) or numbers is sequence:
        return "it searches for rows in themselves"
    rows = call.rows.get(numbers)
    if rows is None:
        return "the numbers that it searches for are not split"
    if len(call.shapes[sequence]) == 1:
        return rows if set(call.rows) == {numbers} else "it searches among some rows only"
    if set(call.rows) != set(call.shapes) or set(call.rows.values()) != {rows}:
        return "its sequences and its numbers are not split alike"
    return rows if rows.dim < len(call.out[0]) - 1 else ALONG


def among(table: str) -> Rule:
    """Each number of the first operand among those of ``table``, which is whole."""

    def rule(call: Call) -> Rows | str:
        numbers = call.node.args[0]
        if not isinstance(numbers, fx.Node) or call.arg(table) is numbers or set(call.rows) != {numbers}:
            return "it searches among some rows only"
        return call.rows[numbers]

    return rule
