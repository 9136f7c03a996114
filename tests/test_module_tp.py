"""Module tensor parallelism through the pipeline: beside data, tensor and context parallelism, and what is refused."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.fx as fx
from conftest import TurnTaking, case
from shared_modules import group_of, ids_of, model, trace_of
from simulate import in_threads, none_failed, real_inputs
from test_context_parallel import prefill
from test_context_parallel import whole as whole_cp

from cpcompile import share_weights
from cpcompile.axes import Axis
from cpcompile.capture import Trace
from cpcompile.compiled import Compiled
from cpcompile.errors import GroupError, OptionError
from cpcompile.exchange import LocalExchange, OfflineExchange
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.module_groups import module_axes
from cpcompile.options import Options
from cpcompile.passes.collective_sequence import check_collective_order
from cpcompile.passes.collectives import is_collective, op_name
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.weight_recipes import carry_out
from cpcompile.pipeline import compile_graph, copy_graph

TOLERANCE = 2e-5
MODULES = ("embedding", "o_proj", "mlp", "lm_head")


class World:
    """Simulated ranks: each with a trace, an axis over which tokens are the same, and groups that share modules."""

    def __init__(
        self,
        traces: Sequence[Trace],
        token_axes: Sequence[Axis | None],
        roles: Sequence[Mapping[str, Axis]],
        **options: Any,
    ) -> None:
        self.traces, self.token_axes, self.roles = traces, token_axes, roles
        turn = threading.Lock()
        rings: dict[tuple[str, tuple[int, ...]], list[LocalExchange]] = {}
        for axis in [*filter(None, token_axes), *(axis for of_rank in roles for axis in of_rank.values())]:
            rings.setdefault((axis.name, axis.ranks), LocalExchange.ring(axis.size))

        def work(rank: int) -> Compiled:
            trace = traces[rank]
            gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))

            def exchange(axis: Axis) -> TurnTaking:
                return TurnTaking(rings[axis.name, axis.ranks][axis.rank], turn)

            with turn:
                parsed = Options.parse(options)
                return compile_graph(
                    gm, trace.inputs, parsed, exchange, [*filter(None, [token_axes[rank]])], roles[rank]
                )

        self.compiled: list[Compiled] = none_failed(in_threads(work, len(traces)))

    def groups(self, rank: int) -> dict[str, tuple[int, ...]]:
        axes = [*filter(None, [self.token_axes[rank]]), *self.roles[rank].values()]
        return {axis.group_name: axis.ranks for axis in axes}

    def graph(self, rank: int, tokens: int) -> fx.GraphModule:
        compiled = self.compiled[rank]
        assert compiled.sharing is not None
        if tokens:
            return compiled.at(tokens).gm
        assert compiled.sharing.idle is not None and not compiled.sharing.not_idle
        return compiled.sharing.idle

    def _values(self, rank: int, tokens: int) -> dict[str, Any]:
        names = [n.name for n in self.traces[rank].gm.graph.find_nodes(op="placeholder")]
        return dict(zip(names, real_inputs(self.traces[rank], ids_of(tokens)), strict=True))

    def run(self, counts: Sequence[int]) -> list[Any]:
        """Every rank's logits for its number of tokens."""
        programs, values = [], [self._values(rank, tokens) for rank, tokens in enumerate(counts)]
        every = [compiled.sharing.recipes for compiled in self.compiled if compiled.sharing is not None]
        for name, steps in every[0].items():
            for index in range(len(steps)):
                before = [of_rank[name] for of_rank in values]
                for rank, of_rank in enumerate(values):
                    collect = functools.partial(_collect, before)
                    of_rank[name] = carry_out(before[rank], every[rank][name][index], collect)
        for rank, tokens in enumerate(counts):
            gm = self.graph(rank, tokens)
            inputs = [values[rank][n.name] for n in gm.graph.find_nodes(op="placeholder")]
            programs.append(RankProgram(gm, inputs, self.groups(rank)))
        outputs: list[Any] = run_lockstep(programs)
        return [output[0] if tokens else None for output, tokens in zip(outputs, counts, strict=True)]


def _collect(values: Sequence[torch.Tensor], own: torch.Tensor, axis: Axis) -> list[torch.Tensor]:
    return [values[rank] for rank in axis.ranks]


def close(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert found.shape == expected.shape, what
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


@torch.no_grad()
def logits(whole: Any, tokens: int) -> torch.Tensor:
    return whole(input_ids=ids_of(tokens), use_cache=False).logits  # type: ignore[no-any-return]


# ---- data parallelism x tensor parallelism ---------------------------------------------------------------------------

DP, TP = 4, 2


@functools.cache
def data_and_tensor_parallel(kind: str, share: int, strategy: str) -> World:
    """Four replicas of two ranks; ``share`` replicas share every module that can be."""
    ranks = case(kind, TP).ranks
    groups = rank_groups(Sizes(dp=DP, tp=TP, **dict.fromkeys(MODULES, share)), "vllm")
    traces, token_axes, roles = [], [], []
    for rank in range(DP * TP):
        t = rank % TP
        own = ranks.axes[t]
        traces.append(ranks.traces[t])
        tokens = groups["tp"].of(rank)
        token_axes.append(Axis("tp", own.group_name, TP, tokens.index(rank), tokens))
        of_rank = groups["o_proj"].of(rank)
        axis = Axis("modules", "module group", share, of_rank.index(rank), of_rank)
        roles.append(dict.fromkeys(MODULES, axis))
    return World(traces, token_axes, roles, strategy=strategy, profile="ascend-a3")


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize(("share", "strategy"), [(2, "tp"), (4, "tp"), (4, "off")])
def test_replicas_share_modules(kind: str, share: int, strategy: str) -> None:
    world = data_and_tensor_parallel(kind, share, strategy)
    for compiled in world.compiled:
        shared = [row.role for row in compiled.sharing.rows if row.decision == "share"]
        assert shared == ["embedding", "o_proj", "mlp", "o_proj", "lm_head"]
        assert compiled.proofs and all(p["holds"] for p in compiled.proofs)
    for counts in ([0, 1, 7, 8], [8, 7, 1, 0], [3, 3, 3, 3]):
        every = [tokens for tokens in counts for _ in range(TP)]
        for rank, (tokens, found) in enumerate(zip(every, world.run(every), strict=True)):
            if tokens:
                close(found, logits(case(kind, TP).whole, tokens), (counts, rank))


@pytest.mark.parametrize("counts", [(0, 1, 7, 8), (16, 16, 0, 0)])
def test_every_rank_issues_the_same_collectives(counts: tuple[int, ...]) -> None:
    """Idle ranks included: their tensor-parallel peers are idle with them, their data-parallel peers are not."""
    world = data_and_tensor_parallel("v3", 4, "tp")
    graphs = [world.graph(rank, counts[rank // TP]) for rank in range(DP * TP)]
    proof = check_collective_order(graphs, [world.groups(rank) for rank in range(DP * TP)])
    assert proof.holds, proof.failures
    assert {ranks for _, ranks in proof.assumed} <= {axis.ranks for axis in world.token_axes}


def test_a_dropped_collective_is_found() -> None:
    world = data_and_tensor_parallel("v3", 4, "tp")
    graphs = [world.graph(rank, 8) for rank in range(DP * TP)]
    broken = fx.GraphModule(graphs[3], copy_graph(graphs[3].graph))
    scatter = next(n for n in broken.graph.nodes if op_name(n.target).endswith("reduce_scatter_tensor"))
    scatter.replace_all_uses_with(scatter.args[0])
    broken.graph.erase_node(scatter)
    graphs[3] = broken
    assert not check_collective_order(graphs, [world.groups(rank) for rank in range(DP * TP)]).holds


# ---- FlashComm 2, and whole layers by rank ---------------------------------------------------------------------------


@functools.cache
def flash_world(otp: int, strategy: str, layered: bool) -> World:
    """Four tensor-parallel ranks with FlashComm 2 and, on top of it, whole layers by rank."""
    size = 4
    ranks = case("v3", size).ranks
    groups = rank_groups(Sizes(tp=size, flashcomm2_otp=otp, shared_weight=layered), "vllm")
    kinds = []
    for rank in range(size):
        of_rank = {}
        for kind in ["flashcomm2_otp", "flashcomm2_odp"] + ["shared_weight"] * layered:
            members, tp = groups[kind].of(rank), ranks.axes[rank]
            # As ProcessGroups does it: groups of the same ranks and purpose share a communicator.
            name = tp.group_name if groups[kind].purpose == groups["tp"].purpose and members == tp.ranks else kind
            of_rank[kind] = Axis(kind, name, len(members), members.index(rank), members)
        kinds.append(of_rank)
    return World(ranks.traces, ranks.axes, kinds, strategy=strategy, profile="ascend-a3")


@pytest.mark.parametrize(
    ("otp", "strategy", "layered"), [(1, "tp", False), (2, "tp", False), (2, "off", False), (1, "tp", True)]
)
def test_flashcomm2_through_the_pipeline(otp: int, strategy: str, layered: bool) -> None:
    world = flash_world(otp, strategy, layered)
    methods = ["flashcomm2"] + ["layers"] * layered
    for compiled in world.compiled:
        assert [p["method"] for p in compiled.proofs if p["method"] != "static"] == methods
        assert compiled.proofs and all(p["holds"] for p in compiled.proofs) and compiled.sharing is not None
        assert [r.decision for r in compiled.sharing.rows] == ["share"] * (4 if layered else 2)
    for tokens in (1, 3, 4, 9, 17):
        for rank, found in enumerate(world.run([tokens] * 4)):
            close(found, logits(case("v3", 4).whole, tokens), (tokens, rank))


def test_flashcomm2_where_a_rank_has_more_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven heads: the ranks find out when they tell each other how they fared, and o_proj stays as it is on all."""
    told, real = iter(range(4)), share_weights.local_tensor

    def uneven(value: Any) -> torch.Tensor:
        return real(value)[: 1 + next(told, 0)]

    monkeypatch.setattr(share_weights, "local_tensor", uneven)
    world = flash_world.__wrapped__(1, "tp", False)
    for compiled in world.compiled:
        assert compiled.sharing is not None and not compiled.sharing.recipes
        assert {"hold weights of other sizes" in row.reason for row in compiled.sharing.rows} == {True}
    for rank, found in enumerate(world.run([5] * 4)):
        close(found, logits(case("v3", 4).whole, 5), rank)


def test_layers_by_rank_with_tokens_of_their_own() -> None:
    """Three replicas, whole o_proj of layer i on rank i % 3; one of them idle."""
    trace, size = trace_of("v3", 5), 3
    axes = [Axis("shared_weight", "shared weights", size, rank, tuple(range(size))) for rank in range(size)]
    world = World([trace] * size, [None] * size, [{"shared_weight": axis} for axis in axes])
    held = [[row.bytes_after > 0 for row in c.sharing.rows] for c in world.compiled if c.sharing is not None]
    assert held == [[layer % size == rank for layer in range(5)] for rank in range(size)]
    counts = [4, 0, 9]
    for tokens, found in zip(counts, world.run(counts), strict=True):
        if tokens:
            close(found, logits(model("v3", 5), tokens), tokens)


# ---- context parallelism ---------------------------------------------------------------------------------------------

CP = 4


@functools.cache
def context_parallel(kind: str, share: int, roles: tuple[str, ...], strategy: str = "cp") -> World:
    """Four ranks that split the tokens; pairs of neighbours, or all, share modules."""
    ranks = prefill(kind, CP)
    of_rank = []
    for rank in range(CP):
        first = rank - rank % share
        axis = Axis("modules", "module group", share, rank - first, tuple(range(first, first + share)))
        of_rank.append(dict.fromkeys(roles, axis))
    return World(ranks.traces, ranks.axes, of_rank, strategy=strategy, profile="ascend-a3")


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize(("share", "roles"), [(2, ("o_proj",)), (2, MODULES), (4, MODULES)])
def test_ranks_that_split_the_tokens_share_modules(kind: str, share: int, roles: tuple[str, ...]) -> None:
    world = context_parallel(kind, share, roles)
    assert all(p["holds"] for compiled in world.compiled for p in compiled.proofs)
    for tokens in (1, 2, 4, 5, 9, 17):
        for rank, found in enumerate(world.run([tokens] * CP)):
            close(found, logits(whole_cp(kind), tokens), (tokens, rank))


def test_ranks_with_the_same_tokens_bring_nothing_together() -> None:
    """Few tokens are not split: every rank has all rows, multiplies by its part, and the parts are summed or joined."""
    world, tokens = context_parallel("v3", 2, MODULES, "auto"), 2
    few, many = (world.compiled[0].at(count).steps for count in (tokens, 1 << 20))
    assert few and not any(step.interval.raises for step in few) and any(step.interval.raises for step in many)
    graph = world.compiled[0].at(tokens).gm
    moved = [op_name(n.target).split("::")[1] for n in graph.graph.nodes if is_collective(n)]
    assert moved == ["all_reduce"] * 4 + [
        "all_gather_into_tensor"
    ]  # embedding, o_proj, mlp, o_proj; columns of lm_head
    for rank, found in enumerate(world.run([tokens] * CP)):
        close(found, logits(whole_cp("v3"), tokens), rank)


def test_no_collective_at_the_seams() -> None:
    """A shared o_proj adds two collectives per layer to context parallelism, and nothing gathers what it scattered."""
    plain, shared = (
        [op_name(n.target).split("::")[1] for n in gm.graph.nodes if is_collective(n)]
        for gm in (
            prefill("v3", CP).compile(strategy="cp", profile="ascend-a3")[0].at(16).gm,
            context_parallel("v3", 2, ("o_proj",)).compiled[0].at(16).gm,
        )
    )
    added = ["all_to_all_single", "reduce_scatter_tensor"] * 2
    rest = list(shared)
    for name in added:
        rest.remove(name)
    assert sorted(rest) == sorted(plain)


# ---- what is refused -------------------------------------------------------------------------------------------------


def offline(trace: Trace, roles: Mapping[str, Axis], **options: Any) -> Compiled:
    gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
    parsed = Options.parse({"replicated": ["*"], **options})
    return compile_graph(gm, trace.inputs, parsed, lambda a: OfflineExchange(a.size, a.rank), [], roles)


def test_weights_that_differ_stay_whole() -> None:
    axis = group_of(2, 0)
    compiled = offline(trace_of("v3"), {"lm_head": axis, "o_proj": axis}, replicated=["*", "!lm_head*"])
    assert compiled.sharing is not None
    rows = {row.module: row for row in compiled.sharing.rows}
    assert rows["lm_head"].decision == "keep" and "may hold different lm_head.weight" in rows["lm_head"].reason
    assert rows["model.layers.0.self_attn.o_proj"].decision == "share"


def test_sizes_that_do_not_divide_stay_whole() -> None:
    compiled = offline(trace_of("v3"), {"embedding": group_of(5, 0)})
    assert compiled.sharing is not None and not compiled.sharing.modules
    assert "has 96 elements, which 5 does not divide" in compiled.sharing.rows[0].reason


def test_deterministic_shares_nothing() -> None:
    compiled = offline(trace_of("v3"), {"o_proj": group_of(2, 0)}, deterministic=True)
    assert compiled.sharing is not None and not compiled.sharing.modules
    assert {row.reason for row in compiled.sharing.rows} == {"deterministic=True keeps every reduction order"}


def test_names_override_dataflow() -> None:
    roles = {"mlp": group_of(2, 0)}
    compiled = offline(trace_of("v3"), roles, modules={"mlp": "model.layers.1.mlp.shared_experts"})
    assert compiled.sharing is not None
    assert [m.name for m in compiled.sharing.modules] == ["model.layers.1.mlp.shared_experts"]
    compiled = offline(trace_of("v3"), roles, modules={"none": "model.layers.0.*"})
    assert compiled.sharing is not None and not compiled.sharing.modules
    (row,) = compiled.sharing.rows  # what was asked for and is nowhere is told
    assert (row.role, row.decision) == ("mlp", "keep") and row.reason.startswith("no module of this graph")
    with pytest.raises(OptionError, match=r"no module called 'model\.layers\.9\.mlp' has the form of mlp"):
        offline(trace_of("v3"), roles, modules={"mlp": "model.layers.9.mlp"})


def test_ranks_that_would_share_other_modules() -> None:
    ring, axes = LocalExchange.ring(2), [group_of(2, rank) for rank in range(2)]
    options = [{}, {"modules": {"none": "lm_head"}}]
    trace, turn = trace_of("v3"), threading.Lock()

    def work(rank: int) -> Compiled:
        gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
        roles = dict.fromkeys(MODULES, axes[rank])
        with turn:
            parsed = Options.parse(options[rank])
            return compile_graph(gm, trace.inputs, parsed, lambda _: TurnTaking(ring[rank], turn), [], roles)

    every = [row for compiled in none_failed(in_threads(work, 2)) for row in compiled.sharing.rows]
    assert every and {row.decision for row in every} == {"keep"}
    reasons = {row.reason.partition(":")[0] for row in every if row.module}
    assert reasons == {"rank 1 of dp [0, 1] would share other modules than rank 0"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"finegrained_tp_config": {"oproj_tensor_parallel_size": 2}},
            "needs the process group 'o_proj': give groups=",
        ),
        (
            {"finegrained_tp_config": {"oproj_tensor_parallel_size": 2}, "groups": {"oproj": None}},
            "groups has none of kind 'o_proj' .did you mean 'oproj'",
        ),
        (
            {"finegrained_tp_config": {"oproj_tensor_parallel_size": 2}, "groups": {"o_proj": group_of(4, 0)}},
            "its process group 'o_proj' has 4 ranks",
        ),
    ],
)
def test_groups_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GroupError, match=message):
        module_axes(Options.parse(options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"finegrained_tp_config": {"oproj_size": 2}}, "known: .*oproj_tensor_parallel_size"),
        ({"finegrained_tp_config": {"mlp_tensor_parallel_size": 0}}, "mlp_tensor_parallel_size is 0: give a number"),
        ({"group_tokens": "same"}, "group_tokens='same' is not known"),
        ({"group_tokens": 0}, "group_tokens is 0: give 'exchange', 'equal' or a number of rows"),
        ({"layer_sharding": ["q_b_proj"]}, "layer_sharding='q_b_proj' is not known"),
        ({"modules": {"oproj": "x"}}, "did you mean 'o_proj'"),
    ],
)
def test_options_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Options.parse(options)
