"""Keep names: whole values of a rewritten graph go by the names that they had before, on every rank.

Before: names as they came; ranks compute their rows' numbers by more or fewer nodes, which shifts the names of others.
After: what is whole has its old name, and what was put in is called ``moved_...``. So a further plan for the graph
names the same nodes on all ranks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch.fx as fx


def keep_names(gm: fx.GraphModule, wholes: Mapping[str, str], taken: Collection[str]) -> fx.GraphModule:
    """A copy of ``gm`` with other names.

    Args:
        gm: the rewritten graph.
        wholes: name of a node in it → name, in the graph before, of the value that it is, whole.
        taken: all names in the graph before: what is put in has none of them.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for number, node in enumerate(gm.graph.nodes):
        name = node.name if node.op in ("placeholder", "get_attr", "output") else wholes.get(node.name)
        name = name or _fresh(f"moved_{number}", taken)
        args, kwargs = (fx.node.map_arg(given, copies.__getitem__) for given in (node.args, node.kwargs))
        copies[node] = graph.create_node(node.op, node.target, args, kwargs, name, node.type)
        copies[node].meta = dict(node.meta)
    graph.lint()
    renamed = fx.GraphModule(gm, graph)
    renamed.meta.update(gm.meta)
    return renamed


def _fresh(name: str, taken: Collection[str]) -> str:
    while name in taken:
        name += "x"
    return name
