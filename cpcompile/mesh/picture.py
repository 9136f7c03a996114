"""Rank groups as a table and as a coloured grid, for terminals and as SVG."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cpcompile.mesh.groups import Communicator, Kind, RankGroups, Ranks

_COLOURS = (
    *("#8ecae6", "#ffb703", "#90be6d", "#f28482", "#cdb4db", "#e9c46a"),
    *("#84a59d", "#f6bd60", "#a0c4ff", "#ffadad", "#caffbf", "#bdb2ff"),
)
_LISTED = 4  # groups that the table writes out
_COLUMNS = 32  # ranks in a row of the picture


def describe(groups: RankGroups, rank: int | None = None) -> RenderableType:
    """The table and the picture of ``groups``; of ``rank``'s own groups where it is given."""
    return Group(_table(groups, rank), Text(), picture(groups, rank))


def save_svg(groups: RankGroups, path: Path, rank: int | None = None) -> None:
    """Write the table and the picture to ``path`` as SVG.

    Raises:
        OSError: it cannot be written.
    """
    console = Console(record=True, file=io.StringIO(), width=140, color_system="truecolor", force_terminal=True)
    console.print(describe(groups, rank))
    title = f"{groups.order.name}: {groups.world} ranks"
    path.write_text(console.export_svg(title=title, unique_id="groups"), encoding="utf-8")


def compact(ranks: Ranks) -> str:
    """``{0-3}``, ``{0,4}`` or ``{0,4,…,28}``: runs as ranges, long steps by their ends."""
    steps = {b - a for a, b in itertools.pairwise(ranks)}
    if len(ranks) > 2 and steps == {1}:
        return f"{{{ranks[0]}-{ranks[-1]}}}"
    if len(ranks) > 4 and len(steps) == 1:
        return f"{{{ranks[0]},{ranks[1]},…,{ranks[-1]}}}"
    return f"{{{','.join(_runs(ranks))}}}"


def _runs(ranks: Ranks) -> Iterator[str]:
    start = 0
    for end in range(1, len(ranks) + 1):
        if end == len(ranks) or ranks[end] != ranks[end - 1] + 1:
            run = ranks[start:end]
            yield from [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
            start = end


def _table(groups: RankGroups, rank: int | None) -> Table:
    grid = " × ".join(f"{axis} {size}" for axis, size in groups.grid.items() if size > 1) or "one rank"
    of = "" if rank is None else f", rank {rank}"
    table = Table(
        title=f"{groups.order.name}: {groups.world} ranks{of} = {grid} (outermost first)", title_justify="left"
    )
    for heading in ("kind", "ranks each", "groups", "communicator", "ranks"):
        table.add_column(heading, justify="right" if heading in ("ranks each", "groups") else "left", overflow="fold")
    communicators = groups.communicators()
    for kind in groups.kinds.values():
        count = len(kind.groups)
        if kind.size == 1:
            table.add_row(kind.name, "1", str(count), "", "each rank alone", style="dim")
            continue
        table.add_row(kind.name, str(kind.size), str(count), _shares(kind, communicators), _listed(kind, rank))
    return table


def _shares(kind: Kind, communicators: tuple[Communicator, ...]) -> str:
    mine = next(c for c in communicators if kind.name in c.kinds)
    others = [name for name in mine.kinds if name != kind.name]
    if others:
        return f"shared with {', '.join(others)}"
    return "its own" if kind.name == kind.purpose else ""


def _listed(kind: Kind, rank: int | None) -> str:
    if rank is not None:
        return f"{compact(kind.of(rank))} (group {kind.index(rank)}, place {kind.of(rank).index(rank)})"
    more = len(kind.groups) - _LISTED
    return " ".join(compact(group) for group in kind.groups[:_LISTED]) + (f" … {more} more" if more > 0 else "")


def picture(groups: RankGroups, rank: int | None = None) -> Text:
    """A row for each kind, a column for each rank; a cell says and colours which group of its kind the rank is in.

    With ``rank``, only its own groups are coloured. Kinds of one rank each have no row.
    """
    kinds = [kind for kind in groups.kinds.values() if kind.size > 1]
    label = max((len(kind.name) for kind in kinds), default=4) + 1
    cell = max(3, len(str(groups.world - 1)) + 1)
    text = Text(no_wrap=True)
    for start in range(0, groups.world, _COLUMNS):
        ranks = range(start, min(start + _COLUMNS, groups.world))
        text.append("rank".ljust(label) + "".join(f"{r:>{cell}}" for r in ranks) + "\n", style="bold")
        for kind in kinds:
            text.append(kind.name.ljust(label))
            for r in ranks:
                index = kind.index(r)
                mine = rank is None or r in kind.groups[kind.index(rank)]
                text.append(
                    f"{index:>{cell}}", style=f"#000000 on {_COLOURS[index % len(_COLOURS)]}" if mine else "dim"
                )
            text.append("\n")
    return text
