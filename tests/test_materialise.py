"""One layer rewritten: its text for any T, its numbers on every rank, gathers that meet, and plans that do not fit."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.fx as fx
from canonical_traces import text
from expecttest import assert_expected_inline
from placed import VOCAB, Annotated, Layer, annotated, layer, traced

from cpcompile.costs import profile
from cpcompile.errors import PlanError
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.materialise import fake_mode_of, materialise
from cpcompile.passes.place import place
from cpcompile.passes.placement_problem import build
from cpcompile.passes.token_dims import annotate
from cpcompile.plan import Interval

SIZE = 4


def plan(found: Annotated) -> Interval:
    """The plan of a large step, which holds at every count."""
    (interval,) = place(found.graph(), profile("ascend-a3"), "tp", "").intervals
    return interval


def rewritten(found: Annotated, interval: Interval | None = None) -> fx.GraphModule:
    return materialise(found.gm, found.graph(), interval or plan(found))


def lines(gm: fx.GraphModule, first: str, last: str) -> str:
    every = text(gm).splitlines()
    names = [line.partition(" = ")[0] for line in every]
    return "\n".join(every[names.index(first) : names.index(last) + 1])


# ---- text ----------------------------------------------------------------------------------------------------------


def test_reduce_scatter_norm_on_the_shard_gather() -> None:
    """The partial sum is padded to ``4 * ceil(T/4)`` rows; the gathered rows are cut to T before any product."""
    gm = rewritten(layer())
    assert_expected_inline(
        lines(gm, "view_default_2", "mm_1"),
        """\
view_default_2 = aten.view(mm, [1, arg1_1, 8])
constant_pad_nd_default_1 = aten.constant_pad_nd(view_default_2, [0, 0, 0, add_1], 0)
add_3 = add(3, arg1_1)
floordiv_2 = floordiv(add_3, 4)
mul_2 = mul(4, floordiv_2)
view_default_3 = aten.view(constant_pad_nd_default_1, [mul_2, 8])
reduce_scatter_tensor_default = _c10d_functional.reduce_scatter_tensor(view_default_3, sum, 4, 0)
wait_tensor_default = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
add_12 = aten.add.Tensor(view_default_1, wait_tensor_default)
pow_1 = aten.pow.Tensor_Scalar(add_12, 2)
mean = aten.mean.dim(pow_1, [-1], True)
add_22 = aten.add.Tensor(mean, 1e-06)
rsqrt = aten.rsqrt(add_22)
mul_15 = aten.mul.Tensor(add_12, rsqrt)
mul_18 = aten.mul.Tensor(mul_15, arg4_1)
view_default_4 = aten.view(mul_18, [1, floordiv_1, 8])
view_default_5 = aten.view(view_default_4, [floordiv_1, 8])
all_gather_into_tensor_default = _c10d_functional.all_gather_into_tensor(view_default_5, 4, 0)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
slice_tensor_1 = aten.slice.Tensor(wait_tensor_default_1, 0, 0, arg1_1)
view_default_6 = aten.view(slice_tensor_1, [1, arg1_1, 8])
view_default_7 = aten.view(view_default_6, [arg1_1, 8])
mm_1 = aten.mm(view_default_7, arg5_1)""",
    )


def test_the_residual_is_carried_in_shards_to_the_last_gather() -> None:
    gm = rewritten(layer())
    assert_expected_inline(
        lines(gm, "reduce_scatter_tensor_default_1", "view_default_13"),
        """\
reduce_scatter_tensor_default_1 = _c10d_functional.reduce_scatter_tensor(view_default_9, sum, 4, 0)
wait_tensor_default_2 = _c10d_functional.wait_tensor(reduce_scatter_tensor_default_1)
add_50 = aten.add.Tensor(add_12, wait_tensor_default_2)
view_default_10 = aten.view(add_50, [1, floordiv_1, 8])
view_default_11 = aten.view(view_default_10, [floordiv_1, 8])
all_gather_into_tensor_default_1 = _c10d_functional.all_gather_into_tensor(view_default_11, 4, 0)
wait_tensor_default_3 = _c10d_functional.wait_tensor(all_gather_into_tensor_default_1)
slice_tensor_2 = aten.slice.Tensor(wait_tensor_default_3, 0, 0, arg1_1)
view_default_12 = aten.view(slice_tensor_2, [1, arg1_1, 8])
view_default_13 = aten.view(view_default_12, [arg1_1, 8])""",
    )


STATIC_LABELS = dict.fromkeys(["add", "pow_1", "mean", "add_1", "rsqrt", "mul", "mul_1", "add_2"], "S")
STATIC_RAISES = {"wait_tensor": "scatter", "mul_1": "gather", "wait_tensor_1": "scatter", "add_2": "gather"}


def static_layer(tokens: int) -> Annotated:
    """The layer traced for one token count."""
    with mock.patch("cpcompile.capture._mark_tokens"):
        return annotated(*traced(lambda mesh: Layer(mesh, 0, SIZE), SIZE, (tokens,)))


def test_a_static_count_that_the_ranks_do_not_divide_is_padded() -> None:
    found = static_layer(6)
    gm = rewritten(found, replace(plan(found), labels=STATIC_LABELS, raises=STATIC_RAISES))
    assert_expected_inline(
        lines(gm, "constant_pad_nd_default_1", "mm_1"),
        """\
constant_pad_nd_default_1 = aten.constant_pad_nd(view_default_2, [0, 0, 0, 2], 0)
view_default_3 = aten.view(constant_pad_nd_default_1, [8, 8])
reduce_scatter_tensor_default = _c10d_functional.reduce_scatter_tensor(view_default_3, sum, 4, 0)
wait_tensor_default = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
add = aten.add.Tensor(view_default_1, wait_tensor_default)
pow_1 = aten.pow.Tensor_Scalar(add, 2)
mean = aten.mean.dim(pow_1, [-1], True)
add_1 = aten.add.Tensor(mean, 1e-06)
rsqrt = aten.rsqrt(add_1)
mul = aten.mul.Tensor(add, rsqrt)
mul_1 = aten.mul.Tensor(mul, arg3_1)
view_default_4 = aten.view(mul_1, [1, 2, 8])
view_default_5 = aten.view(view_default_4, [2, 8])
all_gather_into_tensor_default = _c10d_functional.all_gather_into_tensor(view_default_5, 4, 0)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
slice_tensor_1 = aten.slice.Tensor(wait_tensor_default_1, 0, 0, 6)
view_default_6 = aten.view(slice_tensor_1, [1, 6, 8])
view_default_7 = aten.view(view_default_6, [6, 8])
mm_1 = aten.mm(view_default_7, arg4_1)""",
    )


def test_a_static_count_that_the_ranks_divide_is_neither_padded_nor_cut() -> None:
    found = static_layer(8)
    gm = rewritten(found, replace(plan(found), labels=STATIC_LABELS, raises=STATIC_RAISES))
    targets = [n.target for n in gm.graph.nodes]
    assert torch.ops.aten.constant_pad_nd.default not in targets
    assert targets.count(torch.ops.aten.slice.Tensor) == 1  # this rank's rows of the embedding
    assert targets.count(torch.ops._c10d_functional.reduce_scatter_tensor.default) == 2


def test_a_plan_that_keeps_every_all_reduce_keeps_the_text() -> None:
    found = layer()
    kept = replace(plan(found), labels={}, raises={"wait_tensor": "reduce", "wait_tensor_1": "reduce"})
    gm = rewritten(found, kept)
    assert text(gm).replace("_default", "") == found.text.replace("_default", "")
    assert gm.meta["gathers"] == []


# ---- numbers -------------------------------------------------------------------------------------------------------


def on_every_rank(found: Annotated, interval: Interval, size: int) -> list[tuple[fx.GraphModule, Layer, str]]:
    """The rewritten graph as each rank has it: only its own rows differ."""
    made = []
    for rank in range(size):
        axis = replace(found.axis, rank=rank)
        known = annotate(found.gm, axis, {n.name: n in found.known.replicated for n in found.gm.graph.nodes})
        gm = materialise(found.gm, build(known, profile("ascend-a3")), interval)
        made.append((gm, Layer(None, rank, size), axis.group_name))
    return made


@pytest.mark.parametrize(("size", "shape"), [(2, (12,)), (4, (12,)), (3, (3, 12)), (4, (1, 12))])
def test_every_rank_has_the_whole_models_output_at_any_count(size: int, shape: tuple[int, ...]) -> None:
    """T < n, T = 0, and every remainder of T by n."""
    found = layer(size, shape)
    ranks = on_every_rank(found, plan(found), size)
    for tokens in range(2 * size + 2):
        ids = (torch.arange(3 * tokens) * 7 % VOCAB)[: shape[0] * tokens if len(shape) > 1 else tokens]
        ids = ids.reshape(*shape[:-1], tokens)
        programs = [
            RankProgram(gm, inputs_of(found, model, ids), {group: tuple(range(size))}) for gm, model, group in ranks
        ]
        expected = Layer()(ids)
        for (output,) in run_lockstep(programs):
            torch.testing.assert_close(output, expected, rtol=2e-5, atol=2e-5)


def inputs_of(found: Annotated, model: Layer, ids: torch.Tensor) -> list[object]:
    sizes = {f"L['ids'].size()[{dim}]": size for dim, size in enumerate(ids.shape)}
    weights = dict(model.named_parameters())
    return [sizes.get(i.name, weights.get(i.name, ids)) for i in found.trace.inputs]


# ---- gathers, meta, effects ----------------------------------------------------------------------------------------


def test_values_that_are_wanted_whole_together_share_a_gather() -> None:
    """The residual and its norm: one gather of 8 + 8 elements per token."""
    found = layer()
    labels = {name: label for name, label in plan(found).labels.items() if name != "add_50"}
    raises = {"wait_tensor": "scatter", "add_12": "gather", "mul_18": "gather", "wait_tensor_1": "reduce"}
    both = replace(plan(found), labels=labels, raises=raises)
    gm = rewritten(found, both)
    assert gm.meta["gathers"] == [["add_12", "mul_18"]]
    gathers = gm.graph.find_nodes(op="call_function", target=torch.ops._c10d_functional.all_gather_into_tensor.default)
    assert len(gathers) == 1 and gathers[0].meta["val"].shape[-1] == 16


def test_the_graph_it_is_made_from_is_left_as_it_is() -> None:
    found = layer()
    before = found.gm.print_readable(print_output=False)
    gm = rewritten(found)
    assert found.gm.print_readable(print_output=False) == before
    assert gm is not found.gm and gm.meta["gathers"] == [["mul_18"], ["add_50"]]
    placeholders = [[n.name for n in g.graph.find_nodes(op="placeholder")] for g in (gm, found.gm)]
    assert placeholders[0] == placeholders[1]


def test_fake_values_say_the_shards_rows_and_add_no_guard() -> None:
    found = layer()
    mode = fake_mode_of(found.gm)
    assert mode is not None and mode.shape_env is not None
    guards = len(mode.shape_env.guards)
    gm = rewritten(found)
    assert len(mode.shape_env.guards) == guards
    rows = {n.name: str(n.meta["val"].shape[0].node.expr) for n in gm.graph.nodes if n.name in ("rsqrt", "mm_1")}
    tokens = found.known.tokens
    assert rows == {"rsqrt": f"(({tokens} + 3)//4)", "mm_1": str(tokens)}
    assert all("val" in n.meta for n in gm.graph.nodes if n.op == "call_function")


# ---- plans that do not fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"labels": {"nope": "S"}}, "places 'nope' at 'S', which this graph does not allow"),
        ({"labels": {"rsqrt": "P"}}, "places 'rsqrt' at 'P', which this graph does not allow"),
        ({"labels": {"rsqrt": "R"}}, "places 'rsqrt' at 'R', which this graph does not allow"),
        ({"raises": {"nope": "gather"}}, "raises 'nope', which this graph lacks"),
    ],
)
def test_a_plan_that_does_not_fit(change: dict[str, dict[str, str]], found: str) -> None:
    here = layer()
    with pytest.raises(PlanError) as caught:
        rewritten(here, replace(plan(here), **change))  # type: ignore[arg-type]
    assert str(caught.value) == f"the plan {found}: make a new plan"


def test_a_missing_collective_is_a_bug() -> None:
    found = layer()
    with pytest.raises(AssertionError, match="mul_18 is wanted whole and made at S, and the plan has no collective"):
        rewritten(found, replace(plan(found), raises={"wait_tensor": "scatter", "wait_tensor_1": "scatter"}))
