"""DeepSeek-V3.2 as serving frameworks on Ascend have it: flat tokens of several requests, paged caches, npu ops.

Single-rank code that knows of no parallelism: ``Serving`` is what ``torch.compile`` gets. Sizes are small, or real.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import torch
import torch.fx as fx
from conftest import SharedRanks
from torch import Tensor, nn

from cpcompile.axes import Axis
from cpcompile.capture import Trace
from cpcompile.compiled import Compiled
from cpcompile.passes.lockstep import RankProgram, run_lockstep

npu = torch.ops.npu
NAMES = ("tokens", "positions", "slots", "table", "query_lengths", "key_lengths")


@dataclass(frozen=True)
class Sizes:
    """Of the model; the default is small, :data:`REAL` is V3.2's."""

    layers: int = 2
    vocab: int = 64
    hidden: int = 32
    heads: int = 4
    q_lora: int = 24
    latent: int = 16
    nope: int = 8
    rope: int = 4
    value: int = 8
    inner: int = 48
    index_heads: int = 3
    index_width: int = 8
    index_count: int = 12
    block: int = 4
    positions: int = 2048


REAL = Sizes(2, 129280, 7168, 128, 1536, 512, 128, 64, 128, 18432, 64, 128, 2048, 128, 163840)


@dataclass
class Batch:
    """One step's inputs: ``tokens [T]`` of several requests, one after another, and where their keys are.

    Args:
        positions: ``[T]`` int64, within each request, the cached prefix counted.
        slots: ``[T]`` int32, where each token's key goes in the flattened cache.
        table: ``[B, M]`` int32, each request's blocks.
        query_lengths: ``[B]`` int32, tokens of this and all earlier requests.
        key_lengths: ``[B]`` int32, cached and new tokens of each request.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    table: Tensor
    query_lengths: Tensor
    key_lengths: Tensor

    def __iter__(self):  # type: ignore[no-untyped-def]
        yield from (self.tokens, self.positions, self.slots, self.table, self.query_lengths, self.key_lengths)


def batch(lengths: Sequence[int], prefixes: Sequence[int], blocks: int, sizes: Sizes, seed: int = 0) -> Batch:
    """New tokens of requests that have ``prefixes`` cached; blocks in an order that ``blocks`` alone decides."""
    order = torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks)).tolist()
    width = blocks // len(lengths)
    table = torch.tensor([order[width * r : width * (r + 1)] for r in range(len(lengths))], dtype=torch.int32)
    positions, slots = [], []
    for request, (new, cached) in enumerate(zip(lengths, prefixes, strict=True)):
        here = torch.arange(cached, cached + new)
        positions.append(here)
        slots.append(table[request, here // sizes.block] * sizes.block + here % sizes.block)
    ends = torch.tensor(lengths).cumsum(0).int()
    tokens = torch.randint(0, sizes.vocab, (int(ends[-1]),), generator=torch.Generator().manual_seed(seed))
    keys = torch.tensor([new + cached for new, cached in zip(lengths, prefixes, strict=True)], dtype=torch.int32)
    return Batch(tokens, torch.cat(positions), torch.cat(slots).int(), table, ends, keys)


class Layer(nn.Module):
    """MLA with absorbed up-projections under an indexer, and a dense MLP."""

    caches = ("latent", "rope", "index_width")  # widths of what a token has in each cache
    sparse_mode = 3

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        s = self.sizes = sizes

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, dtype=dtype) * shape[-1] ** -0.5, requires_grad=False)

        def gamma(size: int) -> nn.Parameter:
            return nn.Parameter(1 + 0.1 * torch.randn(size, dtype=dtype), requires_grad=False)

        self.qkv_a = weight(s.q_lora + s.latent + s.rope, s.hidden)
        self.q_norm, self.kv_norm = gamma(s.q_lora), gamma(s.latent)
        self.q_b = weight(s.heads * (s.nope + s.rope), s.q_lora)
        self.k_up, self.v_up = weight(s.heads, s.nope, s.latent), weight(s.heads, s.latent, s.value)
        self.o = weight(s.hidden, s.heads * s.value)
        self.index_q, self.index_k = weight(s.index_heads * s.index_width, s.q_lora), weight(s.index_width, s.hidden)
        self.index_w = weight(s.index_heads, s.hidden)
        self.index_norm = nn.LayerNorm(s.index_width, dtype=dtype).requires_grad_(False)
        self.up, self.down = weight(2 * s.inner, s.hidden), weight(s.hidden, s.inner)
        self.attention_norm, self.mlp_norm = gamma(s.hidden), gamma(s.hidden)

    def attention(
        self, h: Tensor, rope: tuple[Tensor, Tensor], given: Sequence[Tensor], caches: Sequence[Tensor]
    ) -> Tensor:
        s = self.sizes
        query, q_lora = self.project(h, rope, given[0], caches)
        out = self.attend(query, caches, given, h, q_lora, rope)
        out = torch.bmm(out.transpose(0, 1), self.v_up).transpose(0, 1)
        return out.reshape(-1, s.heads * s.value) @ self.o.T

    def project(
        self, h: Tensor, rope: tuple[Tensor, Tensor], slots: Tensor, caches: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Queries ``[T, H, L]`` and ``[T, H, R]`` and their normed down-projection ``[T, Q]``; writes the keys."""
        s = self.sizes
        q_lora, kv = (h @ self.qkv_a.T).split([s.q_lora, s.latent + s.rope], -1)
        q_lora = npu.npu_rms_norm(q_lora, self.q_norm)[0]
        nope, q_rope = (q_lora @ self.q_b.T).view(-1, s.heads, s.nope + s.rope).split([s.nope, s.rope], -1)
        query = torch.bmm(nope.transpose(0, 1), self.k_up).transpose(0, 1)  # [T, H, L]
        q_rope = npu.npu_interleave_rope(q_rope.unsqueeze(2), *rope).squeeze(2)
        self.write_keys(kv, rope, slots, caches)
        return (query, q_rope), q_lora

    def write_keys(self, kv: Tensor, rope: tuple[Tensor, Tensor], slots: Tensor, caches: Sequence[Tensor]) -> None:
        """``[T, L + R]``, normed and rotated, to the caches."""
        latent, k_rope = kv.split([self.sizes.latent, self.sizes.rope], -1)
        self.write(caches[0], slots, npu.npu_rms_norm(latent, self.kv_norm)[0])
        self.write(caches[1], slots, npu.npu_interleave_rope(k_rope[:, None, None], *rope)[:, 0, 0])

    def attend(
        self, query: tuple[Tensor, Tensor], caches: Sequence[Tensor], given: Sequence[Tensor], h: Tensor,
        q_lora: Tensor, rope: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        """``[T, H, L]``."""
        s, (slots, table, ends, lengths) = self.sizes, given
        latent_cache, rope_cache, index_cache = caches
        metadata = {"block_table": table, "actual_seq_lengths_query": ends, "layout_query": "TND"}
        metadata["sparse_mode"] = self.sparse_mode
        chosen = self.choose(h, q_lora, rope, slots, index_cache, lengths, metadata)
        return npu.npu_sparse_flash_attention(
            query[0], latent_cache, latent_cache, chosen, (s.nope + s.rope) ** -0.5, query_rope=query[1],
            key_rope=rope_cache, actual_seq_lengths_kv=lengths, layout_kv="PA_BSND", attention_mode=2, **metadata,
        )[0]  # fmt: skip

    def choose(
        self, h: Tensor, q_lora: Tensor, rope: tuple[Tensor, Tensor], slots: Tensor, cache: Tensor, lengths: Tensor,
        metadata: dict[str, object],
    ) -> Tensor:  # fmt: skip
        """The indexer: ``[T, 1, index_count]``."""
        s = self.sizes
        query = self.rotated((q_lora @ self.index_q.T).view(-1, s.index_heads, s.index_width), rope)
        key = self.rotated(self.index_norm(h @ self.index_k.T)[:, None], rope)
        self.write(cache, slots, key[:, 0])
        weights = (h @ self.index_w.T) * (s.index_heads * s.index_width) ** -0.5
        return npu.npu_lightning_indexer(
            query, cache, weights, actual_seq_lengths_key=lengths, layout_key="PA_BSND", sparse_count=s.index_count,
            **metadata,
        )[0]  # fmt: skip

    def rotated(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """``[T, H, D]`` with its first part rotated."""
        pe, rest = x.split([self.sizes.rope, self.sizes.index_width - self.sizes.rope], -1)
        return torch.cat([npu.npu_interleave_rope(pe.unsqueeze(2), *rope).squeeze(2), rest], -1)

    def write(self, cache: Tensor, slots: Tensor, values: Tensor) -> None:
        """Each token's value to its slot of ``[blocks, size, 1, D]``."""
        npu.npu_scatter_nd_update_(cache.view(-1, cache.shape[-1]), slots.unsqueeze(1), values)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        rope: tuple[Tensor, Tensor],
        given: Sequence[Tensor],
        caches: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor]:
        h, _, residual = npu.npu_add_rms_norm(x, residual, self.attention_norm)
        h, _, residual = npu.npu_add_rms_norm(self.attention(h, rope, given, caches), residual, self.mlp_norm)
        gate, up = (h @ self.up.T).chunk(2, -1)
        return (nn.functional.silu(gate) * up) @ self.down.T, residual


class PutLayer(Layer):
    """The same, writing its caches by index."""

    def write(self, cache: Tensor, slots: Tensor, values: Tensor) -> None:
        cache.view(-1, cache.shape[-1])[slots.long()] = values


class BothWaysLayer(Layer):
    """Without a causal mask, which no pass of this project takes."""

    sparse_mode = 0


class DenseLayer(Layer):
    """V3's: MLA over all keys, as torchair's graphs call it, with lengths as tensors and caches with heads first."""

    caches = ("latent", "rope")

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(sizes, dtype)
        self.register_buffer("mask", torch.ones(2048, 2048, dtype=torch.bool).triu(1), persistent=False)

    def attend(
        self, query: tuple[Tensor, Tensor], caches: Sequence[Tensor], given: Sequence[Tensor], h: Tensor,
        q_lora: Tensor, rope: tuple[Tensor, Tensor],
    ) -> Tensor:  # fmt: skip
        s, (_, table, ends, lengths) = self.sizes, given
        latents, ropes = (cache.transpose(1, 2) for cache in caches)
        return torch.ops.air.npu_fused_infer_attention_score(
            query[0], latents, latents, query_rope=query[1], key_rope=ropes, atten_mask=self.mask,
            actual_seq_lengths=ends.long(), actual_seq_lengths_kv=lengths.long(), block_table=table,
            num_heads=s.heads, num_key_value_heads=1, scale=(s.nope + s.rope) ** -0.5, input_layout="TND",
            block_size=s.block, sparse_mode=3,
        )[0]  # fmt: skip


class Serving(nn.Module):
    """``(tokens, positions, slots, table, query_lengths, key_lengths, *caches) -> logits [B, V]``; writes the caches.

    The logits are of each request's last token, as a sampler wants them.
    """

    def __init__(
        self, sizes: Sizes = Sizes(), dtype: torch.dtype = torch.float64, layer: type[Layer] = Layer, seed: int = 0
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sizes, self.dtype, self.layer = sizes, dtype, layer
        self.embed = nn.Parameter(torch.randn(sizes.vocab, sizes.hidden, dtype=dtype), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(sizes.hidden, dtype=dtype), requires_grad=False)
        self.head = nn.Parameter(torch.randn(sizes.vocab, sizes.hidden, dtype=dtype), requires_grad=False)
        self.layers = nn.ModuleList(layer(sizes, dtype) for _ in range(sizes.layers))
        angles = torch.arange(sizes.positions)[:, None] * 100.0 ** (-torch.arange(0, sizes.rope, 2) / sizes.rope)
        self.register_buffer("cos", angles.cos().repeat(1, 2).to(dtype))
        self.register_buffer("sin", angles.sin().repeat(1, 2).to(dtype))

    def caches(self, blocks: int) -> list[Tensor]:
        """Per layer latents, rotated keys and the indexer's keys; garbage, which no row may read."""
        s = self.sizes
        widths = [getattr(s, name) for name in self.layer.caches] * s.layers
        return [torch.full((blocks, s.block, 1, width), 1e3, dtype=self.dtype) for width in widths]

    def forward(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, table: Tensor, query_lengths: Tensor,
        key_lengths: Tensor, *caches: Tensor,
    ) -> Tensor:  # fmt: skip
        rope = (self.cos[positions][:, None, None], self.sin[positions][:, None, None])
        given = (slots, table, query_lengths, key_lengths)
        x = nn.functional.embedding(tokens, self.embed)
        residual = torch.zeros_like(x)
        for number, layer in enumerate(self.layers):
            each = len(self.layer.caches)
            x, residual = layer(x, residual, rope, given, caches[each * number :][:each])
        h = npu.npu_add_rms_norm(x, residual, self.norm)[0]
        return h.index_select(0, query_lengths - 1) @ self.head.T


def feed(trace: Trace, given: Batch, caches: Sequence[Tensor]) -> list[Any]:
    """Inputs of the traced graph for one step: parameters as traced, and sizes of what is given."""
    values = dict(zip([f"L['{name}']" for name in NAMES], given, strict=True))
    values |= {f"L['caches'][{number}]": cache for number, cache in enumerate(caches)}
    sizes: dict[Any, int] = {}
    nodes = trace.gm.graph.find_nodes(op="placeholder")
    for node, known in zip(nodes, trace.inputs, strict=True):
        if known.kind == "input":
            pairs = zip(node.meta["val"].shape, values[known.name].shape, strict=True)
            sizes |= {said.node.expr: real for said, real in pairs if isinstance(said, torch.SymInt)}
    found: list[Any] = []
    for node, known in zip(nodes, trace.inputs, strict=True):
        if isinstance(node.meta["val"], torch.SymInt):
            found.append(sizes[node.meta["val"].node.expr])
        else:
            found.append(values[known.name] if known.kind == "input" else known.value)
    return found


def mutated(trace: Trace) -> list[int]:
    """Numbers of the caches in the order in which the traced graph returns them, ahead of the logits."""
    names = [known.name for known in trace.inputs if known.kind == "input" and "caches" in known.name]
    return [int(name.removeprefix("L['caches'][").rstrip("]")) for name in names]


@dataclass
class Ranks:
    """Simulated ranks of one axis, all with one trace of a serving model, and what they compiled."""

    trace: Trace
    axes: list[Axis]
    compiled: list[Compiled]

    @property
    def rewritten(self) -> list[list[fx.GraphModule]]:
        """Every rewritten variant, as one graph per rank."""
        numbers = [number for number, variant in enumerate(self.compiled[0].variants) if variant.steps]
        return [[c.variants[number].gm for c in self.compiled] for number in numbers]

    def step(
        self, graphs: Sequence[fx.GraphModule], given: Batch, caches: Sequence[Sequence[Tensor]]
    ) -> list[tuple[Tensor, list[Tensor]]]:
        """Each rank's logits and caches after one step from each rank's caches."""
        programs = [
            RankProgram(gm, feed(self.trace, given, own), {axis.group_name: axis.ranks})
            for gm, axis, own in zip(graphs, self.axes, caches, strict=True)
        ]
        results = []
        order = mutated(self.trace)
        for *written, logits in run_lockstep(programs):  # type: ignore[misc]
            results.append((logits, [written[order.index(k)] for k in range(len(order))]))
        return results


def compile_ranks(size: int, trace: Trace, **options: Any) -> Ranks:
    """What every rank of an axis ``cp`` of ``size`` ranks compiles of the traced model, which is whole on all."""
    axes = [Axis("cp", "cp group", size, rank, tuple(range(size))) for rank in range(size)]
    given = {"strategy": "cp", "profile": "ascend-a3", "replicated": ["*caches*"], **options}
    compiled = SharedRanks([trace] * size, axes).compile(**given)
    return Ranks(trace, axes, compiled)
