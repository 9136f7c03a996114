"""What one layer takes under each parallel strategy, term by term, from a model's shapes and a profile.

Everything counts the worst rank. A product of ``[m, k]`` and ``[k, n]`` takes ``2 m k n`` FLOPs and moves its
operands and its result once. Times are sums, as in :mod:`cpcompile.costs`: nothing overlaps. Not modelled: the lower
efficiency of small products, skewed routing, links of different speed, the embedding and the logits of the last token.

Elements per token and layer that collectives move, times (n-1)/n, with hidden width H: *off* 2 H in each half of a
layer; *tp* H + (q_lora + kv_lora + rope, with the indexer's key and weights) in the attention half, 2 H in the other;
*cp* kv_lora + rope + the indexer's key in the attention half. Every rank runs its own experts on all tokens, as the
rewrite has it; a model that dispatches its tokens to the experts' ranks by all-to-all is said to (``dispatch``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cpcompile.costs import HardwareProfile
from cpcompile.model_shapes import ModelShapes
from cpcompile.strategies import Step, Strategy

ACTIVATION_BYTES = 2  # bfloat16
INDEX_BYTES = 4  # top-k indices are int32
TERMS = ("projections", "indexer", "attention", "norms", "mlp", "collectives")


@dataclass(frozen=True)
class Work:
    """Computation on one rank; ``rate`` is the share of the profile's FLOP/s that it reaches."""

    flops: float
    moved: float
    rate: float = 1.0

    def seconds(self, profile: HardwareProfile) -> float:
        """Time on one rank."""
        return profile.compute(self.flops / self.rate, self.moved)


@dataclass(frozen=True)
class Collective:
    """``count`` collectives of one kind over ``ranks`` ranks.

    Args:
        kind: ``all_reduce``, ``reduce_scatter``, ``all_gather``, ``all_to_all`` or ``broadcast`` (a pipeline along the
            ranks, in which all but the last pass the value on).
        what: the value that it moves.
        ranks: size of the group.
        size: bytes of the full value; for ``all_to_all``, of one rank's part.
        count: how many per layer, or per step.
    """

    kind: str
    what: str
    ranks: int
    size: float
    count: int = 1

    @property
    def wire(self) -> float:
        """Bytes that one rank sends: a ring's volume (see :mod:`cpcompile.costs`)."""
        halves = 2 if self.kind == "all_reduce" else 1
        return self.count * halves * self.size * (self.ranks - 1) / self.ranks

    def seconds(self, profile: HardwareProfile) -> float:
        """Latency, wire and copies."""
        halves = 2 if self.kind == "all_reduce" else 1
        latency = profile.all_reduce_latency if self.kind == "all_reduce" else profile.latency
        return self.count * (latency + halves * self.size * profile.seconds_per_byte(self.ranks))


@dataclass(frozen=True)
class Half:
    """The attention half or the MLP half of one layer: ``(term, work)`` and collectives."""

    work: tuple[tuple[str, Work], ...]
    collectives: tuple[Collective, ...]

    def seconds(self, profile: HardwareProfile) -> dict[str, float]:
        """Seconds of each of ``TERMS``."""
        found = dict.fromkeys(TERMS, 0.0)
        for term, work in self.work:
            found[term] += work.seconds(profile)
        found["collectives"] = sum(c.seconds(profile) for c in self.collectives)
        return found


def linear(model: ModelShapes, rows: float, inner: float, outer: float) -> Work:
    """A linear layer. With 8-bit weights and activations products run at twice the rate (data sheets)."""
    size = model.weight_bytes
    return Work(2 * rows * inner * outer * size / 2, inner * outer * size + rows * (inner + outer) * ACTIVATION_BYTES)


def causal_pairs(step: Step, cp: int, layout: str) -> float:
    """(query, key) pairs of the worst rank under a causal mask: its share of ``T K + T²/2``.

    Contiguous: the last T/C tokens, ``m K + (T² - (T-m)²)/2``, is (2 - 1/C) times the mean without a prefix. Zigzag:
    the mean, for each rank has an early block and its mirror image.
    """
    t, k = float(step.tokens), float(step.prefix)
    if layout == "zigzag":
        return (t * k + t * t / 2) / cp
    m = -(-step.tokens // cp)
    return m * k + (t * t - (t - m) ** 2) / 2


def picked_pairs(model: ModelShapes, step: Step, cp: int, layout: str) -> float:
    """(query, key) pairs that sparse attention computes on the worst rank: at most top-k keys per query."""
    top, end, m = model.index_topk, step.prefix + step.tokens, -(-step.tokens // cp)
    if step.kernels.full_topk:
        return float(m * min(top, end))
    if layout == "zigzag":
        return (_picked(end, top) - _picked(step.prefix, top)) / cp
    return _picked(end, top) - _picked(end - m, top)


def _picked(tokens: int, top: int) -> float:
    """Pairs of the first ``tokens`` queries: the sum of ``min(i, top)``."""
    return tokens**2 / 2 if tokens <= top else top**2 / 2 + (tokens - top) * top


def attention_half(model: ModelShapes, strategy: Strategy, step: Step) -> Half:
    """Norm, projections, indexer, attention, ``o_proj`` and their collectives, in one layer."""
    rows, queries = _rows(strategy, step), -(-step.tokens // strategy.cp)
    hidden_gathered = strategy.gather_hidden or (not model.q_lora and strategy.tp > 1)
    first = queries if hidden_gathered else rows
    work = [("norms", _norm(model, rows)), *_projections(model, strategy, step, first, queries)]
    if model.sparse:
        work += _indexer(model, strategy, step, first, queries)
    work.append(("attention", _attention(model, strategy, step)))
    return Half(tuple(work), tuple(_attention_collectives(model, strategy, step, hidden_gathered)))


def _rows(strategy: Strategy, step: Step) -> int:
    """Rows of the hidden state on a rank between the halves."""
    return -(-step.tokens // strategy.ranks) if strategy.scatter else step.tokens


def _norm(model: ModelShapes, rows: int) -> Work:
    """Residual addition and RMSNorm in one kernel: two reads and two writes of the hidden state."""
    return Work(0.0, 4 * rows * model.hidden * ACTIVATION_BYTES)


def _projections(
    model: ModelShapes, strategy: Strategy, step: Step, first: int, queries: int
) -> Iterable[tuple[str, Work]]:
    heads = model.heads / strategy.tp
    yield "projections", linear(model, first, model.hidden, model.q_lora + model.latent)
    yield "projections", linear(model, queries, model.q_lora or model.hidden, heads * model.qk)
    yield "projections", linear(model, queries, heads * model.value, model.hidden)
    if model.sparse or strategy.absorbed:  # kv_b's two halves, applied to queries and to results
        yield "projections", linear(model, queries, heads * model.nope, model.kv_lora)
        yield "projections", linear(model, queries, heads * model.value, model.kv_lora)
    else:  # every rank expands every key, cached ones too: context parallelism does not split this
        keys = step.tokens + step.prefix
        yield "projections", linear(model, keys, model.kv_lora, heads * (model.nope + model.value))
        # keys joined from their two parts: kv_b's result read, keys and values written
        moved = keys * heads * (model.nope + model.value + model.qk + model.value) * ACTIVATION_BYTES
        yield "norms", Work(0.0, moved)
    # latents normalised, queries rotated: read and written once each
    moved = first * (model.q_lora + model.latent) + queries * heads * model.qk
    yield "norms", Work(0.0, 2 * moved * ACTIVATION_BYTES)


def _indexer(
    model: ModelShapes, strategy: Strategy, step: Step, first: int, queries: int
) -> Iterable[tuple[str, Work]]:
    """Scores of all causal pairs, which tensor parallelism does not divide, and the picking of the top keys."""
    share = strategy.tp if strategy.shard_indexer else 1
    # Sharded over tp the rows are zigzag, whatever the layout over cp: balanced.
    pairs = causal_pairs(step, strategy.cp, strategy.layout) / share
    width = model.index_heads * model.index_dim
    yield "indexer", linear(model, queries / share, model.q_lora or model.hidden, width)
    yield "indexer", linear(model, first, model.hidden, model.index_dim + model.index_heads)
    moved = pairs * (model.index_heads * step.kernels.score_bytes + step.kernels.topk_bytes)
    yield "indexer", Work(2 * pairs * width, moved)


def _attention(model: ModelShapes, strategy: Strategy, step: Step) -> Work:
    """Scores and weighted sum: per pair and head ``2 (qk + value)`` FLOPs, absorbed ``2 (2 kv_lora + rope)``."""
    heads, kernels = model.heads / strategy.tp, step.kernels
    absorbed = 2 * (model.latent + model.kv_lora)
    if model.sparse:
        pairs = picked_pairs(model, step, strategy.cp, strategy.layout)
        # The picked rows serve all heads, so that tensor parallelism does not divide their traffic.
        moved = kernels.gather_passes * model.latent * ACTIVATION_BYTES + kernels.sparse_score_bytes * heads
        return Work(pairs * heads * absorbed, pairs * moved)
    pairs = causal_pairs(step, strategy.cp, strategy.layout)
    width = model.latent if strategy.absorbed else heads * (model.qk + model.value)
    queries = -(-step.tokens // strategy.cp) * heads * (model.qk + model.value)
    moved = ((step.tokens + step.prefix) * width + queries) * ACTIVATION_BYTES
    offset = strategy.cp > 1 or step.prefix > 0
    per_pair = absorbed if strategy.absorbed else 2 * (model.qk + model.value)
    return Work(pairs * heads * per_pair, moved, kernels.offset_rate if offset else 1.0)


def _attention_collectives(
    model: ModelShapes, strategy: Strategy, step: Step, hidden_gathered: bool
) -> Iterable[Collective]:
    tokens = -(-step.tokens // strategy.cp)
    indexer = model.index_dim + model.index_heads if model.sparse else 0
    if strategy.tp > 1 and not strategy.scatter:
        yield _moved("all_reduce", "o_proj", strategy.tp, tokens, model.hidden)
    if strategy.tp > 1 and strategy.scatter:
        yield _moved("reduce_scatter", "o_proj", strategy.tp, tokens, model.hidden)
        width = model.hidden if hidden_gathered else model.q_lora + model.latent + indexer
        yield _moved("all_gather", "hidden" if hidden_gathered else "latents", strategy.tp, tokens, width)
    if strategy.cp > 1:
        yield _moved("all_gather", "keys", strategy.cp, step.tokens, model.latent + model.index_dim)
    if strategy.tp > 1 and strategy.shard_indexer and model.sparse:
        top = min(model.index_topk, step.tokens + step.prefix) * INDEX_BYTES / ACTIVATION_BYTES
        yield _moved("all_gather", "indices", strategy.tp, tokens, top)


def _moved(kind: str, what: str, ranks: int, tokens: int, width: float) -> Collective:
    """A collective of ``[tokens, width]``; its shards are padded to equal rows."""
    rows = tokens if kind == "all_reduce" else -(-tokens // ranks) * ranks
    return Collective(kind, what, ranks, rows * width * ACTIVATION_BYTES)


def mlp_half(model: ModelShapes, strategy: Strategy, step: Step, moe: bool) -> Half:
    """Norm, a dense MLP (its inner width over all ranks) or experts (over all ranks), and their collectives."""
    n, rows, t = strategy.ranks, _rows(strategy, step), step.tokens
    work = [("norms", _norm(model, rows))]
    if moe:
        work += _experts(model, n, rows, t)
    else:
        work += gated(model, t, model.intermediate / n, 1)
    if n == 1:
        return Half(tuple(work), ())
    if not strategy.scatter:
        return Half(tuple(work), (_moved("all_reduce", "mlp", n, t, model.hidden),))
    if moe and strategy.dispatch:
        # A rank sends each of its rows to the ranks of its experts (top_experts of them at the most), and gets it back.
        sent = rows * min(model.top_experts, n) * model.hidden * ACTIVATION_BYTES
        return Half(tuple(work), (Collective("all_to_all", "experts", n, sent, 2),))
    gathered = tuple(_moved(kind, "mlp", n, t, model.hidden) for kind in ("all_gather", "reduce_scatter"))
    return Half(tuple(work), gathered)


def gated(model: ModelShapes, rows: float, inner: float, copies: float) -> Iterable[tuple[str, Work]]:
    """Gate, up and down of ``copies`` MLPs that share ``rows`` rows; only the weights come once per copy."""
    for a, b in ((model.hidden, 2 * inner), (inner, model.hidden)):
        found = linear(model, rows, a, b)
        yield "mlp", Work(found.flops, found.moved + (copies - 1) * a * b * model.weight_bytes)
    yield "mlp", Work(0.0, 3 * rows * inner * ACTIVATION_BYTES)  # silu(gate) * up


def _experts(model: ModelShapes, n: int, rows: int, tokens: int) -> Iterable[tuple[str, Work]]:
    """Router, routed experts of one rank (the one with the most), shared experts split over all ranks."""
    own = -(-model.experts // n)
    met = tokens * model.top_experts * own / model.experts
    yield "mlp", linear(model, rows, model.hidden, model.experts)
    yield from gated(model, met, model.expert_intermediate, min(own, met))
    # tokens sorted by expert and summed back: read and written, twice
    yield "mlp", Work(0.0, 4 * met * model.hidden * ACTIVATION_BYTES)
    if model.shared_experts:
        yield from gated(model, tokens, model.shared_experts * model.expert_intermediate / n, 1)
