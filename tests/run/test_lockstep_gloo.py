"""The lockstep interpreter against two real gloo ranks that run the same GraphModules: bit for bit."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.fx as fx
import torch.multiprocessing as mp
from torch import Tensor

from cpcompile.passes.lockstep import LockstepError, RankProgram, run_lockstep

C10D = torch.ops._c10d_functional
WORLD_SIZE = 2
SECONDS = 20


def collective(target: object, *args: object) -> fx.GraphModule:
    graph = fx.Graph()
    result = graph.call_function(target, (graph.placeholder("x"), *args))
    graph.output(graph.call_function(C10D.wait_tensor.default, (result,)))
    return fx.GraphModule(torch.nn.Module(), graph)


def coalesced(target: object, *args: object) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    operands = [x, graph.call_function(torch.ops.aten.mul.Tensor, (x, 3.0))]
    results = graph.call_function(target, (operands, *args))
    parts = [graph.call_function(lambda values, i: values[i], (results, i)) for i in range(2)]
    graph.output(tuple(graph.call_function(C10D.wait_tensor.default, (part,)) for part in parts))
    return fx.GraphModule(torch.nn.Module(), graph)


def mlp(group: str, sharded: bool) -> fx.GraphModule:
    """``y = 2 AR(x @ w)`` and ``x + y``; ``sharded`` doubles in row shards, between a reduce-scatter and a gather."""
    aten = torch.ops.aten
    graph = fx.Graph()
    x = graph.placeholder("x")
    partial = graph.call_function(aten.mm.default, (x, graph.get_attr("weight")))
    if sharded:
        summed = graph.call_function(C10D.reduce_scatter_tensor.default, (partial, "sum", WORLD_SIZE, group))
    else:
        summed = graph.call_function(C10D.all_reduce.default, (partial, "sum", group))
    value = graph.call_function(aten.mul.Tensor, (graph.call_function(C10D.wait_tensor.default, (summed,)), 2.0))
    if sharded:
        gathered = graph.call_function(C10D.all_gather_into_tensor.default, (value, WORLD_SIZE, group))
        value = graph.call_function(C10D.wait_tensor.default, (gathered,))
    graph.output((graph.call_function(aten.add.Tensor, (x, value)), value))
    root = torch.nn.Module()
    root.weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(7))
    return fx.GraphModule(root, graph)


def cases(group: str, rank: int) -> dict[str, fx.GraphModule]:
    """What both worlds run; the all-to-all's splits depend on the rank."""
    n = WORLD_SIZE
    sends = [[1, 5], [2, 4]]
    programs = {
        f"{name} {reduce_op}": collective(getattr(C10D, name).default, reduce_op, *size, group)
        for name, size in (("all_reduce", ()), ("reduce_scatter_tensor", (n,)))
        for reduce_op in ("sum", "avg", "max", "min", "product")
    }
    return programs | {
        "all_gather": collective(C10D.all_gather_into_tensor.default, n, group),
        "broadcast": collective(C10D.broadcast.default, 1, group),
        "all_to_all": collective(C10D.all_to_all_single.default, [sends[0][rank], sends[1][rank]], sends[rank], group),
        "all_reduce_coalesced": coalesced(C10D.all_reduce_coalesced.default, "sum", group),
        "all_gather_coalesced": coalesced(C10D.all_gather_into_tensor_coalesced.default, n, group),
        "reduce_scatter_coalesced": coalesced(C10D.reduce_scatter_tensor_coalesced.default, "sum", n, group),
        "mlp": mlp(group, sharded=False),
        "mlp sharded": mlp(group, sharded=True),
    }


def refused_cases(group: str) -> dict[str, tuple[fx.GraphModule, Tensor]]:
    """What neither world runs."""
    reduce_scatter = collective(C10D.reduce_scatter_tensor.default, "sum", WORLD_SIZE, group)
    return {
        "indivisible reduce_scatter": (reduce_scatter, torch.ones(5, 3)),
        "average of integers": (collective(C10D.all_reduce.default, "avg", group), torch.ones(4, dtype=torch.int32)),
        "source outside the group": (collective(C10D.broadcast.default, WORLD_SIZE, group), torch.ones(4)),
        "scalar all_gather": (collective(C10D.all_gather_into_tensor.default, WORLD_SIZE, group), torch.ones(())),
    }


def is_refused(gm: fx.GraphModule, x: Tensor) -> bool:
    try:
        gm(x)
    except RuntimeError:
        return True
    return False


def operand(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(rank)).mul(5).to(dtype)


def operands_of(name: str, rank: int) -> list[Tensor]:
    dtypes = [torch.float32] if name.startswith("mlp") else [torch.float32, torch.bfloat16]
    return [operand(rank, dtype) for dtype in dtypes]


def gloo_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    group = dist.group.WORLD.group_name
    outputs = {name: [gm(x) for x in operands_of(name, rank)] for name, gm in cases(group, rank).items()}
    outputs["refused"] = [name for name, (gm, x) in refused_cases(group).items() if is_refused(gm, x)]
    torch.save(outputs, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gloo_outputs(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[object]]]:
    folder = tmp_path_factory.mktemp("gloo")
    context = mp.start_processes(gloo_rank, (str(folder),), WORLD_SIZE, join=False, start_method="spawn")
    try:
        deadline = datetime.datetime.now() + datetime.timedelta(seconds=2 * SECONDS)
        while not context.join(timeout=1):  # raises what a rank raised
            assert datetime.datetime.now() < deadline, "the gloo ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD_SIZE)]


def lockstep(name: str, which: int) -> list[object]:
    groups = {"world": tuple(range(WORLD_SIZE))}
    return run_lockstep(
        [
            RankProgram(cases("world", rank)[name], [operands_of(name, rank)[which]], groups)
            for rank in range(WORLD_SIZE)
        ]
    )


@pytest.mark.parametrize("name", cases("world", 0))
def test_lockstep_has_the_bits_of_gloo(name: str, gloo_outputs: list[dict[str, list[object]]]) -> None:
    for which, _ in enumerate(operands_of(name, 0)):
        for rank, simulated in enumerate(lockstep(name, which)):
            torch.testing.assert_close(simulated, gloo_outputs[rank][name][which], rtol=0, atol=0)


@pytest.mark.parametrize("name", refused_cases("world"))
def test_lockstep_and_gloo_refuse_alike(name: str, gloo_outputs: list[dict[str, list[object]]]) -> None:
    assert all(name in outputs["refused"] for outputs in gloo_outputs)
    gm, x = refused_cases("world")[name]
    with pytest.raises(LockstepError, match=r"^rank 0: "):
        run_lockstep([RankProgram(gm, [x], {"world": tuple(range(WORLD_SIZE))})] * WORLD_SIZE)
