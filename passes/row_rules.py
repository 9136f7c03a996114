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
        if sum(given is source for given in [*call.node.args, *call.node.kwargs.values()]) > 1:
            return Mixing("takes one operand twice")
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
    """``select`` and ``unbind``: a dim that goes; of the tokens' own it takes one."""
    dim = nonnegative(call.arg(1, "dim", 0), len(shape))
    return Mixing("selects some tokens") if dim == layout.dim else layout.shifted(-(dim < layout.dim))


def slice_(call: Call, shape: Shape, layout: TokenDim) -> tuple[TokenDim, bool] | Mixing:
    """Of other dims row-wise; over all tokens the identity."""
    if nonnegative(call.arg(1, "dim", 0), len(shape)) != layout.dim:
        return layout, False
    whole = call.out == shape and call.arg(4, "step", 1) == 1
    return (layout, True) if whole else Mixing("takes some of the tokens")


def along(index: int, name: str, default: int | None = None) -> Rule:
    """Row-wise in the first operand as long as no dim that the op works along is the token dim."""

    def rule(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
        dims = call.dims(index, name) or ([] if default is None else [default])
        if not dims:
            return Mixing("works along all of its operand")
        mixes = layout.dim in [nonnegative(d, len(shape)) for d in dims]
        return Mixing("works along the token dim") if mixes else layout

    return first_operand(rule)


def kept(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    """The tokens stay where they are."""
    return layout


def trailing(count: int) -> Rule:
    """Row-wise unless the tokens lie in the last ``count`` dims, in which the op works."""

    def rule(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
        return Mixing("works along the token dim") if layout.dim >= len(shape) - count else layout

    return first_operand(rule)


def repeat(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """The operand's elements over and over: all tokens, that many times."""
    place = layout.shifted(len(call.out) - len(shape))
    times = call.dims(1, "repeats")[place.dim]
    if not isinstance(times, int):
        return Mixing("repeats the tokens as often as a size says")
    return TokenDim(place.dim, place.outer * times, place.inner) if times else Mixing("leaves no tokens")


def stack(call: Call) -> RowWise | Mixing:
    """Operands of one shape side by side in a new dim."""
    first = call.shape(call.tensors[0])
    aligned = broadcast_rows(call, first, call.tensors)
    if isinstance(aligned, Mixing):
        return aligned
    found, demands = aligned
    return RowWise(demands, (found.shifted(nonnegative(call.arg(1, "dim", 0), len(call.out)) <= found.dim),))


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


def reduction(index: int = 1, default: int | None = None) -> Rule:
    """Row-wise unless it reduces the tokens away. ``index``: of the dims among the arguments; without, it is all."""

    def rule(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
        given = [d for d in call.dims(index, "dim") if not isinstance(d, bool)]  # var(x, True) names no dim
        given = given or ([] if default is None else [default])
        reduced = [nonnegative(d, len(shape)) for d in given or range(len(shape))]
        if layout.dim in reduced:
            return Mixing("reduces over the tokens")
        return layout if len(call.out) == len(shape) else layout.shifted(-sum(d < layout.dim for d in reduced))

    return first_operand(rule)


def extremum(call: Call) -> RowWise | Mixing:
    """``max`` and ``min``: of two tensors, of one along a dim, or of all elements."""
    return pointwise(call) if isinstance(call.arg(1, "other"), fx.Node) else reduction()(call)


def norm(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """Normalisation over trailing dims: ``(input, normalized_shape, weight, …)``."""
    first = len(shape) - len(call.dims(1, "normalized_shape"))
    return Mixing("normalises over the tokens") if layout.dim >= first else layout


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
