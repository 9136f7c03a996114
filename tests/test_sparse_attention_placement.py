"""Where the sparse attention ops are placed in V3.2 at real sizes, and that the placements are proven and compute."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
import torch.fx as fx
from conftest import SharedRanks, case
from simulate import fake_rank
from transformers import AutoModelForCausalLM, DeepseekV32Config

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.costs import profile
from cpcompile.exchange import OfflineExchange
from cpcompile.options import Options
from cpcompile.passes import verify_rules
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.op_call import Mixing, RowWise
from cpcompile.passes.placement_problem import build, evaluate
from cpcompile.passes.placement_rules import classify
from cpcompile.passes.recognise_sparse_attention import RecogniseSparseAttention
from cpcompile.passes.token_dims import annotate
from cpcompile.passes.token_layout import TokenDim, value_shapes
from cpcompile.passes.verify_call import Call
from cpcompile.passes.verify_index import Rows, tensor_shape
from cpcompile.pipeline import compile_graph, copy_graph

INDEXER = torch.ops.cpcompile.lightning_indexer.default
ATTENTION = torch.ops.cpcompile.sparse_attention.default
SIZE, LAYERS, LONG, SHORT = 8, 2, 65536, 1024
REPLICATED = [
    "*norm.weight", "*norm.bias", "*.q_a_proj.weight", "*.kv_a_proj_with_mqa.weight", "*.gate.weight",
    "*.e_score_correction_bias", "*.inv_freq", "*.indexer.*",
]  # fmt: skip
WHOLE_ATTENTION = [*REPLICATED, "*.q_b_proj.weight", "*.kv_b_proj.weight", "*.o_proj.weight", "*.embed_tokens.weight"]


def shard_mlp(model: Any, mesh: Any) -> Any:
    model._tp_plan = {name: style for name, style in model.tp_plan.items() if ".mlp." in name}
    return models.apply_tensor_parallelism(model, mesh)


@functools.cache
def recognised(parallel_attention: bool = True) -> tuple[Trace, Axis]:
    """Two dense layers of the default V3.2 in bfloat16 on 8 ranks, its attention sharded by heads or whole."""
    with torch.device("meta"):
        ids = torch.zeros((1, 10), dtype=torch.long)
        config = DeepseekV32Config(num_hidden_layers=LAYERS, mlp_layer_types=["dense"] * LAYERS)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with fake_rank(0, SIZE) as mesh:
        shard = models.shard if parallel_attention else shard_mlp
        trace, axis = capture(shard(model, mesh), input_ids=ids, use_cache=False), axis_of("tp", mesh)
    Canonicalise()(trace.gm)
    assert RecogniseSparseAttention()(trace.gm).rewrites == LAYERS
    return trace, axis


@functools.cache
def compiled(parallel_attention: bool = True, **changes: Any) -> Compiled:
    trace, axis = recognised(parallel_attention)
    declared = REPLICATED if parallel_attention else WHOLE_ATTENTION
    options = Options.parse({"profile": "ascend-a3", "replicated": declared, **changes})
    gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
    return compile_graph(gm, trace.inputs, options, lambda _: OfflineExchange(SIZE), [axis])


def rows_of(gm: fx.GraphModule, target: object, number: int) -> list[str]:
    """Rows of an operand of each call: ``"all"`` or a rank's."""
    found = []
    for node in gm.graph.nodes:
        if node.target is target:
            size = node.args[number].meta["val"].shape[1].node.expr
            found.append("all" if size.is_Symbol else "own")
    return found


def test_the_indexer_runs_on_a_ranks_rows_of_a_long_prompt() -> None:
    made = compiled()
    assert made.proofs and all(p["holds"] for p in made.proofs)
    gm = made.at(LONG).gm
    for queries in (0, 2, 3):
        assert rows_of(gm, INDEXER, queries) == ["own"] * LAYERS
    assert rows_of(gm, INDEXER, 1) == ["all"] * LAYERS
    # Its heads' weights differ between the ranks: every rank attends with every row.
    assert rows_of(gm, ATTENTION, 0) == rows_of(gm, ATTENTION, 2) == ["all"] * LAYERS


def test_a_short_prompt() -> None:
    """Per token at T = 1024: 42 MFLOP of query projection and scores, 0.16 us less on 1/8 of the rows, against 8 KiB of
    indices to gather, 0.05 us. At 64 tokens two launches of 20 us outweigh all that."""
    made = compiled()
    assert rows_of(made.at(SHORT).gm, INDEXER, 0) == ["own"] * LAYERS
    assert rows_of(made.at(64).gm, INDEXER, 0) == ["all"] * LAYERS


def test_what_is_gathered_for_the_indexer() -> None:
    """Its keys, with the latents, and the indices that it chose; its queries and weights never move."""
    rows = [c for c in compiled().report(LONG).collectives if c.module == "model.layers.1.self_attn.indexer"]
    assert [(c.kind, c.becomes) for c in rows] == [("all_gather", "all_gather"), ("indexer", "all_gather")]
    assert [c.elements_after for c in rows] == [width * LONG * (SIZE - 1) // SIZE for width in (128, 2048)]


def test_attention_of_whole_weights_runs_on_rows() -> None:
    """Context parallelism: queries stay, one gather of 128 indexer keys, 512 latents and 64 rotated keys moves."""
    made = compiled(parallel_attention=False)
    assert made.proofs and all(p["holds"] for p in made.proofs)
    gm = made.at(LONG).gm
    assert rows_of(gm, INDEXER, 0) == ["own"] * LAYERS
    for queries in (0, 2, 3, 5):
        assert rows_of(gm, ATTENTION, queries) == ["own"] * LAYERS
    for keys in (1, 4):
        assert rows_of(gm, ATTENTION, keys) == ["all"] * LAYERS
    inside = [c for c in made.report(LONG).collectives if "layers.1.self_attn" in c.module]
    assert sum(c.elements_after for c in inside) == (128 + 512 + 64) * LONG * (SIZE - 1) // SIZE


OPS = [(INDEXER, {1}), (ATTENTION, {1, 4})]


@pytest.mark.parametrize(("op", "keys"), OPS)
def test_the_proof_wants_every_key_and_all_else_by_rows(op: Any, keys: set[int]) -> None:
    node = recognised()[0].gm.graph.find_nodes(op="call_function", target=op)[0]
    operands = [n for n in node.args if isinstance(n, fx.Node)]
    shapes = {n: tensor_shape(n.meta["val"]) for n in operands}
    rows = {n: Rows(1) for i, n in enumerate(operands) if i not in keys}

    def judged(split: dict[fx.Node, Rows]) -> Rows | str:
        return verify_rules.rows_of(Call(node, shapes, split, (tensor_shape(node.meta["val"]),)))

    assert judged(rows) == Rows(1)
    for key in keys:
        assert judged({**rows, operands[key]: Rows(1)}) == "every query reads every key"
    for missing in rows:
        assert isinstance(judged({n: r for n, r in rows.items() if n is not missing}), str)
        assert isinstance(judged({**rows, missing: Rows(2)}), str)
    assert isinstance(judged({n: Rows(0) for n in rows}), str)


@pytest.mark.parametrize(("op", "keys"), OPS)
def test_the_planner_wants_every_key_and_all_else_by_rows(op: Any, keys: set[int]) -> None:
    gm = recognised()[0].gm
    node = gm.graph.find_nodes(op="call_function", target=op)[0]
    operands = [n for n in node.args if isinstance(n, fx.Node)]
    shapes = {n: value_shapes(n) for n in [node, *operands]}
    tokens = shapes[operands[0]][0][1]

    def judged(layouts: dict[int, TokenDim]) -> RowWise | Mixing:
        return classify(node, tokens, {operands[i]: (layout,) for i, layout in layouts.items()}, shapes)

    found = judged({0: TokenDim(1), 1: TokenDim(1)})  # lengths are a constant, and keys may have tokens
    assert isinstance(found, RowWise) and found.outputs == (TokenDim(1),)
    assert found.operands == {n: None if i in keys else TokenDim(1) for i, n in enumerate(operands)}
    assert isinstance(judged({0: TokenDim(2)}), Mixing)  # heads
    assert isinstance(judged({1: TokenDim(1)}), Mixing)  # whole queries
    assert isinstance(judged({0: TokenDim(1), 2: TokenDim(2)}), Mixing)
    assert isinstance(judged({0: TokenDim(1, outer=tokens)}), Mixing)


def test_costs_are_those_of_scores_and_of_chosen_keys() -> None:
    """FLOPs of one layer at T, from the polynomials in T; 16 of 128 heads are on a rank."""
    trace, axis = recognised()
    known = annotate(trace.gm, axis, dict.fromkeys([n.name for n in trace.gm.graph.nodes], True))
    flops = replace(profile("ascend-a3"), flops=1.0, memory_bandwidth=1e30)
    seconds = {choice.node.target: choice.seconds for choice in build(known, flops).choices}
    assert evaluate(seconds[INDEXER], LONG) == pytest.approx(2 * 64 * 128 * LONG**2)
    assert evaluate(seconds[ATTENTION], LONG) == pytest.approx(2 * 16 * 2048 * (512 + 64 + 512) * LONG)


@pytest.mark.parametrize("strategy", ["tp", "auto"])
def test_every_rank_computes_the_logits_of_the_model(strategy: str) -> None:
    here = case("v32", 2)
    traces = []
    for trace in here.ranks.traces:
        gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
        Canonicalise()(gm)
        assert RecogniseSparseAttention()(gm).rewrites == 2
        traces.append(replace(trace, gm=gm))
    ranks = SharedRanks(traces, here.ranks.axes)
    made = ranks.compile(strategy=strategy, profile="ascend-a3")
    assert not made[0].refused and made[0].proofs and all(p["holds"] for p in made[0].proofs)
    assert any("own" in rows_of(v.gm, INDEXER, 0) for v in made[0].variants)
    for tokens in range(1, 10):
        ids = torch.randint(0, models.TINY["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(tokens))
        expected = here.logits(ids)
        for number in range(len(made[0].variants)):
            for (logits,) in ranks.run([c.variants[number].gm for c in made], ids):
                assert ((logits - expected).norm() / expected.norm()).item() <= 2e-5, (tokens, number)
