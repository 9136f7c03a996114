"""Piecewise compilation of vLLM (mode VLLM_COMPILE): what every rank is known to hold of the values between pieces.

vLLM cuts a model at its attention ops and lets inductor compile what lies between. The pass sees one piece at a time,
without weights. Hooks around vLLM's backend tell it the rest: weights are compared over the ranks once, and what one
piece was shown to return alike on every rank goes into the next, unless an op between them, which holds caches and may
write, was given it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.fx as fx
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass

from cpcompile.axes import axis_of
from cpcompile.backend import exchange_for
from cpcompile.graph_inputs import describe_inputs, unique_names
from cpcompile.options import Options
from cpcompile.passes.base import PassResult
from cpcompile.passes.vllm_ops import count_rows_of_what_is_read
from cpcompile.replication import input_facts
from cpcompile.serving.post_grad import Piece, PostGradPass
from cpcompile.serving.vllm_entry import Entry, tensor_parallel_axes


class PiecePass(PostGradPass, VllmInductorPass):  # type: ignore[misc]
    """The pass as vLLM's pass manager takes it: over vLLM's tensor-parallel group."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        """Check the options."""
        super().__init__(options)
        self.model: Model | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process starts anew."""
        return {**super().__getstate__(), "model": None}

    def axes(self) -> dict[str, Any]:
        """The tensor-parallel group of this rank."""
        return {} if self.model is None else self.model.axes

    def of_this_start(self) -> str:
        """A word that no other start has; none yet where vLLM makes a key of its configuration."""
        return "" if self.model is None else super().of_this_start()

    def __call__(self, graph: fx.Graph | fx.GraphModule) -> None:
        """Rewrite one piece, of which vllm-ascend gives the module."""
        Entry.calls += 1
        super().__call__(graph.graph if isinstance(graph, fx.GraphModule) else graph)


@dataclass
class Model:
    """What is known of one model while its pieces are compiled.

    Args:
        axes: mesh axis → process group.
        names: name of a graph input in the model, by dynamo's name.
        same: dynamo's names of the graph inputs that are the same on every rank.
        found: whether each value that a piece returned is the same on every rank, by the piece's name.
        told: the same by the compiled code, of which there is one for pieces that are alike.
    """

    axes: dict[str, Any]
    names: dict[str, str] = field(default_factory=dict)
    same: set[str] = field(default_factory=set)
    found: dict[str, tuple[bool, ...]] = field(default_factory=dict)
    told: dict[int, tuple[bool, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, vllm_config: Any, graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options) -> Model:
        """Compare the inputs of the whole model over the ranks. Costs one exchange for each axis."""
        model = cls(tensor_parallel_axes(vllm_config))
        inputs = describe_inputs(graph, example_inputs)
        names, values, kinds = unique_names(inputs), [i.value for i in inputs], [i.kind for i in inputs]
        targets = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
        if len(targets) != len(inputs):
            return model
        model.names = dict(zip(targets, names, strict=True))
        for name, group in model.axes.items():
            axis = axis_of(name, group)
            facts = input_facts(
                names, values, kinds, axis, exchange_for(axis, options.timeout_s), declared=options.replicated
            )
            model.same = {target for target, fact in zip(targets, facts, strict=True) if fact.replicated}
        return model

    def piece(self, split: fx.GraphModule, name: str) -> Piece:
        """The piece that ``split``, the model as vLLM cut it, calls ``name``."""
        (call,) = (n for n in split.graph.nodes if n.op == "call_module" and n.target == name)
        named = [self._named(value) for value in call.args]
        written = set(self._given_to_others(split, call))
        same = [known and value not in written for value, (_, known) in zip(call.args, named, strict=True)]
        return Piece([name for name, _ in named], same)

    def _named(self, value: Any) -> tuple[str, bool]:
        if not isinstance(value, fx.Node):
            return str(value), False
        if value.op == "placeholder":
            return self.names.get(str(value.target), value.name), str(value.target) in self.same
        source = value.args[0] if value.op == "call_function" else None
        if not isinstance(source, fx.Node) or source.op != "call_module":
            return value.name, False
        index: Any = value.args[1]
        return f"{source.target}.{index}", any(self.found.get(str(source.target), ())[index : index + 1])

    def _given_to_others(self, split: fx.GraphModule, until: fx.Node) -> Iterator[fx.Node]:
        """Values that were given to what is not compiled, before ``until`` runs: it may have written to them."""
        for node in split.graph.nodes:
            if node is until:
                return
            if node.op == "call_module" and str(node.target) not in self.found:
                yield from node.all_input_nodes


def pass_of(config: Any) -> PiecePass | None:
    """Our pass in vLLM's compilation configuration, if it is there."""
    return next((each for each in config.inductor_compile_config.values() if isinstance(each, PiecePass)), None)


def whole_model(original: Callable[..., Any], backend: Any, graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
    """Around ``VllmBackend.__call__``."""
    ours = pass_of(backend.compilation_config)
    if ours is None:
        return original(backend, graph, inputs)
    # Before vLLM cuts at this op: what it reads no data of need not leave a piece, which hands over whole values.
    result = PassResult()
    count_rows_of_what_is_read(graph.graph, result)
    result.finish(graph)
    ours.model = Model.of(backend.vllm_config, graph, inputs, Options.parse(ours.options))
    try:
        return original(backend, graph, inputs)
    finally:
        ours.model = None


def one_piece(original: Callable[..., Any], piece: Any, graph: Any, config: Any, *args: Any, **kwargs: Any) -> None:
    """Around ``PiecewiseBackend.__init__``, which compiles a piece for all ranges of token counts."""
    ours = pass_of(config.compilation_config)
    if ours is None or ours.model is None or graph is None:
        original(piece, graph, config, *args, **kwargs)
        return
    name, backend = kwargs["submod_name"], args[3]
    ours.piece = ours.model.piece(backend.split_gm, name)
    try:
        ours.model.found[name] = ()
        original(piece, graph, config, *args, **kwargs)
    finally:
        ours.piece = None
    told = [ours.model.told.get(id(entry.runnable), ()) for entry in piece.range_entries.values()]
    if len({len(found) for found in told}) == 1:
        ours.model.found[name] = tuple(map(all, zip(*told, strict=True)))


def one_range(original: Callable[..., Any], manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Around ``CompilerManager.compile``: one piece for one range. A piece like an earlier one gets that one's code."""
    ours = pass_of(manager.compilation_config)
    if ours is None or ours.piece is None or ours.model is None:
        return original(manager, *args, **kwargs)
    ours.piece.last, ours.piece.found = kwargs["compile_range"].end, ()
    compiled = original(manager, *args, **kwargs)
    ours.model.told.setdefault(id(compiled), ours.piece.found)
    return compiled
