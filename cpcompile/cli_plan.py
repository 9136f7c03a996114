"""The command ``cpcompile plan``: parallel strategies and module groups by computed cost; how saved plans differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cpcompile.costs import PROFILES

TOKENS = "Token counts of a prefill step; for --modules, tokens per rank of any step."
MODULES = (
    "Modules over groups of P ranks of their own: lm_head, embedding, o_proj, mlp, layer_sharding; and flashcomm2, "
    "whose P is its otp."
)
TP = "For --modules: ranks that cut the weights already. If not given: 1, and all --ranks (8) for flashcomm2."


def plan(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A directory with the model's config.json.")
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Ranks of one model instance; 8 for --compare.", show_default=False)
    ] = None,
    tokens: Annotated[str, typer.Option(metavar="T[,T2...]", help=TOKENS)] = "16384",
    prefix: Annotated[int, typer.Option(min=0, metavar="K", help="Cached tokens before them.")] = 0,
    profile: Annotated[str, typer.Option(help=f"Hardware: {', '.join(PROFILES)}.")] = "ascend-a3",
    kernels: Annotated[str | None, typer.Option(help="eager, fused; else what the hardware's library has.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare parallel strategies.")] = False,
    modules: Annotated[str | None, typer.Option(metavar="NAME=P,...", help=MODULES, show_default=False)] = None,
    tp: Annotated[int | None, typer.Option(min=1, help=TP, show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare parallel strategies, modules with and without groups of their own, by computed cost; or saved plans."""
    if context.invoked_subcommand is not None:
        return
    from cpcompile.comparison import Comparison, parse_and_compare
    from cpcompile.errors import OptionError
    from cpcompile.module_report import ModuleReport, parse_and_plan

    if config is None or compare == (modules is not None):
        raise OptionError("give --config DIR and --compare or --modules, or the command diff: cpcompile plan --help")
    found: Comparison | ModuleReport
    if modules is not None:
        found = parse_and_plan(config, modules, ranks, tp, tokens, prefix, profile, kernels)
    else:
        found = parse_and_compare(config, ranks or 8, tokens, prefix, profile, kernels)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=1))
    else:
        console = Console()
        (console if console.is_terminal else Console(width=240)).print(found)


def plan_diff(first: Path, second: Path) -> None:
    """Print how two saved plans differ; exit code 1 if they do."""
    from cpcompile.plan import Plan

    lines = Plan.load(first).diff(Plan.load(second))
    for line in lines:
        typer.echo(line)
    if lines:
        raise typer.Exit(1)
