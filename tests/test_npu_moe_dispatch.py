"""npu MoE dispatch: what becomes of experts on gathered rows, and what is left alone, by torch_npu's own ops."""

from __future__ import annotations

import logging
from typing import Any
from unittest import mock

import pytest
import torch
import torch.fx as fx
from ascend_process import AscendProcess
from expert_graphs import Change, Layer, aten, build, cast, dispatched, targets

from cpcompile.lowering.ascend.forms import to_ascend
from cpcompile.lowering.targets import Settings
from cpcompile.passes.collectives import emit
from cpcompile.passes.npu_moe_dispatch import NpuMoeDispatch


def rewritten(layer: Layer) -> dict[str, Any]:
    """What a test looks at of the rewritten graph."""
    gm, result = dispatched(layer)
    calls = {str(n.target).split(".")[1]: n for n in gm.graph.nodes if "distribute" in str(n.target)}
    dispatch, combine = calls["npu_moe_distribute_dispatch_v2"], calls["npu_moe_distribute_combine_v2"]
    again = NpuMoeDispatch("own")(gm)
    return {
        "result": result,
        "targets": targets(gm),
        "dispatch": [*dispatch.args[2:], dispatch.kwargs["x_active_mask"] is not None],
        "combine": [*combine.args[5:], combine.kwargs["x_active_mask"] is dispatch.kwargs["x_active_mask"]],
        "valid": [n.args[1] for n in gm.graph.find_nodes(op="call_function", target=aten.lt.Scalar)],
        "dtypes": [n.meta["val"].dtype for n in (*dispatch.args[:2], combine.args[4])],
        "again": again.rewrites,
    }


def refused(layer: Layer, own: str = "own", ranks: tuple[int, ...] = ()) -> tuple[list[str], bool]:
    """The reasons, and whether the graph is as it was."""
    gm, result = dispatched(layer, own, ranks)
    assert result.rewrites == 0
    return [r.reason for r in result.refusals], not any("distribute" in target for target in targets(gm))


def test_rows_go_to_their_experts_and_back(ascend: AscendProcess) -> None:
    found = ascend(rewritten, Layer())
    assert (found["result"].rewrites, found["result"].refusals) == (1, [])
    assert [t for t in found["targets"] if "c10d" in t] == [
        "_c10d_functional.all_gather_into_tensor.default", "_c10d_functional.wait_tensor.default",
    ]  # of another reader  # fmt: skip
    assert found["dispatch"] == ["hccl own", 2, 1, 8, True] and found["combine"] == ["hccl own", 2, 1, 8, True]
    assert found["again"] == 0
    assert found["valid"] == [2]  # of 5 tokens, 3 on the first rank
    assert found["dtypes"] == [torch.bfloat16, torch.int32, torch.float32]


def test_whole_shards_need_no_mask(ascend: AscendProcess) -> None:
    found = ascend(rewritten, Layer(tokens=6))
    assert found["dispatch"][-1] is False and found["valid"] == []


def plus(at: fx.Node, node: fx.Node) -> fx.Node:
    """As shared experts are added, of which every rank has a part."""
    return emit(at, aten.add.Tensor, cast(at, node), other(node))


def other(node: fx.Node) -> fx.Node:
    return next(n for n in node.graph.nodes if n.name == "other")


def test_what_else_is_in_the_sum_stays_scattered(ascend: AscendProcess) -> None:
    found = ascend(rewritten, Layer(summed=plus))
    assert found["result"].rewrites == 1
    kept = [t for t in found["targets"] if "c10d" in t]
    assert kept.count("_c10d_functional.reduce_scatter_tensor.default") == 1
    assert found["targets"].count("aten.add.Tensor") == 1


def change(op: Any, *args: Any, **kwargs: Any) -> Change:
    return Changed(op, args, kwargs)


class Changed:
    """``op(node, *args)``: not a closure, as it goes to another process."""

    def __init__(self, op: Any, args: Any, kwargs: Any) -> None:
        self.op, self.args, self.kwargs = str(op), args, kwargs

    def __call__(self, at: fx.Node, node: fx.Node) -> fx.Node:
        name, overload = self.op.removeprefix("aten.").split(".")
        op = getattr(getattr(aten, name), overload)
        return emit(at, op, node, *self.args, **self.kwargs)


def with_row(at: fx.Node, node: fx.Node) -> fx.Node:
    row = emit(at, aten.slice.Tensor, other(node), 0, 0, 1)
    return emit(at, aten.add.Tensor, cast(at, node), row)


def reordered(at: fx.Node, node: fx.Node) -> fx.Node:
    return emit(at, aten.flip.default, node, [0])


ALONE = "its rows are not gathered alone and in order"
ONLY = "its sum is not only scattered"
CASES: list[tuple[str, Layer]] = [
    ("its experts are not split over ranks by their numbers", Layer(part=False)),
    ("T is not one number: these ops are for static graphs (--static)", Layer(symbolic=True)),
    (ALONE, Layer(gathered=reordered)),
    ("its gathered rows are reordered", Layer(start=1)),
    ("its rows are gathered and its sum is scattered over different groups", Layer(group="dp")),
    (ONLY, Layer(extra="sum")),
    ("something of another shape is added to its sum", Layer(tokens=6, summed=with_row)),
    ("its sum is scattered with the reduction 'avg'", Layer(reduce_op="avg")),
    ("its sum is scattered as torch.float32", Layer(summed=change(aten.view.default, [5, 1024]))),
    ("its sum is read by aten.relu.default and not only scattered", Layer(summed=change(aten.relu.default))),
    ("its sum is padded elsewhere", Layer(pads=(0, 0, 1, 0))),
    ("its sum is not scattered row by row", Layer(pads=(0, 0, 0, 3))),
    ("rows of torch.float32: the ops take bfloat16 and float16", Layer(dtype=torch.float32, tables=torch.float32,
     summed=change(aten.view.default, [5, 1024]))),
    ("its tables are not of torch.bfloat16 as its rows", Layer(tables=torch.float32)),
    ("rows of 960: the ops take 1024 to 7168", Layer(width=960)),
    ("rows of 7680: the ops take 1024 to 7168", Layer(width=7680)),
    ("513 rows on a rank: the ops take up to 512", Layer(tokens=1026)),
    ("17 experts of a token: the ops take up to 16", Layer(chosen=17, local=16, total=32, scored=32, first=16)),
    ("385 ranks: the ops take 2 to 384", Layer(ranks=385, tokens=400, local=1, total=385, scored=385, first=384)),
    ("4 of 10 experts are here, on each of 2 ranks", Layer(total=10)),
    ("514 experts: the ops take up to 512", Layer(local=257, total=514, scored=514, first=257)),
    ("its experts are not a router's topk: the ops take different ones alone", Layer(routed=False)),
    ("its experts are not a router's topk: the ops take different ones alone", Layer(scored=9)),
    ("rank 1 has experts from 0 on, not 4", Layer(first=0)),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "layer"), CASES, ids=[str(n) for n in range(len(CASES))])
def test_what_the_ops_do_not_take_stays(ascend: AscendProcess, reason: str, layer: Layer) -> None:
    assert ascend(refused, layer) == ([reason], True)


@pytest.mark.parametrize(
    ("reason", "layer", "own", "ranks"),
    [
        ("no group of its own is given, which these ops demand", Layer(), "", ()),
        ("its group has ranks [1, 0], and the experts are on [0, 1]", Layer(), "own", (1, 0)),
        ("its group has ranks [0, 1, 2], and the experts are on [0, 1]", Layer(), "own", (0, 1, 2)),
        (
            "all_gather_into_tensor_default runs over its group, which these ops demand for themselves",
            Layer(), "tp", (),
        ),
    ],
)  # fmt: skip
def test_other_groups_are_refused(
    ascend: AscendProcess, reason: str, layer: Layer, own: str, ranks: tuple[int, ...]
) -> None:
    assert ascend(refused, layer, own, ranks) == ([reason], True)


def without_the_op() -> list[str]:
    with mock.patch("cpcompile.passes.npu_moe_dispatch.missing_ops", lambda names: f"no {names[0]}"):
        return refused(Layer())[0]


def test_a_missing_op_is_refused(ascend: AscendProcess) -> None:
    assert ascend(without_the_op) == ["no npu_moe_distribute_dispatch_v2"]


def told() -> list[str]:
    """What is logged of a layer that stays."""
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("cpcompile")
    logger.addHandler(handler)
    for _ in to_ascend(build(Layer(part=False)), Settings(moe_dispatch="own")):
        pass
    logger.removeHandler(handler)
    return told


def test_a_refusal_is_logged(ascend: AscendProcess) -> None:
    (line,) = ascend(told)
    assert line.endswith("are not dispatched: its experts are not split over ranks by their numbers")
