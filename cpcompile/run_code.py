"""What runs in the place of one AOT graph: the variant for a call's token count. Pickled, it is its graphs."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch._inductor.output_code import OutputCode
from torch._subclasses import FakeTensorMode
from torch.fx._graph_pickler import GraphPickler
from torch.fx._graph_pickler import Options as PickleOptions
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cpcompile.lowering.eager import lower
from cpcompile.lowering.targets import BoxedCallable, Settings
from cpcompile.replication import group_places

Check = Callable[[list[Any]], bool]


@dataclasses.dataclass
class RunCode(OutputCode):
    """The boxed callable that AOTAutograd gets.

    Args:
        run: the lowered variants, by ascending token count.
        firsts: the least token count of each of them.
        read_tokens: reads the token count off a call's inputs; None where there is one variant.
        before: called with a call's inputs, which it may refuse or change, before they run; says if they run in a
            variant, or in the graph as it came.
        original: the graph as it came, op by op.
        graphs: the graphs that ``run`` and ``original`` run op by op; empty where they cannot be kept.
    """

    run: list[BoxedCallable]
    firsts: list[int]
    read_tokens: Callable[[Sequence[Any]], int] | None
    before: Check | None
    original: BoxedCallable | None
    graphs: list[fx.GraphModule]
    pickled: bytes = b""
    failure: str = ""

    def __post_init__(self) -> None:
        """AOTAutograd asks for this by attribute."""
        self._boxed_call = True

    def __call__(self, args: Any) -> Any:
        """Run on one list of inputs, which may be changed."""
        assert self.before is not None, "reloaded code runs only after `start`"
        if not self.before(args):
            assert self.original is not None
            return self.original(args)
        which = bisect.bisect_right(self.firsts, self.read_tokens(args)) - 1 if self.read_tokens is not None else 0
        return self.run[which](args)

    def prepare_for_serialization(self) -> None:
        """Leave what can be pickled: graphs without metadata. Called on a copy, before anyone asked to save it."""
        no_metadata = PickleOptions(ops_filter=None, node_metadata_key_filter=lambda key: False)
        try:
            self.pickled = GraphPickler.dumps(self.graphs, no_metadata)
        except Exception as error:  # an op that cannot be pickled must not keep the graph from running
            self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
        self.run, self.original, self.graphs, self.before = [], None, [], None

    def post_compile(self, example_inputs: Any, constants: Any, graph_kwargs: Any) -> None:
        """Read the graphs back; nothing runs before ``start``."""
        if self.pickled and not self.graphs:
            read: Any = GraphPickler.loads(self.pickled, FakeTensorMode(shape_env=ShapeEnv()))
            self.graphs = list(read)

    def start(self, groups: Mapping[str, str], before: Check) -> None:
        """Run reloaded graphs from now on.

        Args:
            groups: name of a process group when the graphs were made → its name now.
            before: see above.
        """
        lowered: dict[int, BoxedCallable] = {}
        for gm in self.graphs:
            if id(gm) not in lowered:
                rename_groups(gm, groups)
                lowered[id(gm)] = lower(gm, (), Settings())
        *self.run, self.original = (lowered[id(gm)] for gm in self.graphs)
        self.before = before


def group_names(gm: fx.GraphModule) -> set[str]:
    """Names of the process groups that ops of ``gm``, and of graphs in it, are given."""
    return {name for node, places in _given_groups(gm) for name in places.values()}


def holds_tensors(gm: fx.GraphModule) -> bool:
    """Whether ``gm``, or a graph in it, has tensors besides its inputs."""
    own = (value for module in gm.modules() for value in vars(module).values())
    return any(isinstance(v, torch.Tensor) for v in (*gm.parameters(), *gm.buffers(), *own))


def rename_groups(gm: fx.GraphModule, groups: Mapping[str, str]) -> None:
    """Give the groups of ``gm`` the names that they have now."""
    for node, places in _given_groups(gm):
        new = {place: groups.get(name, name) for place, name in places.items()}
        node.args = tuple(new.get(i, arg) for i, arg in enumerate(node.args))
        node.kwargs = {key: new.get(key, arg) for key, arg in node.kwargs.items()}
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            module.recompile()


def _given_groups(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, dict[int | str, str]]]:
    """Nodes that are given groups by name: where among their arguments, and which."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    for node in (node for graph in graphs for node in graph.nodes):
        given = {**dict(enumerate(node.args)), **node.kwargs}
        places = {p: given[p] for p in group_places(node.target) if isinstance(given.get(p), str)}
        if places:
            yield node, places
