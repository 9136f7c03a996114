"""Inputs that a compiler behind this one can take: tensors and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx


def used_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """A copy of ``gm`` without inputs that are no tensors and no sizes (a DTensor's mesh), and the others' numbers.

    The graph does not use what stays out. Numbers that it does not use, sizes of a static graph, stay out too: torchair
    gives them no place, and takes the inputs behind them for one place earlier.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    pairs = enumerate(zip(placeholders, example_inputs, strict=True))
    used = [i for i, (node, value) in pairs if _taken(node, value)]
    dropped = {node for index, node in enumerate(placeholders) if index not in used}
    for node in dropped:
        assert not node.users, f"{node} is no tensor and is used"
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node not in dropped:
            env[node] = graph.node_copy(node, env.__getitem__)
    return fx.GraphModule(gm, graph), used


def _taken(node: fx.Node, value: Any) -> bool:
    if isinstance(value, int | float):
        return bool(node.users)
    return isinstance(value, torch.Tensor | torch.SymInt)
