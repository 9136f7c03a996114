"""Torch's own spellings of an all-reduce, and the noise around them."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from canonical_traces import RANKS, before_after, by_hand, check, fake_group, mesh, ones, text, trace  # noqa: F401
from expecttest import assert_expected_inline
from torch.distributed.tensor import DTensor, Partial, Replicate

from cpcompile.passes.base import PassResult
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.collectives import find_all_reduces, group_name_of, is_collective, is_wait

aten = torch.ops.aten
native = torch.ops._c10d_functional


def test_all_reduce_in_place() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x @ x.T
        dist.all_reduce(y)
        return y + 1

    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
permute = aten.permute(arg0_1, [1, 0])
mm = aten.mm(arg0_1, permute)
all_reduce = _c10d_functional.all_reduce(mm, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
copy = aten.copy(mm, wait_tensor)
add = aten.add.Tensor(copy, 1)
return add
-> 1
permute = aten.permute(arg0_1, [1, 0])
mm = aten.mm(arg0_1, permute)
all_reduce = _c10d_functional.all_reduce(mm, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
add = aten.add.Tensor(wait_tensor, 1)
return add""",
    )


def test_all_reduce_keyword_and_positional_op() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y, z = x * 2, x * 3
        dist.all_reduce(y, op=dist.ReduceOp.SUM)
        dist.all_reduce(z, dist.ReduceOp.SUM, dist.group.WORLD)
        return y + z

    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
mul_1 = aten.mul.Tensor(arg0_1, 3)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
copy = aten.copy(mul, wait_tensor)
all_reduce_1 = _c10d_functional.all_reduce(mul_1, sum, 0)
wait_tensor_1 = _c10d_functional.wait_tensor(all_reduce_1)
copy_1 = aten.copy(mul_1, wait_tensor_1)
add = aten.add.Tensor(copy, copy_1)
return add
-> 2
mul = aten.mul.Tensor(arg0_1, 2)
mul_1 = aten.mul.Tensor(arg0_1, 3)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
all_reduce_1 = _c10d_functional.all_reduce(mul_1, sum, 0)
wait_tensor_1 = _c10d_functional.wait_tensor(all_reduce_1)
add = aten.add.Tensor(wait_tensor, wait_tensor_1)
return add""",
    )


def test_all_reduce_of_a_slice() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y[1:3])
        return y + 1

    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
slice_1 = aten.slice.Tensor(mul, 0, 1, 3)
all_reduce = _c10d_functional.all_reduce(slice_1, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
copy = aten.copy(slice_1, wait_tensor)
slice_scatter = aten.slice_scatter(mul, copy, 0, 1, 3)
add = aten.add.Tensor(slice_scatter, 1)
return add
-> 1
mul = aten.mul.Tensor(arg0_1, 2)
slice_1 = aten.slice.Tensor(mul, 0, 1, 3)
all_reduce = _c10d_functional.all_reduce(slice_1, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
slice_scatter = aten.slice_scatter(mul, wait_tensor, 0, 1, 3)
add = aten.add.Tensor(slice_scatter, 1)
return add""",
    )


def test_all_reduce_of_a_slice_dynamic() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y[:, 2:4])
        return y + 1

    assert_expected_inline(
        before_after(f, ones(6, 8), dynamic=True),
        """\
mul = aten.mul.Tensor(arg1_1, 2)
slice_1 = aten.slice.Tensor(mul, 0, 0, 9223372036854775807)
slice_2 = aten.slice.Tensor(slice_1, 1, 2, 4)
all_reduce = _c10d_functional.all_reduce(slice_2, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
copy = aten.copy(slice_2, wait_tensor)
slice_3 = aten.slice.Tensor(mul, 0, 0, 9223372036854775807)
slice_scatter = aten.slice_scatter(slice_3, copy, 1, 2, 4)
slice_scatter_1 = aten.slice_scatter(mul, slice_scatter, 0, 0, 9223372036854775807)
add_24 = aten.add.Tensor(slice_scatter_1, 1)
return add_24
-> 4
mul = aten.mul.Tensor(arg1_1, 2)
slice_2 = aten.slice.Tensor(mul, 1, 2, 4)
all_reduce = _c10d_functional.all_reduce(slice_2, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
slice_scatter = aten.slice_scatter(mul, wait_tensor, 1, 2, 4)
add_24 = aten.add.Tensor(slice_scatter, 1)
return add_24""",
    )


def test_all_reduce_in_an_autograd_function() -> None:
    class Reduce(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            dist.all_reduce(x)
            return x

        @staticmethod
        def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
            return g

    assert_expected_inline(
        before_after(lambda x: Reduce.apply(x * 2) + 1, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
clone = aten.clone(mul)
all_reduce = _c10d_functional.all_reduce(clone, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
copy = aten.copy(clone, wait_tensor)
add = aten.add.Tensor(copy, 1)
return add
-> 2
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
add = aten.add.Tensor(wait_tensor, 1)
return add""",
    )


@pytest.mark.parametrize("ranks", [None, [0, 1, 2, 3]])
def test_funcol_all_reduce(ranks: list[int] | None) -> None:
    f = lambda x: funcol.all_reduce(x * 2, "sum", ranks or dist.group.WORLD) + 1  # noqa: E731
    found = trace(f, ones(4, 8))
    before = text(found.gm)
    after, result = check(found)
    assert (after, result) == (before, PassResult())
    (ar,) = find_all_reduces(found.gm)
    assert (ar.start.name, ar.wait.name, ar.input.name) == ("all_reduce", "wait_tensor", "mul")
    assert (ar.group_name, ar.reduce_op) == (dist.group.WORLD.group_name, "sum")
    assert is_collective(ar.start) and is_wait(ar.wait) and not is_collective(ar.wait)
    assert group_name_of(ar.start) == dist.group.WORLD.group_name


def test_coalescing_manager() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y, z = x * 2, x * 3
        with dist._coalescing_manager():
            dist.all_reduce(y)
            dist.all_reduce(z)
        return y + z

    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
mul_1 = aten.mul.Tensor(arg0_1, 3)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
copy = aten.copy(mul, wait_tensor)
all_reduce_1 = _c10d_functional.all_reduce(mul_1, sum, 0)
wait_tensor_1 = _c10d_functional.wait_tensor(all_reduce_1)
copy_1 = aten.copy(mul_1, wait_tensor_1)
add = aten.add.Tensor(copy, copy_1)
return add
-> 2
mul = aten.mul.Tensor(arg0_1, 2)
mul_1 = aten.mul.Tensor(arg0_1, 3)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
all_reduce_1 = _c10d_functional.all_reduce(mul_1, sum, 0)
wait_tensor_1 = _c10d_functional.wait_tensor(all_reduce_1)
add = aten.add.Tensor(wait_tensor, wait_tensor_1)
return add""",
    )


def test_legacy_ops_arrive_as_native_ones() -> None:
    legacy = torch.ops.c10d_functional

    def f(x: torch.Tensor) -> torch.Tensor:
        (y,) = legacy.all_reduce_coalesced(
            [legacy.all_reduce(x * 2, "sum", "", [0, 1, 2, 3], 4)], "sum", "", [0, 1, 2, 3], 4
        )
        return legacy.wait_tensor(y) + 1

    found = trace(f, ones(4, 8))
    assert "c10d_functional.all_reduce" in text(found.gm)
    assert not [n for n in found.gm.graph.nodes if str(n.target).startswith("c10d_functional.")]


def test_dtensor_partial_to_replicate() -> None:
    m = mesh()
    f = lambda x: DTensor.from_local(x * 2, m, [Partial()]).redistribute(m, [Replicate()]).to_local() + 1  # noqa: E731
    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
view = aten.view(mul, [4, 8])
all_reduce = _c10d_functional.all_reduce(view, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
add = aten.add.Tensor(wait_tensor, 1)
return add
-> 1
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
add = aten.add.Tensor(wait_tensor, 1)
return add""",
    )
    g = lambda x: DTensor.from_local(x * 2, m, [Partial()]).full_tensor() + 1  # noqa: E731
    assert_expected_inline(
        before_after(g, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
view = aten.view(mul, [4, 8])
all_reduce = _c10d_functional.all_reduce(view, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
view_1 = aten.view(wait_tensor, [4, 8])
add = aten.add.Tensor(view_1, 1)
return add
-> 2
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
add = aten.add.Tensor(wait_tensor, 1)
return add""",
    )


def test_all_gather_into_a_list() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(x) for _ in range(RANKS)]
        dist.all_gather(parts, x)
        return torch.cat(parts) + 1

    assert_expected_inline(
        before_after(f, ones(4, 8)).partition("->")[2],
        """\
 4
all_gather_into_tensor = _c10d_functional.all_gather_into_tensor(arg0_1, 4, 0)
wait_tensor = _c10d_functional.wait_tensor(all_gather_into_tensor)
slice_1 = aten.slice.Tensor(wait_tensor, 0, 0, 4)
slice_2 = aten.slice.Tensor(wait_tensor, 0, 4, 8)
slice_3 = aten.slice.Tensor(wait_tensor, 0, 8, 12)
slice_4 = aten.slice.Tensor(wait_tensor, 0, 12, 16)
cat = aten.cat([slice_1, slice_2, slice_3, slice_4])
add = aten.add.Tensor(cat, 1)
return add""",
    )


@pytest.mark.parametrize("reduce_op", ["avg", "max"])
def test_other_reductions_are_refused(reduce_op: str) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        return funcol.all_reduce(x * 2, reduce_op, dist.group.WORLD) + 1

    found = trace(f, ones(4, 8))
    before = text(found.gm)
    result = Canonicalise()(found.gm)
    assert (text(found.gm), result.rewrites) == (before, 0)
    assert [str(r) for r in result.refusals] == [
        f"Refusal(node='all_reduce', reason=\"all_reduce with '{reduce_op}': expected 'sum'; "
        'reduce by sum and scale or select after it")'
    ]
    assert [ar.reduce_op for ar in find_all_reduces(found.gm)] == [reduce_op]


def test_average_in_place_loses_its_copy_and_stays_refused() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        dist.all_reduce(y, op=dist.ReduceOp.AVG)
        return y + 1

    after, result = check(trace(f, ones(4, 8)), rewrites=1)
    assert "copy(" not in after
    assert [r.node for r in result.refusals] == ["all_reduce"]


def test_two_waits_become_one() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> tuple[fx.Node, fx.Node]:
        ar = graph.call_function(native.all_reduce.default, (x, "sum", "0"))
        waits = [graph.call_function(native.wait_tensor.default, (ar,)) for _ in range(2)]
        return waits[0], waits[1]

    gm = by_hand(build)
    assert Canonicalise()(gm) == PassResult(1)
    assert len(find_all_reduces(gm)) == 1


def test_copy_that_changes_dtype() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(4, 8, dtype=torch.bfloat16)
        y.copy_(funcol.all_reduce(x * 1.001, "sum", dist.group.WORLD))
        return y.float() + 1

    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
empty = aten.empty.memory_format([4, 8], dtype=torch.bfloat16, device=cpu, pin_memory=False)
mul = aten.mul.Tensor(arg0_1, 1.001)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
copy = aten.copy(empty, wait_tensor)
_to_copy = aten._to_copy(copy, dtype=torch.float32)
add = aten.add.Tensor(_to_copy, 1)
return add
-> 1
mul = aten.mul.Tensor(arg0_1, 1.001)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
_to_copy_default = aten._to_copy(wait_tensor, dtype=torch.bfloat16)
_to_copy = aten._to_copy(_to_copy_default, dtype=torch.float32)
add = aten.add.Tensor(_to_copy, 1)
return add""",
    )


def test_copy_that_only_changes_the_stride_of_a_dim_of_one_is_removed() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(8, 1).t()
        y.copy_(funcol.all_reduce(x * 2, "sum", dist.group.WORLD))
        return y.sum()

    assert "copy(" not in check(trace(f, ones(1, 8)))[0]


def test_copy_that_broadcasts_is_kept() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty(2, 4, 8)
        y.copy_(funcol.all_reduce(x * 2, "sum", dist.group.WORLD))
        return y + 1

    after, result = check(trace(f, ones(4, 8)), rewrites=0)
    assert "copy(" in after
    assert_expected_inline(
        result.refusals[0].reason,
        """the result of a collective is copied into another shape or device; copy it as a separate tensor""",
    )


def test_copies_that_the_caller_could_write_to_are_kept() -> None:
    def fresh_copy_of_an_input(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x).copy_(x)

    def two_copies(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        return torch.empty_like(x).copy_(y), y.clone()

    def part_of_a_copy(x: torch.Tensor) -> torch.Tensor:
        return x.clone()[1:]

    for f, kept in ((fresh_copy_of_an_input, 1), (two_copies, 1), (part_of_a_copy, 1)):
        after, _ = check(trace(f, ones(4, 8)))
        assert after.count("copy(") + after.count("clone(") == kept, after


def test_copy_of_memory_that_the_graph_writes_to_is_kept() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        old = graph.call_function(aten.clone.default, (x,))
        old.meta["val"] = x.meta["val"]
        graph.call_function(aten.copy_.default, (x, y))
        total = graph.call_function(aten.add.Tensor, (old, y))
        total.meta["val"] = x.meta["val"]
        return total

    gm = by_hand(build, inputs=2)
    assert Canonicalise()(gm) == PassResult(0)


def test_unused_collective_is_kept() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        ar = graph.call_function(native.all_reduce.default, (x, "sum", "0"))
        wait = graph.call_function(native.wait_tensor.default, (ar,))
        copy = graph.call_function(aten.copy.default, (wait, x))
        out = graph.call_function(aten.mul.Tensor, (copy, 2))
        for node in (ar, wait, copy, out):
            node.meta["val"] = x.meta["val"]
        return out

    gm = by_hand(build)
    assert Canonicalise()(gm) == PassResult(1)
    assert_expected_inline(
        text(gm),
        """\
all_reduce_default = _c10d_functional.all_reduce(x0, sum, 0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
mul_tensor = aten.mul.Tensor(x0, 2)
return mul_tensor""",
    )


def test_noise_between_is_removed() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        t, h = x.shape
        y = funcol.all_reduce(x * 2, "sum", dist.group.WORLD)
        y = y[:t].view(t, 2, -1).view(t, h).reshape(1, t, h).view(t, 4, 2).expand(t, 4, 2).detach()
        return y[:, 0:99].clone().reshape(t, h)[:t] + 1

    assert_expected_inline(
        before_after(f, ones(6, 8), dynamic=True),
        """\
mul = aten.mul.Tensor(arg1_1, 2)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
slice_1 = aten.slice.Tensor(wait_tensor, 0, 0, arg0_1)
view = aten.view(slice_1, [arg0_1, 2, -1])
view_1 = aten.view(view, [arg0_1, 8])
view_2 = aten.view(view_1, [1, arg0_1, 8])
view_3 = aten.view(view_2, [arg0_1, 4, 2])
expand = aten.expand(view_3, [arg0_1, 4, 2])
detach = aten.detach(expand)
slice_2 = aten.slice.Tensor(detach, 0, 0, 9223372036854775807)
clone = aten.clone(slice_2)
view_4 = aten.view(clone, [arg0_1, 8])
slice_3 = aten.slice.Tensor(view_4, 0, 0, arg0_1)
add_48 = aten.add.Tensor(slice_3, 1)
return add_48
-> 11
mul = aten.mul.Tensor(arg1_1, 2)
all_reduce = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce)
add_48 = aten.add.Tensor(wait_tensor, 1)
return add_48""",
    )


def test_views_that_matter_are_kept() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = (x * 2).view(-1, 2, 4)
        kept = (x[1:], x[:-1], x[::2], y.view(-1, 4, 2), y.expand(-1, 2, 4), x.t().clone(), x.t().contiguous())
        return (*(k + 1 for k in kept), y + 1)

    found = trace(f, ones(6, 8), dynamic=True)
    # What goes: the expand, and the clone of a tensor that already has its strides.
    after, _ = check(found, rewrites=2)
    counts = {op: after.count(f"= aten.{op}") for op in ("slice", "view", "expand", "clone")}
    assert counts == {"slice": 3, "view": 2, "expand": 0, "clone": 1}, after


def test_large_graph_in_linear_time() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        def call(target: Any, *args: Any) -> fx.Node:
            node = graph.call_function(target, args)
            node.meta["val"] = x.meta["val"]
            return node

        for _ in range(1000):
            y = call(aten.view.default, call(aten.mul.Tensor, x, 2), [4, 8])
            w = call(native.wait_tensor.default, call(native.all_reduce.default, y, "sum", "0"))
            x = call(aten.add.Tensor, call(aten.slice.Tensor, call(aten.copy.default, y, w), 0, 0, 9), 1)
            for _ in range(5):
                x = call(aten.mul.Tensor, x, 2)
        return x

    gm = by_hand(build)
    assert len(gm.graph.nodes) > 12000
    start = time.perf_counter()
    result = Canonicalise()(gm)
    seconds = time.perf_counter() - start
    assert result == PassResult(3000)
    assert len(find_all_reduces(gm)) == 1000
    # 0.3 s on an idle core; a pass that is quadratic takes minutes.
    assert seconds < 5
