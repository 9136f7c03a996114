"""Recognise sparse attention: DeepSeek's DSA written as masked dense attention -> the two ops that compute it."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field

import sympy
import torch
import torch.fx as fx

from cpcompile import ops  # noqa: F401  registers the ops
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import bound, emit, erase
from cpcompile.passes.mask_reader import HIDDEN, Affine, Among, MaskReader, Shown
from cpcompile.passes.traced_views import Arranged, Traced, arrange, joined, permutation, piece, size_node, trace
from cpcompile.passes.verify_index import Dims, Shape, Size, plain, row_major, same, tensor_shape

aten = torch.ops.aten
_SOFTMAX = (aten._softmax.default, aten._safe_softmax.default)
# Where a search for a top-k upstream of a mask ends: what is behind these is no mask.
_COMPUTED = (aten.bmm.default, aten.mm.default, aten.addmm.default, aten.embedding.default)


@dataclass(frozen=True)
class RecogniseSparseAttention:
    """Masked dense attention under an indexer's top-k -> ``lightning_indexer`` and ``sparse_attention``.

    Before -> after:
        - ``top_k(causal(sum_h w_h * relu(q_h . k)))`` -> ``cpcompile::lightning_indexer``, with the number of visible
          keys of each row from the mask's own arithmetic; the scores' factors go into the weights;
        - ``softmax(q k^T + mask(causal, top-k)) v`` with keys and values projected up from latents by one weight ->
          ``q`` projected into the latent space, ``cpcompile::sparse_attention``, its result projected up (MLA with
          absorbed weights): the per-head keys and values and all scores are gone.

    Both at once for each attention, or neither. Views, transposes, casts and constant factors in between do not matter.
    Dense attention is not looked at.

    Refuses, with the reason: masks that are not exactly causal and top-k (padding, packed sequences, windows), scores
    that are not of this form or not in float32, keys or values that are not two parts of one product with a weight.

    Absorbing the weights moves roundings: results equal the eager form's up to rounding, and where two indexer scores
    are equal up to rounding the other one may be chosen.

    Source: DeepSeek-V3.2-Exp; transformers' ``DeepseekV32Attention`` and ``DeepseekV32Indexer``.
    """

    name = "recognise-sparse-attention"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result, builder = PassResult(), _Builder(gm.graph)
        reader = MaskReader(gm)
        for product_node in gm.graph.find_nodes(op="call_function", target=aten.bmm.default):
            softmax = trace(product_node.args[0]).source
            if softmax.target not in _SOFTMAX or not _reads_top_k(softmax):
                continue
            try:
                builder.replace(_attention(product_node, softmax, reader))
                result.rewrites += 1
            except _Differs as differs:
                result.refuse(differs.node, f"looks like sparse attention, but {differs}; it stays dense")
        if result.rewrites:
            gm.graph.lint()
            gm.recompile()
        return result


class _Differs(Exception):
    """The graph is not of the form that is recognised."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class _Indexer:
    """``query`` [B, S, H, D], ``key`` [B, K, 1, D], ``weights`` [B, S, H] times ``factor``, chosen ``count``."""

    topk: fx.Node
    query: Arranged
    key: Arranged
    weights: Arranged
    factor: float
    count: int


@dataclass(frozen=True)
class _Attention:
    """Everything that the ops need; E = nope + v is what ``weight`` [H * E, L] makes of a latent for each head.

    Args:
        result: the product of probabilities and values, ``[B * H, S, v]``.
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
    indexer: _Indexer
    offset: int
    sizes: tuple[Size, Size, int]
    nope: Arranged
    rope: Arranged
    latent: Arranged
    key_rope: Arranged
    weight: Arranged
    key_part: tuple[int, int]
    value_part: tuple[int, int]
    scale: float


def _reads_top_k(softmax: fx.Node) -> bool:
    pending, seen = [softmax], {softmax}
    while pending:
        node = pending.pop()
        if node.target is aten.topk.default:
            return True
        if node.target not in _COMPUTED:
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            pending += new
    return False


def _shape(node: fx.Node) -> Shape:
    return tensor_shape(node.meta["val"])


def _require(holds: object, node: fx.Node, reason: str) -> None:
    if not holds:
        raise _Differs(node, reason)


def _arranged(traced: Traced, wanted: Dims | None, what: str) -> tuple[Arranged, float]:
    found = None if wanted is None else arrange(traced, wanted)
    if found is None:
        raise _Differs(traced.chain[-1].node, f"the dims of {what} are not where they should be")
    return found


def _bmm(traced: Traced, sizes: Shape, what: str) -> tuple[fx.Node, fx.Node]:
    """Operands of the product that ``traced`` is, viewed as ``sizes``."""
    node = traced.source
    _require(node.target is aten.bmm.default and traced.holds(sizes), node, f"{what} are no product of matrices")
    left, right = node.args
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return left, right


def _attention(result: fx.Node, softmax: fx.Node, reader: MaskReader) -> _Attention:
    """Match backwards from the product of probabilities and values."""
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
    offset = _causal(mask, among, (batch, rows, keys))
    indexer = _indexer(among.topk, offset, (batch, rows, keys), reader)
    query, key = trace(left), trace(right)
    nope, rope = _query(query, (batch, heads, rows, _shape(left)[-1]))
    parts = _keys(key, values, (batch, heads, keys), _shape(left)[-1], _shape(result)[-1])
    assert isinstance(heads, int)
    scale = scores.factor * query.factor * key.factor
    return _Attention(result, indexer, offset, (batch, rows, heads), nope, rope, *parts, scale)


def _masked(softmax: fx.Node, reader: MaskReader) -> tuple[Traced, Shown, Among]:
    """Scores and mask whose sum the softmax is of, and the top-k in the mask."""
    masked = trace(softmax.args[0])  # type: ignore[arg-type]
    total = masked.source
    added = total.target is aten.add.Tensor and bound(total)[2] == 1 and masked.holds(_shape(softmax))
    _require(added and masked.factor == 1, total, "its mask is not added to its scores")
    for scores, mask in (total.args[:2], total.args[1::-1]):
        found = reader.operand(mask, 4)
        if isinstance(scores, fx.Node) and isinstance(found, Shown) and found.additive and not found.negated:
            among = [c for c in found.conditions if isinstance(c, Among)]
            _require(len(among) == 1, total, f"its mask is of {len(among)} top-k and not of one")
            return trace(scores), found, among[0]
    raise _Differs(total, "its mask is not known to be causal and of a top-k alone")


def _causal(mask: Shown, among: Among, sizes: tuple[Size, Size, Size]) -> int:
    """By how much a row sees beyond the key of its own number: ``[B, 1, S, K]`` is exactly causal and top-k."""
    batch, rows, keys = sizes
    topk, scored = among.topk, among.topk.args[0]
    assert isinstance(scored, fx.Node)
    _require(_shape(scored) == (batch, rows, keys), topk, f"its top-k is of {list(_shape(scored))}, not [B, S, K]")
    # A new dim in the place of a batch of 1 is the same.
    _require(
        among.dims[1:] == (None, 1, 2) and (among.dims[0] == 0 or batch == 1), topk, "its mask transposes the top-k"
    )
    return _only_causal(topk, mask.conditions - {among}, 4)


def _only_causal(node: fx.Node, conditions: frozenset[object], ndim: int) -> int:
    """The offset c of the one condition ``q - k + c >= 0``; at least 0, so that every row sees a key."""
    steps = (*[sympy.S.Zero] * (ndim - 2), sympy.S.One, sympy.S.NegativeOne)
    (condition,) = conditions if len(conditions) == 1 else (None,)
    causal = isinstance(condition, Affine) and condition.steps == steps and condition.offset.is_Integer
    _require(causal, node, "its mask is not exactly causal (key <= query)")
    assert isinstance(condition, Affine)
    _require(condition.offset >= 0, node, "some row sees no key")
    return int(condition.offset)


def _indexer(topk: fx.Node, offset: int, sizes: tuple[Size, Size, Size], reader: MaskReader) -> _Indexer:
    """Match backwards from the top-k."""
    batch, rows, keys = sizes
    scored, conditions = _scored(topk, reader)
    _require(_only_causal(topk, conditions, 3) == offset, topk, "indexer and attention see different keys")
    left, right = _bmm(scored, sizes, "the indexer's summed scores")
    heads, width = _shape(left)[-1], 0
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
    return _Indexer(topk, q, k, w, factor, _count(topk, keys))


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
    raise _Differs(topk, "the indexer's mask is not known to be causal alone")


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
    key: Traced, values: Traced, sizes: tuple[Size, Size, Size], width: Size, value_width: Size
) -> tuple[Arranged, Arranged, Arranged, tuple[int, int], tuple[int, int]]:
    """Latents, keys with position, the weight, and which of its rows make keys and values."""
    batch, heads, keys = sizes
    node, dims = key.source, key.split((batch, heads, width, keys))
    parts = joined(node)
    _require(parts is not None, node, "its keys are not a part without and a part with position, joined")
    order = None if dims is None else permutation(row_major(_shape(node)), (dims[0], dims[1], dims[3], dims[2]))
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


@dataclass
class _Builder:
    """Emits the ops; attentions that share a top-k share its indexer, and all share the key lengths."""

    graph: fx.Graph
    indices: dict[fx.Node, fx.Node] = field(default_factory=dict)
    lengths: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)

    def replace(self, found: _Attention) -> None:
        """Put the ops in the place of ``found``."""
        batch, rows = (self._size(size, found) for size in found.sizes[:2])
        lengths = self._lengths(found, batch, rows)
        topk, result = found.indexer.topk, found.result
        if topk not in self.indices:
            self.indices[topk] = _emit_indexer(found.indexer, lengths)
        attended = _emit_attention(found, batch, self.indices[topk], lengths)
        if found.sizes[0] != 1:  # [H, B * S, v] -> [B * H, S, v]; with one batch these are the same
            heads, width = found.sizes[2], found.value_part[1]
            attended = emit(result, aten.reshape.default, attended, [heads, batch, -1, width])
            attended = emit(result, aten.permute.default, attended, [1, 0, 2, 3])
            both = batch * heads if isinstance(batch, int) else emit(result, operator.mul, batch, heads)
            attended = emit(result, aten.reshape.default, attended, [both, rows, width])
        if attended.meta["val"].dtype != result.meta["val"].dtype:
            attended = emit(result, aten._to_copy.default, attended, dtype=result.meta["val"].dtype)
        result.replace_all_uses_with(attended)
        erase(result)

    def _size(self, size: Size, found: _Attention) -> int | fx.Node:
        node = size_node(self.graph, size)
        if node is None:
            raise _Differs(found.result, f"no graph input holds its size {size}")
        return node

    def _lengths(self, found: _Attention, batch: int | fx.Node, rows: int | fx.Node) -> fx.Node:
        """``[B, S]`` int32: row q sees ``q + offset + 1`` keys."""
        like, device = found.indexer.topk.args[0], found.result.meta["val"].device
        assert isinstance(like, fx.Node)
        key = (batch, rows, found.offset, device)
        if key not in self.lengths:
            node = emit(like, aten.arange.default, rows, dtype=torch.int32, device=device)
            node = emit(like, aten.add.Tensor, node, found.offset + 1)
            node = emit(like, aten.unsqueeze.default, node, 0)
            self.lengths[key] = node if batch == 1 else emit(like, aten.expand.default, node, [batch, -1])
        return self.lengths[key]


def _emit_indexer(found: _Indexer, lengths: fx.Node) -> fx.Node:
    """``[B, S, 1, C]``."""
    topk = found.topk
    query, key, weights = (a.emit(topk) for a in (found.query, found.key, found.weights))
    if weights.meta["val"].dtype != torch.float32:
        weights = emit(topk, aten._to_copy.default, weights, dtype=torch.float32)
    if found.factor != 1:
        weights = emit(topk, aten.mul.Tensor, weights, found.factor)
    return emit(topk, torch.ops.cpcompile.lightning_indexer.default, query, key, weights, lengths, found.count)


def _emit_attention(found: _Attention, batch: int | fx.Node, indices: fx.Node, lengths: fx.Node) -> fx.Node:
    """``[H, B * S, v]``."""
    like, heads = found.result, found.sizes[2]
    weight = found.weight.emit(like)
    latent_width = _shape(weight)[1]
    by_head = emit(like, aten.view.default, weight, [heads, -1, latent_width])  # [H, E, L]
    start, length = found.key_part
    up = emit(like, aten.slice.Tensor, by_head, 1, start, start + length)  # [H, nope, L]
    nope = emit(like, aten.reshape.default, found.nope.emit(like, (1, 0, 2, 3)), [heads, -1, length])
    query = emit(like, aten.bmm.default, nope, up)  # [H, B * S, L]
    query = emit(like, aten.reshape.default, query, [heads, batch, -1, latent_width])
    query = emit(like, aten.permute.default, query, [1, 2, 0, 3])
    latent, rope, key_rope = (a.emit(like) for a in (found.latent, found.rope, found.key_rope))
    out = emit(
        like, torch.ops.cpcompile.sparse_attention.default,
        query, latent, indices, rope, key_rope, lengths, found.scale,
    )  # fmt: skip
    out = emit(like, aten.permute.default, out, [2, 0, 1, 3])  # [H, B, S, L]
    out = emit(like, aten.reshape.default, out, [heads, -1, latent_width])
    start, length = found.value_part
    down = emit(like, aten.slice.Tensor, by_head, 1, start, start + length)  # [H, v, L]
    return emit(like, aten.bmm.default, out, emit(like, aten.transpose.int, down, 1, 2))
