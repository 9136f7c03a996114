"""Target ``inductor``: PyTorch's own compiler, on the rewritten graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch._functorch.config
import torch.fx as fx
import torch.fx.experimental._config
from torch._inductor.compile_fx import compile_fx

from cpcompile.lowering.targets import BoxedCallable


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> BoxedCallable:
    """Compile ``gm`` with inductor.

    Inductor traces the graph again with its own decompositions. Inputs that are no tensors and no sizes (a
    DTensor's mesh) are not used by the graph and stay out.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    used = [i for i, v in enumerate(example_inputs) if isinstance(v, torch.Tensor | torch.SymInt | int | float)]
    for index, node in enumerate(placeholders):
        assert index in used or not node.users, f"{node} is no tensor and is used"
    inner = fx.GraphModule(gm, _without(gm, {n for i, n in enumerate(placeholders) if i not in used}))
    # A shard has one row wherever T <= n: code for more rows must not be guarded against that, since the guards of all
    # variants are dynamo's for the whole graph, and one of n = 2 ("T is not 2") would contradict mark_dynamic.
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    # The cache of AOTAutograd is keyed by the names of this project's ops, not by what this version makes of them.
    with oblivious, torch._functorch.config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(inner, [example_inputs[i] for i in used])

    def boxed(args: list[Any]) -> Any:
        mine = [args[i] for i in used]
        args.clear()
        return compiled(*mine)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


def _without(gm: fx.GraphModule, dropped: set[fx.Node]) -> fx.Graph:
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        if node not in dropped:
            env[node] = graph.node_copy(node, env.__getitem__)
    return graph
