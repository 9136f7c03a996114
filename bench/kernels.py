"""The Triton kernels of sparse attention on one CUDA GPU: ``python -m bench.kernels [--json FILE]``.

DeepSeek-V3.2's widths. First each kernel against the CPU's reference, on random bfloat16 and float16; then times of
whole causal prompts, as TFLOP/s of the work that the mask leaves and as a share of the rate of a matrix product in the
same run. Fails where a kernel is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.testing import do_bench

from cpcompile import ops

INDEX_HEADS, INDEX_WIDTH, COUNT, LATENT, ROPE, SCALE = 64, 128, 2048, 512, 64, 192**-0.5
# Flash attention's own error in bf16: weights and result are each rounded once (2**-9 of their value).
MOST_ERROR = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def main() -> int:
    """Check, then time; returns the process's exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    parser.add_argument("--json", type=Path, help="where the rows go as well")
    given = parser.parse_args()
    torch.manual_seed(0)
    rows = [check(dtype, heads) for dtype in MOST_ERROR for heads in (64, 16)]
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
    rows.append({"what": "matmul 8192^3", "TFLOP/s": rate})
    for tokens in (8192, 32768, 65536):
        rows.append(time_indexer(tokens, rate))
        rows += [time_attention(tokens, heads, rate) for heads in (64, 128, 16)]
    for row in rows:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    if given.json:
        given.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows})
        )
    return int(any(not row.get("right", True) for row in rows))


def check(dtype: torch.dtype, heads: int) -> dict[str, Any]:
    """Both kernels against the reference on the CPU: keys of a last part of a prompt, some rows with few of them."""
    rows, keys = 96, 5000
    indexer = indexer_operands(rows, keys, dtype)
    indexer[3][0, :8] = torch.tensor([0, 1, 2, 100, 2047, 2048, 2049, 3000])
    scores = reference_scores(*[t.cpu() for t in indexer])
    chosen = ops.lightning_indexer(*indexer, COUNT).cpu()
    lost = max(shortfall(scores[s], chosen[0, s, 0]) for s in range(rows))
    attention = attention_operands(rows, keys, heads, dtype)
    attention[5][0, :8] = indexer[3][0, :8]
    found = ops.sparse_attention(*attention, SCALE).cpu().double()
    expected = ops.sparse_attention(*[t.cpu().float() if t.is_floating_point() else t.cpu() for t in attention], SCALE)
    error = ((found - expected).norm() / expected.norm()).item()
    right = lost <= 1e-5 and error <= MOST_ERROR[dtype]
    return {"what": f"check {dtype}, {heads} heads", "indexer's loss": lost, "attention's error": error, "right": right}


def reference_scores(query: Tensor, key: Tensor, weights: Tensor, key_lengths: Tensor) -> Tensor:
    """``[S, K]`` in float64, -inf where a row does not see the key."""
    keys = key[0, :, 0].double().T
    pairs = zip(query[0].double(), weights[0].double(), strict=True)
    scores = torch.stack([w @ (q @ keys).relu() for q, w in pairs])
    return scores.masked_fill(torch.arange(key.shape[1]) >= key_lengths[0, :, None], -torch.inf)


def shortfall(scores: Tensor, chosen: Tensor) -> float:
    """How much less the worst chosen key of a row scores than it should, of the scores' size; infinite if malformed."""
    visible = int(scores.isfinite().sum())
    expected = min(visible, chosen.numel())
    taken = chosen[:expected].long()
    distinct = taken.unique().numel() == expected and bool(((taken >= 0) & (taken < visible)).all())
    if not distinct or bool((chosen[expected:] != -1).any()):
        return float("inf")
    if not expected:
        return 0.0
    return ((scores.topk(expected).values.min() - scores[taken].min()) / scores[:visible].abs().max()).item()


def time_indexer(tokens: int, rate: float) -> dict[str, Any]:
    """All rows of a prompt; rows of its last part for the longest would tell the same."""
    operands = indexer_operands(tokens, tokens, torch.bfloat16)
    work = 2 * INDEX_HEADS * INDEX_WIDTH * float(operands[3].double().sum())
    return timed(f"lightning_indexer {tokens}", lambda: ops.lightning_indexer(*operands, COUNT), work, rate)


def time_attention(tokens: int, heads: int, rate: float) -> dict[str, Any]:
    """As many rows as fit beside the keys of a whole prompt; the last ones, that see most."""
    rows = min(tokens, 8192)
    operands = attention_operands(rows, tokens, heads, torch.bfloat16)
    work = 2 * heads * (2 * LATENT + ROPE) * float(operands[5].clamp(max=COUNT).double().sum())
    what = f"sparse_attention {tokens} keys, {rows} rows, {heads} heads"
    return timed(what, lambda: ops.sparse_attention(*operands, SCALE), work, rate)


def timed(what: str, run: Callable[[], Tensor], work: float, rate: float) -> dict[str, Any]:
    """Time, rate, share and the memory that it took beside its operands and result."""
    result = run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = run()
    scratch = torch.cuda.max_memory_allocated() - before - result.numel() * result.element_size()
    took = milliseconds(run)
    reached = work / took / 1e9
    return {"what": what, "ms": took, "TFLOP/s": reached, "of matmul": reached / rate, "scratch MiB": scratch / 2**20}


def milliseconds(run: Callable[[], Any]) -> float:
    """Median of device-event times."""
    return float(do_bench(run, warmup=25, rep=150, return_mode="median"))


def indexer_operands(rows: int, keys: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys, weights and lengths of the last ``rows`` of a prompt of ``keys`` tokens."""
    query, key = random(rows, INDEX_HEADS, INDEX_WIDTH, dtype=dtype), random(keys, 1, INDEX_WIDTH, dtype=dtype)
    return [query, key, random(rows, INDEX_HEADS, dtype=torch.float32), causal(rows, keys)]


def attention_operands(rows: int, keys: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    """As the op's operands before ``scale``; each row picks visible keys at random, -1 where it has too few."""
    query, query_rope = (random(rows, heads, width, dtype=dtype) for width in (LATENT, ROPE))
    key, key_rope = (random(keys, 1, width, dtype=dtype) for width in (LATENT, ROPE))
    lengths = causal(rows, keys)
    picked = torch.full((1, rows, 1, COUNT), -1, dtype=torch.int32, device="cuda")
    for start in range(0, rows, 512):
        part = slice(start, min(rows, start + 512))
        hidden = torch.arange(keys, device="cuda") >= lengths[0, part, None]
        best = torch.rand(hidden.shape, device="cuda").masked_fill_(hidden, -1).topk(min(COUNT, keys))
        picked[0, part, 0, : best.indices.shape[1]] = best.indices.masked_fill(best.values < 0, -1).int()
    return [query, key, picked, query_rope, key_rope, lengths]


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """``[1, *shape]``, normal."""
    return torch.randn(1, *shape, device="cuda", dtype=dtype)


def causal(rows: int, keys: int) -> Tensor:
    """``[1, rows]`` int32: how many keys each of the last rows sees."""
    return torch.arange(keys - rows + 1, keys + 1, device="cuda", dtype=torch.int32)[None]


if __name__ == "__main__":
    sys.exit(main())
