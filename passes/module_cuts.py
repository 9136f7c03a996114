"""How the weights of one module are cut so that a group of ranks can share it.

Columns (output features) of an MLP's first products and of lm_head; rows (input features) of the products that sum over
them; rows of an embedding's table. ``weight_cuts`` carries the cuts back to the graph's inputs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import arguments, op_name
from cpcompile.passes.module_roles import VIEWS, between
from cpcompile.passes.products import Product, product_of
from cpcompile.passes.token_layout import shape_of, size_expr
from cpcompile.passes.weight_cuts import CutRefused, Cuts

KEEPS_ROWS = VIEWS - {f"aten::{n}" for n in ("permute", "t", "transpose", "expand", "slice", "_to_copy")}
DIVIDING = {
    "aten::split": ("split_size",),
    "aten::split_with_sizes": ("split_sizes",),
    "aten::slice": ("start", "end"),
}
_ADDED_AFTER = ("aten::addmm",)  # products whose bias may be added to the sum instead


@dataclass(frozen=True)
class SharedModule:
    """A module whose weight a group of ranks is to share.

    Args:
        role: its role, one of ``module_roles.ROLES``.
        name: the model's name of it.
        nodes: names of its lookup or products, the one that comes down last.
        axis: the ranks that share it.
        unequal: the ranks may have different numbers of rows.
    """

    role: str
    name: str
    nodes: tuple[str, ...]
    axis: Axis
    unequal: bool


def cuts_of(gm: fx.GraphModule, module: SharedModule) -> Cuts:
    """How the weights of ``module`` are cut.

    Raises:
        CutRefused: they cannot be; the message says why.
    """
    nodes = {n.name: n for n in gm.graph.nodes}
    if any(name not in nodes for name in module.nodes):
        raise CutRefused(f"{module.name} is not in this graph as one product")
    mine, cuts = [nodes[name] for name in module.nodes], Cuts(module.axis.size)
    if module.role == "embedding":
        table = mine[0].args[0]
        assert isinstance(table, fx.Node)
        cuts.cut(table, 0, mine[0])
        cuts.check_readers()
        return cuts
    *first, last = (p for n in mine if (p := product_of(n)) is not None)
    if len(first) + 1 != len(mine):
        raise CutRefused(f"{module.name} has a product that is not known in this graph")
    halves = 2 if module.role == "mlp" and len(first) == 1 else 1  # gate and up may be one product, side by side
    for p in first:
        _cut_columns(cuts, p, halves)
    if module.role == "lm_head":
        _cut_columns(cuts, last, 1)
    else:
        _cut_rows(cuts, last)
    cuts.check_readers()
    if module.role == "mlp":
        _check_middle(last, set(mine))
    return cuts


def read_beside(gm: fx.GraphModule, module: SharedModule, cuts: Cuts) -> list[str]:
    """Graph inputs that the weights of ``module`` are read with and that stay whole: scales of what is summed over.

    They must be the same on all ranks of its axis, too: they scale other ranks' rows.
    """
    nodes = {n.name: n for n in gm.graph.nodes}
    products = [p for name in module.nodes if (p := product_of(nodes[name])) is not None]
    pending = [n for p in products for n in (p.weight, *p.per_column)]
    found: dict[fx.Node, None] = {}
    while pending:
        node = pending.pop()
        if node.op == "placeholder":
            found[node] = None
        pending += node.all_input_nodes
    return [node.name for node in found if node not in cuts.nodes]


def _cut_columns(cuts: Cuts, p: Product, segments: int) -> None:
    cuts.cut(p.weight, 1, p.node, segments)
    for vector in (*p.per_column, *([p.bias] if p.bias is not None else [])):
        cuts.cut(vector, len(shape_of(vector.meta["val"])) - 1, p.node, segments)


def _cut_rows(cuts: Cuts, p: Product) -> None:
    if p.bias is not None and op_name(p.node.target) not in _ADDED_AFTER:
        raise CutRefused(f"{p.node} adds its bias before it scales, so that it cannot be added once to the sum")
    cuts.cut(p.weight, 0, p.node)


def _check_middle(down: Product, products: Collection[fx.Node]) -> None:
    """Between gate, up and down nothing may depend on the rows' shape or mix columns."""
    middle = between(down.rows, products)
    if middle is None:
        raise CutRefused(f"more lies before {down.node} than an activation and a product")
    for node in middle:
        name = op_name(node.target)
        if name in KEEPS_ROWS:
            width = {size_expr(n.meta["val"].shape[-1]) for n in (node, node.all_input_nodes[0])}
            if len(width) > 1:
                raise CutRefused(f"{node}, before {down.node}, regroups columns")
        elif name in DIVIDING:
            dim, ndim = arguments(node)["dim"], node.all_input_nodes[0].meta["val"].dim()
            if dim % ndim != ndim - 1:
                raise CutRefused(f"{node}, before {down.node}, divides rows")
        elif name in VIEWS and name != "aten::_to_copy":
            raise CutRefused(f"{node}, before {down.node}, moves columns")
