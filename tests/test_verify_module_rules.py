"""What the static proof of module tensor parallelism allows around summands, parts of columns and all ranks' rows."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import hand_modules  # noqa: F401  defines npu ops
import pytest
import torch
import torch.fx as fx
from shared_modules import GROUP, group_of
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.passes.verify_modules import prove_modules
from cpcompile.passes.verify_proof import Proof
from cpcompile.passes.weight_cuts import Cut, cut_tensor

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

# Two ranks with as many rows.
R, K, M, P, RANK = 5, 8, 6, 2, 1


def waited(op: Any, *args: Any) -> Any:
    return c10d.wait_tensor(op(*args))


def gathered(x: Any) -> Any:
    return waited(c10d.all_gather_into_tensor, x, P, GROUP)


def scattered(x: Any, op: str = "sum") -> Any:
    return waited(c10d.reduce_scatter_tensor, x, op, P, GROUP)


def exchanged(x: Any, splits: tuple[int, ...] = (R, R)) -> Any:
    return waited(c10d.all_to_all_single, x, list(splits), list(splits), GROUP)


def to_columns(x: Any) -> Any:
    """This rank's columns of all ranks' rows."""
    blocks = aten.permute(aten.view(x, [R, P, K // P]), [1, 0, 2])
    return exchanged(aten.view(aten.clone(blocks, memory_format=torch.contiguous_format), [P * R, K // P]))


def product(x: Any, w: Any, v: Any, **scales: Any) -> Any:
    """A quantised product with a float output."""
    return torch.ops.npu.npu_quant_matmul(x, w, v, output_dtype=torch.float32, **scales)


def summand(x: Any, w: Any) -> Any:
    return aten.mm(to_columns(x), w)


# Shape of each operand, and how it is cut.
OPERANDS: dict[str, tuple[tuple[int, ...], Cut | None]] = {
    "x": ((R, K), None),
    "s": ((R, M), None),
    "v": ((1, M), None),
    "w": ((K, M), Cut(0, 1, P)),
    "u": ((K, M), Cut(0, 1, P)),
    "c": ((M, K), Cut(1, 1, P)),
    "fused": ((M, K), Cut(1, 2, P)),
    "down": ((K // 2, M), Cut(0, 1, P)),
    "bias": ((K,), Cut(0, 1, P)),
    "whole_bias": ((M,), None),
    "ids": ((R,), None),
    "others": ((R,), None),
    "table": ((2 * K, M), Cut(0, 1, P)),
}


def padded(x: Any) -> Any:
    return aten.constant_pad_nd(x, [0, 0, 0, 1], 0)


def columns_turned(x: Any) -> Any:
    rows, width = x.shape
    return aten.permute(aten.view(x, [rows, 2, width // 2]), [0, 2, 1]).reshape(rows, width)


def own_columns(x: Any) -> Any:
    return aten.slice(x, 1, RANK * K // P, (RANK + 1) * K // P)


def summed(x: Any) -> Any:
    return waited(c10d.all_reduce, x, "sum", GROUP)


def looked_up(o: Any, masked: str = "", least: int = 0, own: bool = False) -> Any:
    """The masked lookup, with a mask of something else or another clamp."""
    ids = [x if own else gathered(x) for x in (o.ids, o.others)]
    shifted = [aten.sub(x, RANK * K) for x in ids]
    clamped = [aten.clamp(x, least, K - 1) for x in shifted]
    outside = {
        "": lambda: aten.ne(shifted[0], clamped[0]),
        "others": lambda: aten.ne(shifted[1], clamped[1]),
        "nothing": lambda: aten.ne(shifted[0], shifted[0]),
    }[masked]()
    rows = aten.masked_fill(aten.embedding(o.table, clamped[0]), aten.unsqueeze(outside, 1), 0)
    return summed(rows) if own else scattered(rows)


def written(o: Any, late: bool) -> Any:
    """A product of rows that are written in place, read before or after."""
    rows = o.s if late else gathered(o.s)
    aten.copy_(o.s, aten.mul(o.s, 2.0))
    return back(aten.mm(gathered(o.s) if late else rows, o.c))


def written_whole(o: Any) -> Any:
    aten.copy_(o.s, aten.mul(o.s, 2.0))
    return aten.mm(o.s, o.c)


# The original, the shared graph, which operands are stated to be the same on all ranks, and what the proof says.
SMALL: dict[str, tuple[Callable[..., Any], Callable[..., Any], str, str]] = {
    "sum": (lambda o: aten.mm(o.x, o.w), lambda o: scattered(summand(o.x, o.w)), "", ""),
    "summands added": (
        lambda o: aten.add(aten.mm(o.x, o.w), aten.mm(o.x, o.u)),
        lambda o: scattered(aten.add(summand(o.x, o.w), summand(o.x, o.u))),
        "",
        "",
    ),
    "summands scaled": (
        lambda o: aten.mul(aten.mm(o.x, o.w), o.v),
        lambda o: scattered(aten.mul(summand(o.x, o.w), o.v)),
        "v",
        "",
    ),
    "summands scaled by what differs": (
        lambda o: aten.mul(aten.mm(o.x, o.w), o.v),
        lambda o: scattered(aten.mul(summand(o.x, o.w), o.v)),
        "",
        "to be the same on all ranks",
    ),
    "something added to every summand": (
        lambda o: aten.add(aten.mm(o.x, o.w), o.s),
        lambda o: scattered(aten.add(summand(o.x, o.w), gathered(o.s))),
        "v s",
        "expected an op linear in its summands",
    ),
    "a number added to every summand": (
        lambda o: aten.add(aten.mm(o.x, o.w), 2),
        lambda o: scattered(aten.add(summand(o.x, o.w), 2)),
        "",
        "expected an op linear in its summands",
    ),
    "summands multiplied": (
        lambda o: aten.mul(aten.mm(o.x, o.w), aten.mm(o.x, o.u)),
        lambda o: scattered(aten.mul(summand(o.x, o.w), summand(o.x, o.u))),
        "",
        "expected an op linear in its summands",
    ),
    "divided by a summand": (
        lambda o: aten.div(o.s, aten.mm(o.x, o.w)),
        lambda o: scattered(aten.div(gathered(o.s), summand(o.x, o.w))),
        "",
        "expected an op linear in its summands",
    ),
    "summands gathered": (
        lambda o: aten.mm(o.x, o.w),
        lambda o: aten.slice(gathered(summand(o.x, o.w)), 0, 0, R),
        "",
        "expected summands to be summed; found them gathered",
    ),
    "averaged": (
        lambda o: aten.mm(o.x, o.w),
        lambda o: scattered(summand(o.x, o.w), "avg"),
        "",
        "expected the sum of summands",
    ),
    "averaged where it was never split": (
        lambda o: aten.relu(o.s),
        lambda o: aten.relu(scattered(gathered(o.s))),
        "",
        "expected the sum of summands",
    ),
    "each rank's part of its own rows": (
        lambda o: aten.relu(o.x),
        lambda o: aten.relu(
            aten.permute(
                aten.view(gathered(aten.slice(o.x, 1, RANK * K // P, (RANK + 1) * K // P)), [P, R, K // P]), [1, 0, 2]
            ).reshape(R, K)
        ),
        "",
        "every rank's part of its own rows",
    ),
    "own columns of own rows as summands": (
        lambda o: aten.mm(o.x, o.w),
        lambda o: waited(
            c10d.all_reduce, aten.mm(aten.slice(o.x, 1, RANK * K // P, (RANK + 1) * K // P), o.w), "sum", GROUP
        ),
        "",
        "every rank's own rows",
    ),
    "columns of the same rows as summands": (
        lambda o: aten.mm(o.x, o.w),
        lambda o: waited(
            c10d.all_reduce, aten.mm(aten.slice(o.x, 1, RANK * K // P, (RANK + 1) * K // P), o.w), "sum", GROUP
        ),
        "x",
        "",
    ),
    "all ranks' rows and what differs": (
        lambda o: aten.mm(aten.mul(o.s, o.v), o.c),
        lambda o: back(aten.mm(aten.mul(gathered(o.s), o.v), o.c)),
        "",
        "to be the same on all ranks",
    ),
    "all ranks' rows and what is the same": (
        lambda o: aten.mm(aten.mul(o.s, o.v), o.c),
        lambda o: back(aten.mm(aten.mul(gathered(o.s), o.v), o.c)),
        "v",
        "",
    ),
    "rows between columns": (
        lambda o: aten.mm(o.s, o.c),
        lambda o: back(
            aten.permute(aten.view(aten.mm(gathered(o.s), o.c), [R, P, K // P]), [1, 0, 2]).reshape(P * R, K // P)
        ),
        "",
        "expected each rank's rows one after another",
    ),
    "rows of all ranks exchanged": (
        lambda o: aten.relu(o.s),
        lambda o: aten.slice(exchanged(gathered(aten.relu(o.s))), 0, 0, R),
        "",
        "expected this rank's rows",
    ),
    "another segment's columns": (
        lambda o: aten.mm(aten.mm(o.s, o.fused), o.w),
        lambda o: scattered(aten.mm(aten.mm(gathered(o.s), o.fused), o.w)),
        "",
        "expected the rows of the weight that go with these columns",
    ),
    "the same segment's columns": (
        lambda o: aten.mm(aten.mm(o.s, o.c), o.w),
        lambda o: scattered(aten.mm(aten.mm(gathered(o.s), o.c), o.w)),
        "",
        "",
    ),
    "halves of a fused weight": (
        lambda o: aten.mm(torch.ops.npu.npu_swiglu(aten.mm(o.s, o.fused)), o.down),
        lambda o: scattered(aten.mm(torch.ops.npu.npu_swiglu(aten.mm(gathered(o.s), o.fused)), o.down)),
        "",
        "",
    ),
    "halves of a weight cut as one": (
        lambda o: aten.mm(torch.ops.npu.npu_swiglu(aten.mm(o.s, o.c)), o.down),
        lambda o: scattered(aten.mm(torch.ops.npu.npu_swiglu(aten.mm(gathered(o.s), o.c)), o.down)),
        "",
        "expected 2 segments of columns; found 1",
    ),
    "another segment's bias": (
        lambda o: aten.mm(torch.ops.npu.npu_swiglu(aten.addmm(o.bias, o.s, o.fused)), o.down),
        lambda o: scattered(aten.mm(torch.ops.npu.npu_swiglu(aten.addmm(o.bias, gathered(o.s), o.fused)), o.down)),
        "",
        "expected the part of the bias or scale that goes with these columns",
    ),
    "bias of a product that is scaled": (
        lambda o: aten.addmm(o.whole_bias, o.x, o.w, alpha=2),
        lambda o: aten.add(scattered(summand(o.x, o.w)), o.whole_bias),
        "",
        "expected a call of the original",
    ),
    "bias of a product": (
        lambda o: aten.addmm(o.whole_bias, o.x, o.w),
        lambda o: aten.add(scattered(summand(o.x, o.w)), o.whole_bias),
        "",
        "",
    ),
    "a weight that is scaled by what differs": (
        lambda o: aten.mm(o.x, aten.mul(o.w, o.v)),
        lambda o: scattered(summand(o.x, aten.mul(o.w, o.v))),
        "",
        "expected the weight",
    ),
    "a weight that is scaled": (
        lambda o: aten.mm(o.x, aten.mul(o.w, o.v)),
        lambda o: scattered(summand(o.x, aten.mul(o.w, o.v))),
        "v",
        "",
    ),
    "columns of a weight that is scaled by what differs": (
        lambda o: aten.mm(o.s, aten.mul(o.c, aten.view(o.v, [M, 1]))),
        lambda o: back(aten.mm(gathered(o.s), aten.mul(o.c, aten.view(o.v, [M, 1])))),
        "",
        "expected the weight",
    ),
    "the same rows and a number of each rank": (
        lambda o: aten.mm(aten.add(o.x, 3), o.w),
        lambda o: summed(aten.mm(own_columns(aten.add(o.x, 3)), o.w)),
        "x",
        "every rank's own rows",
    ),
    "ranks between rows": (
        lambda o: aten.mm(o.s, o.c),
        lambda o: back(aten.mm(aten.permute(aten.view(gathered(o.s), [P, R, M]), [1, 0, 2]).reshape(P * R, M), o.c)),
        "",
        "reads permuted ones",
    ),
    "columns permuted before a product": (
        lambda o: aten.mm(o.s, o.c),
        lambda o: back(aten.mm(gathered(columns_turned(o.s)), o.c)),
        "",
        "expected a call of the original",
    ),
    "lookup": (lambda o: aten.embedding(o.table, o.ids), lambda o: looked_up(o), "", ""),
    "lookup of the same ids": (
        lambda o: aten.embedding(o.table, o.ids),
        lambda o: looked_up(o, own=True),
        "ids",
        "",
    ),
    "lookup of own ids": (
        lambda o: aten.embedding(o.table, o.ids),
        lambda o: looked_up(o, own=True),
        "",
        "expected ids that all ranks have",
    ),
    "lookup with the mask of other ids": (
        lambda o: aten.embedding(o.table, o.ids),
        lambda o: looked_up(o, masked="others"),
        "",
        "found another mask",
    ),
    "lookup with the mask of nothing": (
        lambda o: aten.embedding(o.table, o.ids),
        lambda o: looked_up(o, masked="nothing"),
        "",
        "expected a masked lookup",
    ),
    "lookup without this rank's first row": (
        lambda o: aten.embedding(o.table, o.ids),
        lambda o: looked_up(o, least=1),
        "",
        "expected a masked lookup",
    ),
    "rows read after they are written": (written_whole, lambda o: written(o, True), "", "written in place"),
    "rows read before they are written": (written_whole, lambda o: written(o, False), "", "written in place"),
    "an output that is not awaited": (
        lambda o: aten.mm(o.x, o.w),
        lambda o: c10d.reduce_scatter_tensor(summand(o.x, o.w), "sum", P, GROUP),
        "",
        "to be Whole of mm",
    ),
    "a write that is gone": (
        lambda o: [aten.copy_(o.v, aten.mul(o.v, 2.0)), aten.mm(o.x, o.w)][1],
        lambda o: scattered(summand(o.x, o.w)),
        "",
        "expected this call with effects; it is gone",
    ),
    "an offset in every summand": (
        lambda o: product(o.x, o.w, o.v, offset=o.v, pertoken_scale=o.ids),
        lambda o: scattered(product(to_columns(o.x), o.w, o.v, offset=o.v, pertoken_scale=gathered(o.ids))),
        "v",
        "expected a plain product",
    ),
    "a scale of summands": (
        lambda o: product(o.x, o.w, o.v, pertoken_scale=o.ids),
        lambda o: scattered(product(to_columns(o.x), o.w, o.v, pertoken_scale=gathered(o.ids))),
        "v",
        "",
    ),
    "unequal blocks": (
        lambda o: aten.mm(o.s, o.c),
        lambda o: back(aten.mm(gathered(o.s), o.c), (R + 1, R - 1)),
        "",
        "expected 2 equal input_split_sizes",
    ),
}


def back(columns: Any, splits: tuple[int, ...] = (R, R)) -> Any:
    """All columns of this rank's rows."""
    return aten.permute(aten.view(exchanged(columns, splits), [P, R, K // P]), [1, 0, 2]).reshape(R, K)


def small_proof(name: str, group_tokens: str | int = "equal") -> Proof:
    original, rewritten, same, _ = SMALL[name]

    def traced(f: Callable[..., Any], cut: bool) -> fx.GraphModule:
        made = []
        for operand, (sizes, how) in OPERANDS.items():
            integers = operand in ("ids", "others")
            tensor = torch.zeros(sizes, dtype=torch.int64 if integers else torch.float32)
            made.append(cut_tensor(tensor, how, RANK) if cut and how else tensor)
        gm = make_fx(lambda *args: f(SimpleNamespace(**dict(zip(OPERANDS, args, strict=True)))), tracing_mode="fake")
        return gm(*made)

    before, after = traced(original, False), traced(rewritten, True)
    names = dict(zip(OPERANDS, [n.name for n in before.graph.find_nodes(op="placeholder")], strict=True))
    cuts = {names[operand]: cut for operand, (_, cut) in OPERANDS.items() if cut}
    stated = [names[operand] for operand in same.split()]
    axes = dict.fromkeys(cuts, group_of(P, RANK))
    return prove_modules(before, after, cuts, axes, group_tokens=group_tokens, same=stated)


def told(proof: Proof) -> str:
    assert proof.holds == (not proof.failures)
    return " ".join(f.message for f in proof.failures)


@pytest.mark.parametrize("name", SMALL)
def test_small_graphs(name: str) -> None:
    expected = SMALL[name][3]
    messages = told(small_proof(name))
    assert expected in messages and bool(messages) == bool(expected)


@pytest.mark.parametrize("group_tokens", ["exchange", R + 1])
def test_rows_are_padded_unless_ranks_have_as_many(group_tokens: str | int) -> None:
    assert "as ranks may have different numbers of them" in told(small_proof("sum", group_tokens))


def test_a_group_token_count_of_no_kind() -> None:
    with pytest.raises(ValueError, match="expected 'exchange', 'equal' or a number of rows"):
        small_proof("sum", "most")


PADDED = {
    "columns permuted behind the padding": (
        lambda o: aten.mm(o.s, o.c),
        lambda o: aten.mm(gathered(columns_turned(padded(o.s))), o.c),
        "",
        "reads permuted ones",
    ),
    "a lookup of padded own ids": (
        lambda o: aten.embedding(o.table, o.ids),
        lambda o: aten.slice(own_ids_looked_up(o), 0, 0, R),
        "",
        "expected a call of the original; found aten.sub",
    ),
    "own columns of padded own rows": (
        lambda o: aten.mm(o.x, o.w),
        lambda o: aten.slice(summed(aten.mm(own_columns(padded(o.x)), o.w)), 0, 0, R),
        "",
        "every rank's own rows",
    ),
}


def own_ids_looked_up(o: Any) -> Any:
    shifted = aten.sub(aten.constant_pad_nd(o.ids, [0, 1], 0), RANK * K)
    clamped = aten.clamp(shifted, 0, K - 1)
    rows = aten.embedding(o.table, clamped)
    return summed(aten.masked_fill(rows, aten.unsqueeze(aten.ne(shifted, clamped), 1), 0))


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """N is stated, one more than R."""
    monkeypatch.setitem(SMALL, name, PADDED[name])
    assert PADDED[name][3] in told(small_proof(name, R + 1))


def test_another_number_of_parts() -> None:
    gm = make_fx(lambda x, w: aten.mm(x, w), tracing_mode="fake")(torch.zeros(R, K), torch.zeros(K, M))
    proof = prove_modules(gm, gm, {"w_1": Cut(0, 1, 4)}, {"w_1": group_of(P, RANK)}, group_tokens="equal")
    assert "expected the 4 ranks that share it" in told(proof)
    proof = prove_modules(gm, gm, {"w_1": Cut(0, 1, 3)}, {"w_1": group_of(3, 1)}, group_tokens="equal")
    assert "expected a dim that 3 divides; found dim 0 of [8, 6]" in told(proof)
    proof = prove_modules(gm, gm, {"another": Cut(0, 1, P)}, {}, group_tokens="equal")
    assert "another: expected a graph input of this name" in told(proof)


def test_a_shape_that_is_not_what_the_graph_says() -> None:
    f = make_fx(lambda x: aten.relu(x), tracing_mode="fake")
    before, after = f(torch.zeros(R, K)), f(torch.zeros(R, K))
    after.graph.find_nodes(op="call_function", target=aten.relu.default)[0].meta["val"] = torch.zeros(R + 1, K)
    assert "expected shape [5, 8]; its meta says [6, 8]" in told(
        prove_modules(before, after, {}, {}, group_tokens="equal")
    )
