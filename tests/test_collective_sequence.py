"""Collectives of all ranks matched without running them: what is accepted, every fault by name, and real runs agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import sympy
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from placed import layer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cpcompile.costs import profile
from cpcompile.passes.collective_sequence import OrderProof, check_collective_order
from cpcompile.passes.lockstep import LockstepError, RankProgram, run_lockstep
from cpcompile.passes.materialise import materialise
from cpcompile.passes.place import place

C10D, ATEN = torch.ops._c10d_functional, torch.ops.aten
ROWS, WIDTH = 8, 3
Members = tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """A collective on the graph's input, cast to ``dtype``, of its first ``width`` columns; or work (``scale``)."""

    kind: str
    group: str = "tp"
    dtype: torch.dtype = torch.float32
    width: int = WIDTH
    reduce_op: str = "sum"
    splits: tuple[list[int], list[int]] | None = None


AR, RS, AG = (Call(kind) for kind in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor"))
A2A, BC, LOCAL = Call("all_to_all_single"), Call("broadcast"), Call("scale")


def graph_of(calls: Sequence[Call], groups: Mapping[str, Members]) -> fx.GraphModule:
    """Names are the place in ``calls``: ``c0``, ``c1``. Every node has its fake tensor, as a trace has."""
    graph, mode = fx.Graph(), FakeTensorMode()
    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.zeros(ROWS, WIDTH))
    results = []
    for place_, call in enumerate(calls):
        n = len(groups.get(call.group, (0,)))
        value = graph.call_function(ATEN._to_copy.default, (x,), {"dtype": call.dtype})
        value.meta["val"] = x.meta["val"].to(call.dtype)
        sliced = graph.call_function(ATEN.slice.Tensor, (value, 1, 0, call.width))
        sliced.meta["val"] = value.meta["val"][:, : call.width]
        if call.kind == "scale":
            results.append(graph.call_function(ATEN.mul.Tensor, (sliced, 2.0)))
            continue
        even = [ROWS // n] * n
        args = {
            "all_reduce": (call.reduce_op,),
            "reduce_scatter_tensor": (call.reduce_op, n),
            "all_gather_into_tensor": (n,),
            "all_to_all_single": call.splits or (even, even),
            "broadcast": (0,),
        }[call.kind]
        target = getattr(C10D, call.kind).default
        node = graph.create_node("call_function", target, (sliced, *args, call.group), name=f"c{place_}")
        results.append(graph.call_function(C10D.wait_tensor.default, (node,)))
    graph.output(tuple(results))
    return fx.GraphModule(torch.nn.Module(), graph)


def views(size: int, **layouts: Sequence[Members]) -> list[dict[str, Members]]:
    """Each rank's own groups."""
    return [{name: m for name, groups in layouts.items() for m in groups if r in m} for r in range(size)]


TWO = views(2, tp=[(0, 1)], ep=[(0, 1)])
MESH = views(4, tp=[(0, 1), (2, 3)], o_proj=[(0, 2), (1, 3)], all=[(0, 1, 2, 3)])


def check(programs: Sequence[Sequence[Call]], groups: Sequence[Mapping[str, Members]] = TWO) -> OrderProof:
    found = check_collective_order([graph_of(c, g) for c, g in zip(programs, groups, strict=True)], groups)
    assert all("\n" not in line for line in found.failures)
    return found


def failure(programs: Sequence[Sequence[Call]], groups: Sequence[Mapping[str, Members]] = TWO) -> str:
    (line,) = check(programs, groups).failures
    return line


# What is accepted


def test_equal_sequences_and_different_groups_of_one_kind() -> None:
    program = [replace(A2A, group="o_proj"), replace(RS, group="o_proj"), AR, replace(AG, group="all")]
    assert check([program] * 4, MESH) == OrderProof(2 + 2 + 2 + 1, ())


def test_other_work_and_idle_ranks() -> None:
    groups = views(3, tp=[(0, 1)])
    assert check([[LOCAL, AR, AG], [AR, LOCAL, LOCAL, AG], [LOCAL]], groups) == OrderProof(2, ())
    assert check([[AR], [AR], []], groups).holds
    assert check([[], [], []], groups) == check([[LOCAL]] * 3, groups) == OrderProof(0, ())
    assert check_collective_order([], []).holds


def test_ranks_of_other_groups_need_no_order_among_them() -> None:
    """Ranks 0 and 1 end before ranks 2 and 3 begin; a bridge between the pairs orders only what it meets."""
    groups = views(4, tp=[(0, 1), (2, 3)], bridge=[(1, 2)])
    bridge = replace(AR, group="bridge")
    assert check([[AR, AG], [AR, bridge, AG], [bridge, RS], [RS]], groups).holds


def test_uneven_all_to_all() -> None:
    to = replace(A2A, splits=([3, 2], [3, 5])), replace(A2A, splits=([5, 6], [2, 6]))
    assert check([[to[0]], [to[1]]]).holds


# Faults, by name


def test_a_missing_collective() -> None:
    assert failure([[AR, AG], [AR]]) == (
        "rank 0 at all_gather_into_tensor 'c1' of group tp [0, 1]: expected rank 1 there, found the end of its graph: "
        "a collective is missing"
    )


def test_an_idle_rank_that_does_not_take_part() -> None:
    line = failure([[replace(AR, group="all")]] * 3 + [[LOCAL]], MESH)
    assert line.startswith("rank 0 at all_reduce 'c0' of group all [0, 1, 2, 3]: expected rank 3 there")


def test_swapped_order_on_one_rank_names_the_odd_one_out() -> None:
    ar, ag = replace(AR, group="all"), replace(AG, group="all")
    assert failure([[ag, ar], [ar, ag], [ar, ag], [ar, ag]], MESH) == (
        "rank 0 at all_gather_into_tensor 'c0' of group all [0, 1, 2, 3]: expected all_reduce 'c0' as on rank 1, found "
        "all_gather_into_tensor: in another order, or one is missing"
    )


def test_a_different_group() -> None:
    line = failure([[AR], [replace(AR, group="ep")]])
    assert line == (
        "deadlock: expected one order of collectives on all ranks, found rank 0 at all_reduce 'c0' of group tp [0, 1] "
        "for rank 1, rank 1 at all_reduce 'c0' of group ep [0, 1] for rank 0"
    )


def test_cross_group_deadlock() -> None:
    a, b = AR, replace(AR, group="ep")
    line = failure([[a, b], [b, a]])
    assert line.startswith("deadlock") and "rank 0 at all_reduce 'c0' of group tp" in line and "of group ep" in line
    assert check([[a, b], [a, b]]).holds


def test_a_deadlock_over_three_groups_names_only_its_circle() -> None:
    groups = views(4, x=[(1, 2)], y=[(2, 3)], z=[(1, 3)], w=[(0, 1)])
    x, y, z, w = (replace(AR, group=name) for name in "xyzw")
    line = failure([[w], [x, z, w], [y, x], [z, y]], groups)
    assert line.startswith("deadlock") and "rank 0" not in line
    for place_ in (
        "rank 1 at all_reduce 'c0' of group x",
        "rank 2 at all_reduce 'c0' of group y",
        "group z [1, 3] for",
    ):
        assert place_ in line


@pytest.mark.parametrize(
    ("other", "text"),
    [
        (replace(AR, dtype=torch.bfloat16), "expected dtype float32 as 'c0' of rank 0, found bfloat16"),
        (replace(AR, width=2), "expected shape [8, 3] as 'c0' of rank 0, found [8, 2]"),
        (replace(AR, reduce_op="max"), "expected reduce_op sum as 'c0' of rank 0, found max"),
    ],
)
def test_operands_that_do_not_go_together(other: Call, text: str) -> None:
    assert failure([[AR], [other]]) == f"rank 1 at all_reduce 'c0' of group tp [0, 1]: {text}"
    assert not check([[AR, AG], [other, AG]]).holds


def test_split_sizes_that_do_not_mirror() -> None:
    lines = check([[A2A], [replace(A2A, splits=([3, 5], [4, 4]))]]).failures
    assert lines == tuple(
        f"rank 1 at all_to_all_single 'c0' of group tp [0, 1]: expected 4 rows from rank {sender} at 'c0', "
        f"found {found} in output_split_sizes"
        for sender, found in ((0, 3), (1, 5))
    )
    assert "expected 2 input_split_sizes, found 3" in failure([[A2A], [replace(A2A, splits=([4, 4], [3, 3, 2]))]])


def test_groups_that_ranks_see_differently() -> None:
    line = failure([[AR], [AR]], [{"tp": (0, 1)}, {"tp": (1, 0)}])
    assert "expected the same ranks of the group on rank 1, found [1, 0] at all_reduce 'c0'" in line


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ([{"tp": (0, 1)}, {"tpx": (0, 1)}], "expected a group of this rank, found none (did you mean 'tpx'?)"),
        ([{"tp": (0, 1)}, {"tp": (0, 5)}], "expected distinct ranks of 0 to 1, rank 1 among them"),
    ],
)
def test_groups_that_cannot_be(groups: list[dict[str, Members]], text: str) -> None:
    assert text in failure([[AR], [AR]], groups)


def test_wrong_group_size_and_reduce_op() -> None:
    graphs = [graph_of([RS], g) for g in TWO]
    (node,) = graphs[1].graph.find_nodes(op="call_function", target=C10D.reduce_scatter_tensor.default)
    node.args = (node.args[0], "summ", 4, "tp")
    lines = check_collective_order(graphs, TWO).failures
    assert [line.partition(": ")[2] for line in lines] == [
        "expected group_size 2, found 4",
        "expected a reduce_op, found 'summ' (did you mean 'sum'?)",
    ]


def test_what_cannot_be_known_is_no_proof() -> None:
    graphs = [graph_of([AR], g) for g in TWO]
    for node in graphs[0].graph.nodes:
        node.meta.pop("val", None)
    (line,) = check_collective_order(graphs, TWO).failures
    assert line.startswith("rank 0 at all_reduce 'c0'") and line.endswith("found none: trace it with fake tensors")
    hidden = fx.Graph()
    hidden.output(hidden.call_function(C10D.all_reduce_.default, (hidden.placeholder("x"), "sum", "tp")))
    (line,) = check_collective_order([fx.GraphModule(torch.nn.Module(), hidden), graphs[1]], TWO).failures
    assert line.startswith("rank 0: node 'all_reduce__default' is the unknown collective")


# Real graphs, symbolic T


@pytest.fixture(scope="module")
def rewritten() -> list[tuple[fx.GraphModule, dict[str, Members]]]:
    """A tensor-parallel layer on two ranks, traced rank by rank, all-reduces rewritten."""
    found = []
    for rank in range(2):
        one = layer(2, rank=rank)
        (interval,) = place(one.graph(), profile("ascend-a3"), "tp", "").intervals
        found.append((materialise(one.gm, one.graph(), interval), {one.axis.group_name: one.axis.ranks}))
    return found


def collectives(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if str(n.target).startswith("_c10d_functional") and "wait" not in str(n.target)]


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)


def test_a_rewritten_model_keeps_the_order(rewritten) -> None:
    graphs, groups = zip(*rewritten, strict=True)
    proof = check_collective_order(graphs, groups)
    assert proof.holds and proof.collectives == len(collectives(graphs[0])) >= 4
    shapes = [n.args[0].meta["val"].shape for n in collectives(graphs[0])]
    (tokens,) = {str(s) for shape in shapes for size in shape if isinstance(size, torch.SymInt) for s in symbols(size)}
    assert proof.assumed == ((tokens, (0, 1)),)


def symbols(size: torch.SymInt) -> set[object]:
    return size.node.expr.free_symbols


@pytest.mark.parametrize("which", range(4))
def test_a_collective_dropped_from_a_rewritten_model_is_found(rewritten, which: int) -> None:
    graphs, groups = zip(*rewritten, strict=True)
    mutant = copied(graphs[1])
    node = collectives(mutant)[which]
    (wait,) = node.users
    wait.replace_all_uses_with(node.args[0])
    mutant.graph.erase_node(wait)
    mutant.graph.erase_node(node)
    assert not check_collective_order([graphs[0], mutant], groups).holds


def test_a_dtype_or_a_size_changed_in_a_rewritten_model_is_found(rewritten) -> None:
    graphs, groups = zip(*rewritten, strict=True)
    mode = next(n.meta["val"].fake_mode for n in graphs[1].graph.nodes if isinstance(n.meta.get("val"), torch.Tensor))
    for change, text in ((lambda v: v.half(), "dtype"), (lambda v: v.new_empty((7, *v.shape[1:])), "shape")):
        mutant = copied(graphs[1])
        operand = collectives(mutant)[0].args[0]
        with mode:
            operand.meta["val"] = change(operand.meta["val"])
        (line,) = check_collective_order([graphs[0], mutant], groups).failures
        assert f"expected {text}" in line


def test_symbolic_rows_of_an_all_to_all_are_assumed_equal() -> None:
    """What o_proj over a group along DP sends: each rank's own number of rows, which must be one number."""

    def traced(rows: str) -> fx.GraphModule:
        env, graph = ShapeEnv(), fx.Graph()
        size = env.create_unbacked_symint()
        size.node._expr = sympy.Symbol(rows, integer=True)
        n, x = graph.placeholder("n"), graph.placeholder("x")
        n.meta["val"] = size
        with FakeTensorMode(shape_env=env):
            x.meta["val"] = torch.empty(12, 3)
        graph.output(graph.call_function(C10D.all_to_all_single.default, (x, [n, n], [n, n], "tp")))
        return fx.GraphModule(torch.nn.Module(), graph)

    proof = check_collective_order([traced("s0"), traced("s0")], TWO)
    assert proof.holds and proof.assumed == (("s0", (0, 1)),)
    lines = check_collective_order([traced("s0"), traced("s1")], TWO).failures
    assert "expected s0 rows from rank 0 at 'all_to_all_single_default', found s1 in output_split_sizes" in lines[0]


# Random programs: the proof holds exactly where a run gets through


LAYOUTS = [
    TWO,
    MESH,
    views(3, tp=[(0, 1, 2)], ep=[(1, 2), (0,)]),
    views(4, x=[(0, 1)], y=[(1, 2)], z=[(2, 3)], w=[(3, 0)]),
]
CALLS = [AR, AG, BC, A2A, LOCAL, replace(AR, dtype=torch.float64), replace(AG, width=2), replace(AR, reduce_op="max")]


def stalls(programs: Sequence[Sequence[Call]], groups: Sequence[Mapping[str, Members]]) -> bool:
    ranks = [RankProgram(graph_of(c, g), [torch.ones(ROWS, WIDTH)], g) for c, g in zip(programs, groups, strict=True)]
    try:
        run_lockstep(ranks)
    except LockstepError:
        return True
    return False


@st.composite
def programs_of(draw: st.DrawFn) -> tuple[list[list[Call]], list[dict[str, Members]]]:
    """One program for all ranks, each with what concerns its groups; then perhaps a rank's calls moved or changed."""
    groups = draw(st.sampled_from(LAYOUTS))
    sized = [call for call in CALLS if call is not A2A or all(ROWS % len(m) == 0 for g in groups for m in g.values())]
    names = sorted({name for view in groups for name in view})
    calls = draw(
        st.lists(
            st.builds(lambda c, g: replace(c, group=g), st.sampled_from(sized), st.sampled_from(names)), max_size=6
        )
    )
    ranks = [[c for c in calls if c.group in view] for view in groups]
    for _ in range(draw(st.integers(0, 2))):
        program = ranks[draw(st.integers(0, len(ranks) - 1))]
        if not program:
            continue
        place_ = draw(st.integers(0, len(program) - 1))
        call = program.pop(place_)
        what = draw(st.sampled_from(["drop", "move", "dtype", "kind"]))
        if what == "move":
            program.insert(draw(st.integers(0, len(program))), call)
        elif what != "drop":
            changed = {
                "dtype": {"dtype": torch.bfloat16},
                "kind": {"kind": draw(st.sampled_from(["all_reduce", "scale"]))},
            }
            program.insert(place_, replace(call, **changed[what]))
    return ranks, groups


def test_the_proof_holds_exactly_where_a_run_gets_through() -> None:
    verdicts = []

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(found=programs_of())
    def agree(found) -> None:
        programs, groups = found
        verdicts.append(check(programs, groups).holds)
        assert verdicts[-1] is not stalls(programs, groups)

    agree()
    assert 40 < sum(verdicts) < len(verdicts) - 40
