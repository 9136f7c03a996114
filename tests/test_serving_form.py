"""Context parallelism of attention in its serving form: every rank's logits and caches are the unsharded model's."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from serving_models import (
    REAL,
    Batch,
    BothWaysLayer,
    DenseLayer,
    Layer,
    PutLayer,
    Ranks,
    Serving,
    Sizes,
    batch,
    compile_ranks,
)
from torch import Tensor

from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.passes.collectives import is_collective, op_name
from cpcompile.passes.npu_attention import NpuAttention
from cpcompile.passes.token_layout import size_expr
from cpcompile.passes.verify_static import prove
from cpcompile.pipeline import copy_graph

TOLERANCE = 1e-12  # float64 throughout: what differs is the order of sums
BLOCKS = 300
SMALL = Sizes()
aten, c10d, own = torch.ops.aten, torch.ops._c10d_functional, torch.ops.cpcompile


@functools.cache
def model(layer: type[Layer] = Layer) -> Serving:
    return Serving(layer=layer)


@functools.cache
def traced(requests: int = 3, layer: type[Layer] = Layer) -> Trace:
    """One request has no symbol for their number, and so a trace of its own."""
    example = batch([5, 1, 4][:requests], [0, 3, 2][:requests], BLOCKS, SMALL)
    return capture(model(layer), *example, *model(layer).caches(BLOCKS))


@functools.cache
def ranks(size: int, requests: int = 3, layer: type[Layer] = Layer) -> Ranks:
    return compile_ranks(size, traced(requests, layer))


Step = tuple[tuple[int, ...], tuple[int, ...]]  # new tokens of each request, and how many it has cached


def given(step: Step) -> Batch:
    return batch(*step, BLOCKS, SMALL, seed=sum(step[1]))


@functools.cache
def prefilled(layer: type[Layer], prefixes: tuple[int, ...]) -> list[Tensor]:
    """Caches that hold what the unsharded model writes for the prefixes, and garbage elsewhere."""
    caches = model(layer).caches(BLOCKS)
    with torch.no_grad():
        model(layer)(*batch([max(1, p) for p in prefixes], [0] * len(prefixes), BLOCKS, SMALL), *caches)
    return caches


@functools.cache
def unsharded(layer: type[Layer], steps: tuple[Step, ...]) -> list[tuple[Tensor, list[Tensor]]]:
    """Logits of every step, and the caches after it."""
    caches = [c.clone() for c in prefilled(layer, steps[0][1])]
    found = []
    for step in steps:
        with torch.no_grad():
            logits = model(layer)(*given(step), *caches)
        found.append((logits, [c.clone() for c in caches]))
    return found


def close(found: Tensor, expected: Tensor, what: object) -> None:
    assert found.shape == expected.shape, what
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{what}: {error:.1e}"


def check(size: int, *steps: Step, layer: type[Layer] = Layer) -> None:
    """Steps of every rank from the caches that it wrote itself."""
    made = ranks(size, 3 if len(steps[0][0]) > 1 else 1, layer)
    proofs = made.compiled[0].proofs
    assert not made.compiled[0].refused and proofs and all(p["holds"] for p in proofs) and made.rewritten
    for graphs in made.rewritten:
        every = [[c.clone() for c in prefilled(layer, steps[0][1])] for _ in made.axes]
        for step, (expected, caches) in zip(steps, unsharded(layer, steps), strict=True):
            results = made.step(graphs, given(step), every)
            for rank, (logits, written) in enumerate(results):
                close(logits, expected, (step, rank))
                for k, (mine, theirs) in enumerate(zip(written, caches, strict=True)):
                    close(mine, theirs, (step, rank, k))
            every = [written for _, written in results]


REQUESTS: list[Step] = [
    ((1, 5, 8), (0, 0, 0)),
    ((3, 2), (40, 0)),
    ((1, 1, 1), (0, 7, 2)),
    ((17, 16), (40, 3)),
    ((1,), (0,)),
    ((17,), (0,)),
    ((1,), (40,)),
    ((9,), (40,)),
]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_every_rank_equals_the_unsharded_model(size: int) -> None:
    for step in REQUESTS:
        check(size, step)


@pytest.mark.parametrize("size", [2, 3])
def test_dense_attention(size: int) -> None:
    for step in REQUESTS[1::2]:
        check(size, step, layer=DenseLayer)


def test_a_long_request() -> None:
    """1023 tokens on 8 ranks: 128 rows each, one of them padding."""
    check(8, ((1023,), (0,)))


@pytest.mark.parametrize("size", [2, 3])
def test_chunked_prefill_and_decode_from_the_caches(size: int) -> None:
    """Two requests in three chunks and four decode steps."""
    at, steps = (0, 0), []
    for chunk in [(17, 5), (2, 9), (24, 1), *[(1, 1)] * 4]:
        steps.append((chunk, at))
        at = (at[0] + chunk[0], at[1] + chunk[1])
    check(size, *steps)


def test_caches_that_are_written_by_index() -> None:
    check(3, ((4, 7), (40, 0)), layer=PutLayer)


def test_attention_that_is_not_understood_runs_on_every_row() -> None:
    """What is around it is split, it is told why it is not, and the answer is kept."""
    check(3, ((4, 7), (40, 0)), layer=BothWaysLayer)
    made = ranks(3, layer=BothWaysLayer)
    (refusals,) = [run.refusals for run in made.compiled[0].passes if run.name == "per-token-attention"]
    assert len(refusals) == 2 * SMALL.layers
    assert all("expected sparse_mode=3, found 0; it keeps its form and needs every row" in why for _, why in refusals)


@pytest.mark.parametrize(("layer", "calls"), [(Layer, 4), (DenseLayer, 2)])
def test_every_rank_runs_npu_calls_on_its_rows(layer: type[Layer], calls: int) -> None:
    """What each rank's graph comes to on Ascend: torch_npu's own calls again, with one row for each of its tokens."""
    made = ranks(3, layer=layer)
    (rewritten,) = made.rewritten
    graphs = [fx.GraphModule(gm, copy_graph(gm.graph)) for gm in rewritten]
    for gm in graphs:
        assert sum("paged" in str(n.target) for n in gm.graph.nodes) == calls
        result = NpuAttention()(gm)
        assert result.rewrites == calls and not result.refusals
        assert not any("paged" in str(n.target) for n in gm.graph.nodes)
    step = ((1, 5, 8), (0, 0, 0))
    every = [[c.clone() for c in prefilled(layer, step[1])] for _ in made.axes]
    ((expected, _),) = unsharded(layer, (step,))
    for rank, (logits, _) in enumerate(made.step(graphs, given(step), every)):
        close(logits, expected, rank)


# ---- structure at real sizes ---------------------------------------------------------------------------------------

TOKENS = 16384


@functools.cache
def real_sizes(layer: type[Layer]) -> Ranks:
    with torch.device("meta"):
        whole = Serving(REAL, torch.bfloat16, layer)
    caches = [c.to("meta") for c in Serving.caches(whole, 7)]
    example = [t.to("meta") for t in batch([5, 1, 4], [0, 3, 2], 9, REAL)]
    return compile_ranks(8, capture(whole, *example, *caches), replicated=["*"])


@pytest.mark.parametrize(("layer", "latent"), [(Layer, 512 + 64 + 128), (DenseLayer, 512 + 64)])
def test_one_gather_in_each_layer(layer: type[Layer], latent: int) -> None:
    """Per layer and token one all-gather: latents, rotated keys and index keys; then each request's last row."""
    compiled = real_sizes(layer).compiled[0]
    assert not compiled.refused and compiled.proofs and all(p["holds"] for p in compiled.proofs)
    *layers, last = [n for n in compiled.at(TOKENS).gm.graph.nodes if is_collective(n)]
    for node in layers:
        assert "all_gather" in op_name(node.target), node
        sizes = [e.subs(dict.fromkeys(e.free_symbols, TOKENS)) for e in map(size_expr, node.meta["val"].shape)]
        assert sizes == [TOKENS, latent]
    assert len(layers) == REAL.layers
    assert "all_reduce" in op_name(last.target) and tuple(last.meta["val"].shape)[1:] == (7168,)
    assert not size_expr(last.meta["val"].shape[0]).has(compiled.tokens)  # a row for each request, however many tokens


def test_queries_are_a_ranks_own_and_caches_whole() -> None:
    gm = real_sizes(Layer).compiled[0].at(TOKENS).gm
    for op, keys in ((own.paged_lightning_indexer.default, {1}), (own.paged_sparse_attention.default, {1, 4})):
        calls = gm.graph.find_nodes(op="call_function", target=op)
        assert len(calls) == REAL.layers
        for node in calls:
            for number, operand in enumerate(a for a in node.args if isinstance(a, fx.Node)):
                size = size_expr(operand.meta["val"].shape[0])
                assert size == 7 if number in keys else not (size.is_Symbol or size.is_number), (node, number)


def test_the_report_has_a_row_for_every_indexer() -> None:
    rows = [c for c in real_sizes(Layer).compiled[0].report(TOKENS).collectives if c.kind == "indexer"]
    assert [(c.decision, c.elements_after) for c in rows] == [("shard", 0)] * REAL.layers
    assert all("its indices are not gathered" in c.reason for c in rows)


# ---- seeded faults -------------------------------------------------------------------------------------------------


def _calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return gm.graph.find_nodes(op="call_function", target=target)


def prefix_dropped(gm: fx.GraphModule) -> None:
    """A row's key length is its place in the batch: lengths of the keys are not added."""
    (difference,) = [n for n in _calls(gm, aten.sub.Tensor) if "index_select" in str(n.args[0])]
    difference.args = (difference.args[1], difference.args[1])


def lengths_of_padded_rows(gm: fx.GraphModule) -> None:
    """Rows are numbered up to the padded count, and a rank's own taken from those."""
    (rows,) = _calls(gm, aten.arange.default)
    pad = next(n for n in rows.users if n.target in (aten.view.default, aten.constant_pad_nd.default))
    while pad.target is not aten.constant_pad_nd.default:
        pad = next(iter(pad.users))
    with gm.graph.inserting_before(pad):
        padded = gm.graph.call_function(aten.constant_pad_nd.default, (pad.args[0], pad.args[1], 1))
    padded.meta = dict(pad.meta)
    pad.replace_all_uses_with(padded)
    gm.graph.erase_node(pad)


def pad_row_written(gm: fx.GraphModule) -> None:
    """The gathered rows lose their first one and keep the padding."""
    (cut, *_) = [u for w in _calls(gm, c10d.wait_tensor.default) for u in w.users if u.target is aten.slice.Tensor]
    cut.args = (cut.args[0], cut.args[1], 1, torch.iinfo(torch.int64).max)


def table_of_another_request(gm: fx.GraphModule) -> None:
    """Block table rows by the row's number in place of its request's."""
    table = next(n for n in _calls(gm, aten.index_select.default) if n.meta["val"].ndim == 2)
    request = table.args[2]
    with gm.graph.inserting_before(table):
        other = gm.graph.call_function(aten.mul.Tensor, (request, 0))
    other.meta = dict(request.meta)  # type: ignore[union-attr]
    table.update_arg(2, other)


def keys_of_own_rows_written(gm: fx.GraphModule) -> None:
    """A cache gets slots of this rank's rows only."""
    write = _calls(gm, torch.ops.npu.npu_scatter_nd_update.default)[-1]
    with gm.graph.inserting_before(write):
        part = gm.graph.call_function(aten.slice.Tensor, (write.args[1], 0, 0, 1))
        values = gm.graph.call_function(aten.slice.Tensor, (write.args[2], 0, 0, 1))
    part.meta, values.meta = ({} for _ in range(2))
    write.args = (write.args[0], part, values)


FAULTS = [prefix_dropped, lengths_of_padded_rows, pad_row_written, table_of_another_request, keys_of_own_rows_written]


def refuted(last: Compiled, fault: Callable[[fx.GraphModule], None]) -> None:
    """By the static proof, on the last rank, whose rows are not the first."""
    (variant,) = [v for v in last.variants if v.steps]
    known = variant.steps[0].graph.known
    before = next(iter(known.shapes)).graph.owning_module

    def holds(gm: fx.GraphModule) -> bool:
        assert before is not None and known.tokens is not None
        return prove(before, gm, known.axis, known.tokens, lambda _: True).holds  # type: ignore[arg-type]

    assert holds(variant.gm)
    broken = fx.GraphModule(variant.gm, copy_graph(variant.gm.graph))
    fault(broken)
    broken.recompile()
    assert not holds(broken)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_rewrite_is_refuted(fault: Callable[[fx.GraphModule], None]) -> None:
    refuted(ranks(3).compiled[2], fault)
