"""npu MLA prolog: absorbed MLA ahead of attention becomes one op, equal in its queries and in what is in the caches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mla_fronts as fronts
import npu_fused_ops  # noqa: F401  defines the ops
import pytest
import torch
import torch.fx as fx
from ascend_process import AscendProcess
from mla_fronts import BLOCKS, HIDDEN, SIZE, changed, front, given, values
from serving_models import REAL, Layer, Serving, Sizes, batch, compile_ranks, feed, mutated
from simulate import fake_rank
from test_ge_forms import targets, traced
from torch import Tensor, nn

from cpcompile.capture import Trace, capture
from cpcompile.lowering.ascend.forms import ascend_passes
from cpcompile.lowering.ge import GeProgram, interpret, load
from cpcompile.lowering.targets import Settings
from cpcompile.passes import npu_mla_prolog
from cpcompile.passes.collectives import is_contiguous
from cpcompile.passes.npu_key_cache import NpuKeyCache
from cpcompile.passes.npu_mla_prolog import LATENT, NOPE, Q_LORA, ROPE, NpuMlaProlog

npu = torch.ops.npu
FUSED = "npu.npu_mla_prolog_v3_functional.default"
LEFT = ("mm.", "bmm.", "rms_norm", "interleave", "scatter")  # what the op computes, so that none of it is left


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> int:
    """Fewer numbers in each token than kernels take: products in half precision are slow here."""
    monkeypatch.setattr(npu_mla_prolog, "HIDDEN", (64,))
    return 64


def check(function: Callable[..., Any], args: tuple[Tensor, ...], layers: int = 1) -> fx.GraphModule:
    before = [cache.clone() for cache in args[-2:]]
    gm = traced(function, *args, mode="fake")
    result = NpuMlaProlog()(gm)
    assert (result.rewrites, result.refusals) == (layers, [])
    assert targets(gm).count(FUSED) == layers and not [t for t in targets(gm) if any(part in t for part in LEFT)]
    for found, expected in zip(gm(*args), function(*args), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.equal(a, b) for a, b in zip(args[-2:], before, strict=True))
    assert (NpuMlaProlog()(gm).rewrites, NpuKeyCache()(gm).rewrites) == (0, 0)
    return gm


@pytest.mark.parametrize(
    "function", [front, fronts.unshared, fronts.keys_first, fronts.batched, fronts.read_early, fronts.turned_otherwise]
)
def test_queries_and_written_keys_are_of_one_op_and_equal(function: Callable[..., Any], narrow: int) -> None:
    gm = check(function, given(hidden=narrow))
    (call,) = (node for node in gm.graph.nodes if str(node.target) == FUSED)
    assert call.kwargs["query_norm_flag"] is (function not in (fronts.unshared, fronts.turned_otherwise))
    turns = [t for t in targets(gm) if "transpose" in t or "permute" in t]
    assert len(turns) == (
        2 if function is fronts.turned_otherwise else function is fronts.batched
    )  # of absorbed queries alone


@pytest.mark.parametrize(("tokens", "count", "size"), [(1, 2, 16), (1, 1, 16), (7, 1, 128), (33, 4, 16)])
def test_token_counts_heads_and_blocks(tokens: int, count: int, size: int, narrow: int) -> None:
    check(front, given(tokens, hidden=narrow, heads=count, size=size))


@pytest.mark.parametrize(
    ("how", "shape"),
    [(lambda a: a.transpose(1, 2), (2, LATENT, NOPE)), (lambda a: a.view(2, NOPE, LATENT), (256, LATENT))],
)
def test_the_absorbed_weight_may_be_a_view(
    how: Callable[[Tensor], Tensor], shape: tuple[int, ...], narrow: int
) -> None:
    gm = check(changed(absorb=how), given(hidden=narrow, absorb=values(*shape, scale=0.1)))
    (call,) = (node for node in gm.graph.nodes if str(node.target) == FUSED)
    assert all(is_contiguous(node) for node in call.all_input_nodes)


def test_every_layer(narrow: int) -> None:
    check(fronts.twice, given(hidden=narrow), layers=2)


def test_tokens_of_a_width_that_the_kernel_takes() -> None:
    check(front, given(1))


# ---- what stays ----------------------------------------------------------------------------------------------------


def halves(made: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(v.to(dtype) if v.is_floating_point() else v for v in made)


VIEW = "is a view of [out, in], or computed: the kernel has it as [in, out], in FRACTAL_NZ; hold it so"
transposed = functools.partial(torch.transpose, dim0=0, dim1=1)
REFUSED: list[tuple[str, Callable[..., Any], tuple[Tensor, ...]]] = [
    ("tokens of 64: the kernel takes 6144, 7168, 7680", front, given(hidden=64)),
    ("queries that are normed of 512: the kernel takes 1536", front, given(q_lora=512)),
    ("a number of heads, 3: the kernel takes 1, 2, 4, 8, 16, 32, 64, 128", front, given(heads=3)),
    ("absorbed queries of 256: the kernel takes 512", front, given(latent=256)),
    ("blocks of 32: the kernel takes 16, 128", front, given(size=32)),
    ("heads have columns [(0, 64), (64, 128)]: the kernel takes [(0, 128), (128, 192)]", front, given(nope=64)),
    ("heads have columns [(64, 192), (0, 64)]: the kernel takes [(0, 128), (128, 192)]", fronts.rope_first, given()),
    ("operands of torch.float16: the kernel takes torch.bfloat16", front, halves(given(), torch.float16)),
    ("heads are not [N, T, D], or not [T, N, 1, D]", fronts.tokens_as_heads, given(2)),
    ("heads are not [N, T, D], or not [T, N, 1, D]", fronts.angles_of_heads, given(2)),
    ("the normed queries have tokens in more than one dim", fronts.of_requests, given(6)),
    (
        "weights have columns [576, 576, (1536,), (512,)], expected [384, 576, (1536,), (512,)]",
        fronts.heads_left_out,
        given(up=values(Q_LORA, 3 * (NOPE + ROPE))),
    ),
    (f"the weight of mm {VIEW}", changed(down=transposed), given(down=values(Q_LORA, HIDDEN))),
    (f"the weight of mm_1 {VIEW}", changed(up=lambda up: up * 2), given()),
    (f"the weight of mm_2 {VIEW}", changed(down_keys=transposed), given(down_keys=values(LATENT + ROPE, HIDDEN))),
    (
        "the keys are columns of a wider product: part its weight",
        fronts.wider,
        given(down=values(HIDDEN, Q_LORA + LATENT + ROPE)),
    ),
    ("the keys are of addmm, not of tokens and a weight", fronts.biased, given()),
    (
        "no other product of the keys' tokens is normed: queries have other tokens, or no norm",
        fronts.other_tokens,
        given(),
    ),
    ("a gather stands between the keys' product and their cache", fronts.keys_gathered, given()),
    ("a gather stands between the keys' product and their cache", fronts.normed_keys_gathered, given()),
    ("a gather stands between the queries' norm and their second product", fronts.queries_gathered, given()),
    ("the normed queries have no second product whose heads meet a weight", fronts.not_absorbed, given()),
    ("the rest of the heads is not rotated by neighbours, but read by npu_rotary_mul", fronts.by_halves, given()),
    ("the heads are read elsewhere as well, by sum", fronts.whole_heads_read, given()),
    ("the heads are read elsewhere as well, by bmm", fronts.absorbed_twice, given()),
    ("queries and keys are rotated by different angles", fronts.angles_differ, given()),
    ("more than its first result is read", fronts.root_read, given()),
    ("add is computed behind bmm, which the op gives", fronts.late, given()),
    ("the cache is not [blocks, size, 1, 64]", front, given(ropes=values(BLOCKS * SIZE, ROPE))),
]


@pytest.mark.parametrize(("reason", "function", "args"), REFUSED)
def test_others_stay(reason: str, function: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    gm = traced(function, *args, mode="fake")
    before = targets(gm)
    result = NpuMlaProlog()(gm)
    assert (result.rewrites, [r.reason for r in result.refusals]) == (0, [reason])
    assert targets(gm) == before


def test_more_tokens_than_the_kernel_takes_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu_mla_prolog, "TOKENS", 4)
    result = NpuMlaProlog()(traced(front, *given(), mode="fake"))
    assert [r.reason for r in result.refusals] == ["5 tokens: the kernel takes up to 4"]


def test_a_missing_op_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npu_mla_prolog, "missing_ops", lambda names: f"no {names[0]}")
    result = NpuMlaProlog()(traced(front, *given(), mode="fake"))
    assert [r.reason for r in result.refusals] == ["no npu_mla_prolog_v3_functional"]


def test_the_form_is_opt_in_and_goes_ahead_of_the_keys_own() -> None:
    names = [made.name for made in ascend_passes(Settings(mla_prolog=True))]
    assert names.index("npu-mla-prolog") == names.index("npu-key-cache") - 1 > names.index("npu-rope")
    assert "npu-mla-prolog" not in [made.name for made in ascend_passes(Settings())]


def test_keys_that_stay_become_their_own_op() -> None:
    gm = traced(fronts.other_tokens, *given(), mode="fake")
    assert (NpuMlaProlog()(gm).rewrites, NpuKeyCache()(gm).rewrites) == (0, 1)


# ---- whole models ------------------------------------------------------------------------------------------------


class WeightsApart(Layer):
    """Its three down-projections and up-projection as the op has them: of their own, ``[in, out]``."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(sizes, dtype)
        down, keys = self.qkv_a.T.split([sizes.q_lora, sizes.latent + sizes.rope], -1)
        self.q_down, self.kv_down, self.q_up = (
            nn.Parameter(weight.contiguous(), requires_grad=False) for weight in (down, keys, self.q_b.T)
        )
        del self.qkv_a, self.q_b

    def project(
        self, h: Tensor, rope: tuple[Tensor, Tensor], slots: Tensor, caches: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        s = self.sizes
        q_lora = npu.npu_rms_norm(h @ self.q_down, self.q_norm)[0]
        nope, q_rope = (q_lora @ self.q_up).view(-1, s.heads, s.nope + s.rope).split([s.nope, s.rope], -1)
        query = torch.bmm(nope.transpose(0, 1), self.k_up).transpose(0, 1)
        q_rope = npu.npu_interleave_rope(q_rope.unsqueeze(2), *rope).squeeze(2)
        self.write_keys(h @ self.kv_down, rope, slots, caches)
        return (query, q_rope), q_lora


WIDE = Sizes(
    layers=1, hidden=64, heads=2, q_lora=Q_LORA, latent=LATENT, nope=NOPE, rope=ROPE, inner=16, index_heads=1,
    index_width=ROPE + 8, block=SIZE, positions=64,
)  # fmt: skip
STEPS = [([5, 1, 4], [0, 0, 0]), ([1, 6, 0], [5, 1, 4])]
WHOLE_BLOCKS = 6


def model(dtype: torch.dtype = torch.bfloat16) -> Serving:
    """Of one set of weights, rounded to bfloat16 in either dtype."""
    made = Serving(WIDE, torch.bfloat16, WeightsApart).to(dtype)
    made.dtype = dtype
    return made


def trace_of(made: Serving, device: str = "cpu") -> Trace:
    example = [*batch([5, 1, 4], [0, 3, 2], WHOLE_BLOCKS, made.sizes), *made.caches(WHOLE_BLOCKS)]
    return capture(made, *(tensor.to(device) for tensor in example))


def lower_model(out: Path, hidden: int) -> list[Any]:
    """Write the model with and without the form; returns the names of its inputs, and the ops of both."""
    from cpcompile.exchange import OfflineExchange
    from cpcompile.lowering.ascend.export import export
    from cpcompile.options import Options
    from cpcompile.pipeline import compile_graph

    trace, found = trace_of(model()), []
    options = Options.parse({"strategy": "off"})
    with fake_rank(0, 1), torch.no_grad(), patch.object(npu_mla_prolog, "HIDDEN", (hidden,)):
        compiled = compile_graph(trace.gm, trace.inputs, options, lambda a: OfflineExchange(a.size, a.rank))
        for folder in ("off", "on"):
            settings = Settings(mla_prolog=folder == "on")
            summary, unsupported = export(compiled.variants[-1].gm, out / folder, settings)
            assert not unsupported
            found.append(dict(summary.ops))
    return [[node.name for node in trace.gm.graph.find_nodes(op="placeholder")], *found]


def squared_errors(folder: Path, names: list[str], trace: Trace) -> float:
    """Of an exported graph's logits and caches, step by step from its own caches, to the model in float32."""
    exact, graph = model(torch.float32), load(folder / "model.pb")
    expected = exact.caches(WHOLE_BLOCKS)
    caches, order, error = [cache.bfloat16() for cache in expected], mutated(trace), 0.0
    for lengths, prefixes in STEPS:
        step = batch(lengths, prefixes, WHOLE_BLOCKS, WIDE, seed=sum(prefixes))
        with torch.no_grad():
            logits = exact(*step, *expected)
        inputs = dict(zip(names, feed(trace, step, caches), strict=True))
        bound = {name: v.detach() if isinstance(v, Tensor) else v for name, v in inputs.items()}
        ((*written, out),) = interpret([GeProgram(graph, bound)])
        caches = [written[order.index(number)] for number in range(len(order))]
        for mine, theirs in zip((out, *caches), (logits, *expected), strict=True):
            kept = theirs != 1e3  # what the caches hold where nothing was written
            assert torch.equal(mine.float()[~kept], theirs[~kept].bfloat16().float())
            error += (mine.float() - theirs)[kept].square().sum().item() / theirs[kept].square().sum().item()
    return error


def test_the_lowered_graph_is_as_near_to_the_model_as_that_of_single_ops(ascend: AscendProcess, tmp_path: Path) -> None:
    names, off, on = ascend(lower_model, tmp_path, WIDE.hidden)
    assert on["MlaPrologV3"] == WIDE.layers and "KvRmsNormRopeCache" not in on
    assert off["KvRmsNormRopeCache"] == off["RmsNorm"] == WIDE.layers and "MlaPrologV3" not in off
    assert "RmsNorm" not in on and off["MatMul"] - on["MatMul"] == 3 * WIDE.layers
    trace = trace_of(model())
    errors = [squared_errors(tmp_path / folder, names, trace) for folder in ("off", "on")]
    assert 0 < errors[1] <= 1.1**2 * errors[0]


def test_keys_that_context_parallelism_gathers_are_refused() -> None:
    with torch.device("meta"):
        whole = Serving(replace(REAL, layers=1), torch.bfloat16, WeightsApart)
    trace = trace_of(whole, "meta")
    (graphs,) = compile_ranks(2, trace, replicated=["*"]).rewritten
    result = NpuMlaProlog()(graphs[0])
    assert result.rewrites == 0
    assert [r.reason for r in result.refusals] == ["a gather stands between the keys' product and their cache"]
    (write,) = (node for node in graphs[0].graph.nodes if node.name == result.refusals[0].node)
    assert write.meta["val"].shape[-1] == LATENT
    assert NpuMlaProlog()(trace.gm).rewrites == 1  # of real sizes and any number of tokens, where nothing is gathered
