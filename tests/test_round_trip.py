"""Reduce-scatter and all-gather that undo each other."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from canonical_traces import RANKS, before_after, check, fake_group, mesh, ones, trace  # noqa: F401
from expecttest import assert_expected_inline
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from versions import needs_torch

native = torch.ops._c10d_functional


@pytest.mark.parametrize("dynamic", [False, True])
def test_dtensor_partial_shard_replicate(dynamic: bool) -> None:
    m = mesh()

    def f(x: torch.Tensor) -> torch.Tensor:
        y = DTensor.from_local(x * 2, m, [Partial()]).redistribute(m, [Shard(1)])
        return y.redistribute(m, [Replicate()]).to_local() + 1

    after = before_after(f, ones(6, 8), dynamic=dynamic).partition("->")[2]
    if dynamic:
        assert_expected_inline(
            after,
            """\
 2
mul = aten.mul.Tensor(arg1_1, 2)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add_58 = aten.add.Tensor(wait_tensor_default, 1)
return add_58""",
        )
    else:
        assert_expected_inline(
            after,
            """\
 2
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add = aten.add.Tensor(wait_tensor_default, 1)
return add""",
        )


def test_dtensor_uneven_shard_is_reduced_with_its_padding() -> None:
    m = mesh()

    def f(x: torch.Tensor) -> torch.Tensor:
        y = DTensor.from_local(x * 2, m, [Partial()]).redistribute(m, [Shard(0)])
        return y.redistribute(m, [Replicate()]).to_local() + 1

    after, _ = check(trace(f, ones(6, 8)))
    assert_expected_inline(
        after,
        """\
mul = aten.mul.Tensor(arg0_1, 2)
split = aten.split.Tensor(mul, 2)
getitem = getitem(split, 0)
getitem_1 = getitem(split, 1)
getitem_2 = getitem(split, 2)
new_zeros = aten.new_zeros(getitem, [0, 8], pin_memory=False)
constant_pad_nd = aten.constant_pad_nd(new_zeros, [0, 0, 0, 2], 0.0)
cat = aten.cat([getitem, getitem_1, getitem_2, constant_pad_nd])
all_reduce_default = _c10d_functional.all_reduce(cat, sum, 0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
slice_1 = aten.slice.Tensor(wait_tensor_default, 0, 0, 6)
add = aten.add.Tensor(slice_1, 1)
return add""",
    )


def round_trip(x: torch.Tensor) -> torch.Tensor:
    y = funcol.reduce_scatter_tensor(x * 2, "sum", 0, dist.group.WORLD)
    return funcol.all_gather_tensor(y, 0, dist.group.WORLD) + 1


def test_round_trip_on_dim_0() -> None:
    assert_expected_inline(
        before_after(round_trip, ones(8, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
reduce_scatter_tensor = _c10d_functional.reduce_scatter_tensor(mul, sum, 4, 0)
wait_tensor = _c10d_functional.wait_tensor(reduce_scatter_tensor)
all_gather_into_tensor = _c10d_functional.all_gather_into_tensor(wait_tensor, 4, 0)
wait_tensor_1 = _c10d_functional.wait_tensor(all_gather_into_tensor)
add = aten.add.Tensor(wait_tensor_1, 1)
return add
-> 1
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, 0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add = aten.add.Tensor(wait_tensor_default, 1)
return add""",
    )


def test_round_trip_of_a_dynamic_dim_is_left_alone() -> None:
    # The consumers' shapes say 4*(T//4) where the all-reduce would say T.
    check(trace(round_trip, ones(8, 8), dynamic=True), rewrites=0)


def test_round_trip_with_another_user_is_left_alone() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = funcol.reduce_scatter_tensor(x * 2, "sum", 0, dist.group.WORLD)
        return funcol.all_gather_tensor(y, 0, dist.group.WORLD) + 1, y + 1

    check(trace(f, ones(8, 8)), rewrites=0)


UNTRACED = needs_torch("2.13", "dynamo does not trace gathers along other dims than 0")


@pytest.mark.parametrize(("scatter", "gather"), [pytest.param(0, 1, marks=UNTRACED), (1, 0)])
def test_round_trip_over_two_dims_is_left_alone(scatter: int, gather: int) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = funcol.reduce_scatter_tensor(x * 2, "sum", scatter, dist.group.WORLD)
        return funcol.all_gather_tensor(y, gather, dist.group.WORLD) + 1

    check(trace(f, ones(8, 8)), rewrites=0)


def test_round_trip_with_shuffled_chunks_is_left_alone() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = torch.cat((x * 2).split(2, 1)[::-1])
        z = funcol.all_gather_tensor(funcol.reduce_scatter_tensor(y, "sum", 0, dist.group.WORLD), 0, dist.group.WORLD)
        return torch.cat(z.split(4), 1) + 1

    check(trace(f, ones(4, 8)), rewrites=0)


def test_round_trip_whose_chunks_are_used_is_left_alone() -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = funcol.reduce_scatter_tensor(x * 2, "sum", 1, dist.group.WORLD)
        parts = native.wait_tensor(native.all_gather_into_tensor(y, RANKS, dist.group.WORLD.group_name)).split(4)
        return torch.cat(parts, 1) + 1, parts[0] + 1

    check(trace(f, ones(4, 8)), rewrites=0)


def test_round_trip_with_work_between_is_left_alone() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = funcol.reduce_scatter_tensor(x * 2, "sum", 0, dist.group.WORLD)
        return funcol.all_gather_tensor(y * 2, 0, dist.group.WORLD) + 1

    check(trace(f, ones(8, 8)), rewrites=0)


def test_round_trip_of_another_reduction_or_group_is_left_alone() -> None:
    other = dist.new_group([0, 1, 2, 3])

    def maximum(x: torch.Tensor) -> torch.Tensor:
        y = funcol.reduce_scatter_tensor(x * 2, "max", 0, dist.group.WORLD)
        return funcol.all_gather_tensor(y, 0, dist.group.WORLD) + 1

    def groups(x: torch.Tensor) -> torch.Tensor:
        y = funcol.reduce_scatter_tensor(x * 2, "sum", 0, dist.group.WORLD)
        return funcol.all_gather_tensor(y, 0, other) + 1

    for f in (maximum, groups):
        check(trace(f, ones(8, 8)), rewrites=0)


@pytest.mark.parametrize("dim", [0, pytest.param(1, marks=UNTRACED)])
def test_gather_and_scatter_alone_are_left_alone(dim: int) -> None:
    world = dist.group.WORLD
    check(trace(lambda x: funcol.reduce_scatter_tensor(x * 2, "sum", dim, world) + 1, ones(4, 8)), rewrites=0)
    check(trace(lambda x: funcol.all_gather_tensor(x * 2, dim, world) + 1, ones(4, 8)), rewrites=0)
