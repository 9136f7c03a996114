"""The lockstep interpreter: what runs, and every way in which ranks cannot run together, with rank and node named."""

from __future__ import annotations

import operator
import re
import weakref
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cpcompile.passes.lockstep import LockstepError, RankProgram, collective_trace, run_lockstep

C10D = torch.ops._c10d_functional
ATEN = torch.ops.aten
TP = {"tp": (0, 1)}
Groups = Mapping[str, tuple[int, ...]]
# (kind, group, node name, further arguments before the group)
Call = tuple[str, str, str, tuple[object, ...]]


def chain(*calls: Call) -> fx.GraphModule:
    """``x`` through a sequence of collectives (or of the pointwise ``scale``), each waited for."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for kind, group, name, args in calls:
        if kind == "scale":
            value = graph.create_node("call_function", ATEN.mul.Tensor, (value, *args), name=name)
            continue
        target = getattr(C10D, kind).default
        value = graph.create_node("call_function", target, (value, *args, group), name=name)
        value = graph.call_function(C10D.wait_tensor.default, (value,))
    graph.output(value)
    return fx.GraphModule(torch.nn.Module(), graph)


def ar(name: str, group: str = "tp", reduce_op: str = "sum") -> Call:
    return ("all_reduce", group, name, (reduce_op,))


def rs(name: str, n: int = 2, group: str = "tp") -> Call:
    return ("reduce_scatter_tensor", group, name, ("sum", n))


def ag(name: str, n: int = 2, group: str = "tp") -> Call:
    return ("all_gather_into_tensor", group, name, (n,))


def ramp(rank: int, rows: int = 4) -> Tensor:
    return torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3) + 100 * rank


def run(
    gms: Sequence[fx.GraphModule], groups: Groups | Sequence[Groups] = TP, inputs: Sequence[Tensor] | None = None
) -> list[object]:
    views = [groups] * len(gms) if isinstance(groups, Mapping) else groups
    xs = inputs or [ramp(r) for r in range(len(gms))]
    return run_lockstep([RankProgram(gm, [x], view) for gm, x, view in zip(gms, xs, views, strict=True)])


def error_of(*args: object, **kwargs: object) -> str:
    with pytest.raises(LockstepError) as caught:
        run(*args, **kwargs)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


# What runs


def test_reduce_scatter_then_all_gather_has_the_bits_of_all_reduce() -> None:
    xs = [torch.randn(6, 5, generator=torch.Generator().manual_seed(r)).bfloat16() for r in range(3)]
    groups = {"tp": (0, 1, 2)}
    reduced = run([chain(ar("ar"))] * 3, groups, xs)
    split = run([chain(rs("rs", 3), ag("ag", 3))] * 3, groups, xs)
    assert all(torch.equal(a, b) for a, b in zip(reduced, split, strict=True))
    assert all(torch.equal(reduced[0], other) for other in reduced)


def test_two_axes() -> None:
    # A 2 x 2 mesh: rank r is (r // 2, r % 2); each rank sees only its own row ("tp") and column ("dp").
    views = [{"tp": [(0, 1), (2, 3)][r // 2], "dp": [(0, 2), (1, 3)][r % 2]} for r in range(4)]
    outs = run([chain(ar("ar"), ag("ag", group="dp"))] * 4, views)
    rows = [ramp(0) + ramp(1), ramp(2) + ramp(3)]
    assert all(torch.equal(out, torch.cat(rows)) for out in outs)


def test_group_order_is_the_order_of_the_gather() -> None:
    outs = run([chain(ag("ag"))] * 2, {"tp": (1, 0)})
    assert torch.equal(outs[0], torch.cat([ramp(1), ramp(0)]))


def test_ranks_may_run_ahead_and_have_different_graphs() -> None:
    # Rank 2 works alone, rank 0 has a further collective with rank 1 only, constants and node names differ.
    views = [{"a": (0, 1)}, {"a": (0, 1), "b": (1, 2)}, {"b": (1, 2)}]
    gms = [
        chain(("scale", "", "s0", (2.0,)), ar("x0", "a")),
        chain(ar("x1", "a"), ar("y1", "b")),
        chain(("scale", "", "s2", (3.0,)), ("scale", "", "t2", (0.5,)), ar("y2", "b")),
    ]
    first = 2 * ramp(0) + ramp(1)
    outs = run(gms, views)
    assert torch.equal(outs[0], first)
    assert torch.equal(outs[1], first + 1.5 * ramp(2)) and torch.equal(outs[2], outs[1])


def rank_slice(rank: int) -> fx.GraphModule:
    """The rank's half of ``s`` rows, by python and sym ops on a SymInt, plus a constant; a mesh that nothing uses."""
    graph = fx.Graph()
    size, mesh, x = (graph.placeholder(name) for name in ("s", "mesh", "x"))
    assert mesh.op == "placeholder"
    half = graph.call_function(operator.floordiv, (size, 2))
    start = graph.call_function(operator.mul, (half, rank))
    stop = graph.call_function(torch.sym_min, (graph.call_function(operator.add, (start, half)), size))
    rows = graph.call_function(ATEN.slice.Tensor, (x, 0, start, stop))
    shifted = graph.call_function(ATEN.add.Tensor, (rows, graph.get_attr("_tensor_constant0")))
    gathered = graph.call_function(C10D.all_gather_into_tensor.default, (shifted, 2, "tp"))
    waited = graph.call_function(C10D.wait_tensor.default, (gathered,))
    graph.output(
        {"gathered": waited, "more": (half, [shifted, None]), "rows": graph.call_function(ATEN.sym_size.int, (rows, 0))}
    )
    root = torch.nn.Module()
    root._tensor_constant0 = torch.full((3,), float(rank))
    return fx.GraphModule(root, graph)


def test_symint_constants_unused_objects_and_nested_outputs() -> None:
    x = ramp(0, 6)
    programs = [RankProgram(rank_slice(r), [6, object(), x], TP) for r in range(2)]
    outs = run_lockstep(programs)
    for rank, out in enumerate(outs):
        assert torch.equal(out["gathered"], torch.cat([x[:3], x[3:] + 1]))
        assert out["more"][0] == 3 and out["more"][1][1] is None and out["rows"] == 3
        assert torch.equal(out["more"][1][0], x[3 * rank : 3 * rank + 3] + rank)


def test_operands_of_a_group_of_one_and_world_of_one() -> None:
    assert torch.equal(run([chain(ar("ar"), rs("rs", 1), ag("ag", 1))], {"tp": (0,)})[0], ramp(0))
    assert run_lockstep([]) == []


def test_values_are_freed_after_their_last_use() -> None:
    references: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def remember(value: Tensor) -> Tensor:
        alive.append(sum(reference() is not None for reference in references))
        references.append(weakref.ref(result := value + 1))
        return result

    graph = fx.Graph()
    value = graph.placeholder("x")
    for _ in range(6):
        value = graph.call_function(remember, (value,))
        graph.call_function(remember, (value,))  # nobody uses it
        value = graph.call_function(C10D.wait_tensor.default, (value,))
    graph.output(value)
    run([fx.GraphModule(torch.nn.Module(), graph)])
    assert max(alive) == 1  # only the operand


def test_no_gradient_is_recorded() -> None:
    (out,) = run([chain(("scale", "", "s", (2.0,)))], inputs=[torch.nn.Parameter(ramp(0))])
    assert not out.requires_grad


def test_trace_lists_collectives_in_graph_order() -> None:
    gm = chain(ar("ar_1"), ("scale", "", "s", (2.0,)), rs("rs_1", group="dp"), ag("ag_1"))
    assert collective_trace(gm) == [
        ("all_reduce", "tp", "ar_1"),
        ("reduce_scatter_tensor", "dp", "rs_1"),
        ("all_gather_into_tensor", "tp", "ag_1"),
    ]
    graph = fx.Graph()
    graph.output(graph.call_function(C10D.all_reduce_.default, (graph.placeholder("x"), "sum", "tp")))
    with pytest.raises(LockstepError, match=r"^node 'all_reduce__default' is the unknown collective"):
        collective_trace(fx.GraphModule(torch.nn.Module(), graph))


# (a) different collectives


def test_different_kinds() -> None:
    assert error_of([chain(ar("ar_3")), chain(rs("rs_1"))]).startswith(
        "rank 0 is at all_reduce 'ar_3' and rank 1 at reduce_scatter_tensor 'rs_1' of group tp: "
    )


def test_different_kinds_are_reported_though_a_third_rank_never_comes() -> None:
    gms = [chain(ar("ar_3")), chain(("scale", "", "s", (1.0,))), chain(rs("rs_1", 3))]
    message = error_of(gms, {"tp": (0, 1, 2)}, [ramp(0, 6)] * 3)
    assert message.startswith("rank 0 is at all_reduce 'ar_3' and rank 2 at reduce_scatter_tensor 'rs_1' of group tp: ")


def test_different_reduce_ops() -> None:
    assert error_of([chain(ar("a")), chain(ar("b", reduce_op="max"))]).startswith(
        "rank 0 is at all_reduce 'a' with reduce_op sum and rank 1 at all_reduce 'b' with reduce_op max of group tp: "
    )


def test_different_sources() -> None:
    gms = [chain(("broadcast", "tp", f"bc_{src}", (src,))) for src in range(2)]
    assert "rank 0 is at broadcast 'bc_0' with src 0 and rank 1 at broadcast 'bc_1' with src 1" in error_of(gms)


def test_swap_within_a_group() -> None:
    message = error_of([chain(rs("r"), ag("g")), chain(ag("g"), rs("r"))])
    assert message.startswith(
        "rank 0 is at reduce_scatter_tensor 'r' and rank 1 at all_gather_into_tensor 'g' of group tp"
    )


# (b) deadlock


def test_two_groups_in_different_order_deadlock() -> None:
    groups = {"tp": (0, 1, 2, 3), "ep": (0, 1, 2, 3)}
    right, wrong = chain(ar("a", "tp"), ar("b", "ep")), chain(ar("b", "ep"), ar("a", "tp"))
    message = error_of([right, wrong, right, right], groups)
    assert message == (
        "deadlock, ranks 0, 2-3 at all_reduce 'a' of group tp [0, 1, 2, 3], rank 1 at all_reduce 'b' of group ep "
        "[0, 1, 2, 3]: every rank must issue its collectives in the same order"
    )


def test_cycle_over_three_groups_deadlocks() -> None:
    groups = {"x": (0, 1), "y": (1, 2), "z": (0, 2)}
    gms = [
        chain(ar("x0", "x"), ar("z0", "z")),
        chain(ar("y1", "y"), ar("x1", "x")),
        chain(ar("z2", "z"), ar("y2", "y")),
    ]
    message = error_of(gms, groups)
    for place in ("rank 0 at all_reduce 'x0' of group x", "rank 1 at all_reduce 'y1'", "rank 2 at all_reduce 'z2'"):
        assert place in message


# (c) a rank ends


def test_rank_that_ends_early() -> None:
    message = error_of([chain(ar("ar_1"), ar("ar_2")), chain(ar("ar_1"))])
    assert message == "rank 1 has finished while rank 0 waits at all_reduce 'ar_2' of group tp: a collective is missing"


def test_ranks_that_end_early() -> None:
    idle = chain(("scale", "", "s", (1.0,)))
    message = error_of([idle, idle, chain(ag("ag", 4)), idle], {"tp": (0, 1, 2, 3)})
    assert message.startswith(
        "ranks 0-1, 3 have finished while rank 2 waits at all_gather_into_tensor 'ag' of group tp"
    )


# (d) uneven shapes and dtypes


@pytest.mark.parametrize(("call", "kind"), [(ar("c"), "all_reduce"), (ag("c"), "all_gather_into_tensor")])
def test_uneven_shapes(call: Call, kind: str) -> None:
    assert error_of([chain(call)] * 2, TP, [ramp(0), ramp(1, 3)]).startswith(
        f"rank 0 is at {kind} 'c' with operands float32 [4, 3] and rank 1 at {kind} 'c' with operands float32 [3, 3] of"
    )


def test_different_dtypes() -> None:
    message = error_of([chain(ar("c"))] * 2, TP, [ramp(0), ramp(1).bfloat16()])
    assert "rank 0 is at all_reduce 'c' with operands float32 [4, 3] and rank 1 at all_reduce 'c' with" in message
    assert "operands bfloat16 [4, 3] of group tp" in message


def test_indivisible_reduce_scatter() -> None:
    assert error_of([chain(rs("rs_7"))] * 2, TP, [ramp(0, 5)] * 2) == (
        "rank 0: reduce_scatter_tensor 'rs_7' of group tp: "
        "expected dim 0 divisible by the group size 2, found shape [5, 3]; pad it first"
    )


def test_all_to_all_splits_that_do_not_mirror() -> None:
    gms = [chain(("all_to_all_single", "tp", f"a2a_{r}", ([2, 2], [1, 3]))) for r in range(2)]
    message = error_of(gms)
    assert message == (
        "rank 0: all_to_all_single 'a2a_0' of group tp: output_split_sizes [2, 2] do not match what rank 0 sends at "
        "'a2a_0', input_split_sizes [1, 3]"
    )


def test_all_to_all_of_uneven_rows_is_fine_but_not_of_uneven_columns() -> None:
    gms = [
        chain(("all_to_all_single", "tp", "a2a", ([1, 2], [1, 1]))),
        chain(("all_to_all_single", "tp", "a2a", ([1, 0], [2, 0]))),
    ]
    outs = run(gms, TP, [ramp(0, 2), ramp(1, 2)])
    assert [len(out) for out in outs] == [3, 1]
    message = error_of(gms, TP, [ramp(0, 2), ramp(1, 2)[:, :2]])
    assert "rank 0 is at all_to_all_single 'a2a' with operands float32 [*, 3] and rank 1" in message


def test_coalesced_operands_of_different_number() -> None:
    def pair(count: int) -> fx.GraphModule:
        graph = fx.Graph()
        operands = [graph.placeholder("x")] * count
        graph.output(graph.call_function(C10D.all_reduce_coalesced.default, (operands, "sum", "tp")))
        return fx.GraphModule(torch.nn.Module(), graph)

    message = error_of([pair(1), pair(2)])
    assert (
        "rank 1 at all_reduce_coalesced 'all_reduce_coalesced_default' with operands float32 [4, 3], float32 [4, 3]"
        in message
    )


# (e) groups


def test_group_unknown_to_a_rank() -> None:
    assert error_of([chain(ar("ar_9"))] * 2, [TP, {"tpx": (0, 1)}]) == (
        "rank 1: all_reduce 'ar_9' of group tp: this rank does not know the group (did you mean 'tpx'?)"
    )


def test_rank_outside_the_group() -> None:
    message = error_of([chain(ar("ar_9"))] * 3, TP)
    assert message == "rank 2: all_reduce 'ar_9' of group tp: this rank is not one of the group's ranks 0-1"


@pytest.mark.parametrize("members", [(0, 5), (0, 0)])
def test_group_with_impossible_ranks(members: tuple[int, ...]) -> None:
    message = error_of([chain(ar("ar_9"))] * 2, {"tp": members})
    assert message.startswith("rank 0: all_reduce 'ar_9' of group tp: expected distinct ranks of 0 to 1, found [0, ")


@pytest.mark.parametrize("call", [rs("c", 4), ag("c", 4)])
def test_group_size_that_is_not_the_groups(call: Call) -> None:
    assert error_of([chain(call)] * 2) == f"rank 0: {call[0]} 'c' of group tp: expected group_size 2, found 4"


def test_members_that_see_a_group_differently() -> None:
    message = error_of([chain(ar("p")), chain(ar("q"))], [TP, {"tp": (1, 0)}])
    assert message == (
        "rank 0 waits at all_reduce 'p' of group tp as ranks [0, 1], rank 1 at all_reduce 'q' as ranks [1, 0]: "
        "every member must see a group alike"
    )


def test_group_name_that_is_not_a_string() -> None:
    graph = fx.Graph()
    x, group = graph.placeholder("x"), graph.placeholder("group")
    graph.output(graph.call_function(C10D.all_reduce.default, (x, "sum", group)))
    program = RankProgram(fx.GraphModule(torch.nn.Module(), graph), [ramp(0), 7], {"tp": (0,)})
    with pytest.raises(
        LockstepError, match=r"^rank 0: all_reduce 'all_reduce_default' of group 7: this rank does not know"
    ):
        run_lockstep([program])


# (f) ordinary nodes


def test_failing_node_names_rank_and_node_and_chains_the_cause() -> None:
    good = chain(ar("ar"))
    graph = fx.Graph()
    graph.output(graph.create_node("call_function", ATEN.mm.default, (graph.placeholder("x"),) * 2, name="mm_5"))
    bad = fx.GraphModule(torch.nn.Module(), graph)
    with pytest.raises(
        LockstepError, match=r"^rank 1: node 'mm_5' \(aten.mm.default\) failed: mat1 and mat2"
    ) as caught:
        run([good, bad])
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_error_without_a_message_and_of_many_lines() -> None:
    def fail(value: object) -> object:
        raise KeyError if value is None else RuntimeError("first\nsecond")

    for argument, text in [(None, "KeyError"), (1, "first")]:
        graph = fx.Graph()
        graph.output(graph.call_function(fail, (argument,)))
        with pytest.raises(LockstepError, match=rf"^rank 0: node 'fail' \(.*\) failed: {text}$"):
            run_lockstep([RankProgram(fx.GraphModule(torch.nn.Module(), graph), [], {})])


def test_methods_and_modules_are_refused() -> None:
    for op, target in [("call_method", "neg"), ("call_module", "child")]:
        graph = fx.Graph()
        graph.output(graph.create_node(op, target, (graph.placeholder("x"),), name="n"))
        gm = fx.GraphModule({"child": torch.nn.Identity()}, graph)
        assert error_of([gm]).startswith(f"rank 0: node 'n' is a {op}; expected a functional ATen graph")


def test_wrong_number_of_inputs() -> None:
    with pytest.raises(LockstepError, match=r"^rank 1: expected 1 inputs, one per placeholder, found 2$"):
        run_lockstep([RankProgram(chain(), [x] * n, {}) for x, n in ((ramp(0), 1), (ramp(1), 2))])


# Random programs


LAYOUTS: list[tuple[int, dict[str, list[tuple[int, ...]]]]] = [
    (2, {"a": [(0, 1)], "b": [(0, 1)]}),
    (3, {"a": [(0, 1, 2)], "b": [(2, 0, 1)]}),
    (4, {"a": [(0, 1), (2, 3)], "b": [(0, 2), (1, 3)]}),
    (4, {"a": [(0, 1, 2, 3)], "b": [(0, 1), (2, 3)]}),
]
STEPS = ["all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "scale"]
PROGRAMS = st.tuples(
    st.sampled_from(LAYOUTS), st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from("ab")), min_size=1, max_size=6)
)


def group_of(layout: dict[str, list[tuple[int, ...]]], name: str, rank: int) -> tuple[int, ...]:
    return next(members for members in layout[name] if rank in members)


def views_of(world_size: int, layout: dict[str, list[tuple[int, ...]]]) -> list[Groups]:
    return [{name: group_of(layout, name, rank) for name in layout} for rank in range(world_size)]


def calls_of(layout: dict[str, list[tuple[int, ...]]], steps: Sequence[tuple[str, str]]) -> list[Call]:
    calls = []
    for i, (kind, group) in enumerate(steps):
        n = len(layout[group][0])
        args = {
            "all_reduce": ("sum",),
            "reduce_scatter_tensor": ("sum", n),
            "all_gather_into_tensor": (n,),
            "scale": (3,),
        }
        calls.append((kind, group, f"c{i}", args[kind]))
    return calls


def reference(
    layout: dict[str, list[tuple[int, ...]]], steps: Sequence[tuple[str, str]], xs: list[Tensor]
) -> list[Tensor]:
    """The same program with whole-world lists in place of ranks; integers, so that no order of summation matters."""
    for kind, name in steps:
        groups = [group_of(layout, name, rank) for rank in range(len(xs))]
        stacks = [torch.stack([xs[r] for r in members]) for members in groups]
        places = [members.index(rank) for rank, members in enumerate(groups)]
        compute: dict[str, Callable[[Tensor, int], Tensor]] = {
            "all_reduce": lambda s, i: s.sum(0),
            "reduce_scatter_tensor": lambda s, i: s.sum(0).unflatten(0, (len(s), -1))[i],
            "all_gather_into_tensor": lambda s, i: s.flatten(0, 1),
            "scale": lambda s, i: s[i] * 3,
        }
        xs = [compute[kind](stack, place) for stack, place in zip(stacks, places, strict=True)]
    return xs


def rows_that_divide(layout: dict[str, list[tuple[int, ...]]], steps: Sequence[tuple[str, str]]) -> int:
    rows = 1
    for kind, group in steps:
        rows *= len(layout[group][0]) if kind == "reduce_scatter_tensor" else 1
    return rows


def integers(world_size: int, rows: int) -> list[Tensor]:
    return [torch.randint(-9, 9, (rows, 2), generator=torch.Generator().manual_seed(r)) for r in range(world_size)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(program=PROGRAMS)
def test_equal_sequences_never_deadlock_and_agree_with_the_reference(program: tuple) -> None:
    (world_size, layout), steps = program
    xs = integers(world_size, rows_that_divide(layout, steps))
    outs = run([chain(*calls_of(layout, steps))] * world_size, views_of(world_size, layout), xs)
    assert all(torch.equal(out, want) for out, want in zip(outs, reference(layout, steps, xs), strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(program=PROGRAMS, data=st.data())
def test_a_collective_dropped_by_one_rank_is_always_reported(program: tuple, data: st.DataObject) -> None:
    (world_size, layout), steps = program
    steps = [*steps, ("all_reduce", "a")]
    calls = calls_of(layout, steps)
    rank = data.draw(st.integers(0, world_size - 1))
    dropped = data.draw(st.sampled_from([i for i, step in enumerate(steps) if step[0] != "scale"]))
    gms = [chain(*calls)] * world_size
    gms[rank] = chain(*calls[:dropped], *calls[dropped + 1 :])
    message = error_of(gms, views_of(world_size, layout), integers(world_size, rows_that_divide(layout, steps)))
    assert re.search(r"ranks? \d", message) and re.search(r"'c\d'", message)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(program=PROGRAMS, data=st.data())
def test_collectives_swapped_by_one_rank_are_always_reported(program: tuple, data: st.DataObject) -> None:
    (world_size, layout), steps = program
    rank = data.draw(st.integers(0, world_size - 1))
    # Reordering is an error when another rank takes part in both; else both orders are the same program to the world.
    shared = set(group_of(layout, "a", rank)) & set(group_of(layout, "b", rank))
    pair = [("all_reduce", "a"), ("all_reduce", "b") if len(shared) > 1 else ("all_gather_into_tensor", "a")]
    place = data.draw(st.integers(0, len(steps)))
    steps = [*steps[:place], *pair, *steps[place:]]
    calls = calls_of(layout, steps)
    gms = [chain(*calls)] * world_size
    gms[rank] = chain(*calls[:place], calls[place + 1], calls[place], *calls[place + 2 :])
    message = error_of(gms, views_of(world_size, layout), integers(world_size, rows_that_divide(layout, steps)))
    assert f"'c{place}'" in message and f"'c{place + 1}'" in message and str(rank) in message
