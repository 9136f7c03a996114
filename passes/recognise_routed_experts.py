"""Recognise routed experts: tokens sorted by expert, grouped products, tokens back in order -> one row-wise op."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from cpcompile import expert_ops  # noqa: F401  registers the op
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import bound, emit, erase, only_user, op_name
from cpcompile.passes.expert_shares import RESHAPES, Numbers
from cpcompile.passes.verify_index import Shape, same, tensor_shape

aten = torch.ops.aten
GROUPED = frozenset({"aten::_grouped_mm", "transformers::grouped_mm_fallback", "cpcompile::grouped_mm"})


class Differs(Exception):
    """The graph is not of the form that is recognised."""

    def __init__(self, node: object, reason: str) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Experts:
    """What the op needs: S = N * K slots, K for each token.

    Args:
        result: the sum over each token's slots, ``[N, H]``.
        hidden: ``[N, H]``.
        slot_ids: ``[S]``.
        slot_weights: ``[S]``.
        gate_up: ``[E, H, 2 * I]``.
        down: ``[E, I, H]``.
        chosen: K.
        part: where experts are split over ranks, the first here and how many there are in all.
    """

    result: fx.Node
    hidden: fx.Node
    slot_ids: fx.Node
    slot_weights: fx.Node
    gate_up: fx.Node
    down: fx.Node
    chosen: int
    part: list[int] | None


@dataclass(frozen=True)
class RecogniseRoutedExperts:
    """Experts that sort tokens -> ``cpcompile::routed_experts``, which a shard can run on its tokens.

    Before: ``sort`` of the expert ids of all slots, ``index`` by the order, two grouped products with silu and product
    in between, weights, ``index`` by the inverse order, sum over each token's slots.
    After: the one op of tokens, ids, weights and both tables. Each of its rows needs the same row of its operands,
    which is not true of any step of the sorted form. Where experts are split over ranks, slots of other ranks' experts
    are masked; the op is told which experts are here, and takes ids and weights as the router gave them.

    Refuses, with the reason: sorted experts of any other form (other activations, biases, other masks).

    Source: ``grouped_mm_experts_forward`` of transformers.
    """

    name = "recognise-routed-experts"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for sort in gm.graph.find_nodes(op="call_function", target=aten.sort.default):
            products = _grouped_products(sort)
            if not products:
                continue
            try:
                _replace(_match(sort, products))
                result.rewrites += 1
            except Differs as differs:
                node = differs.node if isinstance(differs.node, fx.Node) else sort
                result.refuse(node, f"looks like sorted experts, but {differs}; they need all tokens")
        return result.finish(gm)


def _grouped_products(sort: fx.Node) -> list[fx.Node]:
    """The grouped products whose offsets are counted from what ``sort`` sorts, in the graph's order."""
    counts = [
        n for item in sort.users for cast in item.users for n in (cast, *cast.users) if n.target is aten.histc.default
    ]
    return sorted(p for c in counts for total in c.users for p in total.users if op_name(p.target) in GROUPED)


def _require(holds: object, node: object, reason: str) -> None:
    if not holds:
        raise Differs(node, reason)


def _shape(node: fx.Node) -> Shape:
    return tensor_shape(node.meta["val"])


def _call(node: object, target: object, what: str) -> list[Any]:
    """Arguments of ``node``, which must call ``target``."""
    if not isinstance(node, fx.Node) or node.target is not target:
        raise Differs(node, f"{what} is {node} and no {target}")
    return bound(node)


def _lookup(node: object, what: str) -> tuple[fx.Node, fx.Node]:
    """Table and index of ``table[index]``."""
    table, indices = _call(node, aten.index.Tensor, what)
    _require(len(indices) == 1 and isinstance(indices[0], fx.Node), node, f"{what} is not by one index")
    return table, indices[0]


def _match(sort: fx.Node, products: list[fx.Node]) -> Experts:
    """Match from the sort down to the sum and from there back up to the hidden rows."""
    slots, dim, descending = bound(sort)
    _require(len(_shape(slots)) == 1 and dim in (-1, 0) and not descending, sort, "its slots are not sorted upwards")
    order = next((n for n in sort.users if n.target is operator.getitem and n.args[1] == 1), None)
    _require(order is not None and len(products) == 2, sort, f"it has {len(products)} grouped products and not 2")
    assert order is not None
    first, second = products
    offsets = _offsets(sort, first, second)
    rows, gate_up, *_ = bound(first)
    experts = _call(_before(offsets), aten.histc.default, "what counts its rows")[1]
    hidden, chosen = _sorted_rows(_unmasked(_uncast(rows, gate_up), sort, experts), order)
    inner, down, *_ = bound(second)
    gated = _unmasked(_gated(_uncast(inner, down)), sort, experts)
    _require(gated is first, second, "its activation is not silu(gate) * up")
    for product, found in ((first, offsets), (second, offsets)):
        _require(bound(product)[2] is found and not any(bound(product)[3:]), product, "it has a bias or other offsets")
    _require(_shape(gate_up)[0] == experts == _shape(down)[0], first, "it has tables of other numbers of experts")
    masked = only_user(second)
    last = masked if masked is not None and _unmasked(masked, sort, experts) is second else second
    weights, back = _weighted(last, order)
    _inverse(back, order)
    result = _summed(back, chosen, _shape(hidden))
    if last is second:
        return Experts(result, hidden, slots, weights, gate_up, down, chosen, None)
    numbers = Numbers(slots)
    here = numbers.first(slots, experts)
    _require(here is not None, slots, f"its masked slots are not of other experts than {experts} in a row")
    assert here is not None and numbers.chosen is not None
    weights = numbers.without_mask(_flat(weights), here, experts)
    # Transformers 5.17 masks slots where no experts are elsewhere, too.
    part = [here, numbers.total] if numbers.total > experts else None
    return Experts(result, hidden, numbers.chosen, weights, gate_up, down, chosen, part)


def _flat(slots: fx.Node) -> fx.Node:
    """What ``slots`` is a view of."""
    return slots.args[0] if op_name(slots.target) in RESHAPES else slots  # type: ignore[return-value]


def _unmasked(node: object, sort: fx.Node, experts: int) -> object:
    """``node`` before its rows were set to 0 where the sorted expert is of another rank."""
    if not isinstance(node, fx.Node) or node.target is not aten.masked_fill.Scalar or node.args[2] != 0:
        return node
    column, dim = _call(node.args[1], aten.unsqueeze.default, "its mask")
    sorted_ids, bound_ = _call(column, aten.ge.Scalar, "its mask")
    good = dim in (-1, 1) and bound_ == experts and getattr(sorted_ids, "args", ()) == (sort, 0)
    _require(good, node, "its mask is not of other ranks' experts")
    return node.args[0]


def _before(node: fx.Node) -> fx.Node:
    return node.all_input_nodes[0]


def _uncast(node: fx.Node, table: fx.Node) -> fx.Node:
    """``node`` before the cast to the table's dtype, which the op makes itself."""
    if node.target is aten._to_copy.default and node.kwargs == {"dtype": table.meta["val"].dtype}:
        return _before(node)
    return node


def _offsets(sort: fx.Node, *products: fx.Node) -> fx.Node:
    """``cumsum(histc(sorted ids))``: where each expert's rows end."""
    total: fx.Node = bound(products[0])[2]
    counts, dim = _call(total, aten.cumsum.default, "what its offsets are")[:2]
    _require(dim in (0, -1) and total.kwargs == {"dtype": torch.int32}, total, "its offsets are not a running sum")
    cast, experts, least, most = _call(counts, aten.histc.default, "what counts its rows")
    _require((least, most) == (0, experts - 1), counts, "it counts other experts than it has")
    _call(cast, aten._to_copy.default, "what it counts")
    exact = cast.kwargs in ({"dtype": torch.float32}, {"dtype": torch.int32})
    ids = _before(cast)
    first = ids.target is operator.getitem and ids.args == (sort, 0)
    _require(exact and first, cast, "it does not count the sorted expert ids")
    return total


def _sorted_rows(rows: object, order: fx.Node) -> tuple[fx.Node, int]:
    """Hidden rows of ``hidden[order // K]``, and K."""
    hidden, index = _lookup(rows, "what it multiplies")
    source, chosen = _call(index, aten.floor_divide.default, "the index of its rows")
    _require(source is order and isinstance(chosen, int), index, "its rows are not in the order of the experts")
    _require(len(_shape(hidden)) == 2, hidden, "its hidden rows have more than two dims")
    return hidden, chosen


def _gated(node: fx.Node) -> object:
    """The value of which ``node`` is ``silu(first half) * second half``."""
    left, right = _call(node, aten.mul.Tensor, "its activation")
    if getattr(left, "target", None) is not aten.silu.default:
        left, right = right, left
    (gate,) = _call(left, aten.silu.default, "its activation")
    halves = [n.args if isinstance(n, fx.Node) and n.target is operator.getitem else () for n in (gate, right)]
    _require(all(halves) and halves[0][0] is halves[1][0], node, "its gate and its factor are not of one product")
    _require((halves[0][1], halves[1][1]) == (0, 1), node, "its gate is not the first half")
    split = halves[0][0]
    assert isinstance(split, fx.Node)
    source, width, dim = _call(split, aten.split.Tensor, "what parts gate and factor")
    _require(dim in (-1, 1) and _shape(source)[1] == 2 * width, split, "its gate and its factor are not halves")
    return source


def _weighted(product: fx.Node, order: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The weights that ``product`` is multiplied with, in the order of the slots, and the rows put back in order."""
    weighted = only_user(product)
    left, right = _call(weighted, aten.mul.Tensor, "what reads its result")
    column, dim = _call(right if left is product else left, aten.unsqueeze.default, "its weights")
    weights, index = _lookup(column, "its weights")
    _require(dim in (-1, 1) and index is order and len(_shape(weights)) == 1, column, "its weights are not the slots'")
    assert weighted is not None
    back = only_user(weighted)
    table, _ = _lookup(back, "what puts its rows back")
    _require(table is weighted, back, "its rows are not put back")
    assert back is not None
    return weights, back


def _inverse(back: fx.Node, order: fx.Node) -> None:
    """``back`` reads by the inverse of ``order``: ``empty.index_put([order], arange)``."""
    inverse = _lookup(back, "what puts its rows back")[1]
    below, indices, places, accumulate = _call(inverse, aten.index_put.default, "the order in which it puts rows back")
    counted = _call(places, aten.arange.default, "the order in which it puts rows back")
    good = indices == [order] and not accumulate and same(_shape(places)[0], _shape(order)[0])
    good = good and _shape(below) == _shape(order) and len(counted[:1]) == 1
    _require(good, inverse, "it does not put its rows back where they were")


def _summed(back: fx.Node, chosen: int, sizes: Shape) -> fx.Node:
    """The sum over each token's K slots, ``[N, H]``."""
    view = only_user(back)
    _require(view is not None and op_name(view.target) in RESHAPES, back, "its slots are not told apart by token")
    assert view is not None
    _require(_shape(view) == (sizes[0], chosen, sizes[1]), view, f"its slots are not [N, {chosen}, H]")
    total = only_user(view)
    args = _call(total, aten.sum.dim_IntList, "what reads a token's slots")
    assert total is not None
    _require(args[1] in ([1], [-2]) and not args[2] and args[3] is None, total, "it does not sum a token's slots")
    return total


def _replace(found: Experts) -> None:
    """Put the op in the place of ``found``."""
    like = found.result
    ids, weights = (
        emit(like, aten.reshape.default, slots, [-1, found.chosen]) for slots in (found.slot_ids, found.slot_weights)
    )
    op = torch.ops.cpcompile.routed_experts.default
    part = () if found.part is None else (found.part,)
    made = emit(like, op, found.hidden, ids, weights, found.gate_up, found.down, *part)
    like.replace_all_uses_with(made)
    erase(like)
