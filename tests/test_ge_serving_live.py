"""The serving form end to end: every rank's GE graph over paged caches, interpreted, step by step, equals the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import serving_models
import torch
import torch.fx as fx
from ascend_process import AscendProcess
from serving_models import Serving, Sizes, batch, feed, mutated
from simulate import fake_rank
from torch import Tensor

from cpcompile.capture import Trace, capture
from cpcompile.lowering.ge import GeGraph, GeProgram, interpret, load

RANKS, BLOCKS, TOLERANCE = 2, 60, 2e-5
SIZES = Sizes()
# New tokens of three requests, and how many each has cached: odd and even numbers of rows, and fewer than ranks.
STEPS = [([5, 1, 4], [0, 0, 0]), ([1, 6, 2], [5, 1, 4]), ([1, 0, 0], [6, 7, 6]), ([3, 1, 3], [7, 7, 6])]


def traced(layer: str) -> tuple[Trace, Serving]:
    model = Serving(SIZES, torch.float32, getattr(serving_models, layer))
    return capture(model, *batch([5, 1, 4], [0, 3, 2], BLOCKS, SIZES), *model.caches(BLOCKS)), model


def export_serving(out: Path, layer: str) -> list[Any]:
    """Write every rank's graph; returns the names of the trace's inputs, and each rank's ops by type."""
    from cpcompile.exchange import OfflineExchange
    from cpcompile.lowering.ascend.export import export
    from cpcompile.lowering.targets import Settings
    from cpcompile.options import Options
    from cpcompile.pipeline import compile_graph, copy_graph

    (trace, _), found = traced(layer), []
    for rank in range(RANKS):
        with fake_rank(rank, RANKS) as mesh, torch.no_grad():
            gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
            options = {"strategy": "cp", "profile": "ascend-a3", "replicated": ["*"], "axes": {"cp": mesh["tp"]}}
            compiled = compile_graph(
                gm, trace.inputs, Options.parse(options), lambda a: OfflineExchange(a.size, a.rank)
            )
            summary, unsupported = export(compiled.variants[-1].gm, out / f"rank_{rank}", Settings())
            assert not unsupported
            found.append(dict(summary.ops))
    return [[node.name for node in trace.gm.graph.find_nodes(op="placeholder")], *found]


@pytest.mark.parametrize("layer", ["Layer", "PutLayer"])
def test_steps_over_paged_caches_are_the_models(ascend: AscendProcess, tmp_path: Path, layer: str) -> None:
    names, *ops = ascend(export_serving, tmp_path, layer)
    assert all(each["ScatterNdUpdate"] == 6 for each in ops)
    graphs = [load(tmp_path / f"rank_{rank}/model.pb") for rank in range(RANKS)]
    trace, model = traced(layer)
    expected = model.caches(BLOCKS)
    caches = [[cache.clone() for cache in expected] for _ in range(RANKS)]
    for lengths, prefixes in STEPS:
        given = batch(lengths, prefixes, BLOCKS, SIZES, seed=sum(prefixes))
        with torch.no_grad():
            logits = model(*given, *expected)
        caches = step(graphs, names, trace, given, caches, logits)
        for own in caches:
            for cache, wanted in zip(own, expected, strict=True):
                torch.testing.assert_close(cache, wanted, rtol=0, atol=TOLERANCE)


def step(
    graphs: list[GeGraph], names: list[str], trace: Trace, given: Any, caches: list[list[Tensor]], logits: Tensor
) -> list[list[Tensor]]:
    """Run every rank, compare its logits, and return its caches; those that it was given it must not have written."""
    before = [[cache.clone() for cache in own] for own in caches]
    inputs = [dict(zip(names, feed(trace, given, own), strict=True)) for own in caches]
    programs = [
        GeProgram(graph, {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()})
        for graph, values in zip(graphs, inputs, strict=True)
    ]
    order, found = mutated(trace), []
    for *written, out in interpret(programs):
        torch.testing.assert_close(out, logits, rtol=0, atol=TOLERANCE)
        found.append([written[order.index(number)] for number in range(len(order))])
    assert all(
        torch.equal(a, b) for old, own in zip(before, caches, strict=True) for a, b in zip(old, own, strict=True)
    )
    return found
