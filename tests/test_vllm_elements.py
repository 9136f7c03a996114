"""What a layer of DeepSeek-V3.2 at full size sends under vLLM: it gathers latents, and not its hidden states."""

from __future__ import annotations

import dialect_ops  # noqa: F401  these two define the ops
import pytest
import torch
import vllm_ops  # noqa: F401
from simulate import fake_rank
from torch import Tensor, nn

from cpcompile.backend import exchange_for
from cpcompile.capture import capture
from cpcompile.options import Options
from cpcompile.passes import vllm_ops as vllm_pass
from cpcompile.pipeline import compile_graph

IR, VLLM = torch.ops.vllm_ir, torch.ops.vllm
RANKS, TOKENS = 8, 8192
HIDDEN, INNER, VOCAB, HEADS = 7168, 18432, 129280, 128
Q_LORA, KV, INDEX_K, INDEX_HEADS = 1536, 512 + 64, 128, 64
LATENTS = Q_LORA + KV + INDEX_K + INDEX_HEADS


class Layer(nn.Module):
    """As vLLM has it: MLA and its indexer as ops that write what they find, a gated MLP."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.q_a, self.kv_a = nn.Linear(HIDDEN, Q_LORA, False), nn.Linear(HIDDEN, KV, False)
        self.wk_weights_proj = nn.Linear(HIDDEN, INDEX_K + INDEX_HEADS, False)
        self.wq_b = nn.Linear(Q_LORA, INDEX_HEADS * INDEX_K, False)
        self.shard_q_b = nn.Linear(Q_LORA, HEADS // RANKS * 192, False)
        self.shard_o = nn.Linear(HEADS // RANKS * 128, HIDDEN, False)
        self.shard_up, self.shard_down = (
            nn.Linear(HIDDEN, INNER // RANKS, False),
            nn.Linear(INNER // RANKS, HIDDEN, False),
        )
        self.norms = nn.ParameterList(torch.empty(size) for size in (HIDDEN, HIDDEN, Q_LORA, KV))

    def forward(self, x: Tensor, residual: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        h, residual = IR.fused_add_rms_norm(x, residual, self.norms[0], 1e-6)
        q_c = IR.rms_norm(self.q_a(h), self.norms[2], 1e-6)
        kv = IR.rms_norm(self.kv_a(h), self.norms[3], 1e-6)
        k, weights = self.wk_weights_proj(h).split([INDEX_K, INDEX_HEADS], -1)
        VLLM.sparse_attn_indexer(h, self.name, self.wq_b(q_c), k, weights, buffer)
        output = x.new_empty(x.shape[0], HEADS // RANKS * 128)
        VLLM.unified_mla_attention_with_output(torch.cat([self.shard_q_b(q_c), kv], -1), output)
        x = VLLM.all_reduce(self.shard_o(output), "tp:0")
        h, residual = IR.fused_add_rms_norm(x, residual, self.norms[1], 1e-6)
        return VLLM.all_reduce(self.shard_down(nn.functional.silu(self.shard_up(h))), "tp:0"), residual


class Model(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(Layer(f"layers.{number}") for number in range(layers))

    def forward(self, ids: Tensor, buffer: Tensor) -> Tensor:
        x = self.table(ids)
        residual = torch.zeros_like(x)
        for layer in self.layers:
            x, residual = layer(x, residual, buffer)
        return x + residual


def sent(layers: int) -> tuple[int, int]:
    """Elements that a rank sends, before and after."""
    with torch.device("meta"):
        model = Model(layers).to(torch.bfloat16).requires_grad_(False)
        trace = capture(model, torch.zeros(TOKENS, dtype=torch.long), torch.zeros(TOKENS, 2048, dtype=torch.int32))
    options = {"profile": "h200-nvlink", "replicated": ("*", "!*shard*")}
    with fake_rank(0, RANKS) as mesh:
        given = Options.parse({**options, "axes": {"tp": mesh}})
        compiled = compile_graph(trace.gm, trace.inputs, given, lambda axis: exchange_for(axis, 5.0))
        rows = compiled.report(TOKENS).collectives
    return sum(c.elements_before for c in rows), sum(c.elements_after for c in rows)


@pytest.mark.parametrize(
    ("rows_alone", "after"),
    [(vllm_pass.ROWS_ALONE, 2 * HIDDEN + LATENTS + HIDDEN), ({}, 2 * HIDDEN + LATENTS + 2 * HIDDEN)],
    ids=["rows are counted", "all are read"],
)
def test_a_layer_gathers_its_latents(
    rows_alone: dict[str, object], after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elements of a token in a layer's collectives: of its all-reduces, and of what replaces them."""
    monkeypatch.setattr(vllm_pass, "ROWS_ALONE", rows_alone)
    one, two = sent(1), sent(2)
    share = TOKENS * (RANKS - 1) // RANKS
    assert [(b - a) / share for a, b in zip(one, two, strict=True)] == [4 * HIDDEN, after]
    assert 4 * HIDDEN == 28672 and after in (23808, 30976)
