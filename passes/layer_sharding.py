"""Layer sharding: whole weights of one kind of product spread over K ranks by layers, broadcast one layer ahead.

Before: every rank holds the weights of every layer's product (o_proj, say), and multiplies by them.
After: what layer i's weight is computed from (the weight as it is stored, and its scales) lives on rank i % K alone.
All ranks broadcast it: the first one's at the start of the graph, each next one's right after the one before it was
awaited; awaited right before the product. So two layers' weights are in memory at a time. Ranks that do not hold it
send an empty tensor. All ranks issue the same collectives in the same order, also without tokens (``idle_layers``).
The group needs a communicator of its own, as kind ``shared_weight`` of ``cpcompile.mesh`` has: broadcasts run beside
the model's collectives.
Source: vllm-ascend, shared weights of o_proj.
Refuses: a layer whose weight is not computed from graph inputs by views, casts and scaling alone, or is read by others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.passes.base import Refusal
from cpcompile.passes.collectives import NATIVE, fake_value, op_name
from cpcompile.passes.graph_emitter import GraphEmitter
from cpcompile.passes.materialise import fake_mode_of
from cpcompile.passes.module_roles import VIEWS
from cpcompile.passes.products import product_of
from cpcompile.passes.token_layout import shape_of
from cpcompile.passes.weight_recipes import Owner

aten = torch.ops.aten

_ON_THE_WAY = VIEWS | {"aten::mul"}


@dataclass(frozen=True)
class LayerGraph:
    """A graph whose layers' weights are spread over ranks.

    Args:
        gm: the graph. On ranks that drop an input, the input has no rows.
        recipes: graph input → who keeps it; inputs that are not here stay as they are.
        refused: the layers that were left alone, by their first product, with reasons.
    """

    gm: fx.GraphModule
    recipes: Mapping[str, Owner]
    refused: tuple[Refusal, ...]


@dataclass(frozen=True)
class _Layer:
    """One layer: its products, what their weights are computed by, from which inputs, and which rank has these."""

    products: tuple[fx.Node, ...]
    chain: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    owner: int


class _Refused(Exception):
    """Why a layer is left alone, in one line."""


def shard_layers(gm: fx.GraphModule, layers: Sequence[Sequence[str]], axis: Axis) -> LayerGraph:
    """Return a new graph in which the weights of ``layers`` are spread over ``axis``; ``gm`` is left as it is.

    Args:
        gm: functional ATen graph.
        layers: for each layer, in the order of the graph, the names of its products. Layer i's rank is ``i % K``.
        axis: the K ranks, over a communicator that nothing else uses. All hold the same weights.
    """
    found, refused = _find(gm, layers, axis)
    return LayerGraph(_Builder(gm, found, axis).run(), _recipes(found, axis), refused)


def idle_layers(gm: fx.GraphModule, layers: Sequence[Sequence[str]], axis: Axis) -> fx.GraphModule:
    """What a rank without tokens runs while others run :func:`shard_layers`' graph: the broadcasts alone.

    Its inputs are those that the recipes of :func:`shard_layers` name, by their names in ``gm``; it returns nothing.
    """
    found, _ = _find(gm, layers, axis)
    return _Builder(gm, found, axis).run_idle()


def _find(gm: fx.GraphModule, layers: Sequence[Sequence[str]], axis: Axis) -> tuple[list[_Layer], tuple[Refusal, ...]]:
    nodes, order = {n.name: n for n in gm.graph.nodes}, {n: i for i, n in enumerate(gm.graph.nodes)}
    found: list[_Layer] = []
    refused: list[Refusal] = []
    for number, names in enumerate(layers):
        products = tuple(nodes[name] for name in names)
        try:
            found.append(_layer(products, order, number % axis.size))
        except _Refused as reason:
            refused.append(Refusal(names[0], str(reason)))
    firsts = [min(order[p] for p in layer.products) for layer in found]
    assert firsts == sorted(firsts), "layers are given in the order of the graph"
    return found, tuple(refused)


def _layer(products: tuple[fx.Node, ...], order: Mapping[fx.Node, int], owner: int) -> _Layer:
    chain: set[fx.Node] = set()
    inputs: set[fx.Node] = set()
    for node in products:
        p = product_of(node)
        if p is None:
            raise _Refused(f"{op_name(node.target) or node.op} is not known as a product of rows and a weight")
        pending = [p.weight]
        while pending:
            part = pending.pop()
            _check_weight(part)
            (inputs if part.op == "placeholder" else chain).add(part)
            pending += part.all_input_nodes
    for part in (*inputs, *chain):
        other = next((u for u in part.users if u not in chain and u not in products), None)
        if other is not None:
            raise _Refused(f"{part} is also read by {other}, which would need it on every rank")
    return _Layer(
        products, tuple(sorted(chain, key=order.__getitem__)), tuple(sorted(inputs, key=order.__getitem__)), owner
    )


def _check_weight(node: fx.Node) -> None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or any(not size.is_number for size in shape_of(value)):
        raise _Refused(f"{node} is no tensor of a fixed size, as weights are")
    if node.op != "placeholder" and op_name(node.target) not in _ON_THE_WAY:
        raise _Refused(f"its weight comes through {node} ({op_name(node.target) or node.op})")
    if node.op == "placeholder" and not value.dim():
        raise _Refused(f"its weight is scaled by the single number {node}, which has no rows to drop")


def _recipes(layers: Sequence[_Layer], axis: Axis) -> dict[str, Owner]:
    return {node.name: Owner(layer.owner, axis) for layer in layers for node in layer.inputs}


class _Builder:
    """Builds the new graph; ``env`` holds the copy of every node, for a spread input what was broadcast of it."""

    def __init__(self, gm: fx.GraphModule, layers: Sequence[_Layer], axis: Axis) -> None:
        self.gm, self.layers, self.axis, self.new = gm, layers, axis, fx.Graph()
        self.emitter = GraphEmitter(self.new, fake_mode_of(gm), {})
        self.env: dict[fx.Node, fx.Node] = {}
        self.layer_of = {p: layer for layer in layers for p in layer.products}
        self.spread = {n: layer.owner for layer in layers for n in layer.inputs}
        self.chained = {n for layer in layers for n in layer.chain}
        self.started: dict[fx.Node, fx.Node] = {}
        self.awaited = 0

    def run(self) -> fx.GraphModule:
        begun = False
        for node in self.gm.graph.nodes:
            if node.op != "placeholder" and not begun:
                begun = True
                self._start(0)
            if node in self.chained:
                continue
            if node in self.layer_of:
                while self.awaited <= self.layers.index(self.layer_of[node]):
                    self._await(self.awaited)
            self._copy(node)
        return self._made()

    def run_idle(self) -> fx.GraphModule:
        for node in self.gm.graph.find_nodes(op="placeholder"):
            if node in self.spread:
                self._copy(node)
        self._start(0)
        for index in range(len(self.layers)):
            self._await(index)
        self.new.output(())
        return self._made()

    def _made(self) -> fx.GraphModule:
        self.new.lint()
        built = fx.GraphModule(self.gm, self.new)
        built.meta.update(self.gm.meta)
        return built

    def _copy(self, node: fx.Node) -> None:
        copy = self.new.node_copy(node, self.env.__getitem__)
        copy.meta = dict(node.meta)
        if node in self.spread:
            value = node.meta["val"]
            kept = self.axis.rank == self.spread[node]
            shape = shape_of(value)
            copy.meta["val"] = self.emitter.fake(shape if kept else (0 * shape[0], *shape[1:]), value)
        self.env[node] = copy

    def _start(self, index: int) -> None:
        """Start the broadcasts of layer ``index``, if there is one."""
        if index >= len(self.layers):
            return
        layer = self.layers[index]
        self._describe(layer)
        for node in layer.inputs:
            value, shape = node.meta["val"], shape_of(node.meta["val"])
            operand = self.env[node]
            if self.axis.rank != layer.owner:
                options = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
                sizes = [int(s) for s in shape]
                operand = self.emitter.call(aten.empty.memory_format, (sizes,), value, shape, None, **options)
            args = (operand, layer.owner, self.axis.group_name)
            self.started[node] = self.emitter.call(NATIVE.broadcast.default, args, value, shape)

    def _await(self, index: int) -> None:
        """Await the broadcasts of layer ``index``, start the next ones, and compute its weights."""
        layer = self.layers[index]
        self._describe(layer)
        for node in layer.inputs:
            value = node.meta["val"]
            self.env[node] = self.emitter.call(
                NATIVE.wait_tensor.default, (self.started.pop(node),), value, shape_of(value)
            )
        self.awaited = index + 1
        self._start(index + 1)
        for node in layer.chain:
            copy = self.new.node_copy(node, self.env.__getitem__)
            copy.meta = {**node.meta, "val": fake_value(copy, copy)}
            self.env[node] = copy

    def _describe(self, layer: _Layer) -> None:
        meta = layer.products[0].meta
        self.emitter.meta = {k: meta[k] for k in ("nn_module_stack", "stack_trace") if k in meta}
