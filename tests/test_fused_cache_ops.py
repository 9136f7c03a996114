"""Context parallelism around ops that compute keys and write them to paged caches at once.

``npu_kv_rmsnorm_rope_cache`` and ``npu_mla_prolog`` are not row-wise: their caches need every row, in token order and
without padding. So their operands are gathered, and what is around them runs on a rank's own rows. The first gathers a
latent for each token. The second computes queries of all rows of its input, so that hidden states are gathered and
every rank repeats the projections.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from fused_layers import DenseFusedKeys, DenseFusedProlog, FusedKeys, FusedProlog
from serving_models import REAL, DenseLayer, Layer
from test_serving_form import BLOCKS, TOKENS, Step, check, given, model, pad_row_written, ranks, real_sizes, refuted

from cpcompile.passes.collectives import arguments, is_collective, op_name
from cpcompile.passes.npu_ops import base_name
from cpcompile.passes.token_layout import size_expr

KEYS, PROLOG = "npu_kv_rmsnorm_rope_cache_v2_functional", "npu_mla_prolog_v3_functional"
LAYERS = {FusedKeys: KEYS, DenseFusedKeys: KEYS, FusedProlog: PROLOG, DenseFusedProlog: PROLOG}
# Operands that have a row for each token.
ROWS = {KEYS: ("kv", "cos", "sin", "index"), PROLOG: ("token_x", "rope_sin", "rope_cos", "cache_index")}
STEPS: list[Step] = [((1, 5, 8), (0, 0, 0)), ((5, 1, 8), (40, 0, 3))]


@pytest.mark.parametrize(("layer", "size"), [(FusedKeys, 2), (FusedProlog, 2), *((layer, 3) for layer in LAYERS)])
def test_every_rank_equals_the_unsharded_model(layer: type[Layer], size: int) -> None:
    for step in STEPS:
        check(size, step, layer=layer)


@pytest.mark.parametrize("layer", [FusedKeys, FusedProlog])
def test_one_request(layer: type[Layer]) -> None:
    for step in [((1,), (40,)), ((8,), (0,))]:
        check(2, step, layer=layer)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_op_computes_what_separate_ops_do(layer: type[Layer]) -> None:
    """The same logits and caches as the layer with norms, rotations and writes apart, from the same parameters."""
    found = []
    for kind in (layer, DenseLayer if issubclass(layer, DenseLayer) else Layer):
        caches = model(kind).caches(BLOCKS)
        with torch.no_grad():
            found.append([model(kind)(*given(STEPS[0]), *caches), *caches])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


# ---- structure at real sizes ---------------------------------------------------------------------------------------


def calls(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if base_name(n.target) == name]


def gathered(layer: type[Layer]) -> list[int]:
    """Widths of the gathers, in order; behind them is one all-reduce of each request's last row."""
    compiled = real_sizes(layer).compiled[0]
    assert not compiled.refused and compiled.proofs and all(p["holds"] for p in compiled.proofs)
    *gathers, last = [n for n in compiled.at(TOKENS).gm.graph.nodes if is_collective(n)]
    assert "all_reduce" in op_name(last.target)
    widths = []
    for node in gathers:
        assert "all_gather" in op_name(node.target), node
        rows, width = (e.subs(dict.fromkeys(e.free_symbols, TOKENS)) for e in map(size_expr, node.meta["val"].shape))
        assert rows == TOKENS
        widths.append(int(width))
    return widths


@pytest.mark.parametrize(("layer", "latent"), [(FusedKeys, 512 + 64 + 128), (DenseFusedKeys, 512 + 64)])
def test_one_gather_in_each_layer_for_keys(layer: type[Layer], latent: int) -> None:
    """Of what the op takes, not of what it makes: latents and keys ahead of the norm; and index keys."""
    assert gathered(layer) == [latent] * REAL.layers


@pytest.mark.parametrize(("layer", "index"), [(FusedProlog, 128), (DenseFusedProlog, 0)])
def test_one_gather_in_each_layer_for_queries_and_keys(layer: type[Layer], index: int) -> None:
    """Of hidden states, because the op computes queries of all of them; the first layer's are there. And index keys."""
    widths = gathered(layer)
    assert [w for w in widths if w > index] == [7168 + index] * (REAL.layers - 1)
    assert widths == [index] * bool(index) + [7168 + index] * (REAL.layers - 1)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_op_has_every_row_and_attention_a_ranks_own(layer: type[Layer]) -> None:
    compiled = real_sizes(layer).compiled[0]
    gm, name = compiled.at(TOKENS).gm, LAYERS[layer]
    fused = calls(gm, name)
    assert len(fused) == REAL.layers
    for node in fused:
        operands = arguments(node)
        assert {size_expr(operands[row].meta["val"].shape[0]) for row in ROWS[name]} == {compiled.tokens}
    attention = ["paged_attention"] if issubclass(layer, DenseLayer) else ["paged_lightning_indexer"]
    attention += [] if issubclass(layer, DenseLayer) else ["paged_sparse_attention"]
    for op in attention:
        found = calls(gm, op)
        assert len(found) == REAL.layers
        for node in found:
            rows = {size_expr(arguments(node)[n].meta["val"].shape[0]) for n in ("query", "key_lengths", "block_table")}
            (row,) = rows
            assert row != compiled.tokens and row.has(compiled.tokens), node


@pytest.mark.parametrize("layer", LAYERS)
def test_the_report_names_the_op(layer: type[Layer]) -> None:
    collectives = real_sizes(layer).compiled[0].report(TOKENS).collectives
    reason = f"npu::{LAYERS[layer]} is not in the table of token-wise ops"
    named = [row for row in collectives if reason in row.reason]
    assert len(named) == (REAL.layers if LAYERS[layer] == KEYS else REAL.layers - 1)
    assert all(row.becomes == "all_gather" for row in named)


# ---- seeded faults -------------------------------------------------------------------------------------------------


def queries_of_the_first_rows(gm: fx.GraphModule) -> None:
    """Attention has those of the first rank, whatever the rank."""
    query = arguments(calls(gm, "paged_attention")[0])["query"]
    cut, (rows, *_) = query.args
    assert cut.target is torch.ops.aten.slice.Tensor
    cut.args = (cut.args[0], 1, 0, rows)


def first_row_not_written(gm: fx.GraphModule) -> None:
    """The op gets all rows but one."""
    node = calls(gm, KEYS)[0]
    kv = arguments(node)["kv"]
    with gm.graph.inserting_before(node):
        part = gm.graph.call_function(torch.ops.aten.slice.Tensor, (kv, 0, 1))
    node.update_arg(0, part)


FAULTS = [
    (FusedKeys, pad_row_written),
    (FusedKeys, first_row_not_written),
    (DenseFusedProlog, pad_row_written),
    (DenseFusedProlog, queries_of_the_first_rows),
]


@pytest.mark.parametrize(("layer", "fault"), FAULTS)
def test_a_fault_in_the_rewrite_is_refuted(layer: type[Layer], fault: Callable[[fx.GraphModule], None]) -> None:
    refuted(ranks(3, layer=layer).compiled[2], fault)
