"""Rates of the op classes of `cpcompile.strategies` on one GPU: ``python -m bench.op_rates`` prints JSON lines.

Bfloat16, DeepSeek-V3.2 shapes, median of device-event times. A rate is counted FLOPs (or bytes) over seconds, so
it can be set against a data sheet. The sparse ops are written as a plain torch program writes them: in chunks.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right


def seconds(run: Callable[[], object], repeats: int = 7) -> float:
    """Median time of one call."""
    times: list[float] = []
    for i in range(repeats + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def rand(*shape: int) -> torch.Tensor:
    """Random bfloat16 on the device."""
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def tell(what: str, amount: float, took: float, unit: str) -> None:
    """One line."""
    print(json.dumps({"what": what, "ms": round(took * 1e3, 4), "rate": round(amount / took / 1e12, 2), "unit": unit}))


def dense(t: int, heads: int) -> None:
    """Causal attention with V3's head widths, of all tokens and of their late half, by three ways to write that."""
    q, k, v = rand(1, heads, t, 192), rand(1, heads, t, 192), rand(1, heads, t, 128)
    work, half = heads * 2 * 320, t // 2
    took = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    tell(f"causal {t}", t * t / 2 * work, took, "TFLOP/s")
    late, rest = q[:, :, half:].contiguous(), (t * t - half * half) / 2 * work
    bias: Any = causal_lower_right(half, t)
    took = seconds(lambda: F.scaled_dot_product_attention(late, k, v, attn_mask=bias))
    tell(f"late half of {t}, lower right", rest, took, "TFLOP/s")
    padded = F.pad(v, (0, 64))
    took = seconds(lambda: F.scaled_dot_product_attention(late, k, padded, attn_mask=bias))
    tell(f"late half of {t}, lower right, padded values", rest, took, "TFLOP/s")
    if t <= 16384:
        mask = torch.ones(half, t, dtype=torch.bool, device="cuda").tril(half)
        took = seconds(lambda: F.scaled_dot_product_attention(late, k, v, attn_mask=mask))
        tell(f"late half of {t}, boolean mask", rest, took, "TFLOP/s")


def indexer(t: int) -> None:
    """Scores and top-k of 64 queries, bf16 and fp32, and top-k alone."""
    q, k, weights = rand(64 * 64, 128), rand(t, 128), rand(64, 1, 64)

    def scored(dtype: torch.dtype) -> torch.Tensor:
        scores = (q.to(dtype) @ k.to(dtype).t()).relu_().view(64, 64, -1)
        return torch.bmm(weights.to(dtype), scores).squeeze(1).float().topk(2048).indices

    for dtype in (torch.bfloat16, torch.float32):
        tell(f"indexer {dtype}, 64 queries of {t}", 64 * 64 * t * 256, seconds(partial(scored, dtype)), "TFLOP/s")
    s = rand(512, t).float()
    tell(f"topk of {t}", 512 * t * 4, seconds(lambda: s.topk(2048)), "TB/s")


def sparse(t: int) -> None:
    """Absorbed attention of 256 queries on 2048 picked rows each, and their gather alone."""
    kv, picked = rand(t, 576), torch.randint(t, (256, 2048), device="cuda")
    tell(f"gather of {t}, 2 passes", 2 * picked.numel() * 1152, seconds(lambda: kv[picked]), "TB/s")

    def attend(q: torch.Tensor) -> torch.Tensor:
        found = kv[picked]
        return torch.bmm(torch.softmax(torch.bmm(q, found.mT), -1), found[..., :512])

    for heads in (64, 128):
        took = seconds(partial(attend, rand(256, heads, 576)))
        tell(f"sparse, {heads} heads, 256 queries of {t}", 256 * heads * 2048 * 2 * 1088, took, "TFLOP/s")


def main() -> None:
    """Measure every class."""
    print(torch.cuda.get_device_name(), torch.__version__)
    for m, k, n in ((16384, 7168, 2112), (16384, 1536, 12288), (16384, 8192, 7168), (16384, 7168, 18432)):
        tell(f"product {m}x{k}x{n}", 2 * m * k * n, seconds(partial(torch.mm, rand(m, k), rand(k, n))), "TFLOP/s")
    x = rand(16384, 7168)
    w = rand(7168)
    tell("rms norm, 2 passes", 2 * x.numel() * 2, seconds(lambda: F.rms_norm(x, (7168,), w)), "TB/s")
    for tokens, heads in ((4096, 64), (16384, 64), (65536, 16)):
        dense(tokens, heads)
    for tokens in (8192, 32768, 65536):
        indexer(tokens)
        sparse(tokens)


if __name__ == "__main__":
    main()
