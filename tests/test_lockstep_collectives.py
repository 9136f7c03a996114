"""Each collective of the table against a plain torch formula, on 1 to 4 ranks; what the table refuses."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed._functional_collectives  # registers the legacy namespace c10d_functional
import torch.fx as fx
from torch import Tensor

from cpcompile.passes.lockstep import LockstepError, RankProgram, run_lockstep
from cpcompile.passes.lockstep_collectives import REDUCTIONS, RULES, refusal

C10D = torch.ops._c10d_functional


def collective(target: object, *args: object, operands: int = 0) -> fx.GraphModule:
    """One collective on one placeholder, or a coalesced one on ``operands`` placeholders, each result waited for."""
    graph = fx.Graph()
    inputs = [graph.placeholder(f"x{i}") for i in range(max(operands, 1))]
    result = graph.call_function(target, (inputs if operands else inputs[0], *args))
    results = [graph.call_function(lambda r, i: r[i], (result, i)) for i in range(operands)] if operands else [result]
    graph.output(tuple(graph.call_function(C10D.wait_tensor.default, (r,)) for r in results))
    return fx.GraphModule(torch.nn.Module(), graph)


def run(gms: list[fx.GraphModule], inputs: list[list[Tensor]]) -> list[tuple[Tensor, ...]]:
    groups = {"tp": tuple(range(len(gms)))}
    return run_lockstep([RankProgram(gm, x, groups) for gm, x in zip(gms, inputs, strict=True)])


def operand(rank: int, rows: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(rank)).mul(8).to(dtype)


REFERENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda stacked: stacked.amax(0),
    "min": lambda stacked: stacked.amin(0),
    "sum": lambda stacked: functools.reduce(lambda a, b: a + b, stacked.unbind()),
    "avg": lambda stacked: functools.reduce(lambda a, b: a + b, stacked.unbind()) / len(stacked),
    "product": lambda stacked: functools.reduce(lambda a, b: a * b, stacked.unbind()),
}


REDUCED = [(op, dtype) for op in sorted(REDUCTIONS) for dtype in (torch.float32, torch.bfloat16, torch.int32)]
REDUCED.remove(("avg", torch.int32))  # refused, as by gloo: the next test


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(("reduce_op", "dtype"), REDUCED)
def test_all_reduce_and_reduce_scatter(reduce_op: str, n: int, dtype: torch.dtype) -> None:
    xs = [operand(r, dtype=dtype) for r in range(n)]
    expected = REFERENCE[reduce_op](torch.stack(xs))
    reduced = run([collective(C10D.all_reduce.default, reduce_op, "tp")] * n, [[x] for x in xs])
    scattered = run([collective(C10D.reduce_scatter_tensor.default, reduce_op, n, "tp")] * n, [[x] for x in xs])
    for rank in range(n):
        assert reduced[rank][0].dtype == scattered[rank][0].dtype == dtype
        assert torch.equal(reduced[rank][0], expected)
        assert torch.equal(scattered[rank][0], expected.view(n, 12 // n, 3)[rank])


def test_average_of_integers_is_refused() -> None:
    gm = collective(C10D.all_reduce.default, "avg", "tp")
    with pytest.raises(
        LockstepError, match=r"^rank 0: all_reduce 'all_reduce_default' of group tp: failed on ranks 0-1: "
    ):
        run([gm] * 2, [[operand(r, dtype=torch.int32)] for r in range(2)])


def test_bfloat16_rounds_at_each_addition_in_rank_order() -> None:
    # 256 + 1 rounds to 256 in bfloat16: left to right stays at 256, float32 accumulation would give 258.
    xs = [torch.tensor([256.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 256.0])]
    outs = run([collective(C10D.all_reduce.default, "sum", "tp")] * 3, [[x.bfloat16()] for x in xs])
    assert all(out[0].tolist() == [256.0, 258.0] for out in outs)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_all_gather(n: int, rows: int) -> None:
    xs = [operand(r, rows) for r in range(n)]
    outs = run([collective(C10D.all_gather_into_tensor.default, n, "tp")] * n, [[x] for x in xs])
    assert all(torch.equal(out[0], torch.cat(xs)) for out in outs)


def test_all_gather_of_float8() -> None:
    xs = [operand(r).to(torch.float8_e4m3fn) for r in range(2)]
    for out in run([collective(C10D.all_gather_into_tensor.default, 2, "tp")] * 2, [[x] for x in xs]):
        assert torch.equal(out[0].view(torch.uint8), torch.cat([x.view(torch.uint8) for x in xs]))


def test_reduce_scatter_of_no_rows_gives_every_rank_no_rows() -> None:
    outs = run([collective(C10D.reduce_scatter_tensor.default, "sum", 3, "tp")] * 3, [[operand(0, 0)]] * 3)
    assert [tuple(out[0].shape) for out in outs] == [(0, 3)] * 3


@pytest.mark.parametrize("src", [0, 2])
def test_broadcast(src: int) -> None:
    xs = [operand(r) for r in range(3)]
    outs = run([collective(C10D.broadcast.default, src, "tp")] * 3, [[x] for x in xs])
    assert all(torch.equal(out[0], xs[src]) for out in outs)


def test_broadcast_source_is_a_rank_within_the_group() -> None:
    gm = collective(C10D.broadcast.default, 0, "last")
    xs = [operand(r) for r in range(3)]
    idle = fx.GraphModule(torch.nn.Module(), fx.Graph())
    idle.graph.output(None)
    groups = {"last": (2, 1)}
    programs = [RankProgram(idle, [], {}), RankProgram(gm, [xs[1]], groups), RankProgram(gm, [xs[2]], groups)]
    outs = run_lockstep(programs)
    assert outs[0] is None and torch.equal(outs[1][0], xs[2]) and torch.equal(outs[2][0], xs[2])


def test_all_to_all_with_uneven_splits() -> None:
    sends = [[1, 3, 0], [2, 2, 2], [0, 4, 1]]  # sends[i][j]: rows that rank i sends to rank j
    xs = [operand(r, sum(sends[r])) for r in range(3)]
    receives = [[sends[i][j] for i in range(3)] for j in range(3)]
    gms = [collective(C10D.all_to_all_single.default, receives[r], sends[r], "tp") for r in range(3)]
    outs = run(gms, [[x] for x in xs])
    for j in range(3):
        starts = [sum(sends[i][:j]) for i in range(3)]
        expected = torch.cat([xs[i][starts[i] : starts[i] + sends[i][j]] for i in range(3)])
        assert torch.equal(outs[j][0], expected)


@pytest.mark.parametrize(
    ("target", "single", "args"),
    [
        (C10D.all_reduce_coalesced.default, C10D.all_reduce.default, ("sum", "tp")),
        (C10D.reduce_scatter_tensor_coalesced.default, C10D.reduce_scatter_tensor.default, ("max", 2, "tp")),
        (C10D.all_gather_into_tensor_coalesced.default, C10D.all_gather_into_tensor.default, (2, "tp")),
    ],
)
def test_coalesced_is_the_single_collective_of_each_operand(target: object, single: object, args: tuple) -> None:
    inputs = [[operand(r), operand(r + 9, 2, torch.bfloat16)] for r in range(2)]
    outs = run([collective(target, *args, operands=2)] * 2, inputs)
    for i in range(2):
        alone = run([collective(single, *args)] * 2, [[x[i]] for x in inputs])
        assert all(torch.equal(outs[r][i], alone[r][0]) for r in range(2))


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    ("target", "args"),
    [
        (C10D.all_reduce.default, ("sum",)),
        (C10D.all_reduce.default, ("avg",)),
        (C10D.all_gather_into_tensor.default, ("n",)),
        (C10D.reduce_scatter_tensor.default, ("sum", "n")),
        (C10D.broadcast.default, (0,)),
        (C10D.all_to_all_single.default, ("splits", "splits")),
    ],
)
def test_results_share_no_memory_and_operands_stay(n: int, target: object, args: tuple) -> None:
    bound = [{"n": n, "splits": [12 // n] * n}.get(a, a) if isinstance(a, str) else a for a in args]
    xs = [operand(r) for r in range(n)]
    before = [x.clone() for x in xs]
    outs = [out[0] for out in run([collective(target, *bound, "tp")] * n, [[x] for x in xs])]
    assert all(torch.equal(x, old) for x, old in zip(xs, before, strict=True))
    storages = {tensor.untyped_storage().data_ptr() for tensor in (*xs, *outs)}
    assert len(storages) == len(xs) + len(outs)
    assert all(out.untyped_storage().nbytes() == out.nbytes for out in outs)


def test_arguments_may_be_keywords_and_operands_non_contiguous() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    kwargs = {"group_name": "tp", "input": x, "group_size": 2}
    gathered = graph.call_function(C10D.all_gather_into_tensor.default, (), kwargs)
    graph.output((graph.call_function(C10D.wait_tensor.default, (), {"tensor": gathered}),))
    xs = [operand(r).t() for r in range(2)]
    outs = run([fx.GraphModule(torch.nn.Module(), graph)] * 2, [[x] for x in xs])
    assert torch.equal(outs[1][0], torch.cat(xs)) and outs[1][0].is_contiguous()


def test_result_of_a_non_contiguous_operand_is_contiguous() -> None:
    xs = [operand(r).t() for r in range(2)]
    (out, _) = run([collective(C10D.all_reduce.default, "sum", "tp")] * 2, [[x] for x in xs])
    assert torch.equal(out[0], xs[0] + xs[1]) and out[0].is_contiguous()


def test_average_over_one_rank_leaves_an_expanded_operand_alone() -> None:
    x = torch.ones(1, 3).expand(4, 3)
    ((out,),) = run([collective(C10D.all_reduce.default, "avg", "tp")], [[x]])
    assert torch.equal(out, x)


BAD_OPERANDS = [
    (C10D.reduce_scatter_tensor.default, ("sum", 2, "tp"), torch.ones(5, 3), "divisible by the group size 2.*5, 3"),
    (C10D.reduce_scatter_tensor.default, ("sum", 2, "tp"), torch.ones(()), "divisible by the group size 2"),
    (C10D.all_gather_into_tensor.default, (2, "tp"), torch.ones(()), "a tensor with a dim 0"),
    (C10D.broadcast.default, (2, "tp"), torch.ones(3), "src as a rank within the group, 0 to 1, found 2"),
    (C10D.broadcast.default, (-1, "tp"), torch.ones(3), "src as a rank within the group"),
    (C10D.all_to_all_single.default, ([2, 2], [1, 2], "tp"), torch.ones(4), r"add up to dim 0, found \[1, 2\]"),
    (C10D.all_to_all_single.default, ([2, 2], [-1, 5], "tp"), torch.ones(4), r"add up to dim 0, found \[-1, 5\]"),
    (C10D.all_to_all_single.default, ([], [2, 2], "tp"), torch.ones(4), "2 output_split_sizes, one per rank"),
    (C10D.all_to_all_single.default, ([2, 2], [4], "tp"), torch.ones(4), "2 input_split_sizes, one per rank"),
    (C10D.all_reduce.default, ("band", "tp"), torch.ones(4), "unknown reduce_op 'band'.*known: avg, max, min"),
    (C10D.all_reduce.default, ("SUM", "tp"), torch.ones(4), "unknown reduce_op 'SUM'"),
    (C10D.all_reduce.default, ("sum", "tp"), 3, "expected a tensor, found int"),
]


@pytest.mark.parametrize(("target", "args", "value", "reason"), BAD_OPERANDS)
def test_operand_that_cannot_take_part(target: object, args: tuple, value: object, reason: str) -> None:
    gm = collective(target, *args)
    name = str(target).split(".")[1]
    with pytest.raises(LockstepError, match=rf"^rank 0: {name} '{name}_default' of group tp: .*{reason}.*$"):
        run([gm] * 2, [[value], [value]])


def test_every_functional_collective_is_either_in_the_table_or_refused() -> None:
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("_c10d_functional::") and "." not in n]
    assert len(names) > len(RULES)
    for name in sorted(set(names) - {"_c10d_functional::wait_tensor"}):
        target = getattr(C10D, name.removeprefix("_c10d_functional::")).default
        gm = collective(target)
        node = next(node for node in gm.graph.nodes if node.target is target)
        assert (refusal(gm, node) is None) == (target in RULES), name


@pytest.mark.parametrize(
    "target",
    [
        C10D.all_reduce,  # the packet, not its overload
        C10D.all_reduce_.default,
        torch.ops.c10d_functional.all_reduce.default,
        torch.ops._c10d_functional_autograd.all_gather_into_tensor.default,
        torch.ops.c10d.allreduce_.default,
        torch.distributed.all_reduce,
    ],
)
def test_collective_outside_the_table_never_runs_on_one_rank(target: object) -> None:
    gm = collective(target, "sum", "tp")
    with pytest.raises(
        LockstepError, match=r"^rank 0: node '.*' is the unknown collective .*; canonicalise the graph first$"
    ):
        run([gm] * 2, [[operand(0)], [operand(1)]])


def test_custom_dialects_are_known_by_their_process_group_argument() -> None:
    with torch.library._scoped_library("lockstep_dialect", "DEF") as library:
        library.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
        library.define("mm_all_reduce(Tensor x1, Tensor x2, str hcom) -> Tensor")
        library.define("grouped(Tensor x, int group, Tensor group_list) -> Tensor")
        ops = torch.ops.lockstep_dialect
        refused = {}
        for target in (ops.all_reduce.default, ops.mm_all_reduce.default, ops.grouped.default):
            gm = collective(target)
            refused[target] = refusal(gm, list(gm.graph.nodes)[1])
        hidden = collective(torch.ops.higher_order.auto_functionalized_v2, ops.all_reduce.default)
        assert "lockstep_dialect.all_reduce" in str(refused[ops.all_reduce.default])
        assert "lockstep_dialect.mm_all_reduce" in str(refused[ops.mm_all_reduce.default])
        assert refused[ops.grouped.default] is None
        assert "lockstep_dialect.all_reduce" in str(refusal(hidden, list(hidden.graph.nodes)[1]))


def test_subgraph_with_collectives_is_refused_and_one_without_is_not() -> None:
    def owner(inner: fx.GraphModule) -> fx.GraphModule:
        graph = fx.Graph()
        graph.output(graph.get_attr("body"))
        return fx.GraphModule({"body": inner}, graph)

    plain = collective(torch.ops.aten.neg.default)
    for inner, reason in [
        (plain, None),
        (collective(C10D.all_reduce.default, "sum", "tp"), "is a subgraph with collectives; inline it first"),
        (owner(collective(C10D.all_reduce.default, "sum", "tp")), "is a subgraph with collectives; inline it first"),
    ]:
        gm = owner(inner)
        assert refusal(gm, next(iter(gm.graph.nodes))) == reason
