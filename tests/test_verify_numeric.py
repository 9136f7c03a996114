"""The numeric check: right rewrites pass on every rank; wrong rows, ranks, orders and dtypes are each reported."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from conftest import case
from simulate import fake_rank

from cpcompile.axes import axis_of
from cpcompile.capture import capture
from cpcompile.compiled import Compiled
from cpcompile.exchange import OfflineExchange
from cpcompile.options import Options
from cpcompile.passes import verify_numeric
from cpcompile.passes.materialise import materialise
from cpcompile.passes.placement_problem import PlacementGraph
from cpcompile.passes.verify_numeric import check_numerically, tolerance
from cpcompile.passes.widen import widened
from cpcompile.pipeline import compile_graph
from cpcompile.plan import Interval

H = 16
aten, c10d = torch.ops.aten, torch.ops._c10d_functional
Edit = Callable[[fx.GraphModule], None]


class Mlp(torch.nn.Module):
    """Embedding and two tensor-parallel MLP layers with RMSNorm and residual; this rank's shards of the weights.

    Each layer has two all-reduces of different widths that do not wait for one another; ``other``, if given, is a
    group over which the result is averaged.
    """

    def __init__(self, group: object, other: object, size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.group, self.other = group, other
        self.embed = torch.nn.Embedding(12, H, dtype=dtype)
        self.norms = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(H, dtype=dtype)) for _ in range(2)])
        self.up = torch.nn.ModuleList([torch.nn.Linear(H, 24 // size, bias=False, dtype=dtype) for _ in range(2)])
        self.narrow = torch.nn.ModuleList(
            [torch.nn.Linear(24 // size, H // 2, bias=False, dtype=dtype) for _ in range(2)]
        )
        self.down = torch.nn.ModuleList([torch.nn.Linear(24 // size, H, bias=False, dtype=dtype) for _ in range(2)])

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(input_ids)
        for norm, up, down, narrow in zip(self.norms, self.up, self.down, self.narrow, strict=True):
            wide = x.float()
            h = norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
            h = torch.nn.functional.silu(up(h))
            half = funcol.all_reduce(narrow(h), "sum", self.group)
            x = x + funcol.all_reduce(down(h), "sum", self.group) + torch.cat([half, -half], -1)
        if self.other is not None:
            x = funcol.all_reduce(x, "avg", self.other)
        return x, x.float().argmax(-1)


@functools.cache
def compiled(size: int, dtype: torch.dtype = torch.float32, other: bool = False) -> tuple[Compiled, dict[str, bool]]:
    """The outcome of the pipeline on rank 0 of ``size``, and which placeholders are replicated."""
    options = Options.parse({"strategy": "tp", "verify": "off", "replicated": ["embed.*", "norms.*"]})
    with fake_rank(0, 2 * size if other else size) as mesh:
        group = dist.new_group(list(range(size))) if other else mesh.get_group()
        across = dist.new_group([0, size]) if other else None
        model = Mlp(group, across, size, dtype)
        trace = capture(model, input_ids=torch.randint(12, (1, 7)), use_cache=False)
        axis = axis_of("tp", group)
    if across is not None:
        rows = (tuple(range(size)), tuple(range(size, 2 * size)))
        axis = replace(axis, groups={axis.group_name: rows, across.group_name: tuple(zip(*rows, strict=True))})
    return with_facts(compile_graph(trace.gm, trace.inputs, options, lambda _: OfflineExchange(size), [axis]))


def with_facts(outcome: Compiled) -> tuple[Compiled, dict[str, bool]]:
    assert outcome.rewritten
    names = [n.name for n in outcome.original.graph.find_nodes(op="placeholder")]
    return outcome, {n: f.replicated for n, f in zip(names, outcome.facts["tp"], strict=True)}


def check(outcome: tuple[Compiled, dict[str, bool]], **options: object) -> list[str]:
    step = outcome[0].at(1000).steps[0]
    return check_numerically(source_of(step.graph), step.graph, step.interval, outcome[1].__getitem__, **options)  # type: ignore[arg-type]


def source_of(graph: PlacementGraph) -> fx.GraphModule:
    """The graph that ``graph`` annotates: the pipeline's ``variant.gm``."""
    owner = next(iter(graph.known.shapes)).graph.owning_module
    assert owner is not None
    return owner


def corrupt(monkeypatch: pytest.MonkeyPatch, edit: Edit, ranks: tuple[int, ...] = (1,)) -> None:
    """Let ``edit`` change what is materialised for ``ranks``."""

    def materialised(gm: fx.GraphModule, graph: PlacementGraph, interval: Interval) -> fx.GraphModule:
        made = materialise(gm, graph, interval)
        if graph.known.axis.rank in ranks:
            edit(made)
            made.graph.lint()
            made.recompile()
        return made

    monkeypatch.setattr(verify_numeric, "materialise", materialised)


def calls(gm: fx.GraphModule, target: object) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=target)


def drop_last_gather(gm: fx.GraphModule) -> None:
    gather = calls(gm, c10d.all_gather_into_tensor.default)[-1]
    with gm.graph.inserting_before(gather):
        gather.replace_all_uses_with(gm.graph.call_function(aten.cat.default, ([gather.args[0]] * 2,)))
    gm.graph.erase_node(gather)


def shift_rows(gm: fx.GraphModule) -> None:
    """Rank 1's rows from one row earlier."""
    rows = next(n for n in calls(gm, aten.slice.Tensor) if n.args[2] != 0)
    with gm.graph.inserting_before(rows):
        for index in (2, 3):
            rows.update_arg(index, gm.graph.call_function(operator.sub, (rows.args[index], 1)))


def swap_first_scatters(gm: fx.GraphModule) -> None:
    first, second = calls(gm, c10d.reduce_scatter_tensor.default)[:2]
    needed, todo = {second}, [second]
    while todo:
        operands = set(todo.pop().all_input_nodes) - needed
        needed |= operands
        todo += operands
    assert first not in needed
    order = list(gm.graph.nodes)
    for node in order[order.index(first) :]:
        if node in needed:
            first.prepend(node)


def change_output(target: object, *args: object, **kwargs: object) -> Edit:
    """Put a call between the first result and the output."""

    def edit(gm: fx.GraphModule) -> None:
        output = gm.graph.output_node()
        value, *others = output.args[0]  # type: ignore[misc]
        with gm.graph.inserting_before(output):
            output.args = ((gm.graph.call_function(target, (value, *args), kwargs), *others),)  # type: ignore[arg-type]

    return edit


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_right_rewrite_passes(size: int) -> None:
    outcome = compiled(size)
    gm = outcome[0].at(1000).gm
    assert calls(gm, c10d.reduce_scatter_tensor.default) and calls(gm, c10d.all_gather_into_tensor.default)
    assert check(outcome) == []
    assert check(outcome, seed=1, token_counts=[5 * size]) == []


def test_a_right_rewrite_of_a_bfloat16_graph_passes() -> None:
    assert check(compiled(2, torch.bfloat16)) == []


def test_the_error_of_a_right_rewrite_is_far_below_the_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_numeric, "tolerance", lambda dtype: 1e-14)
    assert check(compiled(4)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_off_by_one_are_reported(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    corrupt(monkeypatch, shift_rows)
    failures = check(compiled(2, dtype), token_counts=[8])
    assert [f.split(": rel")[0] for f in failures[:1]] == ["T=8: rank 0: output 0"]
    assert any(f.startswith("T=8: rank 1: output 0: relative error") for f in failures)


def test_the_rows_of_another_rank_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        verify_numeric,
        "materialise",
        lambda gm, graph, interval: materialise(gm, verify_numeric._at_rank(graph, 0), interval),
    )
    failures = check(compiled(3), token_counts=[6])
    assert {f"T=6: rank {rank}: output 0" for rank in range(3)} <= {f.split(": rel")[0] for f in failures}


def test_a_gather_that_one_rank_lacks_names_the_waiting_node(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, drop_last_gather)
    failures = check(compiled(2))
    assert failures
    assert all("rank 1 has finished while rank 0 waits at all_gather_into_tensor 'all_gather" in f for f in failures)


def test_a_gather_that_all_ranks_lack_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, drop_last_gather, ranks=(0, 1))
    failures = check(compiled(2), token_counts=[8])
    assert {f"T=8: rank {rank}: output 0" for rank in range(2)} <= {f.split(": rel")[0] for f in failures}


def test_reordered_collectives_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, swap_first_scatters)
    failures = check(compiled(2), token_counts=[4])
    assert failures
    assert all("rank 0 is at reduce_scatter_tensor" in f and "in the same order" in f for f in failures)
    corrupt(monkeypatch, swap_first_scatters, ranks=(0, 1))
    assert check(compiled(2), token_counts=[4]) == []


def test_another_dtype_is_reported_though_values_are_compared_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, change_output(aten._to_copy.default, dtype=torch.float16))
    failures = check(compiled(2), token_counts=[4])
    assert len(failures) == 1
    assert failures[0].startswith("T=4: rank 1: output 0: expected torch.float32 [1, 4, 16], found torch.float16")


def test_another_shape_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, change_output(aten.squeeze.dim, 0))
    assert "expected torch.float64 [1, 4, 16], found torch.float64 [4, 16]" in check(compiled(2), token_counts=[4])[-1]


def test_infinities_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, change_output(aten.div.Tensor, 0.0))
    assert check(compiled(2), token_counts=[4]) == ["T=4: rank 1: output 0: NaN or infinite in other places"]


def test_integer_results_are_compared_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(gm: fx.GraphModule) -> None:
        output = gm.graph.output_node()
        value, chosen = output.args[0]  # type: ignore[misc]
        with gm.graph.inserting_before(output):
            output.args = ((value, gm.graph.call_function(aten.add.Tensor, (chosen, 1))),)  # type: ignore[arg-type]

    corrupt(monkeypatch, edit)
    assert check(compiled(2), token_counts=[4]) == ["T=4: rank 1: output 1: 4 of 4 elements differ"]


def test_inputs_are_alike_on_all_ranks_where_they_are_replicated_and_only_there() -> None:
    outcome, replicated = compiled(2)
    graph = outcome.at(1000).steps[0].graph
    source = source_of(graph)
    mesh = verify_numeric._Mesh.of(source, graph.known.axis)
    draw = verify_numeric._Inputs(source, graph, replicated.__getitem__, mesh, seed=0)
    pairs = [(n.name, a, b) for n, a, b in zip(draw.nodes, *draw.draw(5), strict=True) if isinstance(a, torch.Tensor)]
    assert len({replicated[name] for name, _, _ in pairs}) == 2
    assert {name: torch.equal(a, b) for name, a, b in pairs} == {name: replicated[name] for name, _, _ in pairs}  # type: ignore[arg-type]


def test_one_slightly_wrong_element_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(gm: fx.GraphModule) -> None:
        change_output(aten.slice_scatter.default, 0.0, 2, 0, 0)(gm)
        node = calls(gm, aten.slice_scatter.default)[-1]
        with gm.graph.inserting_before(node):
            part = gm.graph.call_function(aten.slice.Tensor, (node.args[0], 2, 0, 1))
            node.args = (node.args[0], gm.graph.call_function(aten.mul.Tensor, (part, 1 + 1e-6)), 2, 0, 1)

    corrupt(monkeypatch, edit)
    (failure,) = check(compiled(2), token_counts=[4])
    assert failure.startswith("T=4: rank 1: output 0: relative error")


def test_other_groups_are_what_their_rank_lists_say() -> None:
    outcome = compiled(2, other=True)
    assert len({n.args[-1] for n in calls(outcome[0].original, c10d.all_reduce.default)}) == 2
    assert check(outcome) == []


def test_all_ranks_of_other_groups_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    corrupt(monkeypatch, shift_rows)
    failures = check(compiled(2, other=True), token_counts=[8])
    assert {f.split(": ")[1] for f in failures} == {"rank 0", "rank 1", "rank 2", "rank 3"}


def test_models_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_numeric, "MOST_BYTES", 2**10)
    (failure,) = check(compiled(2))
    assert "more than" in failure and failure.endswith("use verify='static' for a model of this size")


def test_a_comparison_of_zeros_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_numeric, "SCALES", (0.0, 0.0))
    (failure,) = check(compiled(2), token_counts=[4])
    assert failure.startswith("every output is zero")


def test_an_original_that_cannot_run_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = compiled(2)
    (ids,) = verify_numeric._vocabulary(source_of(outcome[0].at(1000).steps[0].graph), 2, outcome[1].__getitem__)
    monkeypatch.setattr(verify_numeric, "_vocabulary", lambda *_: {ids: 1000})
    (failure,) = check(outcome, token_counts=[40])
    assert failure.startswith(
        "T=40: the original graph fails on random inputs, use verify='static': rank 0: node 'embedding'"
    )


@pytest.mark.parametrize(
    ("bounds", "counts"), [((2, 2**62), [1, 3, 4, 5, 11]), ((6, 2**62), [9, 11, 12, 13, 19]), ((2, 4), [1, 3, 4, 4, 4])]
)
def test_token_counts_keep_to_the_graphs_guards(
    monkeypatch: pytest.MonkeyPatch, bounds: tuple[int, int], counts: list[int]
) -> None:
    graph = compiled(4)[0].at(1000).steps[0].graph
    assert verify_numeric._range_of(source_of(graph), graph.known.tokens)[0] <= 2  # type: ignore[arg-type]
    monkeypatch.setattr(verify_numeric, "_range_of", lambda *_: bounds)
    assert verify_numeric._default_counts(source_of(graph), graph) == counts


def test_a_graph_without_float64_form_is_checked_in_its_own_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_numeric._Check, "_has_wide_form", lambda self, tokens: False)
    assert check(compiled(2)) == []
    corrupt(monkeypatch, shift_rows)
    assert any(f.endswith(f"tolerance {tolerance(torch.float32):.1e}") for f in check(compiled(2), token_counts=[8]))


def test_the_float64_form_of_a_grouped_product() -> None:
    graph = fx.Graph()
    a, b, ends = (graph.placeholder(name) for name in "abe")
    graph.output(graph.call_function(aten._grouped_mm.default, (a, b, ends)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    rows, matrices, ends = torch.randn(12, 16), torch.randn(3, 16, 8), torch.tensor([4, 4, 12], dtype=torch.int32)
    wide = widened(gm)(rows.double(), matrices.double(), ends)
    torch.testing.assert_close(wide.float(), gm(rows, matrices, ends))


def test_a_small_deepseek_v3_passes_on_every_rank() -> None:
    for outcome in case("v3", 2).ranks.compile(strategy="tp", verify="off"):
        assert check(with_facts(outcome), token_counts=[1, 5]) == []
