"""Fused attention under context parallelism: queries in shards, masks by rows, causal masks made explicit, faults."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import models
import pytest
import torch
import torch.fx as fx
from conftest import SharedRanks
from simulate import fake_rank
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config

from cpcompile.axes import axis_of
from cpcompile.capture import capture
from cpcompile.compiled import Compiled
from cpcompile.exchange import OfflineExchange
from cpcompile.options import Options
from cpcompile.passes.collectives import arguments, is_collective, op_name
from cpcompile.passes.explicit_causal_masks import ExplicitCausalMasks, find_causal
from cpcompile.passes.fused_attention import FUSED, is_random
from cpcompile.passes.token_layout import size_expr
from cpcompile.passes.verify_rules import RESULTS_BY_ROWS
from cpcompile.passes.verify_static import prove
from cpcompile.pipeline import compile_graph, copy_graph

TOLERANCE = 2e-5
aten, c10d = torch.ops.aten, torch.ops._c10d_functional
FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
HEADS, WIDTH, VOCAB = 4, 8, 32


def ids_of(tokens: int, batch: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


def close(found: Tensor, expected: Tensor, what: object) -> None:
    assert found.shape == expected.shape, what
    assert ((found - expected).norm() / expected.norm()).item() <= TOLERANCE, what


def on_every_rank(model: Any, size: int, *args: Tensor, **kwargs: Any) -> SharedRanks:
    with fake_rank(0, size) as mesh:
        trace = capture(model, *args, **kwargs)
        axis = dataclasses.replace(axis_of("tp", mesh), name="cp")
    return SharedRanks([trace] * size, [dataclasses.replace(axis, rank=rank) for rank in range(size)])


def rewritten(compiled: Sequence[Compiled]) -> list[list[fx.GraphModule]]:
    assert not compiled[0].refused and compiled[0].proofs and all(p["holds"] for p in compiled[0].proofs)
    return [[c.variants[i].gm for c in compiled] for i, v in enumerate(compiled[0].variants) if v.steps]


def calls(gm: fx.GraphModule, name: str) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if n.op == "call_function" and op_name(n.target) == name]


def gathered(gm: fx.GraphModule) -> list[int]:
    """Widths of the rows that all-gathers carry."""
    nodes = [n for n in gm.graph.nodes if is_collective(n) and "all_gather" in op_name(n.target)]
    return [int(size_expr(n.meta["val"].shape[-1])) for n in nodes]


def local_rows(node: fx.Node) -> bool:
    """Whether a call's queries are this rank's rows."""
    return "//" in str(arguments(node)["query"].meta["val"].shape[-2])


# ---- a real model --------------------------------------------------------------------------------------------------


@functools.cache
def whole() -> Any:
    """V3 with values as wide as keys: then torch's CPU takes its flash kernel."""
    config = models.tiny_config("v3", layers=2, v_head_dim=16)
    assert config._attn_implementation in (None, "sdpa")
    return models.build(config)


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_v3_with_sdpa(size: int) -> None:
    ranks = on_every_rank(whole(), size, input_ids=ids_of(10), use_cache=False)
    for graphs in rewritten(ranks.compile(strategy="cp", profile="ascend-a3")):
        ops = calls(graphs[0], "aten::_scaled_dot_product_flash_attention_for_cpu")
        assert len(ops) == 2 and all(map(local_rows, ops))
        for tokens in (*range(1, 2 * size + 2), 17):
            with torch.no_grad():
                expected = whole()(input_ids=ids_of(tokens), use_cache=False).logits
            for rank, (logits,) in enumerate(ranks.run(graphs, ids_of(tokens))):
                close(logits, expected, (tokens, rank))


def test_the_latent_is_gathered_at_real_sizes() -> None:
    """Keys and values of 128 heads are made of 512 + 64 elements of each token: those are what crosses ranks."""
    config = DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=2, v_head_dim=192)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.zeros((1, 10), dtype=torch.long)
    with fake_rank(0, 8) as mesh:
        trace, axis = capture(_OnCpu(model), ids), axis_of("tp", mesh)
    options = Options.parse({"profile": "ascend-a3", "strategy": "cp", "replicated": ["*"]})
    compiled = compile_graph(trace.gm, trace.inputs, options, lambda _: OfflineExchange(8), [axis])
    assert not compiled.refused and compiled.proofs and all(p["holds"] for p in compiled.proofs)
    gm = compiled.at(16384).gm
    ops = calls(gm, "aten::scaled_dot_product_attention") or calls(gm, "aten::_scaled_dot_product_attention_math")
    assert ops or calls(gm, "aten::bmm")
    *layers, _ = gathered(gm)
    assert layers == [512 + 64] * 2


class _OnCpu(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


# ---- masks, on one layer -------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """One layer over ids ``[B, T]``: ``attend(q, k, v)`` of heads ``[B, H, T, 8]``, values ``width`` wide."""

    def __init__(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], width: int = WIDTH, hidden: int = HEADS * WIDTH
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * 0.3, requires_grad=False)

        self.attend, self.width, size = attend, width, HEADS * WIDTH
        self.table, self.query, self.latent = weight(VOCAB, hidden), weight(hidden, size), weight(hidden, 6)
        self.key, self.value, self.out = weight(6, size), weight(6, HEADS * width), weight(HEADS * width, hidden)

    def heads(self, x: Tensor, width: int) -> Tensor:
        return x.view(*x.shape[:2], HEADS, width).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.on_hidden(nn.functional.embedding(ids, self.table))

    def on_hidden(self, x: Tensor) -> Tensor:
        latent = x @ self.latent
        q, k = self.heads(x @ self.query, WIDTH), self.heads(latent @ self.key, WIDTH)
        y = self.attend(q, k, self.heads(latent @ self.value, self.width)).transpose(1, 2).flatten(2)
        return x + y @ self.out


def causal(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(q.shape[-2])[:, None] >= torch.arange(k.shape[-2])[None, :]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **given: Any) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, mask, **given)


def distances(q: Tensor, k: Tensor) -> Tensor:
    return (torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])).abs()


MASKS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "none": lambda q, k, v: sdpa(q, k, v),
    "is_causal": lambda q, k, v: sdpa(q, k, v, is_causal=True, scale=0.2),
    "boolean": lambda q, k, v: sdpa(q, k, v, causal(q, k)),
    "additive": lambda q, k, v: sdpa(q, k, v, torch.where(causal(q, k), 0.0, -1e9)[None, None]),
    "of the keys": lambda q, k, v: sdpa(q, k, v, (torch.arange(k.shape[-2]) % 3 != 1)[None, None, None]),
    "distances": lambda q, k, v: sdpa(q, k, v, distances(q, k) * -0.1),
}


@functools.cache
def toy(mask: str, size: int, width: int = WIDTH, batch: int = 1) -> SharedRanks:
    return on_every_rank(Attention(MASKS[mask], width), size, torch.zeros((batch, 10), dtype=torch.long))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("size", "width", "batch"), [(3, WIDTH, 1), (2, WIDTH, 2), (3, 4, 1)])
def test_every_mask(mask: str, size: int, width: int, batch: int) -> None:
    """Where values are narrower than keys torch's CPU computes products and a softmax."""
    ranks = toy(mask, size, width, batch)
    for graphs in rewritten(ranks.compile(strategy="cp", profile="ascend-a3", verify="numeric")):
        fused = calls(graphs[0], "aten::_scaled_dot_product_flash_attention_for_cpu")
        assert len(fused) == (width == WIDTH) and all(map(local_rows, fused))
        for tokens in (*range(1, 2 * size + 2), 17):
            ids = ids_of(tokens, batch)
            expected = Attention(MASKS[mask], width)(ids)
            for rank, (found,) in enumerate(ranks.run(graphs, ids)):
                close(found, expected, (tokens, rank))


# ---- causal masks made explicit ------------------------------------------------------------------------------------


def traced(op: Callable[..., Any], queries: int = 6, keys: int = 6, **given: Any) -> fx.GraphModule:
    """``op(q, k, v, **given)`` and its first result; ``q [2, 3, queries, 8]``, ``k``, ``v`` ``[2, 3, keys, 8]``."""
    graph = fx.Graph()
    with torch._subclasses.FakeTensorMode():
        values = [torch.empty(2, 3, n, 8) for n in (queries, keys, keys)]
        result = op(*values, **given) if op not in ON_CUDA else None
    nodes = [graph.placeholder(n) for n in ("q", "k", "v")]
    for node, value in zip(nodes, values, strict=True):
        node.meta["val"] = value
    call = graph.call_function(op, tuple(nodes), given)
    call.meta["val"] = (values[0], values[0]) if result is None else result
    out = call
    if op is not aten.scaled_dot_product_attention.default:
        out = graph.call_function(operator.getitem, (call, 0))
        out.meta["val"] = call.meta["val"][0]
    graph.output((out,))
    return fx.GraphModule(nn.Module(), graph)


ON_CUDA = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
)
ON_CPU = (aten.scaled_dot_product_attention.default, aten._scaled_dot_product_attention_math.default, FLASH)


@pytest.mark.parametrize("op", ON_CPU, ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(6, 6), (4, 6), (6, 4)])
def test_the_mask_is_the_ops_own(op: Any, queries: int, keys: int) -> None:
    """Aligned in the upper left corner, as ``is_causal`` is, also of other than square scores."""
    before, after = (traced(op, queries, keys, is_causal=True, scale=0.3) for _ in range(2))
    result = ExplicitCausalMasks()(after)
    assert (result.rewrites, result.refusals) == (1, []) and not find_causal(after)
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(2, 3, n, 8, generator=generator) for n in (queries, keys, keys)]
    torch.testing.assert_close(after(*given), before(*given), rtol=1e-5, atol=1e-6)
    assert ExplicitCausalMasks()(after).rewrites == 0


@pytest.mark.parametrize("op", ON_CUDA, ids=str)
def test_kernels_without_a_mask_of_any_length_give_way(op: Any) -> None:
    more = {} if "flash" in str(op) or "overrideable" in str(op) else {"attn_bias": None, "compute_log_sumexp": False}
    after = traced(op, is_causal=True, scale=0.3, **more)
    assert ExplicitCausalMasks()(after).rewrites == 1
    given = [torch.randn(2, 3, 6, 8) for _ in range(3)]
    expected = nn.functional.scaled_dot_product_attention(*given, is_causal=True, scale=0.3)
    torch.testing.assert_close(after(*given)[0], expected)


@pytest.mark.parametrize(
    ("op", "given", "reason"),
    [
        (FLASH, {"is_causal": True, "dropout_p": 0.5}, "attention with dropout"),
        (ON_CUDA[0], {"is_causal": True, "queries": 4}, "causal attention of 4 queries and 6 keys"),
    ],
)
def test_what_is_refused(op: Any, given: dict[str, Any], reason: str) -> None:
    after = traced(op, **given)
    result = ExplicitCausalMasks()(after)
    assert result.rewrites == 0 and result.refusals[0].reason.startswith(reason)


def test_more_than_the_first_result_is_kept() -> None:
    after = traced(ON_CUDA[0], is_causal=True)
    (call,) = find_causal(after)
    with after.graph.inserting_after(call):
        other = after.graph.call_function(operator.getitem, (call, 1))
    after.graph.output_node().args = ((next(iter(call.users)), other),)
    (refusal,) = ExplicitCausalMasks()(after).refusals
    assert "more than its first result is read" in refusal.reason


def test_the_tables_are_of_the_ops_as_they_are() -> None:
    """Names of arguments from the schemas; both tables know the same ops; dropout alone draws."""
    for name, known in FUSED.items():
        target = getattr(aten, name.removeprefix("aten::")).default
        arguments = {a.name for a in target._schema.arguments}
        assert {"query", "key", "value", "dropout_p", "is_causal"} <= arguments
        assert not known.mask or known.mask in arguments
        assert known.rows <= len(target._schema.returns)
        assert RESULTS_BY_ROWS.get(name.replace(".", "::"), 1) == known.rows
        node = fx.Graph().call_function(target, (), {"dropout_p": 0.0})
        assert not is_random(node)
        node.kwargs = {"dropout_p": 0.1}
        assert is_random(node)


# ---- seeded faults -------------------------------------------------------------------------------------------------


def _call(gm: fx.GraphModule) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=FLASH)[0]


def causal_by_number(gm: fx.GraphModule) -> None:
    call = _call(gm)
    call.kwargs = {k: v for k, v in call.kwargs.items() if k != "attn_mask"}
    call.kwargs = {**call.kwargs, "is_causal": True}


def mask_dropped(gm: fx.GraphModule) -> None:
    call = _call(gm)
    call.kwargs = {k: v for k, v in call.kwargs.items() if k != "attn_mask"}


def keys_of_this_rank(gm: fx.GraphModule) -> None:
    call = _call(gm)
    call.update_arg(1, call.args[0])


def keys_for_values(gm: fx.GraphModule) -> None:
    call = _call(gm)
    call.update_arg(2, call.args[1])


def dropout(gm: fx.GraphModule) -> None:
    call = _call(gm)
    call.kwargs = {**call.kwargs, "dropout_p": 0.1}


def other_scale(gm: fx.GraphModule) -> None:
    call = _call(gm)
    call.kwargs = {**call.kwargs, "scale": 0.7}


def positions_of_another_rank(gm: fx.GraphModule) -> None:
    own = next(n for n in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor) if n.args[2] != 0)
    own.args = (own.args[0], own.args[1], 0, own.args[2])


FAULTS = [causal_by_number, mask_dropped, keys_of_this_rank, keys_for_values, dropout, other_scale]
FAULTS += [positions_of_another_rank]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refuted(fault: Callable[[fx.GraphModule], None]) -> None:
    compiled = _unverified()[1]
    (variant,) = [v for v in compiled.variants if v.steps]
    known = variant.steps[0].graph.known
    before = next(iter(known.shapes)).graph.owning_module
    broken = fx.GraphModule(variant.gm, copy_graph(variant.gm.graph))
    assert isinstance(before, fx.GraphModule) and known.tokens is not None
    assert prove(before, broken, known.axis, known.tokens, lambda _: True).holds
    fault(broken)
    assert not prove(before, broken, known.axis, known.tokens, lambda _: True).holds


@functools.cache
def _unverified() -> list[Compiled]:
    return toy("is_causal", 2).compile(strategy="cp", profile="ascend-a3", verify="off")


# ---- attention that nobody knows -----------------------------------------------------------------------------------


@torch.library.custom_op("cpcompile_test::attention", mutates_args=())
def unknown_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).contiguous()


@unknown_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


class Layers(nn.Module):
    """A layer of attention that is known, and one that is not, on hidden rows that are wider than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.known = Attention(MASKS["boolean"], hidden=128)
        self.unknown = Attention(torch.ops.cpcompile_test.attention, hidden=128)

    def forward(self, ids: Tensor) -> Tensor:
        return self.unknown.on_hidden(self.known(ids))


def test_unknown_attention_is_left_whole_and_named() -> None:
    ranks = on_every_rank(Layers(), 2, torch.zeros((1, 10), dtype=torch.long))
    compiled = ranks.compile(strategy="cp", profile="ascend-a3")
    for graphs in rewritten(compiled):
        (unknown,) = calls(graphs[0], "cpcompile_test::attention")
        assert all("//" not in str(n.meta["val"].shape) for n in unknown.all_input_nodes)
        (known,) = calls(graphs[0], "aten::_scaled_dot_product_flash_attention_for_cpu")
        assert local_rows(known)
        for tokens in (1, 2, 3, 5, 17):
            for (found,) in ranks.run(graphs, ids_of(tokens)):
                close(found, Layers()(ids_of(tokens)), tokens)
    reason = "cpcompile_test::attention is not in the table of token-wise ops"
    known = compiled[0].variants[0].steps[0].graph.known
    assert reason in {getattr(outcome, "reason", "") for outcome in known.classes.values()}
    rows = compiled[0].report(1 << 16).collectives
    assert any(reason in row.reason for row in rows), [row.reason for row in rows]
