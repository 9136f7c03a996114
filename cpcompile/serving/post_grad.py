"""The passes as inductor's ``post_grad_custom_post_pass``: on the graph that inductor is about to lower, in place."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import json
import logging
import operator
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.fx_utils import FakeTensorUpdater
from torch._inductor.virtualized import V
from torch._ops import HigherOrderOperator, OpOverload

from cpcompile.axes import Axis, find_axes
from cpcompile.backend import exchange_for, tell
from cpcompile.exchange import Exchange
from cpcompile.graph_inputs import GraphInput
from cpcompile.options import Options
from cpcompile.passes.collectives import op_name
from cpcompile.pipeline import compile_graph, copy_graph
from cpcompile.replication import structure_fingerprint
from cpcompile.serving.settings import NAME, identity

log = logging.getLogger("cpcompile")
aten = torch.ops.aten
_SUMMAND = "cpcompile_summand"  # in the meta of a placeholder: the value that it stands for
_SOMETIMES_VIEWS = (aten.reshape.default, aten._unsafe_view.default)


@dataclass
class Piece:
    """One piece of a model that inductor compiles on its own.

    Args:
        names: its inputs in order.
        same: whether every rank is known to hold the same value of each input.
        last: the most tokens that it will run with, None where that is not known.
        found: filled in by the pass: whether each returned value is the same on every rank; empty: nothing is known.
    """

    names: Sequence[str]
    same: Sequence[bool]
    last: int | None = None
    found: tuple[bool, ...] = ()


class PostGradPass(CustomGraphPass):
    """Rewrite the collectives of one post-grad graph, or leave it as it is and say why.

    ``torch.compile(model, options={"post_grad_custom_post_pass": PostGradPass({"axes": {"tp": group}})})``; under vLLM
    the plugin makes it. Whatever enters or leaves the graph is whole. Inputs count as the same on every rank where
    ``piece`` says so; without one, where they are integers or match ``options["replicated"]``.

    Every rank must come here with the same graphs in the same order, so what was compiled at another start is never
    taken from a cache: the key has a part that is this object's own.

    Args:
        options: see :class:`cpcompile.options.Options`.
    """

    name = NAME

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """Check the options.

        Raises:
            OptionError: an option is unknown or malformed.
        """
        self.options = dict(options or {})
        Options.parse(self.options)
        self.piece: Piece | None = None
        self.start = ""

    def __getstate__(self) -> dict[str, Any]:
        """Another process starts anew."""
        return {**self.__dict__, "piece": None, "start": ""}

    def axes(self) -> dict[str, Any]:
        """Mesh axis name → its process group."""
        return dict(self.options.get("axes", {}))

    def uuid(self) -> str:
        """What the compiled code depends on besides the graph: options, versions, the plan, facts, and this start."""
        options = {name: value for name, value in self.options.items() if name != "axes"}
        piece = () if self.piece is None else (tuple(self.piece.same), self.piece.last)
        groups = [(name, axis.ranks, axis.rank) for name, axis in self._axes().items()]
        parts = [options, identity(options), piece, groups, self.of_this_start()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def of_this_start(self) -> str:
        """A word that no other start has."""
        self.start = self.start or uuid.uuid4().hex
        return self.start

    def _axes(self) -> dict[str, Axis]:
        return {axis.name: axis for axis in find_axes((), self.axes())}

    def __call__(self, graph: fx.Graph) -> None:
        """Rewrite ``graph`` in place.

        Raises:
            OptionError, AxisError, PlanError, RequirementError: as the backend does.
        """
        gm = graph.owning_module
        assert gm is not None
        if not any(map(_is_all_reduce, graph.nodes)):
            return None
        options = Options.parse({**self.options, "axes": self.axes()})
        exchanges = [exchange_for(axis, options.timeout_s) for axis in self._axes().values()]
        work, summands = fx.GraphModule(gm, copy_graph(graph)), []
        if not _is_the_same(work, exchanges):
            summands = cut_summands(work)
            if not _is_the_same(work, exchanges):
                return log.warning("cpcompile: a piece is left alone: its operations differ between ranks")
        inputs, replicated = self._inputs(work)
        options = dataclasses.replace(options, replicated=(*options.replicated, *replicated))
        compiled = compile_graph(work, inputs, options, lambda axis: exchange_for(axis, options.timeout_s))
        tell(compiled, options)
        last = None if self.piece is None else self.piece.last
        variant = compiled.variants[-1] if last is None else compiled.at(last)
        if self.piece is not None:
            self.piece.found = _same_outputs(variant.gm, variant.same) if variant.steps else ()
        if variant.gm is not compiled.original:
            _replace(graph, variant.gm, summands)
        return None

    def _inputs(self, work: fx.GraphModule) -> tuple[list[GraphInput], list[str]]:
        """What is known of the inputs, and patterns of those that are the same on every rank."""
        nodes, piece = work.graph.find_nodes(op="placeholder"), self.piece
        given = [n for n in nodes if _SUMMAND not in n.meta]
        if piece is not None and len(piece.names) != len(given):
            log.warning("cpcompile: %d inputs of a piece became %d: none is known", len(piece.names), len(given))
            piece = Piece([n.name for n in given], [False] * len(given))
        names = dict(zip(given, [n.name for n in given] if piece is None else piece.names, strict=True))
        inputs = [
            GraphInput(names.get(n, n.name), n.meta.get("val"), "input" if piece is None and n in names else "other")
            for n in nodes
        ]
        same = () if piece is None else zip(piece.names, piece.same, strict=True)
        return inputs, [glob.escape(name) for name, is_same in same if is_same]


def _is_the_same(gm: fx.GraphModule, exchanges: Sequence[Exchange]) -> bool:
    """Whether every rank has this graph, constants aside."""
    mine = structure_fingerprint(gm)
    told = [exchange.all_gather(mine, "fingerprint of a piece") for exchange in exchanges]
    return all(theirs == mine for of_axis in told for theirs in of_axis)


def cut_summands(gm: fx.GraphModule) -> list[str]:
    """Make what the first all-reduces add up an input of ``gm``, in place, and return the names of these values.

    A vocabulary shard is looked up by constants of its rank, and inductor folds those: its steps differ from rank to
    rank. They end in a summand, of which only the sum matters. Nothing is cut where an op has effects.
    """
    if any(_has_effects(node) for node in gm.graph.nodes):
        return []
    cut: list[str] = []
    behind: set[fx.Node] = set()
    last = gm.graph.find_nodes(op="placeholder")[-1]
    for node in list(gm.graph.nodes):
        if _is_all_reduce(node) and not behind.intersection(node.all_input_nodes):
            (value,) = node.all_input_nodes
            with gm.graph.inserting_after(last):
                last = gm.graph.placeholder(f"summand_{len(cut)}")
            last.meta = {"val": value.meta["val"], _SUMMAND: value.name}
            node.replace_input_with(value, last)
            cut.append(value.name)
        if _is_all_reduce(node) or behind.intersection(node.all_input_nodes):
            behind.add(node)
    for node in reversed(list(gm.graph.nodes)):
        if node.op == "call_function" and not node.users:
            gm.graph.erase_node(node)
    for number, node in enumerate(gm.graph.nodes):  # a plan names nodes, and the ranks compare their plans
        if node.op == "call_function":
            node._rename(f"step_{number}")
    gm.recompile()
    return cut


def _is_all_reduce(node: fx.Node) -> bool:
    return op_name(node.target).endswith("::all_reduce")


def _has_effects(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, HigherOrderOperator) or (isinstance(target, OpOverload) and target._schema.is_mutable)


def _same_outputs(gm: fx.GraphModule, same: frozenset[str]) -> tuple[bool, ...]:
    """Whether each output is the same on every rank, and no other output lies in its memory."""
    outputs: Any = gm.graph.output_node().args[0]
    memories = [_memory(node) if isinstance(node, fx.Node) else None for node in outputs]
    return tuple(
        memory is not None and memory.op == "call_function" and memories.count(memory) == 1 and node.name in same
        for node, memory in zip(outputs, memories, strict=True)
    )


def _memory(node: fx.Node) -> fx.Node:
    """The node that may have allocated the memory of ``node``."""
    while isinstance(node.target, OpOverload) or node.target is operator.getitem:
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or not (_may_view(node) or _may_view(source)):
            break
        node = source
    return node


def _may_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and (target.is_view or target in _SOMETIMES_VIEWS or "split" in str(target))


def _replace(graph: fx.Graph, new: fx.GraphModule, summands: Sequence[str]) -> None:
    """Give ``graph`` the nodes of ``new`` between its own placeholders and its own output; ``summands`` stay."""
    assert graph.owning_module is not None
    updater = FakeTensorUpdater(graph.owning_module)
    output, old = graph.output_node(), [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    named = {n.name: n for n in graph.nodes}
    known = {n: named[n.meta.get(_SUMMAND, n.name)] for n in new.graph.find_nodes(op="placeholder")}
    with graph.inserting_before(output):
        results = graph.graph_copy(new.graph, dict(known))
    output.args = (results,)
    for node in reversed(old):
        if not node.users or not summands:
            graph.erase_node(node)
    graph.lint()
    # The rewritten graph's example values may be one object for several nodes: vLLM and inductor tell nodes by them.
    examples = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    with V.set_fake_mode(detect_fake_mode(examples)):  # inductor sets it as well, other compilers do not
        updater.incremental_update()
