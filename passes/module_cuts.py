"""How the weights of one module are cut so that a group of ranks can share it.

Columns (output features) of an MLP's first products and of lm_head; rows (input features) of the products that sum over
them; rows of an embedding's table. ``weight_cuts`` carries the cuts back to the graph's inputs.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import op_name
from cpcompile.passes.module_columns import InnerColumns, inner_columns
from cpcompile.passes.products import Product, product_of
from cpcompile.passes.token_layout import shape_of
from cpcompile.passes.weight_cuts import CutRefused, Cuts

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


@dataclass
class ModuleCuts(Cuts):
    """How the weights of a module are cut, and what that does to the values inside it.

    Args:
        mine: the module's lookup or products.
        inner: an MLP's values between its products.
    """

    mine: tuple[fx.Node, ...] = ()
    inner: InnerColumns = field(default_factory=InnerColumns)


def cuts_of(gm: fx.GraphModule, module: SharedModule) -> ModuleCuts:
    """How the weights of ``module`` are cut.

    Raises:
        CutRefused: they cannot be; the message says why.
    """
    nodes = {n.name: n for n in gm.graph.nodes}
    if any(name not in nodes for name in module.nodes):
        raise CutRefused(f"{module.name} is not in this graph as one product")
    mine = tuple(nodes[name] for name in module.nodes)
    cuts = ModuleCuts(module.axis.size, mine=mine)
    if module.role == "embedding":
        table = mine[0].args[0]
        assert isinstance(table, fx.Node)
        cuts.cut(table, 0, mine[0])
        cuts.check_readers()
        return cuts
    *first, last = (p for n in mine if (p := product_of(n)) is not None)
    if len(first) + 1 != len(mine):
        raise CutRefused(f"{module.name} has a product that is not known in this graph")
    if module.role == "lm_head":
        _cut_columns(cuts, last, 1)
    else:
        _cut_rows(cuts, last)
    if module.role == "mlp":
        cuts.inner = inner_columns(last, mine, module.axis.size)
    for p in first:
        _cut_columns(cuts, p, cuts.inner.of[p.node].segments)
    cuts.check_readers()
    return cuts


def read_beside(gm: fx.GraphModule, module: SharedModule, cuts: Collection[str]) -> list[str]:
    """Graph inputs that the weights of ``module`` are read with and that stay whole: scales of what is summed over.

    They must be the same on all ranks of its axis, too: they scale other ranks' rows. ``cuts`` names what is cut.

    Raises:
        CutRefused: a scale is a constant of the graph, of which nothing is known on other ranks.
    """
    nodes = {n.name: n for n in gm.graph.nodes}
    products = [p for name in module.nodes if (p := product_of(nodes[name])) is not None]
    pending = [n for p in products for n in (p.weight, *p.per_column, *p.single)]
    found: dict[fx.Node, None] = {}
    while pending:
        node = pending.pop()
        if node.op == "get_attr":
            raise CutRefused(f"{node}, a constant of the graph, scales rows of other ranks, which may have another one")
        if node.op == "placeholder":
            found[node] = None
        pending += node.all_input_nodes
    return [node.name for node in found if node.name not in cuts]


def _cut_columns(cuts: Cuts, p: Product, segments: int) -> None:
    cuts.cut(p.weight, 1, p.node, segments)
    for vector in (*p.per_column, *([p.bias] if p.bias is not None else [])):
        cuts.cut(vector, len(shape_of(vector.meta["val"])) - 1, p.node, segments)


def _cut_rows(cuts: Cuts, p: Product) -> None:
    if p.bias is not None and op_name(p.node.target) not in _ADDED_AFTER:
        raise CutRefused(f"{p.node} adds its bias before it scales, so that it cannot be added once to the sum")
    if p.no_sum:
        raise CutRefused(p.no_sum)
    cuts.cut(p.weight, 0, p.node)
