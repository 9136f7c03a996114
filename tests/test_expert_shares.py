"""Experts that are split over ranks by their numbers: one op that is told which are here, or a reason."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
import torch.fx as fx
from simulate import fake_rank, real_inputs
from test_recognise_routed_experts import GROUPED, OP, aten, fresh, only, operands, slot_by_slot
from test_recognise_routed_experts import traced as traced_whole
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from cpcompile.capture import Trace, capture
from cpcompile.passes.collectives import is_wait
from cpcompile.passes.recognise_routed_experts import RecogniseRoutedExperts


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("part", [[0, 6], [2, 6], [4, 6]])
def test_the_op_adds_nothing_for_experts_elsewhere(rows: int, part: list[int]) -> None:
    hidden, ids, weights, *tables = operands(rows, experts=6)
    own = [table[part[0] : part[0] + 2] for table in tables]
    here = (ids >= part[0]) & (ids < part[0] + 2)
    found = OP(hidden, ids, weights, *own, part)
    torch.testing.assert_close(found, slot_by_slot(hidden, ids, weights * here, *tables), rtol=1e-12, atol=1e-12)


@functools.cache
def traced(size: int = 2) -> Trace:
    """The last rank of the library's own plan; no attention before, so that other ranks are not needed."""
    with fake_rank(size - 1, size) as mesh:
        model = models.build(models.tiny_config("v3", 1, first_k_dense_replace=0))
        model.model.layers[0].mlp.gate.e_score_correction_bias.zero_()  # it would have all tokens choose alike
        model._tp_plan = models.EXPERT_PLAN
        model = apply_tensor_parallelism(model, mesh["tp"])
        return capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)


def own_part(gm: fx.GraphModule) -> fx.GraphModule:
    """What a rank has before the sum over the ranks."""
    gm = fx.GraphModule(gm, gm.graph)
    wait = next(n for n in gm.graph.nodes if is_wait(n))
    (output,) = gm.graph.find_nodes(op="output")
    output.args = ((wait.args[0].args[0],),)
    for node in reversed(list(gm.graph.nodes)):  # collectives too
        if node.op == "call_function" and not node.users:
            gm.graph.erase_node(node)
    return gm


@pytest.mark.parametrize("size", [2, 8])  # of 8, each has one expert
def test_the_librarys_plan_keeps_its_numbers(size: int) -> None:
    trace = traced(size)
    gm = fresh(trace)
    result = RecogniseRoutedExperts()(gm)
    assert (result.rewrites, result.refusals) == (1, [])
    call = only(gm, OP)
    assert call.args[5] == [8 - 8 // size, 8]
    gm.graph.eliminate_dead_code()
    assert not gm.graph.find_nodes(op="call_function", target=aten.ne.Scalar)[1:]  # no mask of numbers or weights
    assert RecogniseRoutedExperts()(gm).rewrites == 0
    both = own_part(gm), own_part(fresh(trace))
    for tokens in (2, 60):
        ids = torch.arange(tokens)[None] * 5 % models.TINY["vocab_size"]
        given = real_inputs(trace, ids)
        (mine,), (theirs,) = (fx.Interpreter(g).run(*given) for g in both)
        assert tokens == 2 or theirs.abs().max() > 0.01
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def mask_slots(gm: fx.GraphModule, experts: int) -> None:
    """Set rows of experts elsewhere to 0, where the library does; ``experts`` are here."""
    first, second = gm.graph.find_nodes(op="call_function", target=GROUPED)
    sorted_ids = next(n for n in only(gm, aten.sort.default).users if n.args[1] == 0)
    with gm.graph.inserting_after(sorted_ids):
        elsewhere = gm.graph.call_function(aten.ge.Scalar, (sorted_ids, experts))
    with gm.graph.inserting_after(elsewhere):
        column = gm.graph.call_function(aten.unsqueeze.default, (elsewhere, -1))
    for value in (first.args[0], first, second):
        with gm.graph.inserting_after(value):
            masked = gm.graph.call_function(aten.masked_fill.Scalar, (value, column, 0.0))
        value.replace_all_uses_with(masked, delete_user_cb=lambda user, own=masked: user is not own)
        masked.meta["val"] = value.meta["val"]
    gm.graph.lint()
    gm.recompile()


def test_masks_where_no_expert_is_elsewhere_keep_their_numbers() -> None:
    """What transformers 5.17 does to every model; the one that is installed need not."""
    trace = traced_whole("v3")
    gm = fresh(trace)
    if not gm.graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar):
        mask_slots(gm, 8)
    result = RecogniseRoutedExperts()(gm)
    assert (result.rewrites, result.refusals) == (1, [])
    assert only(gm, OP).args[5:] in ((), (None,))
    given = real_inputs(trace, torch.arange(9)[None])
    for mine, theirs in zip(fx.Interpreter(gm).run(*given), fx.Interpreter(trace.gm).run(*given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


def argument(target: Any, value: Any, index: int = -1) -> Callable[[fx.GraphModule], None]:
    def change(gm: fx.GraphModule) -> None:
        node = only(gm, target, index)
        node.args = (*node.args[:-1], value)

    return change


def ids_of_another_source(gm: fx.GraphModule) -> None:
    """Numbers that no router chose, of which it is not known how many there are."""
    chosen = only(gm, aten.floor_divide.default, 0)
    ids = chosen.args[0]
    assert isinstance(ids, fx.Node)
    ids.args = (ids.args[0], 0)


ELSEWHERE = "its masked slots are not of other experts than 4 in a row"
REFUSED: dict[str, tuple[str, Callable[[fx.GraphModule], None]]] = {
    "numbers of two ranks": (ELSEWHERE, argument(aten.fmod.Scalar, 3)),
    "others are the last expert": (ELSEWHERE, argument(aten.eq.Scalar, -2)),
    "no rank's": (ELSEWHERE, argument(aten.ne.Scalar, 5)),
    "halves of ranks": (ELSEWHERE, argument(aten.floor_divide.default, 2, 0)),
    "no router": (ELSEWHERE, ids_of_another_source),
    "rows of the last expert masked": ("its mask is not of other ranks' experts", argument(aten.ge.Scalar, 3)),
    "rows set to one": ("what it multiplies is", argument(aten.masked_fill.Scalar, 1.0, -3)),
    "results set to one": ("what reads its result is", argument(aten.masked_fill.Scalar, 1.0, -1)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_masks_are_refused(name: str) -> None:
    reason, change = REFUSED[name]
    gm = fresh(traced())
    change(gm)
    before = str(gm.graph)
    result = RecogniseRoutedExperts()(gm)
    assert result.rewrites == 0 and str(gm.graph) == before
    (refusal,) = result.refusals
    assert reason in refusal.reason


def test_weights_that_are_masked_otherwise_stay() -> None:
    """Zero where this rank's experts are: they are not what the router gave."""
    gm = fresh(traced())
    mask = only(gm, aten.masked_fill.Scalar, 1)
    assert mask.args[2] == 0.0 and mask.meta["val"].dtype == torch.float32
    with gm.graph.inserting_before(mask):
        other = gm.graph.call_function(aten.eq.Scalar, (mask.args[1].args[0], 1))
    other.meta["val"] = mask.args[1].meta["val"]
    mask.args = (mask.args[0], other, 0.0)
    assert RecogniseRoutedExperts()(gm).rewrites == 1
    assert gm.graph.find_nodes(op="call_function", target=aten.eq.Scalar)
