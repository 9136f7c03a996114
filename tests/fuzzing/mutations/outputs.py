"""Mutations of what a graph returns; a mutated input's new contents are an output, too."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from fuzzing.mutations.table import LAST, MOVING, WAIT, Mutation, aten, floats, kind, like


def _outputs(m: Mutation) -> tuple[fx.Node, list[Any]]:
    node = m.graph.output_node()
    values = node.args[0]
    return node, list(values) if isinstance(values, list | tuple) else [values]


@kind
def outputs_swapped(m: Mutation) -> str:
    node, values = _outputs(m)
    pairs = [
        (i, j)
        for i in range(len(values))
        for j in range(i)
        if values[i] is not values[j] and like(values[i], values[j])
    ]
    i, j = m.choice(pairs)
    values[i], values[j] = values[j], values[i]
    node.args = (tuple(values),)
    return f"outputs {i} and {j} swapped"


@kind
def output_of_before(m: Mutation) -> str:
    """An output is some other value of its shape."""
    node, values = _outputs(m)
    at = m.rng.randrange(len(values))
    others = [n for n in m.graph.nodes if n is not values[at] and like(n, values[at]) and n.target not in MOVING]
    values[at] = m.choice(others)
    node.args = (tuple(values),)
    return f"output {at} is {values[at]}"


@kind
def output_of_own_rows(m: Mutation) -> str:
    """An output, of each rank, that only it has: a mutated input is written so, too."""
    node, values = _outputs(m)
    at = m.choice([i for i, v in enumerate(values) if isinstance(v, fx.Node) and floats(v)])
    values[at] = m.after(values[at], aten.mul.Tensor, values[at], m.rank + 1)
    node.args = (tuple(values),)
    return f"output {at} differs by rank"


@kind
def output_unwaited(m: Mutation) -> str:
    node, values = _outputs(m)
    at = m.choice([i for i, v in enumerate(values) if isinstance(v, fx.Node) and v.target is WAIT])
    values[at] = values[at].args[0]
    node.args = (tuple(values),)
    return f"output {at} is not waited for"


@kind
def rows_dropped_from_output(m: Mutation) -> str:
    node, values = _outputs(m)
    at = m.choice([i for i, v in enumerate(values) if isinstance(v, fx.Node) and floats(v)])
    values[at] = m.after(values[at], aten.slice.Tensor, values[at], 0, 1, LAST)
    node.args = (tuple(values),)
    return f"output {at} lacks its first row"
