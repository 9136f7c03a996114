"""Explain: what the compiler decides about every collective of a model, and why, as data and as a table."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpcompile.axes import Axis
from cpcompile.backend import exchange_for
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.exchange import Exchange, OfflineExchange
from cpcompile.options import Options
from cpcompile.pipeline import compile_graph
from cpcompile.plan import Plan
from cpcompile.report import Report

DEFAULT_TOKENS = 16384
_WIDTH = 200  # columns where there is no terminal: reasons stay on one line or two
_STYLES = {"scatter": "green", "merge": "green", "sink": "green", "shard": "green", "gather": "cyan", "keep": "yellow"}


class Explanation:
    """What happens to a step of some number of tokens.

    Args:
        compiled: the outcome of the pipeline.
        tokens: the token count T that elements and decisions are stated for.
        seconds: time that the capture took, by ``"dynamo"`` and ``"aot"``.
    """

    def __init__(self, compiled: Compiled, tokens: int, seconds: Mapping[str, float]) -> None:
        """State ``compiled`` for ``tokens`` tokens."""
        self.report: Report = compiled.report(tokens)
        self.plan: Plan = compiled.plan
        self._intervals = list(_intervals(compiled))
        self._seconds = seconds

    def to_dict(self) -> dict[str, Any]:
        """The report, the ``intervals`` of T and the seconds of the ``capture``, as plain data for JSON."""
        capture = {"dynamo_s": self._seconds.get("dynamo", 0.0), "aot_s": self._seconds.get("aot", 0.0)}
        return {**self.report.to_dict(), "intervals": self._intervals, "capture": capture}

    def __str__(self) -> str:
        """The explanation as a plain table."""
        console = Console(file=io.StringIO(), width=_WIDTH, color_system=None)
        console.print(self)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    def __rich__(self) -> RenderableType:
        """The explanation for a rich console."""
        data = self.to_dict()
        return Group(
            _collectives(self.report),
            _volume(data["volume"], self.report.tokens),
            *([_modules(self.report)] if self.report.modules else []),
            _interval_table(self._intervals),
            _passes(self.report),
            *_summary(data),
        )


def explain(
    model: Callable[..., Any],
    *inputs: Any,
    tokens: int = DEFAULT_TOKENS,
    kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Explanation:
    """Explain what ``torch.compile(model, backend="cpcompile", options=options)`` would do, without running anything.

    Where a real process group is initialised, every rank must call it; in a fake one, this process speaks for all.

    Args:
        model: a module or function for inference; its parameters may be on the meta device.
        inputs: its example inputs; dims of integer tensors become symbolic.
        tokens: the token count T that decisions are stated for.
        kwargs: its keyword inputs.
        options: see :class:`cpcompile.options.Options`.

    Raises:
        OptionError: an option is unknown or malformed.
        TraceError: the model cannot be traced as one graph.
        AxisError, PlanError, RequirementError: as from the backend.
    """
    parsed = Options.parse(options)
    trace = capture(model, *inputs, **(kwargs or {}))
    return explain_trace(trace, parsed, tokens)


def explain_trace(
    trace: Trace,
    options: Options,
    tokens: int = DEFAULT_TOKENS,
    axes: Sequence[Axis] | None = None,
    modules: Mapping[str, Axis] | None = None,
) -> Explanation:
    """Explain a captured graph, which is canonicalised in place.

    Args:
        trace: what ``capture`` made or ``load_trace`` read.
        options: the user's options.
        tokens: the token count T that decisions are stated for.
        axes: the mesh axes of a trace whose process groups are gone; this process then speaks for all ranks.
        modules: role → ranks that share such modules, where there are no process groups of them.
    """
    return Explanation(compile_trace(trace, options, axes, modules), tokens, trace.seconds)


def compile_trace(
    trace: Trace,
    options: Options,
    axes: Sequence[Axis] | None = None,
    modules: Mapping[str, Axis] | None = None,
) -> Compiled:
    """Run the pipeline on a captured graph: see :func:`explain_trace` for the arguments."""

    def exchange(axis: Axis) -> Exchange:
        offline = axes is not None or not dist.is_initialized() or axis in (modules or {}).values()
        return OfflineExchange(axis.size, axis.rank) if offline else exchange_for(axis, options.timeout_s)

    return compile_graph(trace.gm, trace.inputs, options, exchange, axes, modules)


def _intervals(compiled: Compiled) -> Iterator[dict[str, Any]]:
    """One entry per interval of T, axis and token count, by ascending T."""
    for variant in compiled.variants:
        kept = compiled.kept_rows(variant)
        for step, rows in zip(variant.steps, compiled.step_rows(variant, variant.first), strict=True):
            axis, found = step.graph.known.axis.name, step.interval
            beside = [] if step.graph.known.further else [row for row in kept if row.axis == axis]
            yield {
                "axis": axis,
                "count": step.plan.tokens,
                "first": variant.first,
                "last": variant.last,
                "solver": found.solver,
                "at": found.at,
                "cost_s": found.cost_s,
                "bound_s": found.bound_s,
                "unchanged_s": found.unchanged_s,
                "counts": dict(sorted(Counter(row.decision for row in [*rows, *beside]).items())),
            }


# ---- tables --------------------------------------------------------------------------------------------------------


def _collectives(report: Report) -> Table:
    table = Table(title=f"Collectives at T = {report.tokens}", title_justify="left")
    for heading in ("module", "node", "axis", "decision", "becomes"):
        table.add_column(heading, overflow="fold")
    for heading in ("sent before", "sent after"):
        table.add_column(heading, justify="right", overflow="fold")
    table.add_column("reason", overflow="fold")
    for c in report.collectives:
        becomes = f"{c.kind} -> {c.becomes}" if c.kind == "all_reduce" else c.becomes
        fused = "" if c.fused is None else f" (all_gather #{c.fused})"
        before, after = (
            _elements(c.elements_before, c.elements_before_in_t),
            _elements(c.elements_after, c.elements_after_in_t),
        )
        decision = Text(c.decision, style=_STYLES.get(c.decision, ""))
        # Text, for what comes from the model may look like markup.
        table.add_row(
            Text(c.module), Text(c.name), Text(c.axis), decision, Text(becomes + fused), before, after, Text(c.reason)
        )
    return table


def _elements(number: int, in_t: str) -> Text:
    return Text(f"{number:,}" + (f"\n{in_t}" if in_t not in ("", "0", str(number)) else ""))


def _volume(volume: Mapping[str, int], tokens: int) -> Text:
    before, after = volume["before"], volume["after"]
    change = f" ({100 * (after - before) / before:+.1f} %)" if before else ""
    return Text(f"Volume: each rank sends {before:,} elements before, {after:,} after{change} at T = {tokens}\n")


def _interval_table(intervals: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(title="Intervals of T", title_justify="left")
    for heading in ("T", "axis", "rows", "decisions", "cost, unchanged", "solver", "certificate"):
        table.add_column(heading, overflow="fold")
    for i in intervals:
        span = f"{i['first']} and more" if i["last"] is None else f"{i['first']} to {i['last']}"
        counts = ", ".join(f"{n} {decision}" for decision, n in i["counts"].items()) or "unchanged"
        cost = f"{i['cost_s'] * 1e3:.4g} ms, {i['unchanged_s'] * 1e3:.4g} ms at T = {i['at']}"
        gap = i["cost_s"] - i["bound_s"]
        certificate = "optimal" if gap <= 0 else f"within {100 * gap / i['cost_s']:.2g} % of the bound"
        cells = (span, i["axis"], i["count"], counts, cost, i["solver"], certificate)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _modules(report: Report) -> Table:
    table = Table(title="Modules", title_justify="left")
    for heading in ("module", "role", "ranks", "decision"):
        table.add_column(heading, overflow="fold")
    for heading in ("weights before", "after"):
        table.add_column(heading, justify="right", overflow="fold")
    for heading in ("collectives", "reason"):
        table.add_column(heading, overflow="fold")
    for row in report.modules:
        sizes = [
            f"{size / 2**20:,.1f} MiB" if row.decision == "share" else ""
            for size in (row.bytes_before, row.bytes_after)
        ]
        cells = (row.module, row.role, f"{row.ranks} ({row.axis})", row.decision, *sizes, row.collectives, row.reason)
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _passes(report: Report) -> Table:
    table = Table(title="Passes", title_justify="left")
    for heading in ("pass", "seconds", "rewrites", "refusals"):
        table.add_column(heading, justify="left" if heading in ("pass", "refusals") else "right", overflow="fold")
    for run in report.passes:
        reasons = Counter(reason for _, reason in run.refusals)
        refusals = "; ".join(f"{n} × {reason}" for reason, n in reasons.items())
        table.add_row(run.name, f"{run.seconds:.3f}", str(run.rewrites), Text(refusals))
    return table


def _summary(data: Mapping[str, Any]) -> Iterator[Text]:
    for axis in data["axes"]:
        if axis["refused"]:
            yield Text(f"Axis {axis['name']} is left alone: {axis['refused']}")
    proofs = data["verify"].get("proofs", [])
    failures = [failure for proof in proofs for failure in proof["failures"]]
    if failures:
        yield Text(f"Verification FAILED, what was not proven runs as it came: {failures[0]}")
    else:
        trusted = sorted({op for proof in proofs for op in proof.get("trusts", [])})
        told = f", taking on trust that {', '.join(trusted)} is row-wise, as stated" if trusted else ""
        yield Text(
            f"Verification: {len(proofs)} rewritten graphs proven{told}"
            if proofs
            else "Verification: nothing was proven"
        )
    capture, graph = data["capture"], data["graph"]
    yield Text(
        f"Graph: {graph['nodes_before']} nodes before, {graph['nodes_after']} after; "
        f"captured in {capture['dynamo_s']:.1f} s (dynamo) + {capture['aot_s']:.1f} s (AOT)"
    )
