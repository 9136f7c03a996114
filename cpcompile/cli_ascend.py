"""The commands ``cpcompile lower`` and ``cpcompile doctor``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cpcompile.axes import Axis
from cpcompile.cli_shared import (
    AxisOption,
    ModuleOption,
    ModulesOption,
    ReplicatedOption,
    TargetArgument,
    status,
    traced,
)


def lower(
    target: TargetArgument,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where to write.")],
    to: Annotated[str, typer.Option("--target", help="ge-export is the one target that writes.")] = "ge-export",
    axis: AxisOption = [],  # noqa: B006
    rank: Annotated[list[int], typer.Option("--rank", help="A rank to lower. Repeat for more; else all.")] = [],  # noqa: B006
    tokens: Annotated[int, typer.Option(min=1, help="Token count T that the graph is chosen for.")] = 16384,
    static: Annotated[bool, typer.Option("--static", help="For that T alone; other sizes: the example's.")] = False,
    strategy: Annotated[str, typer.Option(help="auto, tp, cp, hybrid, off.")] = "auto",
    layout: Annotated[str, typer.Option(help="contiguous, zigzag, interleave, sp.")] = "contiguous",
    profile: Annotated[str, typer.Option(help="Hardware that plans are made for.")] = "ascend-a3",
    replicated: ReplicatedOption = [],  # noqa: B006
    sparse_attention: Annotated[
        bool, typer.Option("--sparse-attention/--no-sparse-attention", help="Recognise DeepSeek sparse attention.")
    ] = True,
    mc2: Annotated[bool, typer.Option("--mc2", help="Matmul and its reduce-scatter or all-gather as one op.")] = False,
    uneven: Annotated[bool, typer.Option("--uneven", help="Scatter and gather uneven rows, in place of pads.")] = False,
    mla_prolog: Annotated[bool, typer.Option("--mla-prolog", help="MLA ahead of attention as one op.")] = False,
    moe_dispatch: Annotated[
        str, typer.Option(metavar="AXIS", help="With --static: rows to their experts' ranks, which AXIS has.")
    ] = "",
    modules: ModulesOption = "",
    module: ModuleOption = [],  # noqa: B006
    group_tokens: Annotated[
        str, typer.Option(help="Tokens of replicas that share modules: equal, or the most that one has.")
    ] = "equal",
) -> None:
    """Rewrite TARGET and write every rank's GE graph: dynamo.pbtxt, model.pb, options.json, summary.json.

    With --modules there are as many replicas of the mesh as the largest P, and each replica's ranks follow the last's;
    a model from a function says with --replicated which of its weights replicas have alike.
    Needs torch_npu and a C compiler, and neither CANN nor an NPU. Exit code 1 if an op could not be lowered.
    """
    from cpcompile.errors import OptionError, nearest
    from cpcompile.explanation import compile_trace
    from cpcompile.lowering.targets import Settings, prepare
    from cpcompile.model_spec import parse_axes
    from cpcompile.module_groups import replica_groups
    from cpcompile.options import Options, parse_patterns

    if to != "ge-export":
        raise OptionError(f"--target {to!r}: only 'ge-export' writes graphs; others run them, in torch.compile")
    given: dict[str, Any] = {"strategy": strategy, "layout": layout, "profile": profile}
    given |= {"sparse_attention": sparse_attention, "modules": parse_patterns(module)}
    given["group_tokens"] = _group_tokens(group_tokens)
    Options.parse(given)
    if moe_dispatch and moe_dispatch not in (known := parse_axes(axis)):
        raise OptionError(f"--moe-dispatch {moe_dispatch}: there is no such --axis{nearest(moe_dispatch, known)}")
    sizes, replicas = _replicas(modules)
    each = math.prod(parse_axes(axis).values())
    ranks = rank or list(range(replicas * each))
    for number in ranks:
        parse_axes(axis, number, replicas)
    prepare(to)
    from cpcompile.lowering.ascend.whole_model import lower_rank

    settings, missing = Settings(mc2=mc2, uneven_collectives=uneven, mla_prolog=mla_prolog), False
    for number in ranks:
        with traced(target, axis, number, replicas) as found:
            if not found.alive:
                raise OptionError("a saved trace has no process groups to name in a GE graph: lower the model itself")
            with status(f"rank {number}: placing, proving, lowering"):
                options = Options.parse({**given, "replicated": (*found.replicated, *replicated)})
                compiled = compile_trace(found.trace, options, found.axes, replica_groups(sizes, each))
                folder = output / f"rank_{number}"
                if moe_dispatch:
                    settings = replace(settings, moe_dispatch=_group_beside(moe_dispatch, found.axes))
                done = lower_rank(compiled, found.trace.inputs, tokens, static, folder, settings)
            for line in done.lines():
                typer.echo(line)
            missing = missing or bool(done.unsupported)
    if missing:
        raise typer.Exit(1)


def _group_beside(name: str, axes: Sequence[Axis]) -> str:
    """A process group of the ranks of the axis ``name`` that nothing runs over yet."""
    import torch.distributed as dist

    ranks = next(axis.ranks for axis in axes if axis.name == name)
    group: Any = dist.new_group(list(ranks), group_desc="moe_dispatch")
    return str(group.group_name)


def _group_tokens(text: str) -> str | int:
    from cpcompile.errors import OptionError

    if text == "exchange":
        raise OptionError("--group-tokens exchange: a GE graph cannot read a number off a tensor: equal, or a number")
    return int(text) if text.isdecimal() else text


def _replicas(modules: str) -> tuple[dict[str, int], int]:
    """Role → replicas that share such modules, and how many replicas there are."""
    from cpcompile.errors import OptionError
    from cpcompile.module_report import parse_modules
    from cpcompile.options import MODULE_SIZES

    sizes = parse_modules(modules, tuple(MODULE_SIZES.values())) if modules else {}
    most = max(sizes.values(), default=1)
    for role, size in sizes.items():
        if most % size:
            raise OptionError(f"--modules: {role}={size} does not divide the {most} replicas that the largest asks for")
    return sizes, most


def doctor() -> None:
    """Say what is installed, which targets work here, and how to get the others."""
    from cpcompile.lowering.ascend.doctor import examine
    from cpcompile.serving.doctor import examine as examine_serving

    for line in [*examine(), "", *examine_serving()]:
        typer.echo(line)
