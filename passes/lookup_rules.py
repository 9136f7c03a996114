"""How ATen's ops that look rows up, or write where numbers say, treat token dims."""

from __future__ import annotations

import torch
import torch.fx as fx

from cpcompile.passes.op_call import Call, Mixing, RowWise, Rule
from cpcompile.passes.row_rules import broadcast_rows, nonnegative

SEVERAL_DIMS = Mixing("operands carry their tokens on different dims")
SEVERAL_COUNTS = Mixing("operands have different token counts")
TABLE = Mixing("looks up rows of a token table")


def embedding(call: Call) -> RowWise | Mixing:
    """A row of the whole table for each index."""
    weight, indices = call.tensors[:2]
    layout = call.layout(indices)
    if layout is None:
        return Mixing("looks up rows of a token table")
    return RowWise({weight: None, indices: layout}, (layout,))


def _is_mask(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def lookup(call: Call) -> RowWise | Mixing:
    """``index(table, [ids, ...])``: a row for each row of the ids, which broadcast, from the whole table."""
    table, indices = call.node.args[0], call.arg(1, "indices")
    assert isinstance(table, fx.Node) and isinstance(indices, list | tuple)
    if any(not isinstance(i, fx.Node) or _is_mask(i) for i in indices):
        return Mixing("selects by a mask, or keeps leading dims of what it looks rows up in")
    ids = list(dict.fromkeys(indices))
    if table in ids:
        return Mixing("looks up rows of itself")
    rest = len(call.shape(table)) - len(indices)
    aligned = broadcast_rows(call, call.out[: len(call.out) - rest], ids)
    if isinstance(aligned, Mixing):
        return Mixing("looks up rows of a token table") if call.layout(table) else aligned
    return RowWise({table: None, **aligned[1]}, (aligned[0],))


def masked_write(call: Call) -> RowWise | Mixing:
    """``index_put(x, [mask], scalar)``: elementwise, the mask being of the leading dims."""
    indices, value = call.arg(1, "indices"), call.arg(2, "values")
    target = call.node.args[0]
    assert isinstance(target, fx.Node) and isinstance(indices, list | tuple) and isinstance(value, fx.Node)
    if len(indices) != 1 or not isinstance(indices[0], fx.Node) or not _is_mask(indices[0]):
        return Mixing("writes to rows that it names")
    mask, shape = indices[0], call.shape(target)
    if call.shape(value) != () or call.shape(mask) != shape[: len(call.shape(mask))]:
        return Mixing("writes several values")
    found = {place for place in map(call.layout, (target, mask)) if place is not None}
    if len(found) != 1 or mask is target:
        return Mixing("operands carry their tokens on different dims")
    rows = found.pop()
    return RowWise({target: rows, mask: rows if rows.dim < len(call.shape(mask)) else None, value: None}, (rows,))


def index_select(call: Call) -> RowWise | Mixing:
    """Rows of the indices, or of a table whose rows are not looked up."""
    source, index = call.tensors[0], call.tensors[-1]
    dim = nonnegative(call.arg(1, "dim"), len(call.shape(source)))
    layout, places = call.layout(index), call.layout(source)
    if layout is not None and index is not source:
        return RowWise({source: None, index: layout}, (layout.shifted(dim),))
    if places is None or places.dim == dim:
        return Mixing("looks up rows of a token table")
    return RowWise({source: places, index: None}, (places,))


def index_write(call: Call) -> RowWise | Mixing:
    """``index_copy``, ``index_add``, ``index_fill``: each row is written where numbers name along another dim."""
    target, index, value = call.node.args[0], call.node.args[2], call.node.args[3]
    assert isinstance(target, fx.Node) and isinstance(index, fx.Node)
    rows = [n for n in (target, value) if isinstance(n, fx.Node) and len(call.shape(n)) == len(call.out)]
    places = {place for n in rows if (place := call.layout(n)) is not None}
    if index in rows or call.layout(index) is not None:
        return Mixing("writes to rows that it names")
    if len(places) != 1:
        return SEVERAL_DIMS
    (found,) = places
    if found.dim == nonnegative(call.arg(1, "dim"), len(call.out)):
        return Mixing("works along the token dim")
    if any(call.shape(n)[found.dim] != call.out[found.dim] for n in rows):
        return SEVERAL_COUNTS
    return RowWise({**dict.fromkeys(call.tensors), **dict.fromkeys(rows, found)}, (found,))


def select_scatter(call: Call) -> RowWise | Mixing:
    """``x[:, 3] = value``: a value, with a dim less, in the place of one slice along another dim than the tokens'."""
    target, value = call.node.args[:2]
    assert isinstance(target, fx.Node) and isinstance(value, fx.Node)
    dim = nonnegative(call.arg(2, "dim"), len(call.out))
    place, below = call.layout(target), call.layout(value)
    if below is not None and place is None:
        place = below.shifted(dim <= below.dim)
    if place is None or place.dim == dim:
        return Mixing("works along the token dim")
    mine = place.shifted(-(dim < place.dim))
    if below not in (None, mine):
        return SEVERAL_DIMS
    return RowWise({target: place, value: mine}, (place,))


def searched(numbers: int) -> Rule:
    """Each number, of operand ``numbers``, in a whole table; of ``searchsorted`` also in its own row of a table."""

    def rule(call: Call) -> RowWise | Mixing:
        sought = call.node.args[numbers]
        tables = [n for n in call.tensors if n is not sought]
        if not isinstance(sought, fx.Node) or sum(given is sought for given in call.node.args) > 1:
            return TABLE
        by_row = "searchsorted" in str(call.node.target) and len(call.shape(tables[0])) > 1
        places = {place for n in [sought, *(tables if by_row else [])] if (place := call.layout(n)) is not None}
        if len(places) != 1:
            return SEVERAL_DIMS if places else TABLE
        (found,) = places
        if not by_row:
            return RowWise({**dict.fromkeys(tables), sought: found}, (found,))
        return TABLE if found.dim == len(call.out) - 1 else RowWise(dict.fromkeys([*tables, sought], found), (found,))

    return rule
