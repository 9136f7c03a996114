"""FlashComm 2 on simulated ranks: the model's answer, fewer rows, more columns, the volume of the formula, refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import models
import pytest
import torch
import torch.fx as fx
from conftest import case
from flash import REDUCED, SCATTERED, Projection, close, flash, graphs, groups_of, project, projection, run

from cpcompile.axes import Axis
from cpcompile.errors import GroupError
from cpcompile.passes.collectives import NATIVE, arguments, sizes
from cpcompile.passes.flash_sites import FlashGroups
from cpcompile.passes.flashcomm2 import use_flashcomm2
from cpcompile.passes.verify_flashcomm2 import prove_flashcomm2
from cpcompile.passes.weight_recipes import Gather, Sum

aten = torch.ops.aten
A2A = NATIVE.all_to_all_single.default
HEADS = models.TINY["num_attention_heads"] * models.TINY["v_head_dim"]
HIDDEN = models.TINY["hidden_size"]
SIZES = [(4, 1), (4, 2), (8, 1), (8, 2), (8, 4)]


def ids_of(tokens: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 96, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.mark.parametrize("form", [SCATTERED, REDUCED])
@pytest.mark.parametrize(("size", "otp"), SIZES)
def test_every_rank_equals_the_model(size: int, otp: int, form: str) -> None:
    made = flash("v3", size, otp, form)
    assert not made[0].refused and len(made[0].products) == 2
    for tokens in range(1, 4 * size + 2) if (size, form) == (4, SCATTERED) else (1, size - 1, size, 2 * size + 1):
        expected = case("v3", size).logits(ids_of(tokens))
        for rank, found in enumerate(run("v3", size, otp, form, ids_of(tokens), made)):
            close(found, expected, (tokens, rank))


@pytest.mark.parametrize("form", [SCATTERED, REDUCED])
def test_a_batch_of_rows(form: str) -> None:
    """Rows of a batch are scattered within each sequence: a rank's chunk has rows of all of them."""
    made = flash("v3", 4, 2, form, 2)
    assert not made[0].refused
    for tokens in (1, 3, 8, 9):
        expected = case("v3", 4, 2).logits(ids_of(tokens, 2))
        for rank, found in enumerate(run("v3", 4, 2, form, ids_of(tokens, 2), made)):
            close(found, expected, (tokens, rank))


@pytest.mark.parametrize("form", [SCATTERED, REDUCED])
@pytest.mark.parametrize(("size", "otp"), SIZES)
def test_every_rank_is_proven(size: int, otp: int, form: str) -> None:
    axes, before = case("v3", size).ranks.axes, graphs("v3", size, form)
    for axis, old, new in zip(axes, before, flash("v3", size, otp, form), strict=True):
        g = groups_of(axis, otp)
        proof = prove_flashcomm2(old, new.gm, (g.tp, g.otp, g.odp), new.recipes, lambda name: False)
        assert proof.holds, proof.failures[:3]


def numbers(node: fx.Node, tokens: int) -> list[int]:
    """The sizes of ``node`` at ``tokens`` tokens."""
    shape = sizes(node)
    assert shape is not None
    return [int(size.subs(dict.fromkeys(size.free_symbols, tokens))) for size in shape]


@pytest.mark.parametrize(("size", "otp"), SIZES)
def test_rows_fall_and_columns_grow_by_the_ranks_that_exchange_them(size: int, otp: int) -> None:
    gm, made = graphs("v3", size, SCATTERED)[0], flash("v3", size, otp, SCATTERED)[0]
    old, new = ({n.name: n for n in g.graph.nodes} for g in (gm, made.gm))
    tokens, width = 4 * size, size // otp
    for before, after in made.products.items():
        assert numbers(old[before].args[0], tokens) == [tokens, HEADS // size]
        assert numbers(new[after].args[0], tokens) == [tokens // width, HEADS // otp]
        assert numbers(new[after].args[1], tokens) == [HEADS // otp, HIDDEN]
    assert {r.dim for r in made.recipes.values() if isinstance(r, Gather)} == {1}


@pytest.mark.parametrize(("size", "otp"), SIZES)
@pytest.mark.parametrize("form", [SCATTERED, REDUCED])
def test_what_crosses_ranks_is_what_the_formula_says(size: int, otp: int, form: str) -> None:
    """For each o_proj [T, HD/tp] by all-to-all, [T/G, H] summed over OTP, [T/tp, H] gathered if need be."""
    tokens, nodes = 4 * size, list(flash("v3", size, otp, form)[0].gm.graph.nodes)
    nodes = nodes[[n.target for n in nodes].index(A2A) :]

    def elements(target: Any, over: int) -> int:
        """Of what each rank puts into the first such collective behind the all-to-all."""
        node = next(n for n in nodes if n.target is target)
        assert arguments(node).get("group_size", over) == over
        return math.prod(numbers(node.args[0], tokens))

    assert elements(A2A, size // otp) == tokens * HEADS // size
    assert len(arguments(nodes[0])["input_split_sizes"]) == size // otp
    if otp > 1:
        assert elements(NATIVE.reduce_scatter_tensor.default, otp) == tokens * otp // size * HIDDEN
    if form == REDUCED:
        assert elements(NATIVE.all_gather_into_tensor.default, size) == tokens // size * HIDDEN


# ---- projections by hand -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("otp", [1, 2])
def test_quantised_weights_scales_and_biases(otp: int) -> None:
    """An int8 weight with scales for each output and for each input, and a bias that each rank adds a part of."""
    made = projection(4, quantised=True, bias=True)
    for tokens in (1, 4, 7):
        graphs_, found, expected = project(made, otp, tokens, {"scale"})
        assert not graphs_[0].refused
        kinds = {type(r) for r in graphs_[0].recipes.values()}
        assert kinds == {Gather, Sum} and len(graphs_[0].recipes) == 3
        for rank, got in enumerate(found):
            close(got, expected, (tokens, rank))
    for rank, (trace, graph) in enumerate(zip(made.traces, graphs_, strict=True)):
        g = groups_of(made.axes[rank], otp)
        names = {n.name for n in trace.gm.graph.nodes if n.name in made.names("scale")}
        assert prove_flashcomm2(trace.gm, graph.gm, (g.tp, g.otp, g.odp), graph.recipes, names.__contains__).holds
        assert not prove_flashcomm2(trace.gm, graph.gm, (g.tp, g.otp, g.odp), graph.recipes, lambda n: False).holds


def refusal(change: Any = None, same: tuple[str, ...] = (), otp: int = 2, **options: Any) -> str:
    made: Projection = projection(4, **options)
    gm, axis = made.copy(0), made.axes[0]
    if change is not None:
        change(gm)
    graph = use_flashcomm2(gm, made.products(gm), groups_of(axis, otp), made.names(*same))
    assert not graph.products and not graph.recipes
    assert [str(n.target) for n in graph.gm.graph.nodes] == [str(n.target) for n in gm.graph.nodes]
    (refused,) = graph.refused
    return refused.reason


def insert(target: Any, *more: Any) -> Any:
    """Puts a call between the product and what reads it."""

    def change(gm: fx.GraphModule) -> None:
        node = next(n for n in gm.graph.nodes if n.target in (aten.mm.default, aten.addmm.default))
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(target, (node, *more))
        with node.meta["val"].fake_mode:
            new.meta["val"] = target(node.meta["val"], *more)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    return change


def also_returned(gm: fx.GraphModule) -> None:
    node, output = gm.graph.find_nodes(op="call_function", target=aten.mm.default)[0], gm.graph.output_node()
    output.args = ((*output.args[0], node),)


def rescaled(gm: fx.GraphModule) -> None:
    """The product as one with a scale for each row, as fp8 has."""
    node = gm.graph.find_nodes(op="call_function", target=aten.mm.default)[0]
    rows, weight = node.args
    with gm.graph.inserting_before(node):
        scales = [gm.graph.call_function(aten.amax.default, (rows, dims, True)) for dims in ([1], [0, 1])]
    with node.meta["val"].fake_mode:
        for scale in scales:
            scale.meta["val"] = rows.meta["val"].amax(scale.args[1], True)
    node.target, node.args = aten._scaled_mm.default, (rows, weight, *scales)


def other_group(gm: fx.GraphModule) -> None:
    (node,) = gm.graph.find_nodes(op="call_function", target=NATIVE.all_reduce.default)
    node.update_arg(2, "another group")


def largest(gm: fx.GraphModule) -> None:
    (node,) = gm.graph.find_nodes(op="call_function", target=NATIVE.all_reduce.default)
    node.update_arg(1, "max")


def read_twice(gm: fx.GraphModule) -> None:
    node, output = gm.graph.find_nodes(op="call_function", target=aten.mm.default)[0], gm.graph.output_node()
    output.args = ((*output.args[0], node.args[1]),)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (also_returned, "expected one sum over tp"),
        (insert(aten.relu.default), "is no move of rows"),
        (insert(aten.t.default), "is no move of rows"),
        (insert(aten.transpose.int, 0, 1), "regroups columns|moves columns"),
        (insert(aten.view.default, [-1, 4]), "regroups columns"),
        (insert(aten.constant_pad_nd.default, [0, 0, 0, 4], 0), "moves rows before they are all-reduced"),
        (other_group, "is no sum over tp"),
        (largest, "is no sum over tp"),
        (rescaled, "scales each row"),
        (read_twice, "is also read by output"),
    ],
)
def test_a_refusal_has_a_reason(change: Any, reason: str) -> None:
    assert re.search(reason, refusal(change))


def test_scales_that_may_differ_between_ranks() -> None:
    assert "not known to be the same on all ranks" in refusal(quantised=True)


def test_otp_that_is_all_of_tp() -> None:
    assert "otp is all of tp" in refusal(otp=4)


def test_groups_that_are_not_those_of_one_otp() -> None:
    tp = Axis("tp", "tp", 4, 1, (0, 1, 2, 3))
    right = groups_of(tp, 2)
    with pytest.raises(GroupError, match="expected flashcomm2_odp to be"):
        FlashGroups(tp, right.odp, right.otp)
    with pytest.raises(GroupError, match="one block to a rank"):
        FlashGroups(Axis("tp", "tp", 4, 1, (0, 1, 2, 3), "zigzag"), right.otp, right.odp)
