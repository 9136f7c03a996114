"""Layers' weights spread over ranks: the model's answer on every rank, idle ones too, and what is in memory when."""

from __future__ import annotations

import pytest
import torch
from flash import carried_out, close, projections
from shared_modules import ids_of, model, trace_of
from simulate import real_inputs

from cpcompile.axes import Axis
from cpcompile.passes.layer_sharding import idle_layers, shard_layers
from cpcompile.passes.lockstep import RankProgram, run_lockstep

LAYERS = 5


def axis_of(size, rank):
    return Axis("shared_weight", "shared weights", size, rank, tuple(range(size)))


def run(kind, counts):
    trace = trace_of(kind, LAYERS)
    layers = [[name] for name in projections(trace.gm)]
    names = [n.name for n in trace.gm.graph.find_nodes(op="placeholder")]
    graphs = [shard_layers(trace.gm, layers, axis_of(len(counts), r)) for r in range(len(counts))]
    assert not graphs[0].refused
    named = carried_out(
        [dict(zip(names, real_inputs(trace, ids_of(t)), strict=True)) for t in counts], [g.recipes for g in graphs]
    )
    programs = []
    for rank, tokens in enumerate(counts):
        axis = axis_of(len(counts), rank)
        gm = graphs[rank].gm if tokens else idle_layers(trace.gm, layers, axis)
        values = [named[rank][n.name] for n in gm.graph.find_nodes(op="placeholder")]
        programs.append(RankProgram(gm, values, {axis.group_name: axis.ranks}))
    return run_lockstep(programs)


@pytest.mark.parametrize("counts", [[3, 4], [5, 0, 7], [0, 1, 2, 9]])
def test_every_rank_equals_the_model(counts):
    for tokens, found in zip(counts, run("v3", counts), strict=True):
        if tokens:
            with torch.no_grad():
                close(found[0], model("v3", LAYERS)(input_ids=ids_of(tokens), use_cache=False).logits, tokens)
