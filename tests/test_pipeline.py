"""The whole pipeline on real models: numbers at every T, structure at real sizes, variants, plans, axes, refusals."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.fx as fx
from conftest import case, make
from simulate import fake_rank
from transformers import AutoModelForCausalLM, DeepseekV3Config

from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.exchange import OfflineExchange
from cpcompile.options import Options
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.collectives import is_collective, op_name
from cpcompile.passes.lockstep import LockstepError, collective_trace
from cpcompile.passes.token_layout import size_expr
from cpcompile.pipeline import compile_graph, copy_graph
from cpcompile.plan import Plan

TOLERANCE = 2e-5  # relative to the norm of the logits, float32


@functools.cache
def compiled(kind: str, size: int, batch: int, dtype: torch.dtype, strategy: str) -> list[Compiled]:
    return case(kind, size, batch, dtype).ranks.compile(strategy=strategy, profile="ascend-a3")


def ids_of(batch: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * batch + tokens)
    return torch.randint(0, models.TINY["vocab_size"], (batch, tokens), generator=generator)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.float() - expected).norm() / expected.norm()).item()


def variants(kind: str, size: int, batch: int, dtype: torch.dtype, strategy: str) -> list[list[fx.GraphModule]]:
    """Every rewritten variant, as one graph per rank. Each is valid at any T."""
    ranks = compiled(kind, size, batch, dtype, strategy)
    assert not ranks[0].refused
    return [[c.variants[i].gm for c in ranks] for i, v in enumerate(ranks[0].variants) if v.steps]


def check_numbers(kind: str, size: int, batch: int, strategy: str, token_counts: list[int]) -> None:
    here = case(kind, size, batch)
    for tokens in token_counts:
        ids = ids_of(batch, tokens)
        expected = here.logits(ids)
        for number, graphs in enumerate(variants(kind, size, batch, torch.float32, strategy)):
            for rank, (logits,) in enumerate(here.ranks.run(graphs, ids)):
                found = error(logits, expected)
                assert found <= TOLERANCE, f"T={tokens}, variant {number}, rank {rank}: {found:.1e}"


def test_a_derived_rank_is_the_rank_as_traced() -> None:
    """What ``conftest.as_rank`` makes of rank 0's trace is what tracing rank 1 gives: text and every input's value."""
    derived = case("v32", 2).ranks.traces[1]
    with fake_rank(1, 2) as mesh:
        model = models.shard(models.build(models.tiny_config("v32")), mesh)
        traced = capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)
    assert text(traced.gm) == text(derived.gm)
    for a, b in zip(traced.inputs, derived.inputs, strict=True):
        assert (a.name, a.kind) == (b.name, b.kind)
        if a.kind in ("parameter", "buffer"):
            local = [getattr(t.value, "_local_tensor", t.value) for t in (a, b)]
            torch.testing.assert_close(*local, rtol=0, atol=0)


FULL = list(range(1, 10))
# Each row is a trace. V3's batch is symbolic at B = 2; dynamo fixes V3.2's, so that it has a trace for each batch.
CASES = [
    *[("v3", n, batch) for n, batch in ((2, 2), (3, 1), (8, 1))],
    *[("v32", n, batch) for n, batch in ((2, 1), (3, 2), (8, 1))],
]


@pytest.mark.parametrize(("kind", "size", "batch"), CASES)
def test_every_rank_equals_the_whole_model(kind: str, size: int, batch: int) -> None:
    check_numbers(kind, size, batch, "tp", [*range(1, 2 * size + 2), 4 * size, 4 * size + 1])


@pytest.mark.parametrize(("kind", "size", "batch"), CASES)
def test_every_variant_equals_the_whole_model(kind: str, size: int, batch: int) -> None:
    check_numbers(kind, size, batch, "auto", [1, size - 1, size, size + 1, 4 * size + 1])


@pytest.mark.parametrize(("kind", "batch"), [("v3", 2), ("v32", 1)])
def test_no_tokens_fail_as_they_do_uncompiled(kind: str, batch: int) -> None:
    """The library's own attention reshapes with -1, which torch refuses for T = 0; ``test_spelling`` runs T = 0."""
    here, ids = case(kind, 2, batch), ids_of(batch, 0)
    for graphs in ([t.gm for t in here.ranks.traces], *variants(kind, 2, batch, torch.float32, "tp")):
        with pytest.raises(LockstepError, match="cannot reshape tensor of 0 elements into shape"):
            here.ranks.run(graphs, ids)


def mean_square(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).square().sum() / expected.double().square().sum()).item()


@pytest.mark.parametrize(("size", "kind"), [(2, "v3"), (2, "v32"), (8, "v32")])
def test_bfloat16_is_as_near_to_the_truth_as_the_uncompiled_ranks(size: int, kind: str) -> None:
    """Against the same weights in float32. Rounding once where two sums were rounded, the rewrite cannot be worse but
    by the luck of single roundings: over some 30 tokens' logits the root mean square varies by less than a tenth."""
    here = case(kind, size, 1, torch.bfloat16)
    truth = make(kind, torch.bfloat16).float()
    every = variants(kind, size, 1, torch.bfloat16, "tp") + variants(kind, size, 1, torch.bfloat16, "auto")
    before, after = 0.0, [0.0] * len(every)
    for tokens in FULL if size == 2 else (1, size - 1, size, size + 1, 4 * size + 1):
        ids = ids_of(1, tokens)
        with torch.no_grad():
            expected = truth(input_ids=ids, use_cache=False).logits
        before += mean_square(here.ranks.run([t.gm for t in here.ranks.traces], ids)[0][0], expected)
        for number, graphs in enumerate(every):
            outputs = [logits for (logits,) in here.ranks.run(graphs, ids)]
            assert all(o.dtype == torch.bfloat16 and torch.equal(o, outputs[0]) for o in outputs)
            after[number] += mean_square(outputs[0], expected)
    assert before > 0
    for found in after:
        assert 0 < found <= 1.1**2 * before, f"{found**0.5:.2e} against {before**0.5:.2e}"


# ---- structure at real sizes ---------------------------------------------------------------------------------------

SIZE, TOKENS, HIDDEN, LATENT, LAYERS = 8, 16384, 7168, 1536 + 512 + 64, 4
# Offline there are no other ranks to compare plain parameters with: these are not sharded.
REPLICATED = [
    "*norm.weight", "*.q_a_proj.weight", "*.kv_a_proj_with_mqa.weight", "*.gate.weight",
    "*.e_score_correction_bias", "*.inv_freq",
]  # fmt: skip


@functools.cache
def real_sizes() -> tuple[Trace, Compiled]:
    """Four layers of the default V3, one of them MoE, on 8 ranks in bfloat16; nothing is allocated."""
    with torch.device("meta"):
        ids = torch.zeros((1, 10), dtype=torch.long)
        model = AutoModelForCausalLM.from_config(
            DeepseekV3Config(num_hidden_layers=LAYERS), dtype=torch.bfloat16
        ).eval()
    with fake_rank(0, SIZE) as mesh:
        trace, axis = capture(models.shard(model, mesh), input_ids=ids, use_cache=False), axis_of("tp", mesh)
    options = Options.parse({"profile": "ascend-a3", "replicated": REPLICATED})
    gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
    return trace, compile_graph(gm, trace.inputs, options, lambda _: OfflineExchange(SIZE), [axis])


def of_axis(gm: fx.GraphModule) -> list[tuple[str, int]]:
    """Every collective in order, as its kind and the elements for each token that the whole value has."""
    found = []
    for node in gm.graph.nodes:
        if is_collective(node):
            kind = op_name(node.target).removeprefix("_c10d_functional::")
            value = node if kind == "all_gather_into_tensor" else node.args[0]
            found.append((kind, int(torch.Size(at_tokens(value)).numel()) // TOKENS))
    return found


def at_tokens(node: fx.Node) -> list[int]:
    return [int(e.subs(dict.fromkeys(e.free_symbols, TOKENS))) for e in map(size_expr, node.meta["val"].shape)]


def test_every_all_reduce_is_scattered() -> None:
    _, compiled = real_sizes()
    rows = [c for c in compiled.report(TOKENS).collectives if c.kind == "all_reduce"]
    before = [kind for kind, _ in of_axis(compiled.original)]
    assert len(rows) == before.count("all_reduce") == 1 + 2 * LAYERS + 1  # the MoE layer has two
    assert {c.decision for c in rows} == {"scatter", "merge"}
    assert compiled.proofs and all(p["holds"] for p in compiled.proofs)


def test_only_the_latent_is_gathered_before_attention() -> None:
    """Attention gathers 1536 + 512 + 64 elements at once, the MLP the hidden row; the last gather is the logits'."""
    _, compiled = real_sizes()
    down, latent, hidden = (
        ("reduce_scatter_tensor", HIDDEN),
        ("all_gather_into_tensor", LATENT),
        ("all_gather_into_tensor", HIDDEN),
    )
    logits = ("all_gather_into_tensor", 129280)
    assert of_axis(compiled.at(TOKENS).gm) == [down, *[latent, down, hidden, down] * LAYERS, hidden, logits]


def test_the_attention_half_sends_a_third_less() -> None:
    """(7168 + 2112) / (2 * 7168) of an all-reduce, 35 % less: o_proj's reduction and the gathers of the latents."""
    _, compiled = real_sizes()
    half = [c for c in compiled.report(TOKENS).collectives if ".self_attn" in c.module]
    assert [c.kind for c in half] == ["all_gather", "all_gather", "all_reduce"] * LAYERS
    before, after = sum(c.elements_before for c in half), sum(c.elements_after for c in half)
    assert before == LAYERS * 2 * HIDDEN * TOKENS * (SIZE - 1) // SIZE
    assert after <= (1 - 0.34) * before


def test_nothing_is_gathered_twice_or_sliced_again() -> None:
    _, compiled = real_sizes()
    gm = compiled.at(TOKENS).gm
    names = [name for gather in gm.meta["gathers"] for name in gather]
    assert names and len(names) == len(set(names))
    for node in gm.graph.nodes:
        if "all_gather" in op_name(node.target):
            (wait,) = node.users
            for reader in _through_views(wait):
                assert TOKENS // SIZE not in at_tokens(reader), f"{reader} keeps a rank's rows of the gathered {node}"


def _through_views(node: fx.Node) -> list[fx.Node]:
    """All that is only a part or another view of ``node``."""
    found = []
    for user in node.users:
        value = user.meta.get("val")
        moves = op_name(user.target).split("::")[-1] in MOVES
        if moves and isinstance(value, torch.Tensor):
            found += [user, *_through_views(user)]
        elif moves:
            found += _through_views(user)
    return found


MOVES = {
    "view",
    "_unsafe_view",
    "reshape",
    "slice",
    "split_with_sizes",
    "getitem",
    "narrow",
    "select",
    "transpose",
    "permute",
    "clone",
}


# ---- again, variants, plans ----------------------------------------------------------------------------------------


def test_a_second_run_rewrites_nothing() -> None:
    """A rewritten graph has no all-reduce left: nothing is placed, and its collectives stay."""
    trace, compiled = real_sizes()
    gm = fx.GraphModule(compiled.at(TOKENS).gm, copy_graph(compiled.at(TOKENS).gm.graph))
    options = Options.parse({"profile": "ascend-a3", "replicated": REPLICATED})
    again = compile_graph(gm, trace.inputs, options, lambda _: OfflineExchange(SIZE), compiled.axes)
    assert not again.rewritten and not again.plan.axes and len(again.variants) == 1
    why = "no sum all-reduce of axis 'tp' carries tokens, and no attention is the same on all its ranks"
    assert again.refused == {"tp": why}
    assert of_axis(again.variants[0].gm) == of_axis(compiled.at(TOKENS).gm)
    assert Canonicalise()(gm).rewrites == 0  # compile_graph canonicalised it


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize("strategy", ["tp", "auto"])
def test_variants_cover_every_token_count(kind: str, strategy: str) -> None:
    for rank in compiled(kind, 2, *BATCH[kind], strategy):
        assert rank.variants[0].first == 0 and rank.variants[-1].last is None
        for a, b in zip(rank.variants, rank.variants[1:], strict=False):
            assert b.first == a.last + 1 > a.first
        for variant in rank.variants:
            assert rank.at(variant.first) is variant
            assert rank.at(10**9 if variant.last is None else variant.last) is variant
        assert len(rank.variants) == 1 if strategy == "tp" else len(rank.variants) >= 2


def test_a_saved_plan_gives_the_same_graphs(tmp_path: Path) -> None:
    ranks = case("v3", 2, 2).ranks
    made = compiled("v3", 2, 2, torch.float32, "auto")
    made[0].plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made[0].plan == made[1].plan
    for plan in (tmp_path / "plan.json", str(tmp_path / "plan.json"), made[0].plan):
        # The plan alone decides: another profile and strategy do not matter.
        for a, b in zip(made, ranks.compile(plan=plan, profile="gloo", strategy="tp", verify="off"), strict=True):
            assert [(v.first, v.last) for v in a.variants] == [(v.first, v.last) for v in b.variants]
            assert [text(v.gm) for v in a.variants] == [text(v.gm) for v in b.variants]
            assert b.plan == a.plan


def text(gm: fx.GraphModule) -> str:
    """The graph with shapes and dtypes, without the class's name."""
    return gm.print_readable(print_output=False).partition("\n")[2]


BATCH = {"v3": (2, torch.float32), "v32": (1, torch.float32)}


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"strategy": "off"}, "strategy='off'"),
        ({"deterministic": True}, "deterministic=True keeps every reduction order"),
    ],
)
def test_left_alone_on_request(options: dict[str, Any], reason: str) -> None:
    ranks = case("v3", 2, 2).ranks
    for trace, found in zip(ranks.traces, ranks.compile(**options), strict=True):
        assert not found.rewritten and found.refused == {"tp": reason}
        assert [text(v.gm) for v in found.variants] == [text(trace.gm)]
        rows = found.report(16).collectives
        assert len(rows) == collective_trace(trace.gm).__len__() - 1  # all but the gather of the logits
        assert {(c.decision, c.becomes, c.reason) for c in rows} == {("keep", "all_reduce", reason)}


def test_a_graph_without_collectives_passes_through() -> None:
    trace = capture(torch.nn.Linear(4, 3), torch.ones(2, 4))
    gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
    found = compile_graph(gm, trace.inputs, Options(), lambda _: pytest.fail("there is no one to ask"))
    assert not found.rewritten and text(found.at(7).gm) == text(trace.gm) and found.report(7).collectives == []
