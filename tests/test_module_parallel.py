"""Modules that are tensor-parallel over ranks with tokens of their own: the answers, idle ranks, what is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shared_modules import GROUP, group_of, ids_of, model, placeholders, run, shared, trace_of
from small_modules import VOCAB, small, trace_of_small

from cpcompile.capture import capture
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.module_cuts import cuts_of
from cpcompile.passes.module_parallel import ModulesRefused, share_modules
from cpcompile.passes.weight_cuts import CutRefused, cut_tensor

TOLERANCE = 2e-5


def close(found: Any, kind: str, tokens: int) -> None:
    with torch.no_grad():
        expected = model(kind)(input_ids=ids_of(tokens), use_cache=False).logits
    assert found.shape == expected.shape
    error = ((found - expected).norm() / expected.norm()).item()
    assert error <= TOLERANCE, f"{tokens} tokens: {error:.1e}"


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize(
    ("counts", "group_tokens"),
    [
        ([0, 1, 7, 8], "exchange"),
        ([5, 2], "exchange"),
        ([3, 0, 9], "exchange"),
        ([0, 1, 7, 8], 12),
        ([8, 1], 8),
        ([5, 5], "equal"),
    ],
)
def test_every_rank_equals_the_model(kind: str, counts: list[int], group_tokens: str | int) -> None:
    for tokens, found in zip(counts, run(trace_of(kind), counts, group_tokens), strict=True):
        if tokens:
            close(found, kind, tokens)


@pytest.mark.parametrize("role", ["embedding", "o_proj", "mlp", "lm_head"])
def test_one_role_alone(role: str) -> None:
    for tokens, found in zip([4, 0, 3, 6], run(trace_of("v3"), [4, 0, 3, 6], "exchange", roles=[role]), strict=True):
        if tokens:
            close(found, "v3", tokens)


def test_weights_fall_by_what_the_formula_says() -> None:
    """Each rank keeps 1/P of embedding, o_proj, the dense layer's MLP and lm_head."""
    trace, size = trace_of("v3"), 4
    graph = share_modules(trace.gm, shared(trace, group_of(size, 1)), "exchange")
    before = {
        n.name: n.meta["val"].numel() for n in trace.gm.graph.find_nodes(op="placeholder") if n.name in graph.cuts
    }
    after = {n.name: n.meta["val"].numel() for n in graph.gm.graph.find_nodes(op="placeholder") if n.name in graph.cuts}
    config = model("v3").config
    heads = config.num_attention_heads * config.v_head_dim
    whole = 2 * config.vocab_size * config.hidden_size + 3 * heads * config.hidden_size
    whole += 3 * config.intermediate_size * config.hidden_size
    assert sum(before.values()) == whole and sum(after.values()) * size == whole


def test_more_rows_than_the_group_takes() -> None:
    trace = trace_of("v3")
    graph = share_modules(trace.gm, shared(trace, group_of(2, 0)), 8)
    assert [str(rows) for rows in graph.most_rows] and len(graph.most_rows) == 1


def test_a_vocabulary_that_does_not_divide() -> None:
    trace = trace_of("v3")
    with pytest.raises(ModulesRefused, match="has 96 elements, which 5 does not divide"):
        share_modules(trace.gm, shared(trace, group_of(5, 0), roles=["embedding"]))


@pytest.mark.parametrize("quantised", ["", "weights", "both"])
@pytest.mark.parametrize("counts", [[20, 18], [0, 19, 24, 17]])
def test_biases_halves_and_scales(quantised: str, counts: list[int]) -> None:
    """A bias is added once, gate and up lie side by side in one weight, scales are cut with what they scale."""
    trace = trace_of_small(quantised)
    found = [m.role for m in shared(trace, group_of(2, 0))]
    assert found == ["embedding", "o_proj", "mlp", "lm_head"]
    for tokens, logits in zip(counts, run(trace, counts, "exchange", vocabulary=VOCAB), strict=True):
        if tokens:
            with torch.no_grad():
                expected = small(quantised)(ids_of(tokens, VOCAB))
            assert (logits - expected).norm() <= TOLERANCE * expected.norm()


def test_what_is_cut_of_quantised_weights() -> None:
    """Columns of a scaled weight take their scales along; rows share the scales of all columns."""
    trace = trace_of_small("weights")
    names = {n.name: given.name for n, given in zip(placeholders(trace.gm), trace.inputs, strict=True)}
    graph = share_modules(trace.gm, shared(trace, group_of(2, 0), roles=["o_proj", "lm_head"]), "exchange")
    assert {names[n]: cut.dim for n, cut in graph.cuts.items()} == {
        "o_proj.weight": 1, "lm_head.weight": 0, "lm_head.scale": 0,
    }  # fmt: skip


def test_activations_that_are_quantised_between_the_products_of_an_mlp() -> None:
    """A scale per token is a maximum over all columns, which no rank has: the MLP stays whole."""

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = (torch.nn.Linear(32, 32, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = torch.nn.functional.silu(self.gate(x)) * self.up(x)
            step = inner.abs().amax(-1, keepdim=True) / 127
            return x + self.down(torch.round(inner / step) * step)

    trace = capture(Mlp(), torch.zeros(20, 32))
    assert not shared(trace, group_of(2, 0), roles=["mlp"])


def test_two_readers_of_a_weight() -> None:
    """lm_head and embedding are one weight: both cut its vocabulary, over the same ranks; o_proj's reader needs all."""

    class Tied(torch.nn.Module):
        def __init__(self, also: bool) -> None:
            super().__init__()
            self.table, self.also = torch.nn.Parameter(torch.randn(VOCAB, 32)), also

        def forward(self, ids: torch.Tensor) -> Any:
            x = torch.nn.functional.embedding(ids, self.table)
            logits = torch.nn.functional.linear(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)), self.table)
            return (logits, self.table.sum()) if self.also else logits

    trace = capture(Tied(False), torch.zeros((1, 10), dtype=torch.long))
    for module in shared(trace, group_of(2, 0)):
        with pytest.raises(CutRefused, match="is also read by"):
            cuts_of(trace.gm, module)


@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_on_flat_rows(bias: bool) -> None:
    """Nothing lies between the products and the activation; with biases, all products are addmm."""

    class Mlp(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = (torch.nn.Linear(32, 48, bias=bias) for _ in range(2))
            self.down = torch.nn.Linear(48, 32, bias=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x)) + x

    torch.manual_seed(0)
    mlp, example = Mlp(), torch.zeros(20, 32)
    torch._dynamo.mark_dynamic(example, 0)
    trace = capture(mlp, example)
    rows = [torch.randn(tokens, 32) for tokens in (7, 20)]
    programs = []
    for rank, own in enumerate(rows):
        graph = share_modules(trace.gm, shared(trace, group_of(2, rank), roles=["mlp"]), "exchange")
        assert len(graph.cuts) == (5 if bias else 3)
        values: dict[str, Any] = {}
        for node, given in zip(placeholders(trace.gm), trace.inputs, strict=True):
            value = given.value if given.kind == "parameter" else own
            value = own.shape[0] if isinstance(node.meta["val"], torch.SymInt) else value
            values[node.name] = cut_tensor(value, graph.cuts[node.name], rank) if node.name in graph.cuts else value
        programs.append(RankProgram(graph.gm, list(values.values()), {GROUP: (0, 1)}))
    with torch.no_grad():
        for own, (found,) in zip(rows, run_lockstep(programs), strict=True):  # type: ignore[misc]
            expected = mlp(own)
            assert (found - expected).norm() <= TOLERANCE * expected.norm()
