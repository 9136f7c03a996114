"""One random module through the pipeline on all ranks, and what became of it, judged by an interpreter of its own."""

from __future__ import annotations

import random
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import Tensor

from cpcompile.compiled import Compiled
from cpcompile.errors import AxisError
from cpcompile.graph_inputs import GraphInput
from cpcompile.options import Options
from cpcompile.pipeline import compile_graph, copy_graph
from fuzzing.interpreter import Stuck, difference, run_world
from fuzzing.programs import VOCAB, Sample
from fuzzing.recorder import Input
from fuzzing.worlds import AXIS, on_every_rank

ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default
SHARED = ("ids", "table", "shared_0", "shared_1", "gain", "order")
KINDS = {"ids": "input", "order": "input", "own_rows": "input", "own_int": "other"}


@dataclass
class Trial:
    """What became of a module.

    Args:
        sample: the module.
        outcome: ``"rewritten"``, ``"left alone"``, ``"refused rightly"``, ``"refused falsely"``, or a fault:
            ``"wrong numbers"``, ``"raised"``. ``"does not run"`` is the module's own fault.
        detail: one line, or a traceback.
        compiled: every rank's outcome.
    """

    sample: Sample
    outcome: str
    detail: str = ""
    compiled: Sequence[Compiled] = field(default_factory=tuple)


FAULTS = ("wrong numbers", "raised")


def weights(sample: Sample) -> list[dict[str, Tensor]]:
    """Every rank's parameters."""
    found: list[dict[str, Tensor]] = [{} for _ in range(sample.world.size)]
    for index, given in enumerate(sample.inputs):
        if given.shape is None or KINDS.get(given.name) == "input":
            continue
        for rank in range(sample.world.size):
            seed = 1000 * index + (0 if given.name in SHARED else rank + 1)
            generator = torch.Generator().manual_seed(seed)
            found[rank][given.name] = torch.randn(given.shape, dtype=given.dtype, generator=generator)  # type: ignore[arg-type]
    return found


def compile_sample(sample: Sample, **options: Any) -> list[Any]:
    """What the pipeline gives or raises on every rank."""
    parameters = weights(sample)

    def work(rank: int, exchange_for: Any) -> Compiled:
        gm = fx.GraphModule(sample.graphs[rank], copy_graph(sample.graphs[rank].graph))
        given = [_graph_input(node, sample, parameters[rank], rank) for node in gm.graph.find_nodes(op="placeholder")]
        axes = {} if sample.default_axes else {AXIS: AXIS}
        return compile_graph(gm, given, Options.parse({"axes": axes, **options}), exchange_for)

    return on_every_rank(sample.world, work)


def _graph_input(node: fx.Node, sample: Sample, parameters: dict[str, Tensor], rank: int) -> GraphInput:
    name = str(node.target)
    if name in parameters:
        return GraphInput(name, parameters[name], "parameter")
    value = own_int(rank) if name == "own_int" else node.meta["val"]
    return GraphInput(name, value, "input" if isinstance(value, Tensor) else "other")


def own_int(rank: int) -> int:
    """The integer that ``rank`` is called with."""
    return 2 + rank


def counts_of(sample: Sample) -> list[int]:
    """Token counts to run at: fewer than, as many as, and more than ranks, where they are symbolic."""
    n = sample.world.width(AXIS)
    dynamic = any("T" in (i.shape or ()) for i in sample.inputs)
    return sorted({max(2, n - 1), n + 1, 2 * n + 3} if n > 2 else {2, 5}) if dynamic else [0]


def call_inputs(sample: Sample, gm: fx.GraphModule, tokens: int, seed: int = 0) -> list[list[Any]]:
    """Every rank's inputs of a step of ``tokens`` tokens, in the order of ``gm``'s placeholders."""
    parameters = weights(sample)
    sizes = {"T": tokens, "B": 3}
    by_name = {i.name: i for i in sample.inputs}
    names = [str(n.target) for n in gm.graph.find_nodes(op="placeholder")]
    return [
        [
            sizes[name] if name in sizes and name not in by_name
            else parameters[rank][name] if name in parameters[rank]
            else own_int(rank) if name == "own_int"
            else _activation(by_name[name], sizes, seed if name in SHARED else seed + 17 * (rank + 1))
            for name in names
        ]
        for rank in range(sample.world.size)
    ]  # fmt: skip


def _activation(given: Input, sizes: dict[str, int], seed: int) -> Tensor:
    assert given.shape is not None
    shape = [sizes[s] if isinstance(s, str) else s for s in given.shape]
    generator = torch.Generator().manual_seed(seed)
    if given.name == "order":
        return torch.randperm(shape[0], generator=generator)
    if given.dtype == torch.int64:
        return torch.randint(VOCAB, shape, generator=generator)
    return torch.randn(shape, dtype=given.dtype, generator=generator)


def compare(sample: Sample, graphs_at: Any, counts: Sequence[int] | None = None) -> str:
    """How ``graphs_at(tokens)``, every rank's graph, differ from the sample's; empty if they do not.

    Raises:
        Stuck: the sample itself does not run.
    """
    for tokens in counts or counts_of(sample):
        inputs = call_inputs(sample, sample.graphs[0], tokens)
        wanted = run_world(sample.world, sample.graphs, inputs)
        try:
            told = difference(wanted, run_world(sample.world, graphs_at(tokens), inputs))
        except Stuck as stuck:
            told = str(stuck)
        if told:
            return f"T={tokens}: {told}"
    return ""


def tokens_of(sample: Sample, tokens: int, compiled: Compiled) -> int:
    """The count by which a call picks its variant: of merged rows, where the plan counts those."""
    expr = compiled.tokens
    if expr is None or expr.is_number:
        return int(expr) if expr is not None else tokens
    return int(expr.subs({s: 3 if "B" in str(s) else tokens for s in expr.free_symbols}))


def attempt(sample: Sample, **options: Any) -> Trial:
    """Put ``sample`` through the pipeline."""
    try:
        return _attempt(sample, **options)
    except Stuck as stuck:
        return Trial(sample, "does not run", str(stuck))


def _attempt(sample: Sample, **options: Any) -> Trial:
    compiled = compile_sample(sample, **options)
    raised = [c for c in compiled if isinstance(c, BaseException)]
    if raised:
        first = next((c for c in raised if type(c).__name__ != "RankLeft"), raised[0])
        if isinstance(first, AxisError) and not _reduces_over_axis(sample):
            return Trial(sample, "left alone", "the axis is given and nothing is reduced over it")
        return Trial(sample, "raised", "".join(traceback.format_exception(first)))
    told = compare(sample, lambda tokens: [c.at(tokens_of(sample, tokens, c)).gm for c in compiled])
    if told:
        return Trial(sample, "wrong numbers", told, compiled)
    if any(changed(c) for c in compiled):
        return Trial(sample, "rewritten", "", compiled)
    crashed = [r for c in compiled for r in c.refused.values() if "Error:" in r]
    failed = [f for c in compiled for p in c.proofs if not p["holds"] for f in p["failures"]]
    if failed:
        return _judge_refusal(sample, failed[0], **options)
    return Trial(
        sample, "raised" if crashed else "left alone", (crashed or [*compiled[0].refused.values(), ""])[0], compiled
    )


def _reduces_over_axis(sample: Sample) -> bool:
    """Whether some rank has an all-reduce over the ranks of the axis."""
    ranks = sample.world.groups[AXIS]
    over = {name for name, blocks in sample.world.groups.items() if set(blocks) & set(ranks)}
    return any(
        n.args[2] in over for gm in sample.graphs for n in gm.graph.find_nodes(op="call_function", target=ALL_REDUCE)
    )


def changed(compiled: Compiled) -> bool:
    """Whether some variant's graph is another one."""
    return any(not s.interval.unchanged for v in compiled.variants for s in v.steps)


def _judge_refusal(sample: Sample, reason: str, **options: Any) -> Trial:
    """Was the proof right? Without it the numbers say."""
    compiled = compile_sample(sample, **{**options, "verify": "off"})
    if any(isinstance(c, BaseException) for c in compiled):
        return Trial(sample, "refused rightly", f"{reason} (without the proof it raises)")
    told = compare(sample, lambda tokens: [c.at(tokens_of(sample, tokens, c)).gm for c in compiled])
    return Trial(sample, "refused rightly" if told else "refused falsely", f"{reason} {told}", compiled)


def fresh_seed() -> int:
    """A seed that nobody has used."""
    return random.SystemRandom().randrange(2**32)
