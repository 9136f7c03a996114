"""How ATen's ops treat token dims: one function for each kind of op, for the table in ``placement_rules``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx as fx

from cpcompile.passes.collectives import op_name
from cpcompile.passes.op_call import UNUSED, Call, Demand, Mixing, RowWise, Rule
from cpcompile.passes.token_layout import ONE, Shape, TokenDim, through_view

CONSTANTS = frozenset(f"aten::new_{n}" for n in ("ones", "zeros", "empty", "full"))


def nonnegative(value: object, ndim: int) -> int:
    """A dim counted from 0."""
    assert isinstance(value, int), value
    return value + ndim if value < 0 else value


FirstRule = Callable[[Call, Shape, TokenDim], "tuple[TokenDim, bool] | TokenDim | Mixing"]


def first_operand(rule: FirstRule, size_arg: int | None = None) -> Rule:
    """A rule in the first operand's shape and token dim that says where its rows end up; other operands stay whole.

    ``rule`` returns the token dim of every output, or that and whether the op is the identity on the tokens.
    """

    def applied(call: Call) -> RowWise | Mixing:
        source = call.tensors[0]
        layout = call.layout(source)
        if layout is None:
            return Mixing("its first operand carries no tokens")
        out = rule(call, call.shape(source), layout)
        if isinstance(out, Mixing):
            return out
        out, identity = out if isinstance(out, tuple) else (out, False)
        demands: dict[fx.Node, Demand] = dict.fromkeys(call.tensors)
        demands[source] = layout
        return RowWise(demands, (out,) * len(call.shapes[call.node]), size_arg, identity)

    return applied


def broadcast_rows(call: Call, out: Shape, operands: list[fx.Node]) -> tuple[TokenDim, dict[fx.Node, Demand]] | Mixing:
    """Operands broadcast against ``out``: the dim on which all token-carrying operands agree.

    Where one operand's tokens are queries and another's are keys (``[T, 1] >= [1, T]`` of a causal mask), rows are the
    queries', which come first, and keys are needed whole.
    """
    places: dict[fx.Node, TokenDim] = {}
    for node in operands:
        layout = call.layout(node)
        if layout is not None:
            here = layout.shifted(len(out) - len(call.shape(node)))
            if call.shape(node)[layout.dim] != out[here.dim]:
                return Mixing("the token dim is broadcast against a longer one")
            places[node] = here
    if not places:
        return Mixing("no operand carries tokens")
    found = min(places.values(), key=lambda place: place.dim)
    demands: dict[fx.Node, Demand] = {}
    for node in operands:
        shape = call.shape(node)
        dim = found.dim - (len(out) - len(shape))
        broadcast = dim < 0 or (shape[dim] == ONE and places.get(node) != found)
        if not broadcast and places.get(node, found) != found:
            return Mixing("operands carry their tokens on different dims")
        if not broadcast and shape[dim] != out[found.dim]:
            return Mixing("nothing says that its operands have as many tokens")
        demands[node] = None if broadcast else TokenDim(dim, found.outer, found.inner)
    return found, demands


def pointwise(call: Call) -> RowWise | Mixing:
    """Elementwise with broadcasting."""
    if not call.shapes[call.node]:
        return Mixing("returns no tensor")
    aligned = broadcast_rows(call, call.out, call.tensors)
    if isinstance(aligned, Mixing):
        return aligned
    return RowWise(aligned[1], (aligned[0],) * len(call.shapes[call.node]))


def view(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """Row-major reshaping; ``view.dtype`` reinterprets bits instead."""
    if isinstance(call.arg(1, "dtype"), torch.dtype):
        return Mixing("reinterprets the elements as another dtype")
    out = through_view(shape, call.out, layout, call.tokens)
    return Mixing("the tokens would be split over several dims") if out is None else out


def expand(call: Call) -> RowWise | Mixing:
    """Repeats dims of size 1. Keys repeated for each query (a batched product's other operand) have a row per query."""
    source = call.tensors[0]
    layout = call.layout(source)
    if layout is None:
        return Mixing("its first operand carries no tokens")
    by = len(call.out) - len(call.shape(source))
    for dim in range(layout.dim + by):
        if call.out[dim] == call.tokens != ONE and (dim < by or call.shape(source)[dim - by] == ONE):
            return RowWise({source: None}, (TokenDim(dim),), 1)
    out = layout.shifted(by)
    if call.out[out.dim] != call.shape(source)[layout.dim]:
        return Mixing("the token dim is expanded")
    return RowWise({source: layout}, (out,), 1)


def permute(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    """The dim moves."""
    order = [nonnegative(d, len(shape)) for d in call.dims(1, "dims")]
    return TokenDim(order.index(layout.dim), layout.outer, layout.inner)


def transpose(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    """Two dims change places."""
    a, b = nonnegative(call.arg(1, "dim0"), len(shape)), nonnegative(call.arg(2, "dim1"), len(shape))
    return TokenDim({a: b, b: a}.get(layout.dim, layout.dim), layout.outer, layout.inner)


def t(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    """As ``transpose``, of a matrix."""
    return TokenDim(len(shape) - 1 - layout.dim, layout.outer, layout.inner)


def unsqueeze(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    """A dim of size 1 before the tokens shifts them."""
    return layout.shifted(nonnegative(call.arg(1, "dim"), len(shape) + 1) <= layout.dim)


def squeeze(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """Dims of size 1 before the tokens that go shift them."""
    named = [nonnegative(d, len(shape)) for d in call.dims(1, "dim")] or list(range(len(shape)))
    if layout.dim in named:
        return Mixing("may squeeze the token dim: a shard can have one row")
    return layout.shifted(-sum(d < layout.dim and shape[d] == ONE for d in named))


def select(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """A dim that goes; of the tokens' own it takes one."""
    dim = nonnegative(call.arg(1, "dim"), len(shape))
    return Mixing("selects some tokens") if dim == layout.dim else layout.shifted(-(dim < layout.dim))


def slice_(call: Call, shape: Shape, layout: TokenDim) -> tuple[TokenDim, bool] | Mixing:
    """Of other dims row-wise; over all tokens the identity."""
    if nonnegative(call.arg(1, "dim", 0), len(shape)) != layout.dim:
        return layout, False
    whole = call.out == shape and call.arg(4, "step", 1) == 1
    return (layout, True) if whole else Mixing("takes some of the tokens")


def along(index: int, name: str, default: int | None = None) -> Rule:
    """Row-wise in the first operand as long as the dim that the op works along is not the token dim."""

    def rule(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
        along = nonnegative(call.arg(index, name, default), len(shape))
        return Mixing("works along the token dim") if along == layout.dim else layout

    return first_operand(rule)


def in_step(index: int, name: str, default: int | None = None) -> Rule:
    """Like ``_along`` for ops whose tensor operands (index, source) run in step with the first."""

    def rule(call: Call) -> RowWise | Mixing:
        aligned = broadcast_rows(call, call.out, call.tensors)
        if isinstance(aligned, Mixing):
            return aligned
        found, demands = aligned
        if nonnegative(call.arg(index, name, default), len(call.out)) == found.dim:
            return Mixing("works along the token dim")
        shapes = [call.shape(n) for n in call.tensors]
        if any(len(s) != len(call.out) or s[found.dim] != call.out[found.dim] for s in shapes):
            return Mixing("operands have different token counts")
        return RowWise(demands, (found,))

    return rule


def reduction(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """Row-wise unless it reduces the tokens away."""
    reduced = [nonnegative(d, len(shape)) for d in call.dims(1, "dim") or range(len(shape))]
    if layout.dim in reduced:
        return Mixing("reduces over the tokens")
    return layout if len(call.out) == len(shape) else layout.shifted(-sum(d < layout.dim for d in reduced))


def norm(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """Normalisation over trailing dims: ``(input, normalized_shape, weight, …)``."""
    first = len(shape) - len(call.dims(1, "normalized_shape"))
    return Mixing("normalises over the tokens") if layout.dim >= first else layout


def matmul(call: Call) -> RowWise | Mixing:
    """``mm``, ``bmm``, ``linear`` and ``addmm``: rows of the left operand (queries), or batches of both."""
    args = [a for a in call.node.args if isinstance(a, fx.Node)]
    if "addmm" in str(call.node.target):
        bias, left, right = args[:3]
        if len(call.shape(bias)) != 1:
            return Mixing("adds a matrix to a product")
        others: dict[fx.Node, Demand] = {bias: None}
    else:
        left, right = args[:2]
        others = dict.fromkeys(args[2:])
    a, b = call.layout(left), call.layout(right)
    ndim = len(call.shape(left))
    if left is right:
        return Mixing("multiplies a value with itself")
    batched = "bmm" in str(call.node.target)
    if a is not None and batched and a.dim == 0 and b in (None, a):
        return RowWise({left: a, right: a}, (a,))
    if a is not None and a.dim < ndim - 1 and not (batched and a.dim == 0):
        # Of two operands with tokens the right one holds keys or values: a row of queries meets all of them.
        return RowWise({left: a, right: None, **others}, (a,))
    if a is None and b is not None and b.dim == ndim - 1 and "linear" not in str(call.node.target):
        return RowWise({left: None, right: b, **others}, (b,)) if not others else Mixing("bias along the tokens")
    return Mixing("multiplies tokens with tokens")


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


def data_free(call: Call) -> RowWise | Mixing:
    """Reads only its operand's shape, dtype and device; the result is the same whatever the operand's placement.

    A constant with a dim of T has its rows there: the first such dim, as queries come before keys.
    """
    demands: dict[fx.Node, Demand] = dict.fromkeys(call.tensors, UNUSED)
    places: tuple[TokenDim | None, ...] = (None,) * len(call.shapes[call.node])
    if op_name(call.node.target) in CONSTANTS and call.tokens != ONE and call.tokens in call.out:
        return RowWise(demands, (TokenDim(call.out.index(call.tokens)),), 1)
    return RowWise(demands, places)


def getitem(call: Call) -> RowWise | Mixing:
    """One output of several."""
    source = call.tensors[0]
    index = call.node.args[1]
    assert isinstance(index, int)
    layout = call.layouts[source][index]
    return Mixing("carries no tokens") if layout is None else RowWise({source: layout}, (layout,))


def pad(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """Row-wise where other dims are padded."""
    amounts = call.dims(1, "pad")  # pairs, the last dim's first
    mine = amounts[2 * (len(shape) - 1 - layout.dim) :][:2]
    return layout if all(amount == 0 for amount in mine) else Mixing("pads the tokens")
