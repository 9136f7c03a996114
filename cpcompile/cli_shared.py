"""What the commands share: arguments, errors in one line, tracing a target."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from cpcompile.errors import CpcompileError

if TYPE_CHECKING:
    from cpcompile.model_spec import Target


_TARGET = (
    "file.py:function or package.module:function that returns (model, args) or (model, args, kwargs); "
    "a directory with config.json; a saved trace"
)
TargetArgument = Annotated[str, typer.Argument(metavar="TARGET", help=_TARGET, show_default=False)]
AxisOption = Annotated[
    list[str], typer.Option("--axis", metavar="NAME=SIZE", help="A mesh axis, such as tp=16. Repeat for more.")
]
RankOption = Annotated[int, typer.Option("--rank", help="The rank whose graph is traced.")]
ReplicatedOption = Annotated[
    list[str],
    typer.Option(
        "--replicated", metavar="PATTERN", help="Inputs that are the same on every rank; '!PATTERN' says not."
    ),
]
ModulesOption = Annotated[
    str, typer.Option(metavar="ROLE=P,...", help="Modules that P replicas share: o_proj, lm_head, embedding, mlp.")
]
ModuleOption = Annotated[
    list[str],
    typer.Option(metavar="ROLE=PATTERN", help="Modules of a role, by name instead of dataflow; none=PATTERN."),
]


def one_line_errors(command: Callable[..., None]) -> Callable[..., None]:
    """End ``command`` with exit code 2 and one line on stderr where the user can act on the error."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except CpcompileError as error:
            typer.echo(f"cpcompile: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None

    return wrapped


@contextmanager
def traced(target: str, axis: list[str], rank: int, replicas: int = 1) -> Iterator[Target]:
    """Trace ``target`` as ``rank``, and keep its process groups while the block lasts; see ``trace_target``."""
    from cpcompile.model_spec import parse_axes, trace_target

    axes = parse_axes(axis, rank, replicas)
    # What torch logs of a failed trace is in the error that we raise.
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with ExitStack() as stack:
            with status("tracing the model (dynamo, AOT)"):
                found = stack.enter_context(trace_target(target, axes, rank, replicas))
            yield found
    finally:
        logger.setLevel(level)


@contextmanager
def status(what: str) -> Iterator[None]:
    """Show ``what`` on stderr while the block runs, if someone is looking."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(what):
        yield
