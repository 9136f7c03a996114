"""Modules over groups of their own, side by side: bytes and milliseconds without and with, and where each pays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from cpcompile.comparison import LARGEST_STEP, first_step
from cpcompile.errors import OptionError, nearest
from cpcompile.layer_costs import Collective
from cpcompile.model_shapes import ModelShapes, read_shapes
from cpcompile.module_costs import MODULES, check_size, module_cost
from cpcompile.module_verdict import CAUTION, WORTH, ModuleCost
from cpcompile.strategies import Step

COLUMNS = ("before", "after", "saved", "buffers", "ms before", "ms after", "change", "slow links")


@dataclass(frozen=True)
class ModuleRow:
    """A module's cost, and where it pays and where it saves time as computed: ``(first, last)`` tokens per rank."""

    cost: ModuleCost
    pays_at: tuple[tuple[int, int], ...]
    faster_at: tuple[tuple[int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON values: bytes and seconds per step on one rank."""
        cost = self.cost
        return {
            "module": cost.module,
            "ranks": cost.ranks,
            "tp": cost.tp,
            "layers": cost.layers,
            "weight_bytes": {"before": cost.before.weights, "after": cost.after.weights, "saved": cost.saved},
            "buffer_bytes": cost.buffers,
            "collectives": [_collective(c, cost) for c in cost.after.collectives],
            "seconds": {
                "before": cost.seconds(cost.before),
                "after": cost.seconds(cost.after),
                "change": cost.change(),
                "change_on_slow_links": cost.cautious,
            },
            "pays": cost.pays,
            "reason": cost.reason,
            "pays_at_tokens": [list(pair) for pair in self.pays_at],
            "faster_at_tokens": [list(pair) for pair in self.faster_at],
        }


def _collective(c: Collective, cost: ModuleCost) -> dict[str, Any]:
    found = {"kind": c.kind, "what": c.what, "ranks": c.ranks, "count": c.count * cost.layers}
    return {**found, "wire_bytes": c.wire * cost.layers, "seconds": c.seconds(cost.profile) * cost.layers}


@dataclass(frozen=True)
class ModuleReport:
    """Modules on one machine: token count → rows; ``step`` gives prefix, profile and kernels."""

    step: Step
    rows: Mapping[int, Sequence[ModuleRow]]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "profile": self.step.profile.name,
            "kernels": self.step.kernels.name,
            "slow_links": CAUTION,
            "seconds_per_gb": WORTH,
            "steps": [{"tokens": t, "modules": [r.to_dict() for r in rows]} for t, rows in self.rows.items()],
            "largest_step": LARGEST_STEP,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One table per token count, each verdict with its reason below it."""
        for tokens, rows in self.rows.items():
            yield _table(self, tokens, rows)
            for row in rows:
                verdict = "pays" if row.cost.pays else "does not pay"
                yield f"{row.cost.module} over {row.cost.ranks} {verdict}: {row.cost.reason}."


def _table(report: ModuleReport, tokens: int, rows: Sequence[ModuleRow]) -> Table:
    table = Table(
        title=f"{tokens:,} tokens per rank, {report.step.profile.name}",
        caption=f"GB per rank; ms per step, all layers; slow links: collectives {CAUTION:g} times as slow as computed",
    )
    table.add_column("module")
    for name in ("P", "tp", *COLUMNS):
        table.add_column(name, justify="right")
    for name in ("collectives", "pays", "pays at B", "faster at B"):
        table.add_column(name)
    for row in rows:
        cost = row.cost
        held = (cost.before.weights, cost.after.weights, cost.saved, cost.buffers)
        took = (cost.seconds(cost.before), cost.seconds(cost.after))
        table.add_row(
            cost.module,
            str(cost.ranks),
            str(cost.tp),
            *(f"{amount / 1e9:.2f}" for amount in held),
            *(f"{seconds * 1e3:.2f}" for seconds in took),
            *(f"{seconds * 1e3:+.2f}" for seconds in (cost.change(), cost.cautious)),
            f"{cost.layers} x ({' + '.join(c.kind for c in cost.after.collectives)})" if cost.ranks > 1 else "none",
            "yes" if cost.pays else "no",
            _shown(row.pays_at),
            _shown(row.faster_at),
        )
    return table


def _shown(runs: tuple[tuple[int, int], ...]) -> str:
    """``1–35``, ``from 600``, ``any`` or ``none``."""
    if runs == ((1, LARGEST_STEP),):
        return "any"
    texts = [f"from {low:,}" if high == LARGEST_STEP else f"{low:,}–{high:,}" for low, high in runs]
    return ", ".join(texts) or "none"


def parse_modules(text: str, known: Collection[str] = MODULES) -> dict[str, int]:
    """``"o_proj=8,mlp=8"`` as module to size. Raises :class:`OptionError`."""
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in known:
            raise OptionError(f"--modules: unknown module {name!r}{nearest(name, known)}")
        if not size.isdecimal() or int(size) < 1:
            raise OptionError(f"--modules: {name}: expected a size of at least 1, such as {name}=8; found {size!r}")
        if name in found:
            raise OptionError(f"--modules: {name} is listed twice; list it once")
        found[name] = int(size)
    return found


def parse_and_plan(
    config: Path,
    modules: str,
    ranks: int | None,
    tp: int | None,
    tokens: str,
    prefix: int,
    hardware: str,
    kernels: str | None = None,
) -> ModuleReport:
    """:func:`plan_modules` from the command line's words.

    Raises:
        OptionError: a module, a count or a preset is not one.
        GroupError: a size does not fit the model or the ranks.
        TraceError: the configuration cannot be read or lacks a key.
    """
    sizes = parse_modules(modules)
    counts, step = first_step(tokens, prefix, hardware, kernels)
    return plan_modules(read_shapes(config), sizes, counts, step, ranks, tp)


def plan_modules(
    model: ModelShapes,
    sizes: Mapping[str, int],
    tokens: Sequence[int],
    step: Step,
    ranks: int | None = None,
    tp: int | None = None,
) -> ModuleReport:
    """Every module of ``sizes`` at each of ``tokens``.

    Args:
        model: its shapes.
        sizes: module to the size of its group.
        tokens: tokens per rank.
        step: prefix, profile and kernels.
        ranks: all ranks, if sizes are to be held against them.
        tp: ranks that cut the weights already. None: 1, and for ``flashcomm2``, which regroups them, ``ranks`` or 8.

    Raises:
        GroupError: a size does not fit the model or the ranks.
    """
    wide = {name: tp or ((ranks or 8) if name == "flashcomm2" else 1) for name in sizes}
    for name, size in sizes.items():
        check_size(name, model, size, wide[name], ranks)
    rows = {t: [_row(model, n, sizes[n], replace(step, tokens=t), wide[n]) for n in sizes] for t in tokens}
    return ModuleReport(step, rows)


def _row(model: ModelShapes, name: str, size: int, step: Step, tp: int) -> ModuleRow:
    def at(tokens: int) -> ModuleCost:
        return module_cost(name, model, size, replace(step, tokens=tokens), tp)

    faster = intervals(lambda tokens: at(tokens).change() < 0)
    return ModuleRow(at(step.tokens), intervals(lambda tokens: at(tokens).pays), faster)


def intervals(holds: Callable[[int], bool]) -> tuple[tuple[int, int], ...]:
    """``(first, last)`` token counts, up to :data:`LARGEST_STEP`, between which ``holds``.

    Sought at powers of two and by bisection between them: what changes twice between two powers can be missed.
    """
    return tuple(_runs([1 << power for power in range(LARGEST_STEP.bit_length())], holds))


def _runs(counts: list[int], holds: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
    first = last = 0
    for tokens in counts:
        low, high, now = last, tokens, holds(tokens)
        if now != bool(first):
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if holds(middle) == now else (middle, high)
            if first:
                yield first, high - 1
            first = high if now else 0
        last = tokens
    if first:
        yield first, last
