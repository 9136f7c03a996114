"""The command ``cpcompile groups``: which ranks talk to each other, for given sizes and a rank order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

ORDER = "sglang, vllm, cann-recipes, or axes from the outermost in: external_dp,pp,dp,cp,tp."
GRID = "Axes of the rank grid"
ATTENTION = "Within tp: attn_dp · attn_cp · attn_tp = tp"
EXPERTS = "Within a stage: moe_dp · moe_ep · moe_tp = its ranks"
MODULES = "Groups of their own"


def _size(text: str, panel: str) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=False, metavar="N")


def groups(
    order: Annotated[str, typer.Option(help=ORDER)] = "vllm",
    world: Annotated[int | None, _size("All ranks; gives external_dp, or tp where dp is inside tp.", GRID)] = None,
    external_dp: Annotated[int | None, _size("Replicas that never communicate.", GRID)] = None,
    dp: Annotated[int | None, _size("Data parallelism (inside tp for sglang, cann-recipes).", GRID)] = None,
    pp: Annotated[int | None, _size("Pipeline stages.", GRID)] = None,
    cp: Annotated[int | None, _size("Context parallelism (inside tp for sglang, cann-recipes).", GRID)] = None,
    tp: Annotated[int | None, _size("Tensor parallelism.", GRID)] = None,
    attn_dp: Annotated[int | None, _size("Data parallelism of attention.", ATTENTION)] = None,
    attn_cp: Annotated[int | None, _size("Context parallelism of attention.", ATTENTION)] = None,
    attn_tp: Annotated[int | None, _size("Tensor parallelism of attention.", ATTENTION)] = None,
    moe_dp: Annotated[int | None, _size("Copies of the experts.", EXPERTS)] = None,
    moe_ep: Annotated[int | None, _size("Expert parallelism.", EXPERTS)] = None,
    moe_tp: Annotated[int | None, _size("Tensor parallelism of each expert.", EXPERTS)] = None,
    o_proj: Annotated[int | None, _size("Ranks that share one o_proj.", MODULES)] = None,
    lm_head: Annotated[int | None, _size("Ranks that share one lm_head.", MODULES)] = None,
    embedding: Annotated[int | None, _size("Ranks that share one embedding.", MODULES)] = None,
    mlp: Annotated[int | None, _size("Ranks that share one dense MLP.", MODULES)] = None,
    flashcomm2_otp: Annotated[int | None, _size("FlashComm 2: ranks that share one o_proj within tp.", MODULES)] = None,
    prefill_tp_ratio: Annotated[int | None, _size("KV producers: tp of prefill / tp of decode.", MODULES)] = None,
    head_replicas: Annotated[int | None, _size("Ranks that hold the same KV head.", MODULES)] = None,
    shared_weight: Annotated[
        bool, typer.Option("--shared-weight", help="Layer sharding.", rich_help_panel=MODULES)
    ] = False,
    mc2: Annotated[bool, typer.Option("--mc2", help="MC2 kernels for experts.", rich_help_panel=MODULES)] = False,
    module_along: Annotated[
        str | None, typer.Option(help="What modules run along: dp, cp, tp or stage.", rich_help_panel=MODULES)
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Only the groups of this rank.", show_default=False)] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Write table and picture there as SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Print the ranks of every parallel group for these sizes, as a table and a picture. Starts no process."""
    given = {name: value for name, value in locals().items() if name not in ("order", "rank", "svg", "as_json")}
    from cpcompile.errors import GroupError
    from cpcompile.mesh import Sizes, rank_groups
    from cpcompile.mesh.picture import describe, save_svg

    found = rank_groups(Sizes(**given), tuple(order.split(",")) if "," in order else order)
    own = None if rank is None else found.of(rank)
    if svg is not None:
        try:
            save_svg(found, svg, rank)
        except OSError as error:
            raise GroupError(f"cannot write {svg}: {error.strerror}") from error
    if as_json:
        data = found.to_dict() if own is None else {"order": found.order.name, "rank": rank, "groups": own}
        typer.echo(json.dumps(data, indent=1))
        return
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(describe(found, rank))
