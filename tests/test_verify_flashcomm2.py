"""The proof of FlashComm 2 refutes every seeded fault, on ranks where it shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.fx as fx
from conftest import case
from flash import REDUCED, SCATTERED, flash, graphs, groups_of

from cpcompile.passes.collectives import NATIVE
from cpcompile.passes.verify_flashcomm2 import prove_flashcomm2
from cpcompile.passes.verify_proof import Proof
from cpcompile.pipeline import copy_graph

aten = torch.ops.aten
A2A, RS = NATIVE.all_to_all_single.default, NATIVE.reduce_scatter_tensor.default
AG, WAIT = NATIVE.all_gather_into_tensor.default, NATIVE.wait_tensor.default
Change = Callable[[fx.GraphModule, dict[str, Any]], None]


def proven(form: str, rank: int, change: Change | None = None, size: int = 4, otp: int = 2) -> Proof:
    """The proof of rank ``rank``'s graph, of a copy with ``change`` in it."""
    old, made = graphs("v3", size, form)[rank], flash("v3", size, otp, form)[rank]
    gm, recipes = fx.GraphModule(made.gm, copy_graph(made.gm.graph)), dict(made.recipes)
    if change is not None:
        change(gm, recipes)
        gm.graph.lint()
    g = groups_of(case("v3", size).ranks.axes[rank], otp)
    return prove_flashcomm2(old, gm, (g.tp, g.otp, g.odp), recipes, lambda name: False)


def first(gm: fx.GraphModule, target: Any, index: int = 0) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[index]


def exchanged(gm: fx.GraphModule) -> tuple[fx.Node, fx.Node]:
    """The permutations before and behind the first all-to-all."""
    permutes = gm.graph.find_nodes(op="call_function", target=aten.permute.default)
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    at = order[first(gm, A2A)]
    return max((p for p in permutes if order[p] < at), key=order.get), min(  # type: ignore[arg-type]
        (p for p in permutes if order[p] > at),
        key=order.get,  # type: ignore[arg-type]
    )


def chunks_in_order(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    """Chunks one after another, not ``[i + jG]``."""
    exchanged(gm)[0].update_arg(1, [0, 1, 2, 3])


def columns_by_rows(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    """What the all-to-all brought, read as rows of all columns."""
    permute = exchanged(gm)[1]
    (copy,) = permute.users
    (view,) = copy.users
    view.update_arg(0, permute.args[0].args[0])  # type: ignore[union-attr]


def on_group(target: Any, name: str) -> Change:
    def change(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
        node = first(gm, target)
        node.update_arg(len(node.args) - 1, name)

    return change


def set_argument(target: Any, index: int, value: Any) -> Change:
    def change(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
        first(gm, target).update_arg(index, value)

    return change


def no_wait(target: Any) -> Change:
    def change(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
        node = first(gm, target)
        next(iter(node.users)).replace_all_uses_with(node)

    return change


def uneven(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    node = first(gm, A2A)
    node.update_arg(1, [0, *node.args[1][1:]])  # type: ignore[index,misc]


def no_all_gather(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    gather = first(gm, AG)
    next(iter(gather.users)).replace_all_uses_with(gather.args[0])  # type: ignore[arg-type]


def no_exchange(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    node = first(gm, A2A)
    next(iter(node.users)).replace_all_uses_with(node.args[0])  # type: ignore[arg-type]


def next_rows(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    gather = first(gm, AG)
    (wait,) = gather.users
    (part,) = wait.users
    part.update_arg(2, 1)


def gathered(**changes: Any) -> Change:
    def change(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
        name = min(recipes)
        axis = recipes[name].axis
        if "axis" in changes:
            recipes[name] = replace(recipes[name], axis=changes["axis"](axis))
        else:
            recipes[name] = replace(recipes[name], **changes)

    return change


def not_gathered(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    del recipes[min(recipes)]


def other_layer(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    one, other = (n for n in gm.graph.find_nodes(op="placeholder") if n.name in recipes)
    (weight,) = one.users
    weight.update_arg(0, other)


def other_number(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
    """A change far from o_proj: the epsilon of a norm."""
    node = next(n for n in gm.graph.nodes if n.target is aten.add.Tensor and n.args[1] == 1e-06)
    node.update_arg(1, 1e-05)


FAULTS: list[tuple[str, Change, tuple[str, ...]]] = [
    ("chunks in order", chunks_in_order, (SCATTERED, REDUCED)),
    ("columns by rows", columns_by_rows, (SCATTERED, REDUCED)),
    ("all-to-all over OTP", on_group(A2A, "flashcomm2_otp"), (SCATTERED, REDUCED)),
    ("all-to-all over another group", on_group(A2A, "somewhere"), (SCATTERED,)),
    ("reduce-scatter over ODP", on_group(RS, "flashcomm2_odp"), (REDUCED,)),
    ("all-gather over OTP", on_group(AG, "flashcomm2_otp"), (REDUCED,)),
    ("mean for sum", set_argument(RS, 1, "avg"), (REDUCED,)),
    ("another group size", set_argument(AG, 1, 2), (REDUCED,)),
    ("no wait for the all-to-all", no_wait(A2A), (SCATTERED, REDUCED)),
    ("no wait for the reduce-scatter", no_wait(RS), (REDUCED,)),
    ("uneven parts", uneven, (SCATTERED, REDUCED)),
    ("no all-gather", no_all_gather, (REDUCED,)),
    ("no all-to-all", no_exchange, (SCATTERED, REDUCED)),
    ("rows one further", next_rows, (REDUCED,)),
    ("weights in another order", gathered(axis=lambda a: replace(a, ranks=a.ranks[::-1])), (SCATTERED, REDUCED)),
    ("weights of OTP", gathered(axis=lambda a: replace(a, name="flashcomm2_otp")), (SCATTERED,)),
    ("weights along the other dim", gathered(dim=0), (SCATTERED,)),
    ("fewer weights", gathered(parts=1), (SCATTERED,)),
    ("no weights of others", not_gathered, (SCATTERED, REDUCED)),
    ("another layer's weight", other_layer, (SCATTERED, REDUCED)),
    ("a number elsewhere", other_number, (SCATTERED, REDUCED)),
]


@pytest.mark.parametrize(("change", "form"), [pytest.param(c, f, id=f"{n}-{f}") for n, c, fs in FAULTS for f in fs])
def test_a_fault_is_refuted(change: Change, form: str) -> None:
    for rank in (0, 3):
        assert proven(form, rank).holds
        proof = proven(form, rank, change)
        assert not proof.holds and all(failure.message for failure in proof.failures)


def test_groups_that_are_not_i_plus_jg() -> None:
    """OTP as ranks beside each other, ODP as every otp-th: the graph is the same, and its rows are not."""
    made, axis = flash("v3", 4, 2, REDUCED)[1], case("v3", 4).ranks.axes[1]
    g = groups_of(axis, 2)
    otp, odp = replace(g.otp, ranks=g.odp.ranks), replace(g.odp, ranks=g.otp.ranks)
    proof = prove_flashcomm2(graphs("v3", 4, REDUCED)[1], made.gm, (g.tp, otp, odp), made.recipes, lambda name: False)
    assert "expected OTP {i + jG}" in " ".join(f.message for f in proof.failures)


def test_another_collective_out_of_its_place() -> None:
    """``Sum`` of the first MLP before the embedding's is what no rank's peers would wait for."""

    def swap(gm: fx.GraphModule, recipes: dict[str, Any]) -> None:
        gather = first(gm, AG)
        start = first(gm, NATIVE.all_reduce.default)
        with gm.graph.inserting_after(gather):
            copy = gm.graph.node_copy(start)
        copy.meta = dict(start.meta)
        with gm.graph.inserting_after(copy):
            wait = gm.graph.call_function(WAIT, (copy,))
        wait.meta = dict(start.meta)

    assert not proven(REDUCED, 0, swap).holds
