"""Layers' weights spread over ranks: the model's answer on every rank, idle ones too, and what is in memory when."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from conftest import case
from flash import REDUCED, SCATTERED, carried_out, close, flash, groups_of, inputs, projection, projections
from shared_modules import ids_of, model, trace_of
from simulate import real_inputs

from cpcompile.axes import Axis
from cpcompile.passes.collectives import NATIVE
from cpcompile.passes.layer_sharding import idle_layers, shard_layers
from cpcompile.passes.lockstep import LockstepError, RankProgram, run_lockstep
from cpcompile.passes.verify_layer_sharding import prove_idle_layers, prove_layer_sharding
from cpcompile.passes.verify_proof import Proof
from cpcompile.pipeline import copy_graph

aten = torch.ops.aten
LAYERS = 5
GROUP = "shared weights"
BROADCAST, WAIT = NATIVE.broadcast.default, NATIVE.wait_tensor.default
Change = Callable[[fx.GraphModule], None]


def group(size: int, rank: int) -> Axis:
    return Axis("shared_weight", GROUP, size, rank, tuple(range(size)))


def layers_of(gm: fx.GraphModule) -> list[list[str]]:
    return [[name] for name in projections(gm)]


def run(counts: Sequence[int], change: Callable[[int, fx.GraphModule], None] = lambda rank, gm: None) -> list[Any]:
    """What every rank returns for its own number of tokens. ``change`` seeds faults."""
    trace = trace_of("v3", LAYERS)
    layers, ranks = layers_of(trace.gm), range(len(counts))
    names = [n.name for n in trace.gm.graph.find_nodes(op="placeholder")]
    graphs = [shard_layers(trace.gm, layers, group(len(counts), rank)) for rank in ranks]
    values = [dict(zip(names, real_inputs(trace, ids_of(tokens)), strict=True)) for tokens in counts]
    values = carried_out(values, [g.recipes for g in graphs])
    programs = []
    for rank, tokens in enumerate(counts):
        gm = graphs[rank].gm if tokens else idle_layers(trace.gm, layers, group(len(counts), rank))
        change(rank, gm)
        mine = [values[rank][n.name] for n in gm.graph.find_nodes(op="placeholder")]
        programs.append(RankProgram(gm, mine, {GROUP: tuple(ranks)}))
    return run_lockstep(programs)


@pytest.mark.parametrize("counts", [[3, 4], [5, 0, 7], [0, 1, 2, 9], [4, 4, 4, 4, 4, 4, 0]])
def test_every_rank_equals_the_model(counts: list[int]) -> None:
    for tokens, found in zip(counts, run(counts), strict=True):
        if tokens:
            with torch.no_grad():
                close(found[0], model("v3", LAYERS)(input_ids=ids_of(tokens), use_cache=False).logits, tokens)
        else:
            assert found == ()


def proofs(size: int, rank: int, change: Change | None = None, idle: bool = False) -> Proof:
    gm = trace_of("v3", LAYERS).gm
    layers, axis = layers_of(gm), group(size, rank)
    made = shard_layers(gm, layers, axis)
    new = idle_layers(gm, layers, axis) if idle else made.gm
    if change is not None:
        change(new)
        new.graph.lint()
    return (prove_idle_layers if idle else prove_layer_sharding)(gm, new, layers, axis, made.recipes)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_every_rank_is_proven(size: int) -> None:
    for rank in range(size):
        for idle in (False, True):
            proof = proofs(size, rank, idle=idle)
            assert proof.holds, proof.failures[:3]


def test_one_layer_ahead_and_no_further() -> None:
    """The first broadcast is the first call; each next one starts when the one before it is there."""
    whole = trace_of("v3", LAYERS).gm
    gm = shard_layers(whole, layers_of(whole), group(3, 0)).gm
    calls = [n for n in gm.graph.nodes if n.op == "call_function"]
    assert calls[0].target is BROADCAST
    moves = [n.target for n in calls if n.target in (BROADCAST, WAIT)]
    assert moves == [BROADCAST] + [WAIT, BROADCAST] * (LAYERS - 1) + [WAIT]
    order = {n: i for i, n in enumerate(calls)}
    for wait in (n for n in calls if n.target is WAIT):
        (weight,) = wait.users  # its transposition, and the product right behind it
        (product,) = weight.users
        assert order[weight] - order[wait] <= 3 and order[product] == order[weight] + 1


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_holds_its_own_layers_alone(size: int) -> None:
    trace = trace_of("v3", LAYERS)
    held = []
    for rank in range(size):
        made = shard_layers(trace.gm, layers_of(trace.gm), group(size, rank))
        names = [n.name for n in trace.gm.graph.find_nodes(op="placeholder")]
        values = dict(zip(names, real_inputs(trace, ids_of(1)), strict=True))
        (values,) = carried_out([values], [made.recipes])
        kept = [bool(values[name].numel()) for name in made.recipes]
        assert kept == [layer % size == rank for layer in range(LAYERS)]
        stated = {n.name: n.meta["val"] for n in made.gm.graph.find_nodes(op="placeholder")}
        assert all(stated[name].shape == values[name].shape for name in made.recipes)
        held.append(sum(values[name].numel() for name in made.recipes))
    assert sum(held) == LAYERS * values[next(iter(made.recipes))].shape[1] * 64


@pytest.mark.parametrize("form", [SCATTERED, REDUCED])
def test_whole_projections_of_flashcomm2(form: str) -> None:
    """FlashComm 2 with otp = 1 needs whole o_proj weights; each rank then keeps those of its layers."""
    made, cases = flash("v3", 4, 1, form), case("v3", 4)
    axes = [group(4, rank) for rank in range(4)]
    graphs = [shard_layers(g.gm, [[n] for n in g.products.values()], a) for g, a in zip(made, axes, strict=True)]
    assert not graphs[0].refused and len(graphs[0].recipes) == 2
    for tokens in (1, 6):
        ids = ids_of(tokens)
        whole = inputs(cases, [g.gm for g in made], [g.recipes for g in made], ids)
        names = [n.name for n in made[0].gm.graph.find_nodes(op="placeholder")]
        values = carried_out([dict(zip(names, v, strict=True)) for v in whole], [g.recipes for g in graphs])
        programs = []
        for graph, own, tp in zip(graphs, values, cases.ranks.axes, strict=True):
            g = groups_of(tp, 1)
            groups = {a.group_name: a.ranks for a in (tp, g.odp, axes[0])}
            programs.append(RankProgram(graph.gm, list(own.values()), groups))
        for rank, found in enumerate(run_lockstep(programs)):
            close(found[0], cases.logits(ids), (tokens, rank))  # type: ignore[index]
    for rank, (before, graph) in enumerate(zip(made, graphs, strict=True)):
        layers = [[n] for n in before.products.values()]
        assert prove_layer_sharding(before.gm, graph.gm, layers, axes[rank], graph.recipes).holds


def test_quantised_weights_travel_as_they_are_stored() -> None:
    made = projection(2, quantised=True)
    gm = made.copy(0)
    graph = shard_layers(gm, [made.products(gm)], group(2, 1))
    assert set(graph.recipes) == made.names("weight", "scale", "scale_in")
    sent = [n.meta["val"].dtype for n in graph.gm.graph.find_nodes(op="call_function", target=BROADCAST)]
    assert sorted(map(str, sent)) == ["torch.float32", "torch.float32", "torch.int8"]
    assert prove_layer_sharding(gm, graph.gm, [made.products(gm)], group(2, 1), graph.recipes).holds


# ---- faults --------------------------------------------------------------------------------------------------------


def broadcasts(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=BROADCAST))


def wrong_source(gm: fx.GraphModule) -> None:
    broadcasts(gm)[1].update_arg(1, 0)


def wrong_group(gm: fx.GraphModule) -> None:
    broadcasts(gm)[1].update_arg(2, "tp")


def other_layer(gm: fx.GraphModule) -> None:
    """The owner of layers 0 and 3 sends the one for the other."""
    one, other = broadcasts(gm)[0], broadcasts(gm)[3]
    a, b = one.args[0], other.args[0]
    one.update_arg(0, b)
    other.update_arg(0, a)


def read_another(gm: fx.GraphModule) -> None:
    """Layer 1 multiplies by layer 0's weight."""
    first, second = (next(iter(b.users)) for b in broadcasts(gm)[:2])
    second.replace_all_uses_with(first)


def no_wait(gm: fx.GraphModule) -> None:
    (wait,) = broadcasts(gm)[2].users
    wait.replace_all_uses_with(broadcasts(gm)[2])


def swapped(gm: fx.GraphModule) -> None:
    """Layer 2's broadcast starts before layer 1's."""
    one, other = broadcasts(gm)[1:3]
    for node in (*(n for n in other.all_input_nodes if n.op != "placeholder"), other):
        one.prepend(node)


def own_copy(gm: fx.GraphModule) -> None:
    """The owner multiplies by what it holds."""
    (wait,) = broadcasts(gm)[0].users
    wait.replace_all_uses_with(broadcasts(gm)[0].args[0])  # type: ignore[arg-type]


def missing(gm: fx.GraphModule) -> None:
    """The last layer's weight is not sent: an empty tensor is read."""
    last = broadcasts(gm)[-1]
    (wait,) = last.users
    wait.replace_all_uses_with(last.args[0])  # type: ignore[arg-type]
    gm.graph.erase_node(wait)
    gm.graph.erase_node(last)


def other_shape(gm: fx.GraphModule) -> None:
    first = next(n for n in gm.graph.nodes if n.target is aten.empty.memory_format)
    first.update_arg(0, [192, 64])


def other_number(gm: fx.GraphModule) -> None:
    node = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor and n.args[1] == 1e-06)
    node.update_arg(1, 1e-05)


FAULTS = [wrong_source, wrong_group, other_layer, read_another, no_wait, swapped, own_copy, missing, other_number]


@pytest.mark.parametrize("change", [*FAULTS, other_shape])
def test_a_fault_is_refuted(change: Change) -> None:
    proof = proofs(3, 0, change)
    assert not proof.holds and all(failure.message for failure in proof.failures)


@pytest.mark.parametrize("change", [wrong_source, wrong_group, missing, other_layer, swapped])
def test_a_fault_of_an_idle_rank_is_refuted(change: Change) -> None:
    assert not proofs(3, 0, change, idle=True).holds


@pytest.mark.parametrize("change", [wrong_source, wrong_group, missing, swapped])
def test_one_rank_that_sends_otherwise_stops_all(change: Change) -> None:
    with pytest.raises(LockstepError):
        run([2, 3, 4], lambda rank, gm: change(gm) if rank == 0 else None)


# ---- refusals ------------------------------------------------------------------------------------------------------


def refusal(change: Change) -> str:
    gm = fx.GraphModule(trace_of("v3", LAYERS).gm, copy_graph(trace_of("v3", LAYERS).gm.graph))
    change(gm)
    made = shard_layers(gm, layers_of(gm)[:1], group(2, 0))
    (refused,) = made.refused
    assert not made.recipes and not broadcasts(made.gm)
    return refused.reason


def first_weight(gm: fx.GraphModule) -> fx.Node:
    node = next(n for n in gm.graph.nodes if n.name == projections(gm)[0])
    return node.args[1]  # type: ignore[return-value]


def also_returned(gm: fx.GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = ((*output.args[0], first_weight(gm)),)  # type: ignore[misc]


def test_a_weight_that_something_else_reads() -> None:
    assert "which would need it on every rank" in refusal(also_returned)
