"""Small graphs with one module each, written by hand: biases, fused weights, quantised products; shared and run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import npu_ops  # noqa: F401  defines the ops
import torch
import torch.fx as fx
from shared_modules import GROUP, group_of
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.module_cuts import SharedModule
from cpcompile.passes.module_parallel import SharedGraph, share_modules
from cpcompile.passes.weight_cuts import Cut, cut_tensor

aten = torch.ops.aten
ROWS, WIDTH, INNER, VOCAB = 25, 36, 48, 96


def rows(*shape: int) -> Tensor:
    return torch.randn(ROWS, *shape)


def int8(*shape: int) -> Tensor:
    return torch.randint(-9, 9, shape, dtype=torch.int8)


def gated(hidden: Tensor, down: Tensor) -> Tensor:
    gate, up = aten.split(hidden, INNER, -1)
    return aten.mm(aten.mul(aten.silu(gate), up), aten.t(down))


def sliced(x: Tensor, w: Tensor, down: Tensor) -> Tensor:
    hidden = aten.mm(x, aten.t(w))
    gate, up = aten.slice(hidden, 1, 0, INNER), aten.slice(hidden, 1, INNER, 2 * INNER)
    return aten.mm(aten.mul(aten.silu(gate), up), aten.t(down))


def scaled(x: Tensor, by_row: Tensor, w: Tensor, by_column: Tensor) -> Tensor:
    product = aten._to_copy(aten._int_mm(x, aten.t(w)), dtype=torch.float32)
    return aten.mul(aten.mul(product, aten.unsqueeze(by_row, 1)), by_column)


def fp8(x: Tensor, by_row: Tensor, w: Tensor, by_column: Tensor) -> Tensor:
    return aten._scaled_mm(x, aten.t(w), by_row, by_column, None, None, torch.bfloat16)


def dequantised(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return aten.mm(x, aten.t(aten.mul(aten._to_copy(w, dtype=torch.float32), scale)))


@dataclass(frozen=True)
class Hand:
    """A graph, its inputs (those of ``ROWS`` rows have as many as a rank has tokens), its module's role and products.

    ``uncut`` are inputs that stay whole and that all ranks hold equal.
    """

    f: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    role: str
    ops: tuple[Any, ...] = (aten.mm.default,)
    uncut: tuple[str, ...] = ()


def quant_matmul(x: Tensor, w: Tensor, by_column: Tensor, by_row: Tensor) -> Tensor:
    return torch.ops.npu.npu_quant_matmul(x, aten.t(w), by_column, pertoken_scale=by_row, output_dtype=torch.float32)


def _bias() -> tuple[Tensor, ...]:
    return rows(WIDTH), torch.randn(INNER, WIDTH), torch.randn(INNER)


def _fused() -> tuple[Tensor, ...]:
    return rows(WIDTH), torch.randn(2 * INNER, WIDTH), torch.randn(WIDTH, INNER)


def _scaled() -> tuple[Tensor, ...]:
    return int8(ROWS, INNER), torch.rand(ROWS), int8(INNER, INNER), torch.rand(INNER)


def _fp8() -> tuple[Tensor, ...]:
    x, w = torch.randn(ROWS, INNER), torch.randn(INNER, INNER)
    kind = torch.float8_e4m3fn
    return x.to(kind), torch.rand(ROWS, 1), w.to(kind), torch.rand(1, INNER)


def _quant() -> tuple[Tensor, ...]:
    return int8(ROWS, INNER), int8(INNER, INNER), torch.rand(INNER), torch.rand(ROWS)


npu = torch.ops.npu
QUANT = (npu.npu_quant_matmul.default,)
HANDS = {
    "bias, rows cut": Hand(lambda x, w, b: aten.addmm(b, x, aten.t(w)), _bias, "o_proj", (aten.addmm.default,)),
    "bias, columns cut": Hand(lambda x, w, b: aten.addmm(b, x, aten.t(w)), _bias, "lm_head", (aten.addmm.default,)),
    "table": Hand(
        lambda ids, w: aten.embedding(w, ids),
        lambda: (torch.randint(0, VOCAB, (ROWS,)), torch.randn(VOCAB, WIDTH)),
        "embedding",
        (aten.embedding.default,),
    ),
    "fused": Hand(lambda x, w, down: gated(aten.mm(x, aten.t(w)), down), _fused, "mlp"),
    "fused, sliced": Hand(sliced, _fused, "mlp"),
    "fused, biased": Hand(
        lambda x, w, b, down: gated(aten.addmm(b, x, aten.t(w)), down),
        lambda: (_fused()[0], _fused()[1], torch.randn(2 * INNER), _fused()[2]),
        "mlp",
        (aten.addmm.default, aten.mm.default),
    ),
    "int8, rows cut": Hand(scaled, _scaled, "o_proj", (aten._int_mm.default,)),
    "int8, columns cut": Hand(scaled, _scaled, "lm_head", (aten._int_mm.default,)),
    "fp8, rows cut": Hand(fp8, _fp8, "o_proj", (aten._scaled_mm.default,), ("by_column_1",)),
    "fp8, columns cut": Hand(fp8, _fp8, "lm_head", (aten._scaled_mm.default,)),
    "npu, rows cut": Hand(quant_matmul, _quant, "o_proj", QUANT, ("by_column_1",)),
    "npu, columns cut": Hand(quant_matmul, _quant, "lm_head", QUANT),
    "dequantised": Hand(dequantised, lambda: (rows(INNER), int8(INNER, INNER), torch.rand(INNER, 1)), "lm_head"),
}


TWO = Hand(
    lambda x, y, w, u: (aten.mm(x, aten.t(w)), aten.mm(y, aten.t(u))),
    lambda: (rows(WIDTH), torch.randn(ROWS + 1, WIDTH), torch.randn(INNER, WIDTH), torch.randn(INNER, WIDTH)),
    "",
)  # products of different numbers of rows


def inputs_of(name: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return HANDS.get(name, TWO).inputs()


@functools.cache
def traced(name: str) -> fx.GraphModule:
    """The graph, with symbolic R in dim 0 of inputs that have rows."""
    mode, fakes = FakeTensorMode(shape_env=ShapeEnv()), []
    for number, tensor in enumerate(inputs_of(name)):
        kinds = [DimDynamic.STATIC] * tensor.dim()
        if tensor.shape[0] in (ROWS, ROWS + 1):
            kinds[0] = DimDynamic.DUCK  # as many rows, the same symbol
        context = StatelessSymbolicContext(dynamic_sizes=kinds)
        fakes.append(mode.from_tensor(tensor, source=ConstantSource(f"x{number}"), symbolic_context=context))
    return make_fx(HANDS.get(name, TWO).f, tracing_mode="symbolic")(*fakes)


def shared_hand(
    name: str, size: int, rank: int, group_tokens: str | int = "exchange", unequal: bool = True, same: bool = False
) -> SharedGraph:
    gm, hand = traced(name), HANDS[name]
    nodes = tuple(n.name for n in gm.graph.nodes if n.target in hand.ops)
    module = SharedModule(hand.role, "module", nodes, group_of(size, rank), unequal)
    return share_modules(gm, [module], group_tokens, same=[n.name for n in gm.graph.nodes] if same else ())


def rank_inputs(name: str, count: int, rank: int, same: bool) -> list[Tensor]:
    """Rank ``rank``'s ``count`` rows, and the whole weights."""
    first = 0 if same else rank * 3
    return [t[first : first + count] if t.shape[0] == ROWS else t for t in inputs_of(name)]


def run_hand(
    name: str,
    counts: Sequence[int],
    group_tokens: str | int = "exchange",
    unequal: bool = True,
    same: bool = False,
    change: Callable[[int, Any], Any] = lambda rank, gm: gm,
    recut: Callable[[Cut], Cut] = lambda cut: cut,
) -> bool:
    """Whether every rank gets what the original gives for its rows. ``change`` seeds faults, ``recut`` cuts otherwise.

    Summands are rounded to the product's dtype before they are added, which in bfloat16 shows.
    """
    programs, expected = [], []
    for rank, count in enumerate(counts):
        shared = shared_hand(name, len(counts), rank, group_tokens, unequal, same)
        values = rank_inputs(name, count, rank, same)
        expected.append(traced(name)(*values))
        names = [n.name for n in shared.gm.graph.find_nodes(op="placeholder")]
        cuts = {n: recut(cut) for n, cut in shared.cuts.items()}
        parts = [cut_tensor(v, cuts[n], rank) if n in cuts else v for n, v in zip(names, values, strict=True)]
        programs.append(RankProgram(change(rank, shared.gm), parts, {GROUP: group_of(len(counts), rank).ranks}))
    found: list[Any] = run_lockstep(programs)
    return all(_close(f, e) for f, e in zip(found, expected, strict=True))


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    return error.item() <= 4 * torch.finfo(found.dtype).eps
