"""The proof of layer sharding: each product reads the awaited broadcast of its own weight from its owner.

Ranks that do not own a weight send an empty tensor, which does not say whose place it takes: the order of the
broadcasts does. From the original graph and the layers it follows which inputs are broadcast, from which rank, and in
which order; the k-th broadcast over the group must be the k-th of these, on every rank, and is that input once it has
been awaited. All other calls must be the original's (``verify_same_calls``). Shares no code with the pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.collectives import group_name_of, is_wait
from cpcompile.passes.verify_arguments import Arguments, Refused, communicates, op_name
from cpcompile.passes.verify_index import Shape, shape, tensor_shape
from cpcompile.passes.verify_proof import Failure, Proof
from cpcompile.passes.verify_same_calls import Copies, Original, check_shape
from cpcompile.passes.weight_recipes import Owner

# Op -> which argument is the weight. Sources: native_functions.yaml, torch_npu's schemas.
_WEIGHTS: Mapping[str, str] = {
    **dict.fromkeys(("aten::mm", "aten::_int_mm", "aten::addmm", "aten::_scaled_mm"), "mat2"),
    "npu::npu_quant_matmul": "x2",
}
_BROADCAST = "_c10d_functional::broadcast"


@dataclass(frozen=True)
class Sent:
    """One broadcast that the graph must make: an input of the original, and the rank that has it."""

    node: fx.Node
    owner: int


def expected_broadcasts(
    original: fx.GraphModule, layers: Sequence[Sequence[str]], axis: Axis, recipes: Mapping[str, Any]
) -> list[Sent]:
    """Which graph inputs are broadcast, in order: those that layers' weights are computed from and a recipe spreads.

    Args:
        original: the graph before.
        layers: for each layer the names of its products; layer i's owner is rank ``i % K``.
        axis: the K ranks.
        recipes: graph input → ``Owner``.
    """
    order = {node: index for index, node in enumerate(original.graph.nodes)}
    arguments, found = Arguments(original, axis), dict[fx.Node, int]()
    for number, names in enumerate(layers):
        read: set[fx.Node] = set()
        for node in (n for n in order if n.name in names):
            weight = arguments.arguments(node)[_WEIGHTS[op_name(node.target)]]
            read |= _inputs_of(weight)
        for node in sorted(read, key=order.__getitem__):
            if node.name in recipes:
                found.setdefault(node, number % axis.size)
    return [Sent(node, owner) for node, owner in found.items()]


def prove_layer_sharding(
    original: fx.GraphModule,
    rewritten: fx.GraphModule,
    layers: Sequence[Sequence[str]],
    axis: Axis,
    recipes: Mapping[str, Any],
) -> Proof:
    """Prove that ``rewritten`` computes what ``original`` does, if all ranks' graphs are proven with the same layers.

    Args:
        original: functional ATen graph, ``meta["val"]`` set, the same on all ranks of ``axis``.
        rewritten: this rank's graph that is to replace it.
        layers: for each layer, in the order of the graph, the names of its products in ``original``.
        axis: the ranks that the weights are spread over, seen from this rank.
        recipes: graph input → ``Owner``, or nothing where it stays.
    """
    return _Prover(original, rewritten, layers, axis, recipes).run()


def prove_idle_layers(
    original: fx.GraphModule,
    idle: fx.GraphModule,
    layers: Sequence[Sequence[str]],
    axis: Axis,
    recipes: Mapping[str, Any],
) -> Proof:
    """Prove that ``idle`` takes part in every broadcast, in order, and in nothing else; arguments as above."""
    return _Prover(original, idle, layers, axis, recipes).run(idle=True)


class _Prover:
    def __init__(
        self,
        original: fx.GraphModule,
        rewritten: fx.GraphModule,
        layers: Sequence[Sequence[str]],
        axis: Axis,
        recipes: Mapping[str, Any],
    ) -> None:
        self.gm, self.axis, self.recipes = rewritten, axis, recipes
        self.original = Original(original, axis)
        self.copies = Copies(self.original, rewritten, axis)
        self.expected = expected_broadcasts(original, layers, axis, recipes)
        self.kept: dict[fx.Node, int] = {}
        self.empty: dict[fx.Node, Shape] = {}
        self.started: dict[fx.Node, Sent] = {}
        self.awaited: set[Sent] = set()
        self.facts: dict[str, str] = {}

    def run(self, idle: bool = False) -> Proof:
        failures = list(self._check_recipes())
        for node in self.gm.graph.nodes:
            try:
                if node.op != "output" and not self.copies.arguments.visit_size(node, self._shape):
                    self._visit(node)
            except Refused as refused:
                failures.append(Failure(node.name, f"{node.name}: {refused}"))
        for sent in self.expected[len(self.started) :]:
            failures.append(
                Failure(sent.node.name, f"expected a broadcast of {sent.node} from rank {sent.owner}; found none")
            )
        for sent in (s for s in self.started.values() if s not in self.awaited):
            failures.append(Failure(sent.node.name, f"expected the broadcast of {sent.node} to be awaited; it is not"))
        if idle:
            others = [n for n in self.gm.graph.nodes if communicates(n) and not self._is_ours(n)]
            failures += [Failure(n.name, f"{n.name}: expected broadcasts alone; found {n.target}") for n in others]
        else:
            failures += [Failure(name, message) for name, message in self.copies.check_rest(())]
        return Proof(not failures, tuple(failures), self.facts)

    def _check_recipes(self) -> Sequence[Failure]:
        owners = {sent.node.name: sent.owner for sent in self.expected}
        found = []
        for name, recipe in self.recipes.items():
            if not isinstance(recipe, Owner) or recipe.axis != self.axis or recipe.rank != owners.get(name):
                wanted = f"expected rank {owners.get(name)} of {self.axis.name} to keep {name}"
                found.append(Failure(name, f"{wanted}; found {recipe}"))
        return found

    def _shape(self, node: fx.Node) -> Shape:
        if node not in self.copies.at:
            raise Refused(f"the size of {node} is asked for, which was not proven")
        return shape(self.copies.at[node][1])

    def _visit(self, node: fx.Node) -> None:
        name = op_name(node.target)
        if node.op == "placeholder" and node.name in self.recipes:
            self._input(node)
        elif name == "aten::empty" and all(self._is_broadcast(u) for u in node.users):
            args = self.copies.arguments.arguments(node)
            self.empty[node] = tuple(args["size"])
            check_shape(node, self.empty[node])
        elif self._is_broadcast(node):
            self._broadcast(node)
        elif is_wait(node) and node.all_input_nodes[0] in self.started:
            sent = self.started[node.all_input_nodes[0]]
            self.awaited.add(sent)
            self.copies.take(node, self.original.at[sent.node])
            self.facts[node.name] = f"{sent.node} of rank {sent.owner}"
        else:
            spread = next((n for n in node.all_input_nodes if n in self.kept or n in self.started), None)
            if spread is not None:
                raise Refused(f"expected the awaited broadcast of a weight; found {spread} itself")
            if all(n in self.copies.at or n in self.copies.arguments.sizes for n in node.all_input_nodes):
                self.copies.copy(node)  # else the failure of an operand has been told

    def _input(self, node: fx.Node) -> None:
        theirs = next(n for n in self.original.gm.graph.find_nodes(op="placeholder") if n.target == node.target)
        sizes = tensor_shape(theirs.meta["val"])
        kept = self.recipes[node.name].keeps
        check_shape(node, sizes if kept else (0, *sizes[1:]))
        self.kept[node] = self.original.number(theirs)

    def _is_broadcast(self, node: fx.Node) -> bool:
        return op_name(node.target) == _BROADCAST and self.axis.owns(group_name_of(node))

    def _is_ours(self, node: fx.Node) -> bool:
        return self._is_broadcast(node) or (is_wait(node) and self._is_broadcast(node.all_input_nodes[0]))

    def _broadcast(self, node: fx.Node) -> None:
        if len(self.started) >= len(self.expected):
            raise Refused(f"expected {len(self.expected)} broadcasts; found one more")
        sent = self.expected[len(self.started)]
        args = self.copies.arguments.arguments(node)
        operand, value = args["input"], sent.node.meta["val"]
        self.started[node] = sent
        if args["src"] != sent.owner:
            raise Refused(f"expected the broadcast of {sent.node} from rank {sent.owner}; found src {args['src']}")
        if self.axis.rank == sent.owner:
            if self.kept.get(operand) != self.original.number(sent.node):
                raise Refused(f"expected the broadcast of {sent.node}; found that of {operand}")
        elif self.empty.get(operand) != tensor_shape(value):
            raise Refused(f"expected an empty tensor in the place of {sent.node}; found {operand}")
        made = node.meta.get("val"), operand.meta.get("val")
        if any(not isinstance(v, torch.Tensor) or (v.dtype, v.device) != (value.dtype, value.device) for v in made):
            raise Refused(f"expected {value.dtype} on {value.device}, as {sent.node} is; found another dtype or device")
        check_shape(node, tensor_shape(value))


def _inputs_of(node: fx.Node) -> set[fx.Node]:
    """The graph inputs that ``node`` is computed from."""
    pending, seen = [node], set[fx.Node]()
    while pending:
        part = pending.pop()
        if part not in seen:
            seen.add(part)
            pending += part.all_input_nodes
    return {n for n in seen if n.op == "placeholder"}
