"""What an exported GE graph takes, by the model's own names: GE takes inputs by position, and positions say nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpcompile.lowering.ascend.ge_graph import MODEL, SUMMARY
from cpcompile.lowering.ge.executor import GeProgram
from cpcompile.lowering.ge.graph import GeError, GeGraph, GeOp
from cpcompile.lowering.ge.loader import load
from cpcompile.passes.weight_cuts import Cut, cut_tensor


@dataclass(frozen=True)
class RankGraph:
    """One rank's exported GE graph.

    Args:
        graph: what ``export`` wrote.
        rows: the summary's row of each of its inputs, in order.
    """

    graph: GeGraph
    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def read(cls, folder: Path) -> RankGraph:
        """The graph in one rank's folder.

        Raises:
            GeError: the graph's inputs are not those of the summary, in its order.
        """
        graph = load(folder / MODEL)
        rows = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["inputs"]
        names, told = [op.name for op in graph.inputs], [row["name"] for row in rows]
        if names != told:
            where = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(names, told, strict=False))))
            raise GeError(f"{folder}: input {where} of the graph is not the one of {SUMMARY}: export both again")
        return cls(graph, rows)

    def program(self, given: Mapping[str, Tensor | int]) -> GeProgram:
        """The graph with its inputs.

        Args:
            given: source of an input, as the summary calls it → its value on this rank: a weight that ranks share is
                given whole, and cut here. There may be more than the graph takes.

        Raises:
            GeError: an input is not given.
        """
        pairs = zip(self.graph.inputs, self.rows, strict=True)
        return GeProgram(self.graph, [_value(op, row, given) for op, row in pairs])


def _value(op: GeOp, row: Mapping[str, Any], given: Mapping[str, Tensor | int]) -> Tensor | int:
    source = row["source"]
    if isinstance(source, list):
        return torch.tensor([_given(op, name, given) for name in source], dtype=op.output_descs[0].dtype)
    value, part = _given(op, source, given), row.get("part")
    if part is None:
        return value
    assert isinstance(value, Tensor)
    return cut_tensor(value, Cut(part["dim"], part["segments"], part["parts"]), part["index"])


def _given(op: GeOp, source: str, given: Mapping[str, Tensor | int]) -> Tensor | int:
    if source not in given:
        raise op.error(f"its value, {source!r}, is not given")
    return given[source]
