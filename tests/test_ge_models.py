"""Whole models: GE graphs that torchair made, interpreted on all ranks, against the unsharded eager model; and faults.

``data/ge`` has the graphs of two ranks of three-layer V3 and V3.2 models, tensor-parallel and rewritten, as torchair
wrote them once: they are what faults are seeded in. ``test_ge_live.py`` exports graphs anew.
"""

from __future__ import annotations

import copy
import functools
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from ge_build import attr
from ge_exports import model_of
from simulate import fake_rank
from torch import Tensor
from torch.distributed.tensor import DTensor

from cpcompile.lowering.ge import GeError, GeGraph, GeProgram, interpret, parse
from cpcompile.passes.lockstep import LockstepError

HERE = Path(__file__).parent
LAYERS, RANKS = 3, 2
TOLERANCE = 2e-5


@functools.cache
def weights_of(kind: str, rank: int) -> dict[str, Tensor]:
    """What the stored graph takes by name: this rank's shards."""
    said = json.loads((HERE / f"data/ge/{kind}.json").read_text())
    with fake_rank(rank, RANKS) as mesh:
        model = models.shard(model_of(kind, LAYERS, torch.float32), mesh)
    state = dict([*model.named_parameters(), *model.named_buffers()])
    found = {name: state[parameter].detach() for name, parameter in said["parameters"].items()}
    return {name: v._local_tensor if isinstance(v, DTensor) else v for name, v in found.items()}


@functools.cache
def stored(kind: str) -> list[GeGraph]:
    files = [HERE / f"data/ge/{kind}_rank_{rank}.pb.xz" for rank in range(RANKS)]
    return [parse(lzma.decompress(file.read_bytes())) for file in files]


@functools.cache
def whole(kind: str) -> Any:
    return model_of(kind, LAYERS, torch.float32)


def ids_of(tokens: int) -> Tensor:
    return torch.randint(0, models.TINY["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def eager(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@functools.cache
def expected(kind: str, tokens: int) -> Tensor:
    return eager(whole(kind), ids_of(tokens))


def run(kind: str, graphs: Sequence[GeGraph], tokens: int) -> list[Tensor]:
    names = json.loads((HERE / f"data/ge/{kind}.json").read_text())["tokens"]
    given = dict.fromkeys(names, ids_of(tokens))
    programs = [GeProgram(graph, {**weights_of(kind, rank), **given}) for rank, graph in enumerate(graphs)]
    return [outputs[0] for outputs in interpret(programs)]


def worst(kind: str, graphs: Sequence[GeGraph], tokens: int) -> float:
    errors = [(found - expected(kind, tokens)).abs().nan_to_num(torch.inf) for found in run(kind, graphs, tokens)]
    return max(float(error.max()) for error in errors)


@pytest.mark.parametrize("tokens", [1, 7, 16, 33])
@pytest.mark.parametrize("kind", ["v3", "v32"])
def test_the_graphs_that_torchair_made_are_the_unsharded_model(kind: str, tokens: int) -> None:
    assert worst(kind, stored(kind), tokens) < TOLERANCE


# ---- faults --------------------------------------------------------------------------------------------------------

Fault = Callable[[list[GeGraph]], None]


def setting(op_type: str, name: str, value: Any, which: int = 0) -> Fault:
    """An attribute of one op, on every rank."""

    def seed(graphs: list[GeGraph]) -> None:
        for graph in graphs:
            assert graph.of_type(op_type)[which].attrs[name].value != value
            graph.of_type(op_type)[which].attrs[name] = attr(value)

    return seed


def bypassing(op_type: str, which: int = 0, given: int = 0) -> Fault:
    """One op left out, on every rank: its first input instead of its result."""

    def seed(graphs: list[GeGraph]) -> None:
        for graph in graphs:
            gone = graph.of_type(op_type)[which]
            for op in graph.ops:
                op.inputs = [gone.inputs[given] if value == f"{gone.name}:0" else value for value in op.inputs]

    return seed


def swapping(op_type: str, which: int = 0) -> Fault:
    """The first two inputs of one op in the other order."""

    def seed(graphs: list[GeGraph]) -> None:
        for graph in graphs:
            inputs = graph.of_type(op_type)[which].inputs
            inputs[:2] = inputs[1::-1]

    return seed


def last_behind(op_type: str, source: str) -> Fault:
    """The first op of a type behind one of type ``source``, left out."""

    def seed(graphs: list[GeGraph]) -> None:
        for graph in graphs:
            reached: set[str] = set()
            for op in graph.ops:
                behind = any(value.rpartition(":")[0] in reached for value in op.inputs)
                if op.type == source or (behind and op.type in ("Identity",)):
                    reached.add(op.name)
                elif behind and op.type == op_type:
                    bypassing(op_type, graph.of_type(op_type).index(op))([graph])
                    break
            else:
                raise AssertionError(f"no {op_type} behind {source}")

    return seed


def without_cast(graphs: list[GeGraph]) -> None:
    """The first cast of truth values to numbers left out."""
    for graph in graphs:
        truths = {op.name for op in graph.ops if op.output_descs and op.output_descs[0].dtype == torch.bool}
        casts = graph.of_type("Cast")
        found = next(i for i, op in enumerate(casts) if op.inputs[0].rpartition(":")[0] in truths)
        bypassing("Cast", found)([graph])


def without_residual(graphs: list[GeGraph]) -> None:
    """The last sum of two values, neither of them a constant, left out."""
    for graph in graphs:
        constants = {op.name for op in graph.of_type("Const")} | {op.name for op in graph.of_type("Cast")}
        sums = graph.of_type("Add")
        real = [i for i, op in enumerate(sums) if not {v.rpartition(":")[0] for v in op.inputs} & constants]
        bypassing("Add", real[-1])([graph])


def on_one_rank(fault: Fault) -> Fault:
    return lambda graphs: fault(graphs[1:])


def unlike_weights(graphs: list[GeGraph]) -> None:
    """The second rank runs the first one's graph: its rows of the vocabulary are wrong."""
    graphs[1] = copy.deepcopy(graphs[0])


OF_V3: dict[str, Fault] = {
    "ranks of a gather in the other order": setting("HcomAllGather", "group", "rank_list=1,0"),
    "ranks of a scatter in the other order": setting("HcomReduceScatter", "group", "rank_list=1,0"),
    "a maximum for a sum": setting("HcomReduceScatter", "reduction", "max", -1),
    "another reduction on one rank": on_one_rank(setting("HcomReduceScatter", "reduction", "max")),
    "another size of the group": setting("HcomAllGather", "rank_size", 4),
    "a collective left out on one rank": on_one_rank(bypassing("HcomAllGather")),
    "a weight that is turned": setting("MatMul", "transpose_x2", True),
    "a square product that is turned": setting("BatchMatMul", "adj_x2", True),
    "a cast left out": without_cast,
    "rows of padding kept": last_behind("StridedSliceV2", "HcomAllGather"),
    "a residual left out": without_residual,
    "a norm without its root": bypassing("Rsqrt", 3),
    "operands of a difference in the other order": swapping("Sub"),
    "parts of a join in the other order": swapping("ConcatV2", -1),
    "an activation left out": bypassing("Swish"),
    "another slope of the activation": setting("Swish", "scale", 1.01),
    "rows of another rank's vocabulary": unlike_weights,
    "experts' rows counted as ends": setting("GroupedMatmul", "group_list_type", 0),
    "experts' rows back to other tokens": setting("MoeFinalizeRoutingV2", "drop_pad_mode", 0),
    "one expert less a token": setting("TopKV2", "largest", False, -1),
}
OF_V32: dict[str, Fault] = {
    "a key less a row": setting("LightningIndexer", "sparse_count", 5),
    "another scale of the scores": setting("SparseFlashAttention", "scale_value", 0.3),
    "keys in blocks of two": setting("SparseFlashAttention", "sparse_block_size", 2),
}
FAULTS = [*(("v3", *fault) for fault in OF_V3.items()), *(("v32", *fault) for fault in OF_V32.items())]


@pytest.mark.parametrize(("kind", "name", "fault"), FAULTS, ids=[f"{kind}: {name}" for kind, name, _ in FAULTS])
def test_a_fault_in_a_graph_is_caught(kind: str, name: str, fault: Fault) -> None:
    """By an error where shapes, dtypes or ranks do not fit, else by the numbers."""
    graphs = copy.deepcopy(stored(kind))
    fault(graphs)
    try:
        found = worst(kind, graphs, 7)
    except (GeError, LockstepError):
        return
    assert found > 10 * TOLERANCE
