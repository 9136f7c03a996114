"""What it takes to spread one module's weights over a group of its own: bytes per rank, work and collectives per step.

Every rank of a group brings ``B`` rows of its own (along DP or CP, or inside TP where rows are split), as many as the
busiest of them: the others pad. P ranks share one copy of the weights that tensor parallelism leaves to each. With H
hidden, D = heads times value width, V vocabulary, I inner width of a dense MLP, L layers, t ranks of TP:

============== ============================================================================ =========================
module         dataflow                                                                     weights per rank
============== ============================================================================ =========================
lm_head        gather [B, H]; product [PB, V/tP]; all-to-all to [B, V/t]                    V H / t   →  V H / tP
embedding      gather [B] ids; masked lookup; reduce-scatter [PB, H]                        V H / t   →  V H / tP
o_proj         all-to-all [B, D/t] to [PB, D/tP]; product; reduce-scatter [PB, H]           L D H / t →  L D H / tP
mlp            gather [B, H]; gate, up, down of I/tP; reduce-scatter [PB, H]                3 I H / t →  3 I H / tP
flashcomm2     P = otp of t ranks: all-to-all over t/P; product; reduce-scatter over P      L D H / t →  L D H / P
layer_sharding layer i's o_proj on rank i % P, broadcast while the layer before it computes L D H / t →  ⌈L/P⌉ D H / t
============== ============================================================================ =========================

A product reads its weights, whatever the rows: that is what small batches save. Costs are first principles on a
profile of :mod:`cpcompile.costs`; nothing overlaps but the broadcast. Experts, shared ones too, are no "mlp". Sources
of the dataflows: vllm-ascend's fine-grained tensor parallelism, FlashComm 2 and layer sharding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from cpcompile.comparison import step_cost
from cpcompile.errors import GroupError, nearest
from cpcompile.layer_costs import ACTIVATION_BYTES, Collective, Work, gated, linear
from cpcompile.model_shapes import ModelShapes
from cpcompile.module_verdict import ModuleCost, Side
from cpcompile.strategies import Step, Strategy

VOCABULARY_BYTES = 2  # embedding and lm_head stay in bfloat16 in 8-bit checkpoints
ID_BYTES = 8  # token ids are int64


@dataclass(frozen=True)
class Layout:
    """What a module's group is laid over.

    Args:
        model: its shapes; ``weight_bytes`` says how wide a weight is, save for the vocabulary's.
        ranks: P, the size of the group.
        tp: ranks that cut the weights already.
        step: ``tokens`` are B, those that each rank brings; kernels and prefix count for ``layer_sharding`` alone.
    """

    model: ModelShapes
    ranks: int
    tp: int
    step: Step

    @property
    def rows(self) -> int:
        """Rows of the whole group: P·B."""
        return self.ranks * self.step.tokens


def module_cost(module: str, model: ModelShapes, ranks: int, step: Step, tp: int = 1) -> ModuleCost:
    """Cost of spreading ``module`` over ``ranks`` ranks.

    Args:
        module: a key of :data:`MODULES`.
        model: its shapes.
        ranks: size of the group; for ``flashcomm2`` its otp, the ranks of ``tp`` that share one o_proj.
        step: ``tokens`` are what each rank brings to the module.
        tp: ranks that cut the module's weights already.

    Raises:
        GroupError: there is no such module, or its weights do not divide; with the nearest sizes that work.
    """
    if module not in MODULES:
        raise GroupError(f"module groups: no module {module!r}{nearest(module, MODULES)}")
    check_size(module, model, ranks, tp)
    layout = Layout(model, ranks, tp, step)
    before, after, layers, buffers, cover = MODULES[module](layout)
    after = replace(after, collectives=tuple(c for c in after.collectives if c.ranks > 1))
    buffers = buffers if after.collectives != before.collectives else 0.0  # a group that moves nothing holds nothing
    return ModuleCost(module, ranks, tp, step.tokens, layers, before, after, buffers, cover, step.profile)


def check_size(module: str, model: ModelShapes, ranks: int, tp: int, world: int | None = None) -> None:
    """Refuse a size that does not fit ``model`` or, if given, the ``world / tp`` replicas of all ranks.

    Raises:
        GroupError: it does not; with the nearest sizes that fit both.
    """
    rules = list(_constraints(module, model, tp, world))

    def fits(n: int) -> bool:
        return all(holds(n) for _, holds in rules)

    broken = [says for says, holds in rules if ranks < 1 or not holds(ranks)]
    if not broken:
        return
    below = next((n for n in range(min(ranks - 1, model.vocab), 0, -1) if fits(n)), None)
    above = next((n for n in range(max(ranks, 0) + 1, model.vocab + 1) if fits(n)), None)
    sizes = " or ".join(str(n) for n in (below, above) if n)
    nearby = f"nearest that work: {module} {sizes}" if sizes else "no size works, mend what it says"
    raise GroupError(f"module groups: {module} {ranks}: expected {broken[0]}; {nearby}")


def _constraints(
    module: str, model: ModelShapes, tp: int, world: int | None
) -> Iterator[tuple[str, Callable[[int], bool]]]:
    """What a size must satisfy, in words and as a test."""
    if world is not None:
        yield f"ranks % tp = 0 with ranks {world}, tp {tp}", lambda n: world % tp == 0
    if module == "flashcomm2":
        yield f"heads % tp = 0 with heads {model.heads}, tp {tp}", lambda n: model.heads % tp == 0
        yield f"tp % flashcomm2 = 0 with tp {tp}", lambda n: tp % n == 0
        return
    if world is not None:
        yield f"ranks / tp % {module} = 0 with ranks {world}, tp {tp}", lambda n: world // tp % n == 0
    if module == "layer_sharding":
        yield f"no more ranks than {model.layers} layers", lambda n: n <= model.layers
        return
    whole, name = {
        "o_proj": (model.heads, "heads"),
        "mlp": (model.intermediate, "intermediate size"),
        "lm_head": (model.vocab, "vocabulary"),
        "embedding": (model.vocab, "vocabulary"),
    }[module]
    yield f"{name} % (tp · {module}) = 0 with {name} {whole}, tp {tp}", lambda n: whole % (tp * n) == 0
    if module == "mlp":
        yield "a model with dense MLPs", lambda n: model.dense_layers > 0


Parts = tuple[Side, Side, int, float, float]
"""before, after, layers, bytes of buffers, seconds of cover"""


def _lm_head(at: Layout) -> Parts:
    model, rows, own = replace(at.model, weight_bytes=VOCABULARY_BYTES), at.rows, at.step.tokens
    width, weights = model.vocab / at.tp, model.vocab * model.hidden * VOCABULARY_BYTES / at.tp
    collectives = (
        _moved("all_gather", "hidden", at.ranks, rows * model.hidden),
        _moved("all_to_all", "logits", at.ranks, own * width),
    )
    before = Side(weights, (linear(model, own, model.hidden, width),))
    after = Side(weights / at.ranks, (linear(model, rows, model.hidden, width / at.ranks),), collectives)
    return before, after, 1, rows * (model.hidden + width / at.ranks) * ACTIVATION_BYTES, 0.0


def _embedding(at: Layout) -> Parts:
    """A lookup reads one row of weights per token, so that its time knows nothing of the vocabulary's size."""
    model, rows = at.model, at.rows
    weights, row = model.vocab * model.hidden * VOCABULARY_BYTES / at.tp, model.hidden * ACTIVATION_BYTES
    collectives = (
        Collective("all_gather", "ids", at.ranks, rows * ID_BYTES),
        _moved("reduce_scatter", "embedding", at.ranks, rows * model.hidden),
    )
    before = Side(weights, (Work(0.0, 2 * at.step.tokens * row),))
    after = Side(weights / at.ranks, (Work(0.0, (at.step.tokens + rows) * row),), collectives)
    return before, after, 1, rows * (ID_BYTES + row), 0.0


def _o_proj(at: Layout) -> Parts:
    model, width = at.model, at.model.heads * at.model.value / at.tp
    weights = model.layers * width * model.hidden * model.weight_bytes
    collectives = (
        _moved("all_to_all", "heads", at.ranks, at.step.tokens * width),
        _moved("reduce_scatter", "o_proj", at.ranks, at.rows * model.hidden),
    )
    before = Side(weights, (linear(model, at.step.tokens, width, model.hidden),))
    after = Side(weights / at.ranks, (linear(model, at.rows, width / at.ranks, model.hidden),), collectives)
    return before, after, model.layers, at.rows * (width / at.ranks + model.hidden) * ACTIVATION_BYTES, 0.0


def _mlp(at: Layout) -> Parts:
    model, inner = at.model, at.model.intermediate / at.tp
    weights = model.dense_layers * 3 * inner * model.hidden * model.weight_bytes
    collectives = (
        _moved("all_gather", "hidden", at.ranks, at.rows * model.hidden),
        _moved("reduce_scatter", "mlp", at.ranks, at.rows * model.hidden),
    )

    def work(rows: int, width: float) -> tuple[Work, ...]:
        return tuple(w for _, w in gated(model, rows, width, 1))

    before = Side(weights, work(at.step.tokens, inner))
    after = Side(weights / at.ranks, work(at.rows, inner / at.ranks), collectives)
    return before, after, model.dense_layers, 2 * at.rows * model.hidden * ACTIVATION_BYTES, 0.0


def _flashcomm2(at: Layout) -> Parts:
    """Against FlashComm 1, a reduce-scatter over tp. T = tp·B rows come out of attention on every rank of tp."""
    model, otp, odp, rows = at.model, at.ranks, at.tp // at.ranks, at.tp * at.step.tokens
    width, own = model.heads * model.value, rows // odp
    weights = model.layers * width * model.hidden * model.weight_bytes
    collectives = (
        _moved("all_to_all", "heads", odp, rows * width / at.tp),
        _moved("reduce_scatter", "o_proj", otp, own * model.hidden),
    )
    scattered = (_moved("reduce_scatter", "o_proj", at.tp, rows * model.hidden),) if at.tp > 1 else ()
    before = Side(weights / at.tp, (linear(model, rows, width / at.tp, model.hidden),), scattered)
    after = Side(weights / otp, (linear(model, own, width / otp, model.hidden),), collectives)
    # What the all-to-all brings is new; its result is smaller than FlashComm 1's.
    return before, after, model.layers, own * width / otp * ACTIVATION_BYTES, 0.0


def _layer_sharding(at: Layout) -> Parts:
    """Two weights are under way, the one in use and the next. A layer's work hides a broadcast, its collectives not."""
    model, width = at.model, at.model.heads * at.model.value / at.tp
    weight = width * model.hidden * model.weight_bytes
    product = (linear(model, at.step.tokens, width, model.hidden),)
    sent = (Collective("broadcast", "o_proj's weight", at.ranks, weight),)
    held = -(-model.layers // at.ranks) * weight
    # The layer as under context parallelism over these ranks, where whole o_projs are what memory goes into.
    terms = step_cost(model, Strategy("cp", at.ranks, 1), replace(at.step, tokens=at.rows)).terms
    cover = (sum(terms.values()) - terms["collectives"]) / model.layers
    return Side(model.layers * weight, product), Side(held, product, sent), model.layers, 2 * weight, cover


MODULES: dict[str, Callable[[Layout], Parts]] = {
    "lm_head": _lm_head,
    "embedding": _embedding,
    "o_proj": _o_proj,
    "mlp": _mlp,
    "flashcomm2": _flashcomm2,
    "layer_sharding": _layer_sharding,
}


def _moved(kind: str, what: str, ranks: int, elements: float) -> Collective:
    return Collective(kind, what, ranks, elements * ACTIVATION_BYTES)
