"""Parallel strategies of one prefill step: how ranks split attention's tokens and heads, and which are possible.

With n ranks, ``C`` of context times ``t`` of tensor parallelism:

- *off* is the tensor-parallel model as it comes: C = 1, t = n, all-reduces;
- *tp* takes reduce-scatter and all-gather for them, and gathers latents instead of the hidden state;
- *cp* replicates attention's weights and splits the tokens: C = n, t = 1;
- *hybrid* is tp over t ranks within cp over C.

The experts lie on all ranks (EP) in each of them. :mod:`cpcompile.layer_costs` says what they cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpcompile.costs import HardwareProfile
from cpcompile.model_shapes import ModelShapes


@dataclass(frozen=True)
class Kernels:
    """What attention's kernels move besides their operands, and how fast they are.

    Args:
        name: the preset's name.
        score_bytes: bytes that the indexer moves per (query, key, head): 0 where scores stay on the chip.
        topk_bytes: bytes' worth of time that picking the top keys takes per (query, key).
        gather_passes: how often a picked key's row goes through memory.
        sparse_score_bytes: bytes that sparse attention moves per (query, picked key, head).
        full_topk: whether queries with fewer keys than top-k cost as much as any (rectangular tensors).
        offset_rate: share of the profile's FLOP/s that dense attention reaches where queries start after the first
            key: other ranks' or cached tokens come before them.
        source: where the numbers come from.
    """

    name: str
    score_bytes: float
    topk_bytes: float
    gather_passes: float
    sparse_score_bytes: float
    full_topk: bool
    offset_rate: float
    source: str


KERNELS = {
    k.name: k
    for k in (
        # bf16 scores: written, read and written by relu, read by the weighted sum: 4 passes of 2 bytes. Picked rows:
        # read and written by the gather, read by both products. Softmax: as the scores. Measured on one H200 by
        # bench/op_rates.py (torch 2.11): top-k of 65,536 fp32 keys, 0.26 TB/s where memory gives 3.84, is 60 bytes per
        # key; causal attention 557-660 TFLOP/s, and 215-281 for its late half, by the faster kernels that can do it.
        Kernels("eager", 8, 60, 4, 8, True, 0.45, "passes of a chunked torch program; bench/op_rates.py on one H200"),
        Kernels("fused", 0, 0, 1, 0, False, 1.0, "ideal: operands are read once, nothing else leaves the chip"),
    )
}


def default_kernels(profile: HardwareProfile) -> Kernels:
    """``fused`` on Ascend, whose library has both sparse ops; ``eager`` elsewhere: what torch itself has."""
    return KERNELS["fused" if profile.name.startswith("ascend") else "eager"]


@dataclass(frozen=True)
class Strategy:
    """One way to lay a model out over ``cp`` times ``tp`` ranks.

    Args:
        name: as tables show it.
        cp: ranks that split the tokens of attention.
        tp: ranks that split its heads.
        scatter: whether reduce-scatter and all-gather take the place of all-reduce.
        layout: tokens of a context-parallel rank: ``contiguous``, or ``zigzag`` (balanced under a causal mask).
        shard_indexer: whether the ranks of ``tp`` split the indexer's queries and gather the picked indices.
        gather_hidden: gather the hidden state before qkv_a, instead of the latents after it.
        absorbed: dense attention on the latent itself, as decode does; sparse attention always is.
        dispatch: whether the model sends each token to its experts' ranks by all-to-all; needs ``scatter``.
    """

    name: str
    cp: int
    tp: int
    scatter: bool = True
    layout: str = "zigzag"
    shard_indexer: bool = False
    gather_hidden: bool = False
    absorbed: bool = False
    dispatch: bool = False

    @property
    def ranks(self) -> int:
        """All ranks."""
        return self.cp * self.tp


@dataclass(frozen=True)
class Step:
    """One prefill step of one request: ``tokens`` new tokens after ``prefix`` cached ones, on ``profile``."""

    tokens: int
    profile: HardwareProfile
    kernels: Kernels
    prefix: int = 0


def candidates(model: ModelShapes, ranks: int) -> list[Strategy]:
    """Every strategy that tables compare, ``off`` first; hybrids for every factorisation of ``ranks``."""
    found = [Strategy("off", 1, ranks, scatter=False), Strategy("tp", 1, ranks)]
    if model.sparse:
        found.append(Strategy("tp, indexer sharded", 1, ranks, shard_indexer=True))
    found.append(Strategy("cp contiguous", ranks, 1, layout="contiguous"))
    found.append(Strategy("cp zigzag", ranks, 1))
    if not model.sparse:
        found.append(Strategy("cp zigzag, absorbed", ranks, 1, absorbed=True))
    splits = [c for c in range(2, ranks) if ranks % c == 0]
    return found + [Strategy(f"hybrid cp{c} x tp{ranks // c}", c, ranks // c) for c in splits]


def impossible(model: ModelShapes, strategy: Strategy, tokens: int) -> str | None:
    """Why ``strategy`` cannot run ``tokens`` tokens of ``model``; None if it can."""
    if model.heads % strategy.tp:
        return f"{model.heads} heads do not divide by {strategy.tp} ranks"
    if model.dense_layers and model.intermediate % strategy.ranks:
        return f"the MLP's width {model.intermediate} does not divide by {strategy.ranks} ranks"
    if model.moe_layers and model.shared_experts * model.expert_intermediate % strategy.ranks:
        width = model.shared_experts * model.expert_intermediate
        return f"the shared experts' width {width} does not divide by {strategy.ranks} ranks"
    if strategy.cp > 1 and strategy.layout == "zigzag" and tokens < 2 * strategy.cp:
        return f"zigzag needs 2 tokens per rank, {2 * strategy.cp} in all"
    return None
