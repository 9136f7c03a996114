"""Predicted against published: ``python -m bench.calibration > docs/CALIBRATION.md``.

No number here is fitted to a published row: profiles are data-sheet figures, kernels are counted passes and rates
measured apart (bench/op_rates.py). Where the prediction misses, the table says by how much.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from cpcompile.comparison import step_cost
from cpcompile.costs import HardwareProfile, profile
from cpcompile.layer_costs import ACTIVATION_BYTES, Collective, Work, attention_half, linear
from cpcompile.model_shapes import ModelShapes
from cpcompile.module_costs import module_cost
from cpcompile.module_verdict import CAUTION, WORTH, ModuleCost
from cpcompile.strategies import KERNELS, Kernels, Step, Strategy

# DeepSeek-V3 and R1; V3.2 adds the indexer (tests hold both against the transformers library's configurations).
V3 = ModelShapes(7168, 61, 3, 58, 128, 1536, 512, 128, 64, 128, 18432, 2048, 256, 1, 8, 129280)
V32 = replace(V3, index_heads=64, index_dim=128, index_topk=2048)
# Kimi-Linear-48B-A3B without its 20 KDA layers' attention: 7 MLA layers, 27 MLPs.
KIMI = ModelShapes(2304, 7, 1, 26, 32, 0, 512, 128, 64, 128, 9216, 1024, 256, 1, 8, 163840)
# H20: 148 TFLOP/s dense bf16, 4.0 TB/s, NVLink 450 GB/s per direction, with the factors of cpcompile.costs.
H20 = HardwareProfile("h20-nvlink", 360e9, 12e-6, 16e-6, 89e12, 3.2e12, "vendor data sheet peak, times 0.6, 0.8, 0.8")
A2, A3, H200, H100 = (profile(name) for name in ("ascend-a2", "ascend-a3", "h200-nvlink", "h100-nvlink"))
EAGER, FUSED = KERNELS["eager"], KERNELS["fused"]

HEADER = """# Calibration of the strategy costs

Made by `python -m bench.calibration`; a test keeps it so. It sets what `cpcompile plan --compare` and `--modules`
compute against published figures. **No number is fitted to a row**: profiles are data-sheet figures times 0.6 (FLOP/s),
0.8 (memory) and 0.8 (link); `eager` kernels are counted passes plus two rates measured apart on one H200; `fused`
kernels are ideal. So `predicted / published` shows how far to trust the tables: ratios far more than seconds.

| row | quantity | published | predicted | predicted / published |
|---|---|---|---|---|"""

FOOTER = """
## What the rows assume

- **#12207**: "TP32" is `off`, "CP32" is `cp zigzag`, experts over all ranks and, as the author says, run as without
  context parallelism: on all tokens, gathered and scattered again. One step of 65,536 tokens, fused kernels. Both
  times come out too short (ideal kernels, no skew between experts, no host time), the shorter one more so.
- **#10568**: FP8 weights, as the model is published; the all-reduce after `o_proj` stays, the other becomes
  reduce-scatter and latent gather. qkv_a and the norms shrink as published (0.13, 0.56 against 0.53), though norms run
  far below the data sheet there. Communication shrinks by 17 % here, the volume's share, and by 7 % there.
- **One V3 layer**: a dense MLP and eager kernels, both assumed. That context parallelism loses even when balanced comes
  from one measured rate: torch's causal attention runs at 0.45 of its speed where queries do not start at the first
  key. With ideal kernels (`--kernels fused`) contiguous still loses and zigzag comes out even ({fused:.2f} at 64K).
- **V3.2 attention half**: eager kernels, bf16 scores in chunks; the published program's own chunking is not known. The
  indexer's share at 8K, and so the gain there, is underestimated; at 64K that of zigzag is overestimated.
- **cann-recipes**: 64 "chips" taken as 64 ranks, `cp zigzag`, tokens dispatched to their experts by all-to-all; the
  published figure is a bound.
- **FlashComm 1**: volume of the attention half only, which depends on neither T nor the ranks.
- **PCP2 TP8**: one request; DP2 TP8 is `off` on 8 ranks (two requests at once keep the experts as busy as 8 ranks of
  their own), PCP2 TP8 the hybrid on 16. Chunking, the load and 8-bit attention are not said. Seconds are far too short.
- **#34059**: Kimi-Linear's MLA layers and experts, chunks of 8,192, contiguous, absorbed attention against
  expanded, H100, fused kernels. The 20 KDA layers are left out of both sides. The sign is right, the loss
  too small: absorbed attention alone has 3.4 times the arithmetic, the rest of the gap is not explained here.
- **Module groups**: DP32 EP32 on Ascend A2, whose profile has A3's numbers; 24 tokens per rank, the published batch
  (no draft tokens assumed). Published "GB" are GiB. lm_head and mlp save time by reading fewer weights, as published.
  **Two published times do not follow from first principles.** Embedding: a lookup reads 24 rows, whatever the table's
  size, so nothing saves the published 1.0 ms here; computed is what two collectives cost. o_proj over 8: **the computed
  sign is wrong**. The published loss needs collectives {needed:.2f} times as slow as computed; the computed gain is
  gone at {slack:.2f} times, and at 48 tokens per rank computed is {draft:+.2f} ms. (Its pull request says +1 ms, and
  none over 4 ranks; computed there: {four:+.2f} ms.)
- **Verdicts on module groups**: {verdicts}.
  They do not follow the computed ms alone but a criterion (`cpcompile/module_verdict.py`) that was written with these
  rows in view, from figures of others: a gain must survive collectives {caution:g} times as slow as computed, which
  #10568's above are, and a GB is worth 0.1 ms. o_proj's "no" holds from a factor of {flip:.2f} on and while a GB is
  worth less than {o_proj:.2f} ms; embedding's "yes" while it is worth more than {embedding:.2f} ms.

## What cannot be computed

| row | what is missing |
|---|---|
| cann-recipes V3.2, TPOT < 30 ms | batch size; decode of many requests is not modelled |
| FlashComm 1, prefill +22–26 % | token count, ranks, model |
| FlashComm 2, prefill +8 % over FlashComm 1, R1, TP16 | token count, otp |
| ATOM V4 TP8 → TP4·PCP2; V4 on AMD (#27928) | DeepSeek-V4's attention is not modelled; profile of the machine |
| vLLM SP without DP (#47070) | token count and machine |
| vLLM SP auto-enabled (#48656) | model, machine, token count |
| Meta CP 2024 | model (grouped-query attention is not modelled) and interconnect |
| Megatron SP 2022 | training: backward pass and recomputation are not modelled |

## Rates measured on one H200

`python -m bench.op_rates`, torch 2.11, bf16, median of 7; the profile `h200-nvlink` says 593 TFLOP/s and 3.84 TB/s.

| op | measured |
|---|---|
| products, 16,384 rows, V3's widths | 716–782 TFLOP/s |
| RMSNorm, two passes | 2.4 TB/s |
| causal attention (192/128), 4,096 / 16,384 / 65,536 tokens | 557–565 / 608–660 / 592–596 TFLOP/s |
| its late half, lower-right causal, as dispatched | 127–145 TFLOP/s |
| its late half, values padded to 192, or a boolean mask | 215–281 TFLOP/s |
| eager indexer, 64 queries of 65,536 keys, bf16 / fp32 scores | 0.76 / 2.91 ms (computed, bf16: {indexer:.2f}) |
| top-k 2048 of 65,536 fp32 keys | 0.26 TB/s |
| eager sparse attention, 256 queries, 64 / 128 heads | 0.92 / 1.19 ms (computed: {sparse:.2f} / {sparse_all:.2f}) |

Products run faster than the profile says; the profile stays what its other users know."""


@dataclass(frozen=True)
class Row:
    """A published figure and ours, in ``unit``; ``low`` and ``high`` differ where a range or a bound is published."""

    name: str
    quantity: str
    low: float
    high: float
    predicted: float
    unit: str = "x"

    def __str__(self) -> str:
        """A line of the table."""
        published = f"{self.low:g}" if self.low == self.high else f"{self.low:g}–{self.high:g}"
        published = published if self.low else f"< {self.high:g}"
        if self.low <= self.predicted <= self.high:
            ratio = "within"
        else:
            ratio = f"{self.predicted / (self.high if self.predicted > self.high else self.low):.2f}"
        shown = f"{self.predicted:.2f}" if self.predicted < 100 else f"{self.predicted:.1f}"
        return f"| {self.name} | {self.quantity} | {published} {self.unit} | {shown} {self.unit} | {ratio} |"


def off(ranks: int) -> Strategy:
    """The tensor-parallel model as it comes."""
    return Strategy("off", 1, ranks, scatter=False)


def total(model: ModelShapes, strategy: Strategy, tokens: int, machine: HardwareProfile, kernels: Kernels) -> float:
    """Seconds of one step."""
    return step_cost(model, strategy, Step(tokens, machine, kernels)).seconds


def ascend_cp() -> Iterator[Row]:
    """V3.2, 64K on 32 ranks."""
    tp, cp = (total(V32, s, 65536, A3, FUSED) for s in (off(32), Strategy("cp", 32, 1)))
    name = "CP, V3.2, 64K, 32 Ascend ranks (sglang #12207)"
    yield Row(name, "TP32", 30, 30, tp, "s")
    yield Row(name, "CP32", 5, 5, cp, "s")
    yield Row(name, "TP32 / CP32", 6, 6, tp / cp)


def scattered_input() -> Iterator[Row]:
    """V3 in FP8 on 8 H20, a chunk of 16K."""
    name, tokens, ranks = "RS/AG after qkv_a, H20 TP8, 16K (sglang #10568)", 16384, 8
    model = replace(V3, weight_bytes=1)
    width, hidden = model.q_lora + model.latent, tokens * model.hidden * ACTIVATION_BYTES

    def norms(rows: float) -> float:
        return Work(0, 4 * rows * model.hidden * ACTIVATION_BYTES).seconds(H20)

    before = 2 * model.layers * Collective("all_reduce", "", ranks, hidden).seconds(H20)
    halves = Collective("reduce_scatter", "", ranks, hidden), Collective("all_gather", "", ranks, hidden * width / 7168)
    after = before / 2 + model.layers * sum(c.seconds(H20) for c in halves)
    for rows, published in ((tokens, 205.1), (tokens / ranks, 26.14)):
        took = 1e3 * model.layers * linear(model, rows, model.hidden, width).seconds(H20)
        yield Row(name, f"qkv_a on {rows:,.0f} rows", published, published, took, "ms")
    for what, published, seconds in (
        ("communication before", 267.1, before),
        ("communication after", 249.63, after),
        ("RMSNorm before", 82.3, 2 * model.layers * norms(tokens)),
        ("RMSNorm after", 43.4, model.layers * (norms(tokens) + norms(tokens / ranks))),
    ):
        yield Row(name, what, published, published, 1e3 * seconds, "ms")


def dense_layer() -> Iterator[Row]:
    """One V3 layer with a dense MLP on two H200."""
    one = replace(V3, layers=1, dense_layers=1, moe_layers=0)
    hidden, latent = Strategy("RS + hidden AG", 1, 2, gather_hidden=True), Strategy("RS + latent AG", 1, 2)
    contiguous, zigzag = Strategy("CP contiguous", 2, 1, layout="contiguous"), Strategy("CP zigzag", 2, 1)
    for strategy, published in (
        (hidden, ((0.99, 1.0),) * 3),
        (latent, ((0.99, 0.99), (1.03, 1.03), (1.01, 1.01))),
        (contiguous, ((0.75, 0.75), (0.59, 0.59), (0.42, 0.42))),
        (zigzag, ((0.84, 0.84), (0.72, 0.72), (0.60, 0.60))),
    ):
        for tokens, (low, high) in zip((4096, 16384, 65536), published, strict=True):
            ratio = total(one, off(2), tokens, H200, EAGER) / total(one, strategy, tokens, H200, EAGER)
            yield Row("one V3 layer, two H200", f"{strategy.name}, {tokens:,}, speed", low, high, ratio)


def fused_zigzag() -> float:
    """Speed of zigzag on two H200 at 64K, one V3 layer, if kernels were ideal."""
    one = replace(V3, layers=1, dense_layers=1, moe_layers=0)
    return total(one, off(2), 65536, H200, FUSED) / total(one, Strategy("zigzag", 2, 1), 65536, H200, FUSED)


def sparse_attention_half() -> Iterator[Row]:
    """The attention half of a V3.2 layer on two H200."""
    sharded, zigzag = Strategy("TP, indexer sharded", 1, 2, shard_indexer=True), Strategy("CP zigzag", 2, 1)
    for strategy, published in ((sharded, (1.33, 1.42, 1.51)), (zigzag, (1.76, 1.74, 1.53))):
        for tokens, ratio in zip((8192, 32768, 65536), published, strict=True):
            ours = half_seconds(off(2), tokens) / half_seconds(strategy, tokens)
            yield Row("V3.2 attention half, two H200", f"{strategy.name}, {tokens:,}, speed", ratio, ratio, ours)


def half_seconds(strategy: Strategy, tokens: int) -> float:
    """The attention half of a V3.2 layer on H200s, eager kernels."""
    return sum(attention_half(V32, strategy, Step(tokens, H200, EAGER)).seconds(H200).values())


def ascend_others() -> Iterator[Row]:
    """cann-recipes, FlashComm 1, PCP2 TP8."""
    seconds = total(V32, Strategy("cp", 64, 1, dispatch=True), 131072, A3, FUSED)
    yield Row("cann-recipes V3.2, 64 chips, BF16", "TTFT at 128K", 0, 2, seconds, "s")
    volumes = [
        sum(c.wire for c in attention_half(V3, s, Step(16384, A3, FUSED)).collectives)
        for s in (off(16), Strategy("tp", 1, 16))
    ]
    yield Row("FlashComm 1", "communication saved", 35, 35, 100 * (1 - volumes[1] / volumes[0]), "%")
    name, model = "PCP2 TP8 against DP2 TP8, R1-W8A8, A3", replace(V3, weight_bytes=1)
    for tokens, before, after in ((32768, 9.3, 7.9), (65536, 22.8, 15.9), (131072, 73.2, 46.0)):
        dp = total(model, off(8), tokens, A3, FUSED)
        pcp = total(model, Strategy("hybrid", 2, 8), tokens, A3, FUSED)
        yield Row(name, f"DP2 TP8, {tokens:,}", before, before, dp, "s")
        yield Row(name, f"PCP2 TP8, {tokens:,}", after, after, pcp, "s")
        yield Row(name, f"speed, {tokens:,}", round(before / after, 2), round(before / after, 2), dp / pcp)


def absorbed_cp() -> Iterator[Row]:
    """Kimi-Linear, CP4 absorbed against TP4 expanded, in chunks."""
    cp = Strategy("cp", 4, 1, layout="contiguous", absorbed=True)
    for tokens, published in ((8192, 1.92), (131072, 2.80)):
        steps = [Step(8192, H100, FUSED, prefix) for prefix in range(0, tokens, 8192)]
        took = [sum(step_cost(KIMI, s, step).seconds for step in steps) for s in (cp, off(4))]
        name = "KDA + MLA, absorbed, CP4 against TP4 (#34059)"
        yield Row(name, f"slower by, {tokens:,}", published, published, took[0] / took[1])


def module(name: str, ranks: int = 8, tokens: int = 24) -> ModuleCost:
    """A module of R1-W8A8 over a group of its own, in decode on Ascend A2."""
    return module_cost(name, replace(V3, weight_bytes=1), ranks, Step(tokens, A2, FUSED))


PUBLISHED_MODULES = {"lm_head": (1.51, -1.2), "embedding": (1.51, -1.0), "o_proj": (5.8, 1.5), "mlp": (0.9, -1.0)}
"""GiB saved per rank and change of a decode step in ms, groups of 8: vllm-ascend's guide to fine-grained TP."""


def module_groups() -> Iterator[Row]:
    """R1-W8A8, DP32 EP32, batch 24 per rank."""
    for name, (saved, change) in PUBLISHED_MODULES.items():
        cost = module(name)
        yield Row("module groups, R1-W8A8, 32 A2", f"{name} over 8, saved", saved, saved, cost.saved / 2**30, "GiB")
        yield Row("module groups, R1-W8A8, 32 A2", f"{name} over 8", change, change, 1e3 * cost.change(), "ms")


def module_notes() -> dict[str, float | str]:
    """What the notes on module groups say in numbers."""
    o_proj = module("o_proj")
    per_factor = o_proj.change(2.0) - o_proj.change()
    price = {name: 1e12 * module(name).cautious / module(name).freed for name in ("o_proj", "embedding")}
    verdicts = [f"{name} {'yes' if module(name).pays else 'no'}" for name in PUBLISHED_MODULES]
    return {
        "needed": 1 + (PUBLISHED_MODULES["o_proj"][1] / 1e3 - o_proj.change()) / per_factor,
        "slack": o_proj.slack,
        "draft": 1e3 * module("o_proj", tokens=48).change(),
        "four": 1e3 * module("o_proj", ranks=4).change(),
        "caution": CAUTION,
        "flip": 1 + (WORTH * o_proj.freed / 1e9 - o_proj.change()) / per_factor,
        **price,
        "verdicts": ", ".join(verdicts),
    }


def rows() -> list[Row]:
    """Every published row that gives enough to compute."""
    parts = (ascend_cp, scattered_input, dense_layer, sparse_attention_half, ascend_others, absorbed_cp, module_groups)
    return [row for part in parts for row in part()]


def kernel_check() -> dict[str, float]:
    """Milliseconds that the eager kernels' counts give for what bench/op_rates.py times."""
    pairs = 64 * 65536
    moved = pairs * (V32.index_heads * EAGER.score_bytes + EAGER.topk_bytes)
    picked, absorbed = 256 * V32.index_topk, 2 * (V32.latent + V32.kv_lora)

    def sparse(heads: int) -> float:
        gathered = EAGER.gather_passes * V32.latent * ACTIVATION_BYTES + EAGER.sparse_score_bytes * heads
        return 1e3 * Work(picked * heads * absorbed, picked * gathered).seconds(H200)

    indexer = 1e3 * Work(2 * pairs * V32.index_heads * V32.index_dim, moved).seconds(H200)
    return {"indexer": indexer, "sparse": sparse(64), "sparse_all": sparse(128)}


def main() -> str:
    """The whole page."""
    notes = {"fused": fused_zigzag(), **kernel_check(), **module_notes()}
    return "\n".join((HEADER, *map(str, rows()), FOOTER.format(**notes))) + "\n"


if __name__ == "__main__":
    print(main(), end="")
