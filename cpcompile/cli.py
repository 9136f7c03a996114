"""The command ``cpcompile``: explain a model's collectives, save and rewrite its trace, compare plans."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cpcompile.cli_ascend import doctor, lower
from cpcompile.cli_groups import groups
from cpcompile.cli_plan import plan, plan_diff
from cpcompile.cli_shared import (
    AxisOption,
    ModuleOption,
    ModulesOption,
    RankOption,
    ReplicatedOption,
    TargetArgument,
    one_line_errors,
    status,
    traced,
)
from cpcompile.costs import PROFILES

app = typer.Typer(
    help="Token parallelism for tensor-parallel DeepSeek inference: explain, trace, rewrite.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(no_args_is_help=True)
app.add_typer(plan_app, name="plan")


class Strategy(str, Enum):
    """Values of ``--strategy``."""

    auto = "auto"
    tp = "tp"
    cp = "cp"
    hybrid = "hybrid"
    off = "off"


class Layout(str, Enum):
    """Values of ``--layout``."""

    contiguous = "contiguous"
    zigzag = "zigzag"
    interleave = "interleave"
    sp = "sp"


class Verify(str, Enum):
    """Values of ``--verify``."""

    static = "static"
    numeric = "numeric"
    off = "off"


@app.callback(invoke_without_command=True)
def main(show: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """Token parallelism for tensor-parallel DeepSeek inference: explain, trace, rewrite."""
    if show:
        typer.echo(version("cpcompile"))
        raise typer.Exit()


@app.command()
@one_line_errors
def explain(
    target: TargetArgument,
    axis: AxisOption = [],  # noqa: B006 (typer copies it)
    tokens: Annotated[int, typer.Option(min=0, help="Token count T that decisions are stated for.")] = 16384,
    rank: RankOption = 0,
    profile: Annotated[str, typer.Option(help=f"Hardware: {', '.join(PROFILES)}.")] = "ascend-a3",
    strategy: Annotated[
        Strategy, typer.Option(help="auto: best per T; tp, cp, hybrid: the plan of a large step; off.")
    ] = Strategy.auto,
    layout: Annotated[
        Layout, typer.Option(help="Which rows each rank holds where attention is split by tokens.")
    ] = Layout.contiguous,
    require: Annotated[list[str], typer.Option(metavar="PATTERN", help="Must be rewritten, else an error.")] = [],  # noqa: B006
    replicated: ReplicatedOption = [],  # noqa: B006
    sparse_attention: Annotated[
        bool, typer.Option("--sparse-attention/--no-sparse-attention", help="Recognise DeepSeek sparse attention.")
    ] = True,
    modules: ModulesOption = "",
    module: ModuleOption = [],  # noqa: B006
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    save_plan: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the plan there.")] = None,
    verify: Annotated[Verify, typer.Option(help="How rewritten graphs are checked.")] = Verify.static,
) -> None:
    """Say what becomes of every collective of TARGET, and why. Needs no accelerator and no second process."""
    from cpcompile.explanation import explain_trace
    from cpcompile.module_groups import replica_axes
    from cpcompile.module_report import parse_modules
    from cpcompile.options import MODULE_SIZES, Options, parse_patterns

    options: dict[str, Any] = {"strategy": strategy.value, "profile": profile, "verify": verify.value}
    options |= {"layout": layout.value, "require": require, "sparse_attention": sparse_attention}
    options |= {"modules": parse_patterns(module)}
    Options.parse(options)  # before the minutes that a large model takes
    sizes = parse_modules(modules, tuple(MODULE_SIZES.values())) if modules else {}
    with traced(target, axis, rank) as found, status("placing and proving"):
        declared = (*found.replicated, *replicated)
        roles = replica_axes(sizes, math.prod(axis.size for axis in found.axes), rank)
        parsed = Options.parse({**options, "replicated": declared})
        outcome = explain_trace(found.trace, parsed, tokens, found.axes, roles)
    if save_plan is not None:
        _write(save_plan, outcome.plan.save)
    if as_json:
        typer.echo(json.dumps(outcome.to_dict(), indent=1))
    else:
        console = Console()
        (console if console.is_terminal else Console(width=200)).print(outcome)


@app.command()
@one_line_errors
def trace(
    target: TargetArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.pt2", help="The trace to write.")],
    axis: AxisOption = [],  # noqa: B006
    rank: RankOption = 0,
    replicated: ReplicatedOption = [],  # noqa: B006
) -> None:
    """Trace TARGET and save the graph, without parameter values, to explain and rewrite it elsewhere."""
    from cpcompile.trace_file import SUFFIX, save_trace

    if output.suffix != SUFFIX:
        raise typer.BadParameter(f"{output}: the name of a trace ends in {SUFFIX}", param_hint="--output")
    with traced(target, axis, rank) as found:
        save_trace(output, found.trace, found.axes, (*found.replicated, *replicated))


@app.command()
@one_line_errors
def opt(
    file: Annotated[Path | None, typer.Argument(metavar="FILE.pt2", help="A saved trace.")] = None,
    passes: Annotated[
        str, typer.Option("-p", "--passes", metavar="PASSES", help="name{field=value,...},name2 in order.")
    ] = "",
    show: Annotated[bool, typer.Option("--list", help="List the passes with their fields.")] = False,
    print_between: Annotated[
        bool, typer.Option("--print-between-passes", help="Print the graph after each pass.")
    ] = False,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Say on stderr how long each pass took.")] = False,
) -> None:
    """Run passes by name on a saved trace and print the graph."""
    from cpcompile.errors import OptionError
    from cpcompile.passes.registry import parse_passes
    from cpcompile.trace_file import blaming, load_trace

    if show:
        _list_passes()
        return
    if file is None or not passes:
        raise OptionError("name the passes and the trace: cpcompile opt -p canonicalise x.pt2; --list lists the passes")
    pipeline = parse_passes(passes)
    gm = load_trace(file).trace.gm
    with blaming(file):
        for run in pipeline:
            began = time.perf_counter()
            result = run(gm)
            _tell(run.name, result, time.perf_counter() - began if time_passes else None)
            if print_between and run is not pipeline[-1]:
                typer.echo(f"# after {run.name}\n{gm.print_readable(print_output=False)}")
        typer.echo(gm.print_readable(print_output=False))


plan_app.callback(invoke_without_command=True)(one_line_errors(plan))
plan_app.command("diff")(one_line_errors(plan_diff))
app.command()(one_line_errors(groups))
app.command()(one_line_errors(lower))
app.command()(one_line_errors(doctor))


def _write(path: Path, save: Callable[[Path], None]) -> None:
    from cpcompile.errors import PlanError

    try:
        save(path)
    except OSError as error:
        raise PlanError(f"cannot write {path}: {error.strerror}") from error


def _list_passes() -> None:
    from cpcompile.passes.registry import PASSES, field_types, pass_class

    for name in PASSES:
        cls = pass_class(name)
        fields = ",".join(f"{field}={getattr(cls, field, None)}" for field in field_types(cls))
        typer.echo(f"{name}{{{fields}}}: {(cls.__doc__ or '').splitlines()[0]}")


def _tell(name: str, result: Any, seconds: float | None) -> None:
    took = "" if seconds is None else f"{seconds:8.3f} s  "
    typer.echo(f"{took}{name}: {result.rewrites} rewrites, {len(result.refusals)} refusals", err=True)
    for refusal in result.refusals:
        typer.echo(f"  {refusal.node}: {refusal.reason}", err=True)
