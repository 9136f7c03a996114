"""Recognise sparse attention: DeepSeek's DSA written as masked dense attention -> the two ops that compute it."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import sympy
import torch
import torch.fx as fx

from cpcompile import ops  # noqa: F401  registers the ops
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, is_contiguous, op_name
from cpcompile.passes.fused_attention import FUSED
from cpcompile.passes.mask_reader import MaskReader
from cpcompile.passes.sparse_attention_form import SOFTMAX, Attention, Differs, Indexer, match_fused, match_products
from cpcompile.passes.token_layout import Expr
from cpcompile.passes.traced_views import size_node, trace
from cpcompile.passes.verify_index import Size

aten = torch.ops.aten
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
          absorbed weights): the per-head keys and values and all scores are gone. PyTorch's fused attention ops with
          such a mask are that softmax.

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
        for node, softmax in list(_sparse(gm.graph)):
            try:
                found = match_fused(node, reader) if softmax is None else match_products(node, softmax, reader)
                builder.replace(found)
                result.rewrites += 1
            except Differs as differs:
                result.refuse(differs.node, f"looks like sparse attention, but {differs}; it stays dense")
        return result.finish(gm)


def _sparse(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node | None]]:
    """What may be sparse attention: products with a softmax of such a mask, and that softmax; fused attention."""
    for node in graph.nodes:
        if node.target is aten.bmm.default:
            softmax = trace(node.args[0]).source
            if softmax.target in SOFTMAX and _reads_top_k(softmax):
                yield node, softmax
        elif node.op == "call_function" and (op := FUSED.get(op_name(node.target))) is not None and op.mask:
            mask = arguments(node).get(op.mask)
            if isinstance(mask, fx.Node) and _reads_top_k(mask):
                yield node, None


def _reads_top_k(softmax: fx.Node) -> bool:
    """Whether this comes from a top-k that is not behind a product: a mask of it may be sparse attention's."""
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


@dataclass
class _Builder:
    """Emits the ops; attentions that share a top-k share its indexer, and all share the key lengths."""

    graph: fx.Graph
    indices: dict[fx.Node, fx.Node] = field(default_factory=dict)
    lengths: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)

    def replace(self, found: Attention) -> None:
        """Put the ops in the place of ``found``."""
        batch, rows = (self._size(size, found) for size in found.sizes[:2])
        lengths = self._lengths(found, batch, rows)
        topk, result = found.indexer.topk, found.result
        if topk not in self.indices:
            self.indices[topk] = _emit_indexer(found.indexer, lengths)
        attended = _emit_attention(found, batch, self.indices[topk], lengths)
        heads, width = found.sizes[2], found.value_part[1]
        if result.meta["val"].ndim == 4:
            attended = emit(result, aten.reshape.default, attended, [heads, batch, -1, width])
            attended = _as_laid_out(attended, result)
        elif found.sizes[0] != 1:  # [H, B * S, v] -> [B * H, S, v]; with one batch these are the same
            attended = emit(result, aten.reshape.default, attended, [heads, batch, -1, width])
            attended = emit(result, aten.permute.default, attended, [1, 0, 2, 3])
            both = batch * heads if isinstance(batch, int) else emit(result, operator.mul, batch, heads)
            attended = emit(result, aten.reshape.default, attended, [both, rows, width])
        if attended.meta["val"].dtype != result.meta["val"].dtype:
            attended = emit(result, aten._to_copy.default, attended, dtype=result.meta["val"].dtype)
        result.replace_all_uses_with(attended)
        # PyTorch's fused ops count as impure, for their dropout, of which there is none here.
        erase(result, *(result.all_input_nodes if result.target is operator.getitem else ()))

    def _size(self, size: Size, found: Attention) -> int | fx.Node:
        node = size_node(self.graph, size)
        if node is None:
            raise Differs(found.result, f"no graph input holds its size {size}")
        return node

    def _sum(self, like: fx.Node, total: Expr, found: Attention) -> int | fx.Node:
        """A sum of sizes, as the graph's inputs have them."""
        number, rest = total.as_coeff_Add()
        result: int | fx.Node = int(number)
        for term in sympy.Add.make_args(rest) if rest != 0 else ():
            factor, size = term.as_coeff_Mul()
            node: int | fx.Node = self._size(size, found)
            node = node if factor == 1 else emit(like, operator.mul, node, int(factor))
            result = emit(like, operator.add, node, result)
        return result

    def _lengths(self, found: Attention, batch: int | fx.Node, rows: int | fx.Node) -> fx.Node:
        """``[B, S]`` int32: row q sees ``q + offset + 1`` keys."""
        like, device = found.indexer.topk.args[0], found.result.meta["val"].device
        assert isinstance(like, fx.Node)
        key = (batch, rows, found.offset, device)
        if key not in self.lengths:
            first = self._sum(like, found.offset + 1, found)
            node = emit(like, aten.arange.default, rows, dtype=torch.int32, device=device)
            node = emit(like, aten.add.Tensor, node, first)
            node = emit(like, aten.unsqueeze.default, node, 0)
            self.lengths[key] = node if batch == 1 else emit(like, aten.expand.default, node, [batch, -1])
        return self.lengths[key]


def _as_laid_out(attended: fx.Node, result: fx.Node) -> fx.Node:
    """``[H, B, S, v]`` as ``[B, H, S, v]``, in memory by heads or by rows as ``result`` is: views follow."""
    by_heads = is_contiguous(result)
    node = emit(result, aten.permute.default, attended, [1, 0, 2, 3] if by_heads else [1, 2, 0, 3])
    node = emit(result, aten.clone.default, node, memory_format=torch.contiguous_format)
    return node if by_heads else emit(result, aten.transpose.int, node, 1, 2)


def _emit_indexer(found: Indexer, lengths: fx.Node) -> fx.Node:
    """``[B, S, 1, C]``."""
    topk = found.topk
    query, key, weights = (a.emit(topk) for a in (found.query, found.key, found.weights))
    if weights.meta["val"].dtype != torch.float32:
        weights = emit(topk, aten._to_copy.default, weights, dtype=torch.float32)
    if found.factor != 1:
        weights = emit(topk, aten.mul.Tensor, weights, found.factor)
    return emit(topk, torch.ops.cpcompile.lightning_indexer.default, query, key, weights, lengths, found.count)


def _emit_attention(found: Attention, batch: int | fx.Node, indices: fx.Node, lengths: fx.Node) -> fx.Node:
    """``[H, B * S, v]``."""
    like, heads = found.result, found.sizes[2]
    weight = found.weight.emit(like)
    latent_width = weight.meta["val"].shape[1]
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
