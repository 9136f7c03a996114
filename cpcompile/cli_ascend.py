"""The commands ``cpcompile lower`` and ``cpcompile doctor``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from cpcompile.cli_shared import AxisOption, ReplicatedOption, TargetArgument, status, traced


def lower(
    target: TargetArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write.")],
    to: Annotated[str, typer.Option("--target", help="ge-export is the one target that writes.")] = "ge-export",
    axis: AxisOption = [],  # noqa: B006
    rank: Annotated[list[int], typer.Option("--rank", help="A rank to lower. Repeat for more; else all.")] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="Token count T that the graph is chosen for.")] = 16384,
    static: Annotated[bool, typer.Option("--static", help="A graph for that T alone.")] = False,
    strategy: Annotated[str, typer.Option(help="auto, tp, cp, hybrid, off.")] = "auto",
    layout: Annotated[str, typer.Option(help="contiguous, zigzag, interleave, sp.")] = "contiguous",
    profile: Annotated[str, typer.Option(help="Hardware that plans are made for.")] = "ascend-a3",
    replicated: ReplicatedOption = [],  # noqa: B006
    sparse_attention: Annotated[
        bool, typer.Option("--sparse-attention", help="Recognise DeepSeek sparse attention.")
    ] = False,
    mc2: Annotated[bool, typer.Option("--mc2", help="Matmul and its reduce-scatter or all-gather as one op.")] = False,
    uneven: Annotated[bool, typer.Option("--uneven", help="Scatter and gather uneven rows, in place of pads.")] = False,
    mla_prolog: Annotated[bool, typer.Option("--mla-prolog", help="MLA ahead of attention as one op.")] = False,
) -> None:
    """Rewrite TARGET and write every rank's GE graph: dynamo.pbtxt, model.pb, options.json, summary.json.

    Needs torch_npu and a C compiler, and neither CANN nor an NPU. Exit code 1 if an op could not be lowered.
    """
    from cpcompile.errors import OptionError
    from cpcompile.explanation import compile_trace
    from cpcompile.lowering.targets import Settings, prepare
    from cpcompile.model_spec import parse_axes
    from cpcompile.options import Options

    if to != "ge-export":
        raise OptionError(f"--target {to!r}: only 'ge-export' writes graphs; others run them, in torch.compile")
    given = {"strategy": strategy, "layout": layout, "profile": profile, "sparse_attention": sparse_attention}
    Options.parse(given)
    ranks = rank or list(range(math.prod(parse_axes(axis).values())))
    for number in ranks:
        parse_axes(axis, number)
    prepare(to)
    from cpcompile.lowering.ascend.whole_model import lower_rank

    missing = False
    for number in ranks:
        with traced(target, axis, number) as found:
            if not found.alive:
                raise OptionError("a saved trace has no process groups to name in a GE graph: lower the model itself")
            with status(f"rank {number}: placing, proving, lowering"):
                options = Options.parse({**given, "replicated": (*found.replicated, *replicated)})
                compiled = compile_trace(found.trace, options)
                folder = output / f"rank_{number}"
                settings = Settings(mc2=mc2, uneven_collectives=uneven, mla_prolog=mla_prolog)
                done = lower_rank(compiled, tokens, static, folder, settings)
            for line in done.lines():
                typer.echo(line)
            missing = missing or bool(done.unsupported)
    if missing:
        raise typer.Exit(1)


def doctor() -> None:
    """Say what is installed, which targets work here, and how to get the others."""
    from cpcompile.lowering.ascend.doctor import examine
    from cpcompile.serving.doctor import examine as examine_serving

    for line in [*examine(), "", *examine_serving()]:
        typer.echo(line)
