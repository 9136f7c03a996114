"""Coalesced ops, vLLM, SGLang, and what is not understood."""

from __future__ import annotations

import operator
from collections.abc import Callable

import dialect_ops
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from canonical_traces import RANKS, before_after, by_hand, check, fake_group, ones, text, trace  # noqa: F401
from expecttest import assert_expected_inline

from cpcompile.passes.base import PassResult
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.collectives import find_all_reduces

native = torch.ops._c10d_functional


def test_all_reduce_coalesced() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = funcol.all_reduce_coalesced([x * 2, y * 3], "sum", dist.group.WORLD)
        return a + 1, b + 1

    assert_expected_inline(
        before_after(f, ones(4, 8), ones(2, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
mul_1 = aten.mul.Tensor(arg1_1, 3)
all_reduce_coalesced = _c10d_functional.all_reduce_coalesced([mul, mul_1], sum, 0)
getitem = getitem(all_reduce_coalesced, 0)
getitem_1 = getitem(all_reduce_coalesced, 1)
wait_tensor = _c10d_functional.wait_tensor(getitem)
wait_tensor_1 = _c10d_functional.wait_tensor(getitem_1)
add = aten.add.Tensor(wait_tensor, 1)
add_1 = aten.add.Tensor(wait_tensor_1, 1)
return add, add_1
-> 1
mul = aten.mul.Tensor(arg0_1, 2)
mul_1 = aten.mul.Tensor(arg1_1, 3)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, 0)
all_reduce_default_1 = _c10d_functional.all_reduce(mul_1, sum, 0)
wait_tensor = _c10d_functional.wait_tensor(all_reduce_default)
wait_tensor_1 = _c10d_functional.wait_tensor(all_reduce_default_1)
add = aten.add.Tensor(wait_tensor, 1)
add_1 = aten.add.Tensor(wait_tensor_1, 1)
return add, add_1""",
    )


def test_gather_and_scatter_coalesced() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b = funcol.reduce_scatter_tensor_coalesced([x * 2, y * 3], "sum", [0, 0], dist.group.WORLD)
        c, d = funcol.all_gather_into_tensor_coalesced([a + 1, b + 1], dist.group.WORLD)
        return c + 1, d + 1

    assert_expected_inline(
        before_after(f, ones(4, 8), ones(8, 2)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
mul_1 = aten.mul.Tensor(arg1_1, 3)
reduce_scatter_tensor_coalesced = _c10d_functional.reduce_scatter_tensor_coalesced([mul, mul_1], sum, 4, 0)
getitem = getitem(reduce_scatter_tensor_coalesced, 0)
getitem_1 = getitem(reduce_scatter_tensor_coalesced, 1)
wait_tensor = _c10d_functional.wait_tensor(getitem)
wait_tensor_1 = _c10d_functional.wait_tensor(getitem_1)
add = aten.add.Tensor(wait_tensor, 1)
add_1 = aten.add.Tensor(wait_tensor_1, 1)
all_gather_into_tensor_coalesced = _c10d_functional.all_gather_into_tensor_coalesced([add, add_1], 4, 0)
getitem_2 = getitem(all_gather_into_tensor_coalesced, 0)
getitem_3 = getitem(all_gather_into_tensor_coalesced, 1)
wait_tensor_2 = _c10d_functional.wait_tensor(getitem_2)
wait_tensor_3 = _c10d_functional.wait_tensor(getitem_3)
add_2 = aten.add.Tensor(wait_tensor_2, 1)
add_3 = aten.add.Tensor(wait_tensor_3, 1)
return add_2, add_3
-> 2
mul = aten.mul.Tensor(arg0_1, 2)
mul_1 = aten.mul.Tensor(arg1_1, 3)
reduce_scatter_tensor_default = _c10d_functional.reduce_scatter_tensor(mul, sum, 4, 0)
reduce_scatter_tensor_default_1 = _c10d_functional.reduce_scatter_tensor(mul_1, sum, 4, 0)
wait_tensor = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
wait_tensor_1 = _c10d_functional.wait_tensor(reduce_scatter_tensor_default_1)
add = aten.add.Tensor(wait_tensor, 1)
add_1 = aten.add.Tensor(wait_tensor_1, 1)
all_gather_into_tensor_default = _c10d_functional.all_gather_into_tensor(add, 4, 0)
all_gather_into_tensor_default_1 = _c10d_functional.all_gather_into_tensor(add_1, 4, 0)
wait_tensor_2 = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
wait_tensor_3 = _c10d_functional.wait_tensor(all_gather_into_tensor_default_1)
add_2 = aten.add.Tensor(wait_tensor_2, 1)
add_3 = aten.add.Tensor(wait_tensor_3, 1)
return add_2, add_3""",
    )


def test_vllm_all_reduce() -> None:
    f = lambda x: torch.ops.vllm.all_reduce(x * 2, "tp:0") + 1  # noqa: E731
    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce = vllm.all_reduce(mul, tp:0)
add = aten.add.Tensor(all_reduce, 1)
return add
-> 1
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add = aten.add.Tensor(wait_tensor_default, 1)
return add""",
    )


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vllm_gather_and_scatter(dim: int, dynamic: bool) -> None:
    ops = torch.ops.vllm

    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scattered = ops.reduce_scatter(x * 2, dim, RANKS, "tp:0")
        return scattered.view(-1), ops.all_gather(x * 3, dim, RANKS, "tp:0").view(-1)

    found = trace(f, ones(8, 8, 8), dynamic=dynamic)
    after, result = check(found, rewrites=2)
    assert result.refusals == [] and "vllm" not in after
    if dim == 1 and not dynamic:
        assert_expected_inline(
            after,
            """\
mul = aten.mul.Tensor(arg0_1, 2)
permute_default = aten.permute(mul, [1, 0, 2])
clone_default = aten.clone(permute_default, memory_format=torch.contiguous_format)
reduce_scatter_tensor_default = _c10d_functional.reduce_scatter_tensor(clone_default, sum, 4, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
permute_default_1 = aten.permute(wait_tensor_default, [1, 0, 2])
clone_default_1 = aten.clone(permute_default_1, memory_format=torch.contiguous_format)
view = aten.view(clone_default_1, [-1])
mul_1 = aten.mul.Tensor(arg0_1, 3)
permute_default_2 = aten.permute(mul_1, [1, 0, 2])
clone_default_2 = aten.clone(permute_default_2, memory_format=torch.contiguous_format)
all_gather_into_tensor_default = _c10d_functional.all_gather_into_tensor(clone_default_2, 4, tp:0)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
permute_default_3 = aten.permute(wait_tensor_default_1, [1, 0, 2])
clone_default_3 = aten.clone(permute_default_3, memory_format=torch.contiguous_format)
view_1 = aten.view(clone_default_3, [-1])
return view, view_1""",
        )
    elif dim == 0 and dynamic:
        assert_expected_inline(
            after,
            """\
mul = aten.mul.Tensor(arg1_1, 2)
reduce_scatter_tensor_default = _c10d_functional.reduce_scatter_tensor(mul, sum, 4, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
view = aten.view(wait_tensor_default, [-1])
mul_6 = aten.mul.Tensor(arg1_1, 3)
all_gather_into_tensor_default = _c10d_functional.all_gather_into_tensor(mul_6, 4, tp:0)
wait_tensor_default_1 = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
view_1 = aten.view(wait_tensor_default_1, [-1])
return view, view_1""",
        )


def test_vllm_scatter_of_an_indivisible_dim_is_refused() -> None:
    found = trace(lambda x: torch.ops.vllm.reduce_scatter(x * 2, 0, RANKS, "tp:0") + 1, ones(7, 8))
    result = Canonicalise()(found.gm)
    assert result.rewrites == 0
    assert_expected_inline(
        result.refusals[0].reason,
        """vllm::reduce_scatter: dim 0 has size 7, not a multiple of 4 ranks; pad it""",
    )


def test_all_reduce_of_a_transpose_keeps_its_layout() -> None:
    def vllm(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.vllm.all_reduce((x * 2).t(), "tp:0").t().view(-1) + 1

    def in_place(x: torch.Tensor) -> torch.Tensor:
        y = (x * 2).t()
        dist.all_reduce(y)
        return y.t().view(-1) + 1

    for f in (vllm, in_place):
        after, result = check(trace(f, ones(4, 8)))
        assert after.count("copy(") == 1
        assert [r.reason for r in result.refusals] == [
            "a tensor that is not contiguous is communicated in place; make it contiguous first"
        ]


def test_sglang_outplace_all_reduce() -> None:
    f = lambda x: torch.ops.sglang.outplace_all_reduce(x * 2, "tp:0", "ca") + 1  # noqa: E731
    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
outplace_all_reduce = sglang.outplace_all_reduce(mul, tp:0, ca)
add = aten.add.Tensor(outplace_all_reduce, 1)
return add
-> 1
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add = aten.add.Tensor(wait_tensor_default, 1)
return add""",
    )


def test_sglang_inplace_all_reduce() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.ops.sglang.inplace_all_reduce(y, "tp:0")
        return y + 1

    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
auto_functionalized_v2 = auto_functionalized_v2(sglang.inplace_all_reduce.default, group_name=tp:0, _tensor_base_index=0, _all_bases=[mul])
getitem_1 = getitem(auto_functionalized_v2, 1)
add = aten.add.Tensor(getitem_1, 1)
return add
-> 1
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add = aten.add.Tensor(wait_tensor_default, 1)
return add""",  # noqa: E501
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_sglang_inplace_all_reduce_of_a_view(dynamic: bool) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.ops.sglang.inplace_all_reduce(y.view(-1, 2, 4), "tp:0")
        return y + 1

    after, result = check(trace(f, ones(4, 8), dynamic=dynamic), rewrites=1)
    assert result.refusals == []
    if dynamic:
        assert_expected_inline(
            after,
            """\
mul = aten.mul.Tensor(arg1_1, 2)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add_7 = aten.add.Tensor(wait_tensor_default, 1)
return add_7""",
        )
    else:
        assert_expected_inline(
            after,
            """\
mul = aten.mul.Tensor(arg0_1, 2)
all_reduce_default = _c10d_functional.all_reduce(mul, sum, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add = aten.add.Tensor(wait_tensor_default, 1)
return add""",
        )


def test_sglang_inplace_all_reduce_of_a_slice() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.ops.sglang.inplace_all_reduce(y[1:3], "tp:0")
        return y + 1

    assert_expected_inline(
        before_after(f, ones(4, 8)),
        """\
mul = aten.mul.Tensor(arg0_1, 2)
auto_functionalized_v2 = auto_functionalized_v2(sglang.inplace_all_reduce.default, group_name=tp:0, _tensor_base_index=0, _tensor_slice_dim=0, _tensor_slice_start=1, _tensor_slice_end=3, _all_bases=[mul])
getitem_1 = getitem(auto_functionalized_v2, 1)
add = aten.add.Tensor(getitem_1, 1)
return add
-> 1
mul = aten.mul.Tensor(arg0_1, 2)
slice_tensor = aten.slice.Tensor(mul, 0, 1, 3)
all_reduce_default = _c10d_functional.all_reduce(slice_tensor, sum, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
slice_scatter_default = aten.slice_scatter(mul, wait_tensor_default, 0, 1, 3)
add = aten.add.Tensor(slice_scatter_default, 1)
return add""",  # noqa: E501
    )


@pytest.mark.parametrize(
    "part",
    [
        lambda y: y.as_strided((4, 8), (1, 4)),
        lambda y: y.as_strided((4, 4), (8, 2)),
        lambda y: y.view(-1)[8:16],
        lambda y: y.view(-1)[:16].view(2, 8, 1),
    ],
)
def test_sglang_inplace_all_reduce_of_another_part(part: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        torch.ops.sglang.inplace_all_reduce(part(y), "tp:0")
        return y + 1

    _, result = check(trace(f, ones(4, 8)), rewrites=0)
    assert [r.reason for r in result.refusals] == [
        "sglang::inplace_all_reduce: works on a strided part of a larger tensor; make that part contiguous first"
    ]


def test_sglang_inplace_all_reduce_of_an_input() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        torch.ops.sglang.inplace_all_reduce(x, "tp:0")
        return x + 1

    assert_expected_inline(
        before_after(f, ones(4, 8)).partition("->")[2],
        """\
 1
all_reduce_default = _c10d_functional.all_reduce(arg0_1, sum, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
add = aten.add.Tensor(wait_tensor_default, 1)
return wait_tensor_default, add""",
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_sglang_gather_and_scatter(dynamic: bool) -> None:
    def f(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = x.new_empty(x.shape[0] * RANKS, x.shape[1])
        part = x.new_empty(x.shape[0] // RANKS, x.shape[1])
        torch.ops.sglang.reg_all_gather_into_tensor(whole, x * 2, "tp:0")
        torch.ops.sglang.reg_reduce_scatter_tensor(part, x * 3, "tp:0")
        return whole + 1, part + 1

    after, result = check(trace(f, ones(8, 2), dynamic=dynamic), rewrites=2)
    assert result.refusals == []
    if not dynamic:
        assert_expected_inline(
            after,
            """\
mul = aten.mul.Tensor(arg0_1, 2)
all_gather_into_tensor_default = _c10d_functional.all_gather_into_tensor(mul, 4, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
mul_1 = aten.mul.Tensor(arg0_1, 3)
reduce_scatter_tensor_default = _c10d_functional.reduce_scatter_tensor(mul_1, sum, 4, tp:0)
wait_tensor_default_1 = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
add = aten.add.Tensor(wait_tensor_default, 1)
add_1 = aten.add.Tensor(wait_tensor_default_1, 1)
return add, add_1""",
        )
    else:
        assert_expected_inline(
            after,
            """\
mul_5 = aten.mul.Tensor(arg1_1, 2)
all_gather_into_tensor_default = _c10d_functional.all_gather_into_tensor(mul_5, 4, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_gather_into_tensor_default)
mul_8 = aten.mul.Tensor(arg1_1, 3)
reduce_scatter_tensor_default = _c10d_functional.reduce_scatter_tensor(mul_8, sum, 4, tp:0)
wait_tensor_default_1 = _c10d_functional.wait_tensor(reduce_scatter_tensor_default)
add_12 = aten.add.Tensor(wait_tensor_default, 1)
add_16 = aten.add.Tensor(wait_tensor_default_1, 1)
return add_12, add_16""",
        )


def test_sglang_gather_into_a_part_is_refused() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        whole = x.new_zeros(40, 2)
        torch.ops.sglang.reg_all_gather_into_tensor(whole[:32], x * 2, "tp:0")
        return whole + 1

    _, result = check(trace(f, ones(8, 2)), rewrites=0)
    assert_expected_inline(
        result.refusals[0].reason,
        """sglang::reg_all_gather_into_tensor: writes to a part of a larger tensor; give it an output tensor of its own""",  # noqa: E501
    )


def test_auto_functionalized_v1() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        v1 = torch.ops.higher_order.auto_functionalized
        done = graph.call_function(
            v1, (torch.ops.sglang.inplace_all_reduce.default,), {"tensor": x, "group_name": "tp:0"}
        )
        done.meta["val"] = (None, x.meta["val"])
        out = graph.call_function(operator.getitem, (done, 1))
        out.meta["val"] = x.meta["val"]
        return out

    gm = by_hand(build)
    assert Canonicalise()(gm) == PassResult(1)
    assert_expected_inline(
        text(gm),
        """\
all_reduce_default = _c10d_functional.all_reduce(x0, sum, tp:0)
wait_tensor_default = _c10d_functional.wait_tensor(all_reduce_default)
return wait_tensor_default""",
    )


def test_legacy_op_in_a_graph_by_hand_is_refused() -> None:
    gm = by_hand(lambda g, x: g.call_function(torch.ops.c10d_functional.all_reduce.default, (x, "sum", "", [0, 1], 2)))
    result = Canonicalise()(gm)
    assert result.rewrites == 0
    assert_expected_inline(
        result.refusals[0].reason,
        """c10d_functional::all_reduce is not understood: capture the graph through AOTAutograd, which makes it native""",  # noqa: E501
    )


FOREIGN = {
    "npu": lambda g, x: g.call_function(torch.ops.npu.npu_mm_all_reduce_base.default, (x, x, "hcom0")),
    "npu_define": lambda g, x: g.call_function(torch.ops.npu_define.allreduce.default, (x, "sum", "", [0, 1], 2)),
    "vllm-ascend": lambda g, x: g.call_function(torch.ops.vllm.maybe_pad_and_reduce.default, (x,)),
    "flashinfer": lambda g, x: g.call_function(
        torch.ops.sglang.flashinfer_allreduce_residual_rmsnorm.default, (x, x, x)
    ),
    "shm": lambda g, x: g.call_function(
        torch.ops.higher_order.auto_functionalized_v2,
        (torch.ops._C.shm_allreduce.default,),
        {"group": "tp:0", "_x_base_index": 0, "_all_bases": [x]},
    ),
    "return value used": lambda g, x: [
        g.call_function(operator.getitem, (done, i))
        for done in [
            g.call_function(
                torch.ops.higher_order.auto_functionalized_v2,
                (torch.ops.sglang.inplace_all_reduce.default,),
                {"group_name": "tp:0", "_tensor_base_index": 0, "_all_bases": [x]},
            )
        ]
        for i in range(2)
    ],
    "shm in place": lambda g, x: g.call_function(torch.ops._C.shm_allreduce.default, (x, "tp:0")),
    "native in place": lambda g, x: g.call_function(native.all_reduce_.default, (x, "sum", "0")),
    "not waited for": lambda g, x: g.call_function(native.all_reduce.default, (x, "sum", "0")),
    "list used whole": lambda g, x: g.call_function(native.all_reduce_coalesced.default, ([x], "sum", "0")),
}


def test_what_is_not_understood_is_refused_by_name() -> None:
    reasons = []
    for build in FOREIGN.values():
        gm = by_hand(build)
        before = text(gm)
        result = Canonicalise()(gm)
        assert (text(gm), result.rewrites) == (before, 0)
        (refusal,) = result.refusals
        assert refusal.node in before
        reasons.append(refusal.reason)
    assert_expected_inline(
        "\n".join(reasons),
        """\
npu::npu_mm_all_reduce_base is not understood: compile the matmul and torch.distributed.all_reduce as two ops
npu_define::allreduce is not understood: use torch.distributed.all_reduce in its place
vllm::maybe_pad_and_reduce is not understood: its group is not in the graph: turn FlashComm 1 off
sglang::flashinfer_allreduce_residual_rmsnorm is not understood: use torch.distributed.all_reduce in its place
_C::shm_allreduce is not understood: use torch.distributed.all_reduce in its place
sglang::inplace_all_reduce: expected getitem 1 to be the only value that is used; use torch.distributed.all_reduce in its place
_C::shm_allreduce is not understood: use torch.distributed.all_reduce in its place
_c10d_functional::all_reduce_ is not understood: use _c10d_functional.all_reduce and the value that it returns
all_reduce is not followed by wait_tensor alone; wait for it before it is used
_c10d_functional::all_reduce_coalesced: its list is used whole; expected one getitem per tensor""",  # noqa: E501
    )


def test_changed_schema_is_refused() -> None:
    dialect_ops.define(
        "vllm", "all_reduce.scaled(Tensor tensor, float scale, str group_name) -> Tensor", lambda x, *_: x
    )
    gm = by_hand(lambda g, x: g.call_function(torch.ops.vllm.all_reduce.scaled, (x, 2.0, "tp:0")))
    result = Canonicalise()(gm)
    assert result.rewrites == 0
    assert_expected_inline(
        result.refusals[0].reason,
        """vllm::all_reduce: expected arguments Tensor, str, found Tensor, float, str; use torch.distributed.all_reduce in its place""",  # noqa: E501
    )


def test_effectful_op_is_rewritten_once() -> None:
    op = torch.ops.vllm.all_reduce.default
    gm = by_hand(lambda g, x: g.call_function(op, (x, "tp:0")))
    next(node for node in gm.graph.nodes if node.target is op).meta["val"] = ones(4, 8)
    fx.node._side_effectful_functions.add(op)
    try:
        assert Canonicalise()(gm) == PassResult(1)
    finally:
        fx.node._side_effectful_functions.remove(op)
    assert len(find_all_reduces(gm)) == 1


def test_new_nodes_say_where_they_come_from() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.vllm.all_reduce(x * 2, "tp:0") + 1

    found = trace(torch.nn.Sequential(Layer()), ones(4, 8))
    Canonicalise()(found.gm)
    (ar,) = find_all_reduces(found.gm)
    for node in (ar.start, ar.wait):
        assert "Layer" in str(node.meta["nn_module_stack"]) and "vllm.all_reduce" in node.meta["stack_trace"]
