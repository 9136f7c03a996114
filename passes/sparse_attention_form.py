"""The form of DeepSeek's sparse attention as masked dense attention: matched by dataflow, or refused with the reason.

Before: the product of probabilities and values. After: where the indexer's and the attention's operands are, in which
order of dims, with which factors. Nothing is changed.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch
import torch.fx as fx

from cpcompile.passes.collectives import arguments, bound, getitems, is_contiguous, is_row_major, op_name
from cpcompile.passes.fused_attention import FUSED, is_random
from cpcompile.passes.mask_meaning import HIDDEN, Affine, Among, Shown
from cpcompile.passes.mask_reader import MaskReader
from cpcompile.passes.token_layout import Expr, size_expr
from cpcompile.passes.traced_views import Arranged, Traced, arrange, joined, permutation, piece, trace
from cpcompile.passes.verify_index import Dims, Shape, Size, plain, row_major, same, tensor_shape

aten = torch.ops.aten
SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)


class Differs(Exception):
    """The graph is not of the form that is recognised."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Indexer:
    """``query`` [B, S, H, D], ``key`` [B, K, 1, D], ``weights`` [B, S, H] times ``factor``, chosen ``count``."""

    topk: fx.Node
    query: Arranged
    key: Arranged
    weights: Arranged
    factor: float
    count: int


@dataclass(frozen=True)
class Attention:
    """Everything that the ops need; E = nope + v is what ``weight`` [H * E, L] makes of a latent for each head.

    Args:
        result: the product of probabilities and values, ``[B * H, S, v]``, or fused attention's, ``[B, H, S, v]``.
        indexer: what chooses the keys.
        offset: row q sees the keys up to ``q + offset``.
        sizes: B, S, H.
        nope: query part ``[B, H, S, nope]``.
        rope: query part ``[B, S, H, R]``.
        latent: ``[B, K, 1, L]``.
        key_rope: ``[B, K, 1, R]``.
        weight: ``[H * E, L]``.
        key_part: start and length of the keys' rows in E.
        value_part: start and length of the values' rows in E.
        scale: factor of the scores.
    """

    result: fx.Node
    indexer: Indexer
    offset: Expr
    sizes: tuple[Size, Size, int]
    nope: Arranged
    rope: Arranged
    latent: Arranged
    key_rope: Arranged
    weight: Arranged
    key_part: tuple[int, int]
    value_part: tuple[int, int]
    scale: float


def _shape(node: fx.Node) -> Shape:
    return tensor_shape(node.meta["val"])


def _require(holds: object, node: fx.Node, reason: str) -> None:
    if not holds:
        raise Differs(node, reason)


def _arranged(traced: Traced, wanted: Dims | None, what: str) -> tuple[Arranged, float]:
    found = None if wanted is None else arrange(traced, wanted)
    if found is None:
        raise Differs(traced.chain[-1].node, f"the dims of {what} are not where they should be")
    return found


def _bmm(traced: Traced, sizes: Shape, what: str) -> tuple[fx.Node, fx.Node]:
    """Operands of the product that ``traced`` is, viewed as ``sizes``."""
    node = traced.source
    _require(node.target is aten.bmm.default and traced.holds(sizes), node, f"{what} are no product of matrices")
    left, right = node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return left, right


@dataclass(frozen=True)
class _Dense:
    """Masked dense attention.

    Args:
        result: see :class:`Attention`.
        sizes: B, H, S, K.
        query: ``[B, H, S, E]``, E ``width``.
        key: with its dims as ``[B, H, K, E]``.
        values: ``[B, H, K, v]``.
        mask: what is added to the scores.
        scale: factor of the scores.
    """

    result: fx.Node
    sizes: tuple[Size, int, Size, Size]
    query: Traced
    key: tuple[Traced, Dims | None]
    values: Traced
    width: Size
    mask: tuple[Shown, Among]
    scale: float


def match_products(result: fx.Node, softmax: fx.Node, reader: MaskReader) -> Attention:
    """Match backwards from the product of probabilities and values."""
    return _match(_products(result, softmax, reader), reader)


def match_fused(node: fx.Node, reader: MaskReader) -> Attention:
    """Match one of PyTorch's fused attention ops."""
    return _match(_fused(node, reader), reader)


def _match(found: _Dense, reader: MaskReader) -> Attention:
    batch, heads, rows, keys = found.sizes
    mask, among = found.mask
    offset = _causal(mask, among, (batch, rows, keys))
    indexer = _indexer(among.topk, offset, (batch, rows, keys), reader)
    nope, rope = _query(found.query, (batch, heads, rows, found.width))
    parts = _keys(found.key, found.values, (batch, heads, keys), _shape(found.result)[-1])
    joined_alike = _shape(nope.node)[-1] == parts[3][1]
    _require(joined_alike, found.query.source, "its queries and keys are joined at different widths")
    return Attention(found.result, indexer, offset, (batch, rows, heads), nope, rope, *parts, found.scale)


def _fused(node: fx.Node, reader: MaskReader) -> _Dense:
    args, op, items = arguments(node), FUSED[op_name(node.target)], getitems(node) or {}
    alone = isinstance(node.meta["val"], torch.Tensor)
    _require(not is_random(node) and not args.get("is_causal"), node, "it drops out, or is causal by its own rule too")
    _require(alone or list(items) == [0], node, "more than its attended values is read")
    result = node if alone else items[0]
    _require(is_contiguous(result) or _lies_by_rows(result), result, "its memory lies neither by heads nor by rows")
    query, key, values = (trace(args[name]) for name in ("query", "key", "value"))
    batch, heads, rows, width = _shape(args["query"])
    keys = _shape(args["key"])[2]
    _require(isinstance(heads, int) and isinstance(width, int), node, "its number or width of heads is not fixed")
    _require(_shape(args["key"])[1] == heads, node, "several of its queries share a head of keys")
    mask = reader.operand(args[op.mask], 4)
    scale = args.get("scale")
    assert isinstance(width, int) and isinstance(heads, int)
    if not isinstance(mask, Shown) or mask.negated or not (mask.additive or op.boolean):
        raise Differs(node, _UNKNOWN_MASK)
    return _Dense(
        result, (batch, heads, rows, keys), query, (key, key.split((batch, heads, keys, width))),
        values, width, (mask, _one_top_k(mask, node)),
        (width**-0.5 if scale is None else scale) * query.factor * key.factor,
    )  # fmt: skip


def _lies_by_rows(node: fx.Node) -> bool:
    """Whether ``[B, H, S, v]`` is a transposed ``[B, S, H, v]``."""
    value = node.meta["val"]
    pairs = [(size_expr(value.shape[d]), size_expr(value.stride(d))) for d in (0, 2, 1, 3)]
    return is_row_major([size for size, _ in pairs], [stride for _, stride in pairs])


def _products(result: fx.Node, softmax: fx.Node, reader: MaskReader) -> _Dense:
    probabilities, values = trace(result.args[0]), trace(result.args[1])  # type: ignore[arg-type]
    sizes = _shape(softmax)
    _require(len(sizes) == 4, softmax, f"its scores have shape {list(sizes)} and not [B, H, S, K]")
    batch, heads, rows, keys = sizes
    _require(isinstance(heads, int), softmax, "its number of heads is not fixed")
    _require(
        probabilities.holds(sizes) and probabilities.factor == 1 and bound(softmax)[1] in (-1, 3),
        softmax, "its softmax is not over the keys, or the probabilities are changed before they meet the values",
    )  # fmt: skip
    scores, mask, among = _masked(softmax, reader)
    left, right = _bmm(scores, sizes, "its scores")
    query, key = trace(left), trace(right)
    dims = key.split((batch, heads, _shape(left)[-1], keys))
    key_dims = None if dims is None else (dims[0], dims[1], dims[3], dims[2])
    assert isinstance(heads, int)
    scale = scores.factor * query.factor * key.factor
    return _Dense(
        result, (batch, heads, rows, keys), query, (key, key_dims), values, _shape(left)[-1], (mask, among), scale
    )


def _masked(softmax: fx.Node, reader: MaskReader) -> tuple[Traced, Shown, Among]:
    """Scores and mask whose sum the softmax is of, and the top-k in the mask."""
    masked = trace(softmax.args[0])  # type: ignore[arg-type]
    total = masked.source
    added = total.target is aten.add.Tensor and bound(total)[2] == 1 and masked.holds(_shape(softmax))
    _require(added and masked.factor == 1, total, "its mask is not added to its scores")
    for scores, mask in (total.args[:2], total.args[1::-1]):
        found = reader.operand(mask, 4)
        if isinstance(scores, fx.Node) and isinstance(found, Shown) and found.additive and not found.negated:
            return trace(scores), found, _one_top_k(found, total)
    raise Differs(total, _UNKNOWN_MASK)


_UNKNOWN_MASK = "its mask is not known to be causal and of a top-k alone"


def _one_top_k(mask: Shown, node: fx.Node) -> Among:
    among = [c for c in mask.conditions if isinstance(c, Among)]
    _require(len(among) == 1, node, f"its mask is of {len(among)} top-k and not of one")
    return among[0]


def _causal(mask: Shown, among: Among, sizes: tuple[Size, Size, Size]) -> Expr:
    """By how much a row sees beyond the key of its own number: ``[B, 1, S, K]`` is exactly causal and top-k."""
    batch, rows, keys = sizes
    topk, scored = among.topk, among.topk.args[0]
    assert isinstance(scored, fx.Node)
    _require(_shape(scored) == (batch, rows, keys), topk, f"its top-k is of {list(_shape(scored))}, not [B, S, K]")
    # A new dim in the place of a batch of 1 is the same.
    _require(
        among.dims[1:] == (None, 1, 2) and (among.dims[0] == 0 or batch == 1), topk, "its mask transposes the top-k"
    )
    return _only_causal(topk, mask.conditions - {among}, sizes)


def _only_causal(node: fx.Node, conditions: frozenset[object], sizes: tuple[Size, Size, Size]) -> Expr:
    """The offset c of the one condition ``q - k + c >= 0``, at least 0, so that every row sees a key.

    A lone row counts no rows, and where it sees every key there is no condition.
    """
    _, rows, keys = sizes
    if rows == 1 and keys == 1 and not conditions:
        return sympy.S.Zero
    (condition,) = conditions if len(conditions) == 1 else (None,)
    _require(isinstance(condition, Affine), node, "its mask is not exactly causal (key <= query)")
    assert isinstance(condition, Affine)
    *others, of_row, of_key = condition.steps
    exact = not any(others) and of_key == (0 if keys == 1 else -1) and of_row == (0 if rows == 1 else 1)
    _require(exact, node, "its mask is not exactly causal (key <= query)")
    offset = sympy.expand(condition.offset)
    whole = offset.is_Integer or (offset.is_integer and all(s.is_nonnegative for s in offset.free_symbols))
    _require(whole, node, "its mask is not exactly causal (key <= query)")
    _require(offset.is_nonnegative, node, "some row sees no key")
    return offset


def _indexer(topk: fx.Node, offset: Expr, sizes: tuple[Size, Size, Size], reader: MaskReader) -> Indexer:
    """Match backwards from the top-k."""
    batch, rows, keys = sizes
    scored, conditions = _scored(topk, reader)
    _require(_only_causal(topk, conditions, sizes) == offset, topk, "indexer and attention see different keys")
    left, right = _bmm(scored, sizes, "the indexer's summed scores")
    heads = _shape(left)[-1]
    rectified, weights = trace(right), trace(left)
    relu = rectified.source
    four = (batch, rows, heads, keys)
    _require(relu.target is aten.relu.default and rectified.holds(four), relu, "the indexer's scores are not rectified")
    products = trace(relu.args[0])  # type: ignore[arg-type]
    query, key = (trace(n) for n in _bmm(products, four, "the indexer's scores"))
    width = _shape(query.chain[-1].node)[-1]
    for node in (scored.source, products.source):
        _require(node.meta["val"].dtype == torch.float32, node, "the indexer's scores are not in float32")
    by_head = weights.split((batch, rows, 1, heads))
    _require(by_head is not None, left, "the dims of the indexer's weights are not where they should be")
    assert by_head is not None
    w, from_w = _arranged(weights, (by_head[0], by_head[1], by_head[3]), "the indexer's weights")
    q, from_q = _arranged(query, query.split((batch, rows, heads, width)), "the indexer's queries")
    k, from_k = _arranged(key, _shared(key.split((batch, rows, width, keys)), 1), "the indexer's keys")
    inner = products.factor * from_q * from_k
    _require(inner > 0, relu, "the indexer's scores are scaled by a negative number before they are rectified")
    factor = scored.factor * rectified.factor * from_w * inner
    return Indexer(topk, q, k, w, factor, _count(topk, keys))


def _shared(dims: Dims | None, over: int) -> Dims | None:
    """Digits of ``[B, x, D, K]``, the same for all x, as ``[B, K, 1, D]``."""
    if dims is None or any(stride != 0 for _, stride in dims[over]):
        return None
    return (dims[0], dims[3], (), dims[2])


def _scored(topk: fx.Node, reader: MaskReader) -> tuple[Traced, frozenset[object]]:
    """The scores whose top-k is taken, and what decides which of them count."""
    total = topk.args[0]
    assert isinstance(total, fx.Node)
    if total.target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        scores, hidden, value = total.args
        found, value = reader.operand(hidden, 3), getattr(reader.operand(value, 0), "value", 0.0)
        if isinstance(found, Shown) and found.negated and value <= HIDDEN:
            return trace(scores), found.conditions  # type: ignore[arg-type]
    elif total.target is aten.add.Tensor and bound(total)[2] == 1:
        for scores, mask in (total.args[:2], total.args[1::-1]):
            found = reader.operand(mask, 3)
            if isinstance(scores, fx.Node) and isinstance(found, Shown) and found.additive and not found.negated:
                return trace(scores), found.conditions
    raise Differs(topk, "the indexer's mask is not known to be causal alone")


def _count(topk: fx.Node, keys: Size) -> int:
    """``k``, or the int in ``min(k, number of keys)``."""
    count = topk.args[1]
    size = plain(count.meta["val"] if isinstance(count, fx.Node) else count)
    if isinstance(size, int):
        return size
    limits = [arg for arg in size.args if not same(plain(arg), keys)] if "Min" in type(size).__name__ else []
    _require(len(limits) == 1 and limits[0].is_Integer, topk, f"its top-k takes {size} keys and not a fixed number")
    return int(limits[0])


def _query(query: Traced, sizes: Shape) -> tuple[Arranged, Arranged]:
    """The parts without and with position: as ``[B, H, S, nope]`` and ``[B, S, H, R]``."""
    node, wanted = query.source, query.split(sizes)
    parts = joined(node)
    _require(parts is not None, node, "its queries are not a part without and a part with position, joined")
    order = None if wanted is None else permutation(row_major(_shape(node)), wanted)
    _require(order is not None, node, "the dims of its queries are not where they should be")
    assert parts is not None and order is not None
    return Arranged(parts[0], order), Arranged(parts[1], [order[d] for d in (0, 2, 1, 3)])


def _in_order(dims: Dims, order: list[int | None]) -> Dims:
    return tuple(() if d is None else dims[d] for d in order)


def _keys(
    key: tuple[Traced, Dims | None], values: Traced, sizes: tuple[Size, Size, Size], value_width: Size
) -> tuple[Arranged, Arranged, Arranged, tuple[int, int], tuple[int, int]]:
    """Latents, keys with position, the weight, and which of its rows make keys and values."""
    batch, heads, keys = sizes
    node, dims = key[0].source, key[1]
    parts = joined(node)
    by_token = node.target is aten.cat.default and bound(node)[1] % len(_shape(node)) != len(_shape(node)) - 1
    _require(not by_token, node, "its cache holds each head's keys and not latents, as before transformers 5.18")
    _require(parts is not None, node, "its keys are not a part without and a part with position, joined")
    order = None if dims is None else permutation(row_major(_shape(node)), dims)
    _require(order is not None, node, "the dims of its keys are not where they should be")
    assert parts is not None and order is not None
    nope, rope = trace(parts[0]), trace(parts[1])
    by_head = _in_order(rope.dims, order)
    shared = _shared((by_head[0], by_head[1], by_head[3], by_head[2]), 1)
    key_rope, factor = _arranged(rope, shared, "its keys with position, one for all heads,")
    _require(factor == 1 and nope.factor == 1 and values.factor == 1, node, "parts of its keys or values are scaled")
    value_dims = values.split((batch, heads, keys, value_width))
    source, key_part = _piece(nope, _in_order(nope.dims, order), "keys", (batch, heads, keys))
    value_source, value_part = _piece(values, value_dims, "values", (batch, heads, keys))
    _require(source is value_source, node, "its keys and values are not parts of one product")
    latent, weight = _projected(source, (batch, keys))
    return latent, key_rope, weight, key_part, value_part


def _piece(
    traced: Traced, dims: Dims | None, what: str, sizes: tuple[Size, Size, Size]
) -> tuple[fx.Node, tuple[int, int]]:
    """The product of latents and weight that ``traced`` is a part of, for each head."""
    node, (batch, heads, keys) = traced.source, sizes
    found = piece(node)
    order = None if dims is None else permutation(row_major(_shape(node)), dims)
    _require(found is not None and order is not None, node, f"its {what} are no part of a product for each head")
    assert found is not None and order is not None
    whole = trace(found[0])
    content = row_major((batch, keys, heads, _shape(found[0])[-1]))
    in_place = _in_order(whole.dims, order) == tuple(content[d] for d in (0, 2, 1, 3))
    _require(
        whole.source.target is aten.mm.default and in_place and whole.factor == 1,
        node, f"its {what} are not projected from latents by a plain weight",
    )  # fmt: skip
    return whole.source, found[1:]


def _projected(source: fx.Node, sizes: tuple[Size, Size]) -> tuple[Arranged, Arranged]:
    """Latents ``[B, K, 1, L]`` and the weight ``[H * E, L]`` of a product ``[B * K, H * E]``."""
    left, right = trace(source.args[0]), trace(source.args[1])  # type: ignore[arg-type]
    dims = left.split((*sizes, _shape(source.args[0])[-1]))  # type: ignore[arg-type]
    wanted = None if dims is None else (dims[0], dims[1], (), dims[2])
    latent, factor = _arranged(left, wanted, "its latents")
    weight, other = _arranged(right, right.dims[::-1], "its up-projection")
    _require(factor == other == 1, source, "its latents or their weight are scaled")
    return latent, weight
