"""Context parallelism and experts over the same ranks, under tensor parallelism, and inside data parallelism."""

from __future__ import annotations

import dataclasses
import functools
import threading
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from conftest import SharedRanks, TurnTaking, as_rank
from simulate import fake_rank, in_threads, none_failed, real_inputs
from test_context_parallel import _place, build, close, close_on_every_rank, ids_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers.distributed.tensor_parallel import apply_tensor_parallelism

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.exchange import LocalExchange
from cpcompile.options import Options
from cpcompile.passes.collectives import group_name_of, is_collective, op_name
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.pipeline import compile_graph, copy_graph

EXPERTS = 24
PLAN = {
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts.down_proj": "rowwise",
    "model.layers.*.mlp.experts": "moe_tp_experts",
}


class OwnExperts(nn.Module):
    """Expert parallelism: this rank's tables, zero for the experts of other ranks, a sum over the ranks.

    ``first`` is the number of the first expert here; ``gate_up`` ``[E/n, 2I, H]``, ``down`` ``[E/n, H, I]``.
    """

    def __init__(self, experts: Any, mesh: Any) -> None:
        super().__init__()
        own = EXPERTS // mesh.size()
        first = own * mesh.get_local_rank()
        self.group = mesh.get_group()
        self.gate_up = nn.Parameter(experts.gate_up_proj[first : first + own].detach().clone())
        self.down = nn.Parameter(experts.down_proj[first : first + own].detach().clone())
        self.register_buffer("first", torch.tensor(first))

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        own = self.gate_up.shape[0]
        local = ids - self.first
        here = (local >= 0) & (local < own)
        local = local.clamp(0, own - 1)
        gate, up = (self.gate_up[local] @ hidden[:, None, :, None]).squeeze(-1).chunk(2, -1)
        out = (self.down[local] @ (nn.functional.silu(gate) * up)[..., None]).squeeze(-1)
        out = (out * (weights * here)[..., None]).sum(1)
        return funcol.all_reduce(out, "sum", self.group)


def expert_model(kind: str) -> Any:
    return models.build(models.tiny_config(kind, n_routed_experts=EXPERTS))


def split_experts(kind: str, how: str, mesh: Any) -> Any:
    """A model that is whole on every rank but for its experts: split within (``"tp"``) or by number (``"ep"``).

    By number in the library's own way (``"plan"``), whose router masks the experts of other ranks.
    """
    model = expert_model(kind)
    if how in ("tp", "plan"):
        model._tp_plan = PLAN if how == "tp" else models.EXPERT_PLAN
        return apply_tensor_parallelism(model, mesh)
    for layer in model.model.layers[1:]:
        layer.mlp.experts = OwnExperts(layer.mlp.experts, mesh)
    return model


@functools.cache
def whole(kind: str) -> Any:
    return expert_model(kind)


@functools.cache
def experts_over_the_axis(kind: str, how: str, size: int) -> SharedRanks:
    def make(mesh: Any) -> Any:
        return split_experts(kind, how, mesh["tp"])

    with fake_rank(0, size) as mesh:
        first = capture(make(mesh), input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)
    every = [as_rank(first, rank, size, make) for rank in range(size)]
    return SharedRanks([trace for trace, _ in every], [axis for _, axis in every])


def last_proves(size: int, **options: Any) -> list[dict[str, Any]]:
    """Every rank's options; the last one, whose rows are not the first, proves its graph."""
    return [{**options, "verify": "static" if rank == size - 1 else "off"} for rank in range(size)]


CASES = [
    (k, h, c)
    for k, h, sizes in (
        ("v3", "tp", (2, 8)),
        ("v3", "ep", (3, 4)),
        ("v32", "tp", (3, 4)),
        ("v32", "ep", (2, 8)),
        ("v3", "plan", (3,)),
        ("v32", "plan", (4,)),
    )
    for c in sizes
]


@pytest.mark.parametrize(("kind", "how", "size"), CASES)
def test_experts_over_the_ranks_that_share_the_context(kind: str, how: str, size: int) -> None:
    """Attention on each rank's queries, hidden rows gathered for the experts, their sums scattered again."""
    ranks = experts_over_the_axis(kind, how, size)
    compiled = none_failed(ranks.outcomes(last_proves(size, strategy="cp", profile="ascend-a3")))
    assert not compiled[-1].refused and [p["holds"] for p in compiled[-1].proofs] == [True]
    (variant,) = [v for v in compiled[0].variants if v.steps]
    moved = [
        (op_name(n.target).split("::")[1], n.meta["val"].shape[-1]) for n in variant.gm.graph.nodes if is_collective(n)
    ]
    *before, (last, _), _ = moved  # the last one gathers the graph's output
    assert last == "reduce_scatter_tensor" and {name for name, _ in before} == {"all_gather_into_tensor"}
    widths = [width for _, width in before]  # keys of two layers, the experts' tokens, their ids and weights
    assert widths[:2] == [24 + 16 * (kind == "v32")] * 2 and sum(w >= 64 for w in widths) == 1 and len(widths) <= 4
    for tokens in (*range(1, 2 * size + 2), 17):
        ids = ids_of(1, tokens)
        with torch.no_grad():
            expected = whole(kind)(input_ids=ids, use_cache=False).logits
        for rank, (logits,) in enumerate(ranks.run([c.variants[0].gm for c in compiled], ids)):
            close(logits, expected, (tokens, rank))


# ---- under tensor parallelism: 8 x 2 -------------------------------------------------------------------------------


def on_a_mesh(cp: int, tp: int, model: Any) -> tuple[list[Trace], list[list[Axis]]]:
    """Every rank's trace on a mesh ``[cp, tp]``; ranks of one tp index share theirs."""
    traces, axes = [], []
    for rank in range(cp * tp):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=cp * tp)
        mesh = init_device_mesh("cpu", (cp, tp), mesh_dim_names=("cp", "tp"))
        axes.append([Axis(name, f"{name} group", *_place(mesh, name)) for name in ("tp", "cp")])
        if rank < tp:
            trace = capture(models.shard(model(), mesh["tp"]), input_ids=ids_of(1, 10), use_cache=False)
            values = [getattr(i.value, "_local_tensor", i.value) for i in trace.inputs]
            trace.inputs = [dataclasses.replace(i, value=v) for i, v in zip(trace.inputs, values, strict=True)]
            for node in trace.gm.graph.nodes:
                if is_collective(node):
                    group = group_name_of(node)
                    node.args = tuple("tp group" if i and a == group else a for i, a in enumerate(node.args))
            traces.append(trace)
        else:
            traces.append(traces[rank % tp])
        dist.destroy_process_group()
    return traces, axes


def test_eight_by_two_ranks() -> None:
    """8 ranks of context by 2 of tensors, one layer with experts."""

    def model() -> Any:
        return models.build(models.tiny_config("v3", 1, first_k_dense_replace=0))

    traces, axes = on_a_mesh(8, 2, model)
    groups = {a.ranks for both in axes for a in both}
    ring, turn = {ranks: LocalExchange.ring(len(ranks)) for ranks in groups}, threading.Lock()

    def work(rank: int) -> Compiled:
        gm = fx.GraphModule(traces[rank].gm, copy_graph(traces[rank].gm.graph))
        verify = "static" if rank == 15 else "off"
        options = Options.parse({"strategy": "hybrid", "profile": "ascend-a3", "verify": verify})
        with turn:
            return compile_graph(
                gm, traces[rank].inputs, options, lambda a: TurnTaking(ring[a.ranks][a.rank], turn), axes[rank]
            )

    compiled = none_failed(in_threads(work, 16))
    last = compiled[-1]
    assert not last.refused and [p["holds"] for p in last.proofs] == [True, True]
    decisions = [(c.axis, c.decision) for c in last.report(16384).collectives]
    assert decisions.count(("tp", "scatter")) >= 3 and ("tp", "keep") not in decisions, decisions
    for tokens in (17, 40):
        ids = ids_of(1, tokens)
        with torch.no_grad():
            expected = model()(input_ids=ids, use_cache=False).logits
        close_on_every_rank(compiled, traces, axes, ids, expected)


# ---- inside data parallelism ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["v3", "v32"])
def test_rows_of_data_parallelism_do_not_meet(kind: str) -> None:
    """Mesh ``[dp, cp]``: each row has a batch of its own, of other sizes too; collectives stay in the row."""
    axes = []
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
        if rank == 0:
            trace = capture(build(kind), input_ids=ids_of(1, 10), use_cache=False)
        axes.append(dataclasses.replace(axis_of("cp", mesh["cp"]), group_name=f"cp of {rank // 2}"))
        dist.destroy_process_group()
    rows = [SharedRanks([trace] * 2, axes[:2]), SharedRanks([trace] * 2, axes[2:])]
    compiled = [c for row in rows for c in row.compile(strategy="cp", profile="ascend-a3")]
    assert [a.ranks for a in axes] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    for one, axis in zip(compiled, axes, strict=True):
        assert not one.refused and one.proofs and all(p["holds"] for p in one.proofs)
        groups = {group_name_of(n) for n in one.variants[0].gm.graph.nodes if is_collective(n)}
        assert groups == {axis.group_name}
    for tokens in ((5, 8), (1, 17), (4, 4)):
        batches = [ids_of(1 + row, count)[:1] for row, count in enumerate(tokens)]
        with torch.no_grad():
            expected = [build(kind)(input_ids=ids, use_cache=False).logits for ids in batches]
        programs = [
            RankProgram(c.variants[0].gm, real_inputs(trace, batches[rank // 2]), {axis.group_name: axis.ranks})
            for rank, (c, axis) in enumerate(zip(compiled, axes, strict=True))
        ]
        outputs: Any = run_lockstep(programs)
        for rank, (logits,) in enumerate(outputs):
            close(logits, expected[rank // 2], (tokens, rank))
