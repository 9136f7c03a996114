"""Parallel strategies side by side: time by term, bytes sent, memory per rank, and where the best one changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from cpcompile.costs import profile
from cpcompile.errors import OptionError, nearest
from cpcompile.layer_costs import ACTIVATION_BYTES, TERMS, Collective, Half, attention_half, mlp_half
from cpcompile.model_shapes import ModelShapes, read_shapes
from cpcompile.strategies import KERNELS, Step, Strategy, candidates, default_kernels, impossible

LARGEST_STEP = 1 << 20  # tokens up to which the best strategy is sought


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank: weights, key-value cache of one request, and an estimate of the activations' peak."""

    weights: float
    cache: float
    activations: float

    @property
    def total(self) -> float:
        """Their sum."""
        return self.weights + self.cache + self.activations


@dataclass(frozen=True)
class Cost:
    """What a strategy costs in one step.

    Args:
        strategy: it.
        terms: seconds by term of :data:`cpcompile.layer_costs.TERMS`, on the worst rank.
        collectives: all of the step's.
        memory: of the worst rank.
    """

    strategy: Strategy
    terms: Mapping[str, float]
    collectives: tuple[Collective, ...]
    memory: Memory

    @property
    def seconds(self) -> float:
        """Time of the step."""
        return sum(self.terms.values())

    @property
    def wire(self) -> float:
        """Bytes that one rank sends."""
        return sum(c.wire for c in self.collectives)

    def to_dict(self) -> dict[str, Any]:
        """The cost as JSON values."""
        return {
            "strategy": self.strategy.name,
            "cp": self.strategy.cp,
            "tp": self.strategy.tp,
            "seconds": self.seconds,
            "terms": dict(self.terms),
            "collectives": sum(c.count for c in self.collectives),
            "wire_bytes": self.wire,
            "memory_bytes": {
                "weights": self.memory.weights,
                "cache": self.memory.cache,
                "activations": self.memory.activations,
            },
        }


@dataclass(frozen=True)
class Refusal:
    """A strategy that cannot run, and why."""

    strategy: Strategy
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The refusal as JSON values."""
        return {"strategy": self.strategy.name, "impossible": self.reason}


def step_cost(model: ModelShapes, strategy: Strategy, step: Step) -> Cost:
    """Cost of one step of the whole model."""
    terms = dict.fromkeys(TERMS, 0.0)
    collectives: list[Collective] = []
    for half, count in _halves(model, strategy, step):
        for term, seconds in half.seconds(step.profile).items():
            terms[term] += count * seconds
        collectives += [replace(c, count=count * c.count) for c in half.collectives]
    return Cost(strategy, terms, tuple(collectives), memory(model, strategy, step))


def _halves(model: ModelShapes, strategy: Strategy, step: Step) -> list[tuple[Half, int]]:
    counted = [
        (attention_half(model, strategy, step), model.layers),
        (mlp_half(model, strategy, step, moe=False), model.dense_layers),
    ]
    return [*counted, (mlp_half(model, strategy, step, moe=True), model.moe_layers)] if model.moe_layers else counted


def memory(model: ModelShapes, strategy: Strategy, step: Step) -> Memory:
    """Bytes on one rank; latents are cached whole on every rank, as MLA's tensor parallelism has them too."""
    width = model.latent + model.index_dim
    cache = (step.tokens + step.prefix) * width * ACTIVATION_BYTES * model.layers
    return Memory(_weights(model, strategy) * model.weight_bytes, cache, _activations(model, strategy, step))


def _weights(model: ModelShapes, strategy: Strategy) -> float:
    """Parameters of one rank: heads over tp, all else of attention whole, MLPs, experts and vocabulary over all."""
    per_head = (model.q_lora or model.hidden) * model.qk + model.kv_lora * (model.nope + model.value)
    headed = model.heads * (per_head + model.value * model.hidden) / strategy.tp
    whole = model.hidden * (model.q_lora + model.latent)
    indexer = model.index_heads * model.index_dim * (model.q_lora or model.hidden)
    indexer += model.hidden * (model.index_dim + model.index_heads)
    expert = 3 * model.hidden * model.expert_intermediate
    split = model.dense_layers * 3 * model.hidden * model.intermediate + 2 * model.vocab * model.hidden
    split += model.moe_layers * model.shared_experts * expert
    routed = model.moe_layers * (expert * -(-model.experts // strategy.ranks) + model.hidden * model.experts)
    return model.layers * (headed + whole + indexer) + split / strategy.ranks + routed


def _activations(model: ModelShapes, strategy: Strategy, step: Step) -> float:
    """Residual and hidden state, and what the larger half of a layer holds at once; an estimate, without workspace."""
    rows = -(-step.tokens // strategy.ranks) if strategy.scatter else step.tokens
    queries, heads = -(-step.tokens // strategy.cp), model.heads / strategy.tp
    attention = queries * (model.q_lora + heads * (model.qk + model.value))
    if not (model.sparse or strategy.absorbed):
        attention += (step.tokens + step.prefix) * heads * (model.qk + model.value)
    dense = step.tokens * (model.hidden + 3 * model.intermediate / strategy.ranks)
    met = step.tokens * model.top_experts / strategy.ranks
    experts = step.tokens * model.hidden + met * (2 * model.hidden + 3 * model.expert_intermediate)
    peak = max(attention, dense * bool(model.dense_layers), experts * bool(model.moe_layers))
    return (2 * rows * model.hidden + peak) * ACTIVATION_BYTES


@dataclass(frozen=True)
class Comparison:
    """Strategies on one machine.

    Args:
        step: prefix, profile and kernels; its tokens are the first of ``rows``.
        ranks: how many.
        rows: token count → every strategy's cost or refusal, ``off`` first.
        best: ``(first token count, name)``: the fastest strategy from there on, up to :data:`LARGEST_STEP`.
    """

    step: Step
    ranks: int
    rows: Mapping[int, Sequence[Cost | Refusal]]
    best: Sequence[tuple[int, str]]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "ranks": self.ranks,
            "prefix": self.step.prefix,
            "profile": self.step.profile.name,
            "kernels": self.step.kernels.name,
            "steps": [{"tokens": t, "strategies": [r.to_dict() for r in rows]} for t, rows in self.rows.items()],
            "best": [{"from_tokens": t, "strategy": name} for t, name in self.best],
            "largest_step": LARGEST_STEP,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One table per token count, then where the best strategy changes."""
        for tokens, rows in self.rows.items():
            yield _table(self, tokens, rows)
        changes = "; ".join(f"{name} from T = {first:,}" for first, name in self.best) or "none is possible"
        yield f"Fastest, up to T = {LARGEST_STEP:,}: {changes}."


def _table(comparison: Comparison, tokens: int, rows: Sequence[Cost | Refusal]) -> Table:
    step = comparison.step
    after = f" after {step.prefix:,} cached" if step.prefix else ""
    title = f"{tokens:,} tokens{after}, {comparison.ranks} ranks, {step.profile.name}, {step.kernels.name} kernels"
    table = Table(title=title, caption="ms per prefill step on the worst rank; GB sent and held per rank")
    names = ("total", "vs off", *TERMS, "count", "wire", "weights", "cache", "activations")
    table.add_column("strategy")
    for name in names:
        table.add_column(name, justify="right")
    if any(isinstance(row, Refusal) for row in rows):
        table.add_column("impossible, for")
    baseline = next((r.seconds for r in rows if isinstance(r, Cost) and r.strategy.name == "off"), None)
    for row in rows:
        if isinstance(row, Refusal):
            table.add_row(row.strategy.name, *["-"] * len(names), row.reason)
            continue
        held = (row.memory.weights, row.memory.cache, row.memory.activations)
        table.add_row(
            row.strategy.name,
            f"{row.seconds * 1e3:,.2f}",
            f"{baseline / row.seconds:.2f}x" if baseline else "-",
            *(f"{row.terms[term] * 1e3:,.2f}" for term in TERMS),
            str(sum(c.count for c in row.collectives)),
            *(f"{amount / 1e9:.2f}" for amount in (row.wire, *held)),
        )
    return table


def parse_and_compare(
    config: Path, ranks: int, tokens: str, prefix: int, hardware: str, kernels: str | None = None
) -> Comparison:
    """:func:`compare` from the command line's words: ``tokens`` is ``"65536"`` or ``"8192,65536"``.

    Raises:
        OptionError: a token count is no positive integer, or a preset does not exist.
        TraceError: the configuration cannot be read or lacks a key.
    """
    counts, first = first_step(tokens, prefix, hardware, kernels)
    return compare(read_shapes(config), ranks, counts, first)


def first_step(tokens: str, prefix: int, hardware: str, kernels: str | None) -> tuple[list[int], Step]:
    """The token counts that ``tokens`` lists, and the step of the first. Raises :class:`OptionError`."""
    machine = profile(hardware)
    if kernels is not None and kernels not in KERNELS:
        raise OptionError(f"unknown kernels {kernels!r}{nearest(kernels, KERNELS)}")
    counts = tokens.split(",")
    wrong = [c for c in counts if not c.strip().isdecimal() or int(c) < 1]
    if wrong:
        raise OptionError(f"--tokens {tokens!r}: expected positive integers, such as 8192,65536; found {wrong[0]!r}")
    found = [int(c) for c in counts]
    return found, Step(found[0], machine, KERNELS[kernels] if kernels else default_kernels(machine), prefix)


def compare(model: ModelShapes, ranks: int, tokens: Sequence[int], step: Step) -> Comparison:
    """Every candidate strategy at each of ``tokens``; ``step`` gives prefix, profile and kernels."""
    rows = {t: _row(model, ranks, replace(step, tokens=t)) for t in tokens}
    return Comparison(step, ranks, rows, best_strategies(model, ranks, step))


def _row(model: ModelShapes, ranks: int, step: Step) -> list[Cost | Refusal]:
    found: list[Cost | Refusal] = []
    for strategy in candidates(model, ranks):
        reason = impossible(model, strategy, step.tokens)
        found.append(Refusal(strategy, reason) if reason else step_cost(model, strategy, step))
    return found


def best_strategies(model: ModelShapes, ranks: int, step: Step) -> list[tuple[int, str]]:
    """``(first token count, fastest strategy from there on)``.

    Sought at powers of two and by bisection between them, so that a strategy that is best only for a stretch between
    two neighbouring powers can be missed.
    """

    def best(tokens: int) -> str | None:
        costs = [r for r in _row(model, ranks, replace(step, tokens=tokens)) if isinstance(r, Cost)]
        return min(costs, key=lambda c: c.seconds).strategy.name if costs else None

    changes: list[tuple[int, str]] = []
    last, name = 0, None
    powers = range(LARGEST_STEP.bit_length())
    for tokens in (1 << power for power in powers):
        found = best(tokens)
        if found is not None and found != name:
            low, high = last, tokens
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if best(middle) != found else (low, middle)
            changes.append((high, found))
        last, name = tokens, found
    return changes
