"""A whole model's GE graphs, rank by rank, as ``cpcompile lower`` writes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpcompile.compiled import Compiled
from cpcompile.graph_inputs import GraphInput
from cpcompile.lowering.ascend.conversion import Unsupported, remedy
from cpcompile.lowering.ascend.export import export
from cpcompile.lowering.ascend.ge_graph import GeSummary
from cpcompile.lowering.targets import Settings
from cpcompile.module_tp import Sharing
from cpcompile.passes.specialise import sizes_for, specialise
from cpcompile.passes.token_counts import token_placeholder
from cpcompile.passes.token_layout import Expr, value_shapes
from cpcompile.report import ModuleRow


@dataclass(frozen=True)
class Lowered:
    """One rank's GE graph.

    Args:
        folder: where it is.
        summary: what is in it.
        unsupported: what is not.
        kept: modules that were to be shared and are not.
    """

    folder: Path
    summary: GeSummary
    unsupported: list[Unsupported]
    kept: Sequence[ModuleRow] = ()

    def lines(self) -> Iterator[str]:
        """The summary for people."""
        total = sum(self.summary.ops.values())
        yield f"{self.folder}: {total} GE ops of {len(self.summary.ops)} types, {self.summary.bytes:,} bytes"
        most = [f"{count} {op}" for op, count in list(self.summary.ops.items())[:12]]
        yield f"  {', '.join(most)}{', ...' if len(self.summary.ops) > 12 else ''}"
        groups = Counter((row["op"], row["group"]) for row in self.summary.collectives)
        for (op, group), count in groups.items():
            yield f"  {count} {op} over {group}"
        for (op, module), count in Counter((u.op, u.module) for u in self.unsupported).items():
            first = next(u for u in self.unsupported if (u.op, u.module) == (op, module))
            yield f"  NOT LOWERED: {count} {op} in {module or 'no module'}: {remedy(first)}"
        for row in self.kept:
            yield f"  NOT SHARED: {row.role} {row.module}: {row.reason}"


def lower_rank(
    compiled: Compiled, inputs: Sequence[GraphInput], tokens: int, static: bool, folder: Path, settings: Settings
) -> Lowered:
    """Write the graph that runs for ``tokens`` tokens.

    Args:
        compiled: the outcome of the pipeline on one rank, whose process groups are alive.
        inputs: what the traced graph's inputs are.
        tokens: the token count T.
        static: a graph for that T alone, in which all sizes are constants; else for all T that the variant serves.
        folder: where to write.
        settings: what the target is told.

    Raises:
        OptionError: ``static``, and T does not determine the graph's sizes.
        AscendError: torch_npu is missing or does not fit.
    """
    gm = compiled.at(tokens).gm
    if static:
        gm = specialise(gm, sizes_for(gm, _token_count(compiled), tokens))
    summary, unsupported = export(gm, folder, settings, known_of(compiled, inputs))
    rows = compiled.sharing.rows if compiled.sharing else []
    return Lowered(folder, summary, unsupported, [row for row in rows if row.decision == "keep"])


def _token_count(compiled: Compiled) -> Expr | None:
    """T in the graph's own symbols: as placed, else the length of the token ids, where nothing was placed."""
    if compiled.tokens is not None or (ids := token_placeholder(compiled.original)) is None:
        return compiled.tokens
    node, dim = ids
    return value_shapes(node)[0][dim]


def known_of(compiled: Compiled, inputs: Sequence[GraphInput]) -> list[dict[str, Any]]:
    """What a summary says of every input: its ``source``, and the ``part`` that this rank has of a shared weight."""
    names = [node.name for node in compiled.original.graph.find_nodes(op="placeholder")]
    sharing = compiled.sharing or Sharing()
    found: list[dict[str, Any]] = [{"source": given.name} for given in inputs]
    for name, cut in sharing.cuts.items():
        found[names.index(name)]["part"] = {**asdict(cut), "index": sharing.axes[name].rank}
    return found
