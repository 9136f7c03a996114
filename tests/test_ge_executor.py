"""Executing GE graphs: binding of inputs, in-place writes, ranks in lockstep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ge_build import data, node, output
from torch import Tensor

from cpcompile.lowering.ge import GeError, GeGraph, GeOp, GeProgram, interpret
from cpcompile.lowering.ge.graph import TensorDesc
from cpcompile.passes.lockstep import LockstepError

X, W = torch.arange(6.0).view(2, 3), torch.ones(3)


def graph(*ops: GeOp) -> GeGraph:
    return GeGraph("g", list(ops))


def product(**changes: Any) -> GeGraph:
    x, size = data("x", 0, X), data("size", 1, 0)
    x.output_descs[0].shape = (-1, 3)
    ops = [
        x,
        size,
        node("cast", "Cast", {"x": "size"}, dst_type=torch.float32),
        node("y", "Mul", {"x1": "x", "x2": "cast"}),
    ]
    out = output(["y"])
    out.input_descs[0] = TensorDesc("input0", changes.get("dtype", torch.float32), changes.get("shape", (-1, 3)))
    return graph(*ops, out)


@pytest.mark.parametrize("inputs", [[X, 3], {"size": 3, "x": X, "unused": W}, (X, torch.tensor(3))])
def test_inputs_are_bound_by_order_or_by_name(inputs: Any) -> None:
    assert torch.equal(interpret([GeProgram(product(), inputs)])[0][0], 3 * X)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([X], "rank 0: expected 2 inputs, x, size, found 1"),
        ({"x": X, "sizes": 3}, r"rank 0: input 'size' is not given \(did you mean 'sizes'\?\)"),
        ([X.double(), 3], r"rank 0: op 'x' \(Data\): expected float32, found float64"),
        ([X[0], 3], r"op 'x' \(Data\): expected shape \[-1, 3\], found \[3\]"),
        ([X[:, :2], 3], r"op 'x' \(Data\): expected shape \[-1, 3\], found \[2, 2\]"),
        ([X, None], r"op 'size' \(Data\): expected a tensor or an int, found NoneType"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(inputs: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        interpret([GeProgram(product(), inputs)])


def test_indices_of_inputs_that_leave_a_gap_are_an_error() -> None:
    with pytest.raises(GeError, match=r"op 'x' .Data.: expected index 0 among the graph's inputs, found 1"):
        interpret([GeProgram(graph(data("x", 1, X), output(["x"])), [X])])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.bfloat16}, "output 0: expected bfloat16, found float32"),
        ({"shape": (-1, 4)}, r"output 0: expected shape \[-1, 4\], found \[2, 3\]"),
    ],
)
def test_outputs_are_checked_against_what_the_graph_says(changes: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        interpret([GeProgram(product(**changes), [X, 3])])


def updated(*between: GeOp, source: str) -> GeGraph:
    places, rows = data("places", 1, torch.tensor([1])), data("rows", 2, X[:1])
    write = node("write", "ScatterUpdate", {"var": source, "indices": "places", "updates": "rows"})
    return graph(data("x", 0, X), places, rows, *between, write, output(["write"]))


@pytest.mark.parametrize(("op_type", "written"), [("Identity", False), ("TensorMove", False), (None, True)])
def test_an_op_writes_an_input_in_place_and_leaves_what_others_see(op_type: str | None, written: bool) -> None:
    """Of the graph's own inputs the caller's tensors are written; a moved value or a view has memory of its own."""
    between = [node("moved", op_type, {"x": "x"})] if op_type else []
    x = X.clone()
    (found,) = interpret(
        [GeProgram(updated(*between, source="moved" if op_type else "x"), [x, torch.tensor([1]), -X[:1]])]
    )[0]
    assert torch.equal(found, torch.stack([X[0], -X[0]]))
    assert torch.equal(x, found if written else X)


@pytest.mark.parametrize("moved", [False, True])
def test_an_op_that_writes_what_another_wrote_writes_the_same_memory(moved: bool) -> None:
    """Of the input, or of what was moved from it: a third op reads both writes through the first's name."""
    between = [node("moved", "TensorMove", {"x": "x"})] if moved else []
    one_more = [data("others", 3, torch.tensor([0]))]
    made = updated(*between, *one_more, source="moved" if moved else "x")
    again = node("again", "ScatterUpdate", {"var": "write", "indices": "others", "updates": "rows"})
    seen = node("seen", "Identity", {"x": "write"})
    seen.after.append("again")
    made.ops[-1:] = [again, seen, output(["seen"])]
    x = X.clone()
    (found,) = interpret([GeProgram(made, [x, torch.tensor([1]), -X[:1], torch.tensor([0])])])[0]
    assert torch.equal(found, torch.stack([-X[0], -X[0]]))
    assert torch.equal(x, X if moved else found)


def test_an_op_that_writes_what_was_moved_writes_what_else_was_made_of_it() -> None:
    made = updated(node("moved", "TensorMove", {"x": "x"}), source="moved")
    seen = node("seen", "Identity", {"x": "moved"})
    seen.after.append("write")
    made.ops[-1:] = [seen, output(["seen"])]
    (found,) = interpret([GeProgram(made, [X, torch.tensor([1]), -X[:1]])])[0]
    assert torch.equal(found, torch.stack([X[0], -X[0]]))


@pytest.mark.parametrize("op_type", ["Const", "Constant", "FileConstant"])
def test_a_constant_without_data_is_an_error(op_type: str) -> None:
    made = updated(GeOp("w", op_type, output_descs=[TensorDesc("y", X.dtype)]), source="x")
    with pytest.raises(GeError, match=rf"op 'w' \({op_type}\): expected a constant's data, found none"):
        interpret([GeProgram(made, [X.clone(), torch.tensor([1]), -X[:1]])])


def gathered(group: str) -> GeGraph:
    gather = node("rows", "HcomAllGather", {"x": "x"}, rank_size=2, group=group)
    return graph(data("x", 0, X), gather, output(["rows"]))


@pytest.mark.parametrize("group", ["a", "tag=;rank_list=1,0"])
def test_the_order_of_a_groups_ranks_is_the_groups_own(group: str) -> None:
    for (found,) in run([gathered(group)] * 2, {"a": (1, 0)}):
        assert torch.equal(found, torch.cat([X + 1, X]))


def test_a_group_has_its_own_size() -> None:
    exchange = node("rows", "HcomAllToAll", {"x": "x"}, group="rank_list=0,2")
    others = node("rows", "HcomAllToAll", {"x": "x"}, group="rank_list=1")
    graphs = [graph(data("x", 0, X), op, output(["rows"])) for op in (exchange, others, exchange)]
    found = [outputs[0] for outputs in interpret([GeProgram(g, [X + r]) for r, g in enumerate(graphs)])]
    assert torch.equal(found[0], torch.stack([X[0], X[0] + 2])) and torch.equal(found[1], X + 1)
    assert torch.equal(found[2], torch.stack([X[1], X[1] + 2]))


def test_inputs_are_in_the_order_of_their_indices_and_may_be_references() -> None:
    first, second = data("a", 1, X), data("b", 0, X)
    second.type = "RefData"
    made = graph(first, second, node("y", "Sub", {"x1": "a", "x2": "b"}), output(["y"]))
    assert [op.name for op in made.inputs] == ["b", "a"]
    assert torch.equal(interpret([GeProgram(made, [X, 3 * X])])[0][0], 2 * X)


def test_an_op_never_writes_a_constant() -> None:
    weight = GeOp("w", "Const", output_descs=[TensorDesc("y", X.dtype)], data=X.clone())
    made = updated(weight, source="w")
    (found,) = interpret([GeProgram(made, [X, torch.tensor([1]), -X[:1]])])[0]
    assert not torch.equal(found, X) and torch.equal(weight.data, X)


def reduced(*groups: str) -> GeGraph:
    ops, value = [data("x", 0, X)], "x"
    for i, group in enumerate(groups):
        ops.append(node(f"sum{i}", "HcomAllReduce", {"x": value}, reduction="sum", group=group))
        value = ops[-1].name
    return graph(*ops, output([value]))


GROUPS = {"a": (0, 1), "b": (0, 1)}


def run(graphs: list[GeGraph], groups: dict[str, tuple[int, ...]] = GROUPS) -> list[list[Tensor]]:
    return interpret([GeProgram(g, [X + rank], groups) for rank, g in enumerate(graphs)])


def test_ranks_run_in_lockstep() -> None:
    for (found,) in run([reduced("a", "b")] * 2):
        assert torch.equal(found, 2 * (2 * X + 1))


def test_collectives_in_another_order_are_a_deadlock_and_missing_ones_are_named() -> None:
    with pytest.raises(LockstepError, match="deadlock, rank 0 at all_reduce 'sum0' of group a"):
        run([reduced("a", "b"), reduced("b", "a")])
    with pytest.raises(LockstepError, match="rank 1 has finished while rank 0 waits at all_reduce 'sum1' of group b"):
        run([reduced("a", "b"), reduced("a")])


def test_a_group_without_the_rank_is_an_error() -> None:
    with pytest.raises(
        LockstepError, match="rank 0: all_reduce 'sum0' of group a: this rank is not one of the group's"
    ):
        run([reduced("a")] * 2, {"a": (1,)})


def test_an_unused_op_that_is_not_known_is_an_error_too() -> None:
    made = reduced("a")
    made.ops.insert(1, node("odd", "Mystery", {"x": "x"}))
    with pytest.raises(GeError, match=r"rank 0: op 'odd' \(Mystery\): unknown op type"):
        run([made] * 2)
