"""Context parallelism on real models: attention that every rank repeats is split by tokens, and the answer is kept."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
import torch.fx as fx
from cached_models import Cached, Packed, mark_prefix, positions_of
from conftest import SharedRanks, TurnTaking
from cousins import config_of
from simulate import fake_rank, in_threads, none_failed, real_inputs
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, DeepseekV3Config, DeepseekV32Config

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.errors import RequirementError
from cpcompile.exchange import LocalExchange, OfflineExchange
from cpcompile.layout_ops import own_rows
from cpcompile.layouts import KINDS
from cpcompile.options import Options
from cpcompile.passes.collectives import group_name_of, is_collective, op_name
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.token_layout import size_expr
from cpcompile.pipeline import compile_graph, copy_graph

TOLERANCE = 2e-5
PREFIX = 40
DIM_NAME = "cp"


def build(kind: str) -> Any:
    """So many index heads that no score is zero: of equal scores top-k takes any, by the shape that it works on."""
    return models.build(config_of(kind, **({"index_n_heads": 32} if kind == "v32" else {})))


def replicated_ranks(size: int, model: Any, *args: torch.Tensor, **kwargs: Any) -> SharedRanks:
    """Every rank holds the same model, so every rank's trace is the same: only the axes tell the ranks apart."""
    with fake_rank(0, size) as mesh:
        trace = capture(model, *args, **kwargs)
        axis = dataclasses.replace(axis_of("tp", mesh), name=DIM_NAME)
    return SharedRanks([trace] * size, [dataclasses.replace(axis, rank=rank) for rank in range(size)])


@functools.cache
def prefill(kind: str, size: int, batch: int = 1) -> SharedRanks:
    return replicated_ranks(size, build(kind), input_ids=torch.zeros((batch, 10), dtype=torch.long), use_cache=False)


@functools.cache
def chunks(kind: str, size: int) -> SharedRanks:
    """A chunk of a prompt, behind cached tokens."""
    model = Cached(build(kind))
    with torch.no_grad():
        caches = model(ids_of(1, PREFIX))[1:]
    return replicated_ranks(size, model, ids_of(1, 10), *mark_prefix(caches))


@functools.cache
def whole(kind: str) -> Any:
    return build(kind)


def ids_of(batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * batch + tokens)
    return torch.randint(0, models.TINY["vocab_size"], (batch, tokens), generator=generator)


def close(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    assert found.shape == expected.shape, what
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


def rewritten(compiled: Sequence[Compiled], proven: bool = True) -> list[list[fx.GraphModule]]:
    """Every rewritten variant, as one graph per rank."""
    assert not compiled[0].refused and bool(compiled[0].proofs) == proven
    assert all(p["holds"] for p in compiled[0].proofs)
    return [[c.variants[i].gm for c in compiled] for i, v in enumerate(compiled[0].variants) if v.steps]


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize(
    ("size", "layout"), [*((size, layout) for size in (2, 3) for layout in KINDS), (8, "contiguous"), (8, "zigzag")]
)
def test_every_rank_equals_the_whole_model(kind: str, size: int, layout: str) -> None:
    batch = 2 if (kind, size) == ("v3", 2) else 1
    ranks = prefill(kind, size, batch)
    counts = {*range(1, 2 * size + 2), 4 * size + 1, 17} if layout == "contiguous" else {1, size, 2 * size + 1, 17}
    for graphs in rewritten(ranks.compile(strategy="cp", profile="ascend-a3", layout=layout)):
        assert bool(graphs[0].graph.find_nodes(op="call_function", target=own_rows)) == (layout != "contiguous")
        for tokens in sorted(counts):
            ids = ids_of(batch, tokens)
            with torch.no_grad():
                expected = whole(kind)(input_ids=ids, use_cache=False).logits
            for rank, (logits,) in enumerate(ranks.run(graphs, ids)):
                close(logits, expected, (tokens, rank))


def test_rotary_embeddings_in_complex_numbers_are_split() -> None:
    """DeepSeek's own form: pairs viewed as complex numbers, turned, and viewed as pairs again."""
    ranks = prefill("v2_lite", 2)
    assert ranks.traces[0].gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view_as_complex.default)
    (graphs,) = rewritten(ranks.compile(strategy="cp", profile="ascend-a3", require=["*self_attn*"]))
    for node in graphs[0].graph.find_nodes(op="call_function", target=torch.ops.aten.view_as_complex.default):
        assert node.meta["val"].shape[1] != 10
    for tokens in (5, 6):
        with torch.no_grad():
            expected = whole("v2_lite")(input_ids=ids_of(1, tokens), use_cache=False).logits
        for rank, (logits,) in enumerate(ranks.run(graphs, ids_of(1, tokens))):
            close(logits, expected, (tokens, rank))


@pytest.mark.parametrize("kind", ["v3", "v32"])
def test_a_long_request(kind: str) -> None:
    """1023 tokens on 8 ranks: 128 rows each, one of them padding."""
    ranks, ids = prefill(kind, 8), ids_of(1, 1023)
    with torch.no_grad():
        expected = whole(kind)(input_ids=ids, use_cache=False).logits
    for graphs in rewritten(ranks.compile(strategy="cp", profile="ascend-a3", verify="off"), proven=False)[:1]:
        for (logits,) in ranks.run(graphs, ids):
            close(logits, expected, "1023")


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize(("size", "layout"), [*((2, layout) for layout in KINDS), (3, "contiguous")])
def test_chunked_prefill_and_decode_from_the_caches(kind: str, size: int, layout: str) -> None:
    """Three chunks and four decode steps give every rank the logits and caches of one shot, in token order."""
    ranks = chunks(kind, size)
    model = Cached(whole(kind))
    ids = ids_of(1, PREFIX + 47)
    with torch.no_grad():
        first = model(ids[:, :PREFIX])[1:]
    options = {"strategy": "cp", "profile": "ascend-a3", "layout": layout, "replicated": ["*past*"]}
    for graphs in rewritten(ranks.compile(**options)):
        at, caches = PREFIX, [first] * size
        for tokens in (17, 2, 24, 1, 1, 1, 1):
            now = ids[:, at : at + tokens].contiguous()
            programs = [
                RankProgram(gm, feed(trace, [now, *given]), {axis.group_name: axis.ranks})
                for gm, trace, axis, given in zip(graphs, ranks.traces, ranks.axes, caches, strict=True)
            ]
            outputs: Any = run_lockstep(programs)
            at += tokens
            with torch.no_grad():
                logits, *expected = model(ids[:, :at])
            for rank, found in enumerate(outputs):
                for number, (mine, theirs) in enumerate(zip(found, [logits[:, -tokens:], *expected], strict=True)):
                    close(mine, theirs, (at, rank, number))
            caches = [found[1:] for found in outputs]


@functools.cache
def packed(kind: str, size: int) -> SharedRanks:
    return replicated_ranks(size, Packed(build(kind)), ids_of(1, 14), positions_of((1, 5, 8)))


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize(("size", "layout"), [*((2, layout) for layout in KINDS), (3, "contiguous"), (8, "interleave")])
def test_a_batch_of_several_requests(kind: str, size: int, layout: str) -> None:
    """Every request has the logits that it has alone, whichever ranks its tokens fall to."""
    ranks = packed(kind, size)
    for graphs in rewritten(ranks.compile(strategy="cp", profile="ascend-a3", layout=layout)):
        for lengths in ((1, 5, 8), (1, 1, 1), (17,), (9, 8)):
            ids = ids_of(1, sum(lengths))
            with torch.no_grad():
                alone = [whole(kind)(input_ids=part, use_cache=False).logits for part in ids.split(lengths, 1)]
            programs = [
                RankProgram(gm, feed(trace, [ids, positions_of(lengths)]), {axis.group_name: axis.ranks})
                for gm, trace, axis in zip(graphs, ranks.traces, ranks.axes, strict=True)
            ]
            outputs: Any = run_lockstep(programs)
            for rank, (logits,) in enumerate(outputs):
                close(logits, torch.cat(alone, 1), (lengths, rank))


def feed(trace: Trace, given: Sequence[torch.Tensor]) -> list[Any]:
    """Inputs of the traced graph: parameters as traced, the token ids and caches given, and their sizes."""
    nodes = trace.gm.graph.find_nodes(op="placeholder")
    places = [i for i, known in enumerate(trace.inputs) if known.kind == "input"]
    ids = next(i for i in places if "ids" in trace.inputs[i].name)
    order = [ids, *(i for i in places if i != ids)]  # dynamo keeps the order of ``*past``
    values = dict(zip(order, given, strict=True))
    sizes: dict[Any, int] = {}
    for place, value in values.items():
        traced = nodes[place].meta["val"]
        for said, real in zip([*traced.shape, *traced.stride()], [*value.shape, *value.stride()], strict=True):
            if isinstance(said, torch.SymInt):
                sizes.setdefault(said.node.expr, real)
    found: list[Any] = []
    for place, (node, known) in enumerate(zip(nodes, trace.inputs, strict=True)):
        traced = node.meta.get("val")
        if place in values:
            found.append(values[place])
        elif isinstance(traced, torch.SymInt):
            found.append(sizes[traced.node.expr])
        else:
            found.append(known.value.detach() if isinstance(known.value, torch.Tensor) else None)
    return found


def test_caches_that_may_differ_are_not_relied_on() -> None:
    """Nothing says that every rank holds the same cache: attention over it stays whole unless the user declares it."""
    compiled = chunks("v3", 2).compile(strategy="cp", profile="ascend-a3")
    assert not compiled[0].rewritten and "no attention is the same on all its ranks" in compiled[0].refused["cp"]


# ---- with tensor parallelism ---------------------------------------------------------------------------------------


@functools.cache
def hybrid(kind: str, cp: int, tp: int) -> tuple[list[Trace], list[list[Axis]]]:
    """Every rank's trace on a mesh ``[cp, tp]``, tensor-parallel over ``tp``: one for the ranks alike over ``cp``."""
    traces: list[Trace] = []
    axes = []
    for rank in range(cp * tp):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=cp * tp)
        mesh = init_device_mesh("cpu", (cp, tp), mesh_dim_names=("cp", "tp"))
        axes.append([Axis(name, f"{name} group", *_place(mesh, name)) for name in ("tp", "cp")])
        trace = traces[rank - tp] if rank >= tp else _traced(kind, mesh)
        dist.destroy_process_group()
        traces.append(trace)
    return traces, axes


def _traced(kind: str, mesh: DeviceMesh) -> Trace:
    trace = capture(models.shard(build(kind), mesh["tp"]), input_ids=ids_of(1, 10), use_cache=False)
    for node in trace.gm.graph.nodes:  # PyTorch's names are counted anew on each rank of one process
        if is_collective(node):
            node.args = tuple("tp group" if i and a == group_name_of(node) else a for i, a in enumerate(node.args))
    # The mesh of a DTensor is gone with the rank: its local part is compared like any parameter.
    values = [getattr(i.value, "_local_tensor", i.value) for i in trace.inputs]
    trace.inputs = [dataclasses.replace(i, value=v) for i, v in zip(trace.inputs, values, strict=True)]
    return trace


def _place(mesh: DeviceMesh, name: str) -> tuple[int, int, tuple[int, ...]]:
    axis = axis_of(name, mesh[name])
    return axis.size, axis.rank, axis.ranks


def close_on_every_rank(
    compiled: Sequence[Compiled],
    traces: Sequence[Trace],
    axes: Sequence[Sequence[Axis]],
    ids: torch.Tensor,
    expected: torch.Tensor,
) -> None:
    """All ranks of a mesh run together, and each has the ``expected`` logits."""
    programs = [
        RankProgram(c.variants[0].gm, real_inputs(trace, ids), {a.group_name: a.ranks for a in both})
        for c, trace, both in zip(compiled, traces, axes, strict=True)
    ]
    outputs: Any = run_lockstep(programs)
    for rank, (logits,) in enumerate(outputs):
        close(logits, expected, (ids.shape[1], rank))


@pytest.mark.parametrize(("kind", "layout"), [("v3", "contiguous"), ("v3", "zigzag"), ("v32", "contiguous")])
def test_context_and_tensor_parallelism_together(kind: str, layout: str) -> None:
    traces, axes = hybrid(kind, 2, 2)
    ring, turn = {ranks: LocalExchange.ring(2) for ranks in {a.ranks for both in axes for a in both}}, threading.Lock()

    def work(rank: int) -> Compiled:
        gm = fx.GraphModule(traces[rank].gm, copy_graph(traces[rank].gm.graph))
        options = Options.parse({"strategy": "hybrid", "profile": "ascend-a3", "layout": layout})
        with turn:
            exchanges = {a.ranks: TurnTaking(ring[a.ranks][a.rank], turn) for a in axes[rank]}
            return compile_graph(gm, traces[rank].inputs, options, lambda axis: exchanges[axis.ranks], axes[rank])

    compiled = none_failed(in_threads(work, 4))
    first = compiled[0]
    assert not first.refused and [p["holds"] for p in first.proofs] == [True, True]
    decisions = {(c.axis, c.decision) for c in first.report(TOKENS).collectives}
    assert {("cp", "gather"), ("tp", "scatter")} <= decisions
    scattered = {c.module for c in first.report(TOKENS).collectives if (c.axis, c.decision) == ("tp", "scatter")}
    assert {"model.embed_tokens", "model.layers.1.mlp"} <= scattered, scattered  # experts and shared ones in one sum
    for tokens in (1, 2, 3, 4, 5, 9, 17):
        ids = ids_of(1, tokens)
        with torch.no_grad():
            expected = whole(kind)(input_ids=ids, use_cache=False).logits
        close_on_every_rank(compiled, traces, axes, ids, expected)


# ---- structure at real sizes ---------------------------------------------------------------------------------------

SIZE, TOKENS, LAYERS = 8, 16384, 2


@functools.cache
def real_sizes(kind: str) -> Compiled:
    """A dense layer and one with experts, of real sizes, whole on each of 8 ranks in bfloat16; nothing is allocated."""
    config = (
        DeepseekV3Config(num_hidden_layers=LAYERS, first_k_dense_replace=1)
        if kind == "v3"
        else DeepseekV32Config(num_hidden_layers=LAYERS, mlp_layer_types=["dense", "sparse"])
    )
    with torch.device("meta"):
        ids = torch.zeros((1, 10), dtype=torch.long)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with fake_rank(0, SIZE) as mesh:
        trace, axis = capture(model, input_ids=ids, use_cache=False), axis_of("tp", mesh)
    options = Options.parse({"profile": "ascend-a3", "strategy": "cp", "replicated": ["*"]})
    return compile_graph(trace.gm, trace.inputs, options, lambda _: OfflineExchange(SIZE), [axis])


@pytest.mark.parametrize(("kind", "latent"), [("v3", 512 + 64), ("v32", 512 + 64 + 128)])
def test_one_gather_of_the_latent_in_each_layer(kind: str, latent: int) -> None:
    """Per layer and token one all-gather: keys as latent, rope keys and the indexer's keys, and nothing else."""
    compiled = real_sizes(kind)
    assert not compiled.refused and compiled.proofs and all(p["holds"] for p in compiled.proofs)
    gathered = []
    for node in compiled.at(TOKENS).gm.graph.nodes:
        if is_collective(node):
            assert "all_gather" in op_name(node.target), node
            sizes = [e.subs(dict.fromkeys(e.free_symbols, TOKENS)) for e in map(size_expr, node.meta["val"].shape)]
            assert sizes[0] == TOKENS
            gathered.append(int(sizes[1]))
    *layers, last = gathered
    assert layers == [latent] * LAYERS and last in (7168, 129280)  # hidden rows or logits, for the graph's output


# ---- strategies ----------------------------------------------------------------------------------------------------


def test_decode_keeps_its_graph_and_long_prompts_are_split() -> None:
    compiled = prefill("v3", 2).compile(strategy="auto", profile="ascend-a3")[0]
    assert not compiled.at(1).steps[0].interval.labels
    assert compiled.at(1 << 16).steps[0].interval.labels


def test_tensor_parallelism_is_not_for_attention_that_is_whole() -> None:
    compiled = prefill("v3", 2).compile(strategy="tp")[0]
    assert compiled.refused == {
        "cp": "strategy='tp', and every rank of axis 'cp' computes all of attention: that is for 'cp' or 'auto'"
    }
    with pytest.raises(RequirementError, match="nothing of that name was rewritten"):
        prefill("v3", 2).compile(strategy="tp", require=["*self_attn*"])
