"""Our pass on pieces of a model, called as inductor does, on two gloo ranks: numbers, boundaries, what is left."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.fx as fx
import torch.multiprocessing as mp
from placed import Layer
from torch import Tensor
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from versions import needs_torch

from cpcompile.capture import capture
from cpcompile.pipeline import copy_graph
from cpcompile.serving.post_grad import Piece, PostGradPass

WORLD, TOLERANCE = 2, 1e-5
SCATTER = "_c10d_functional.reduce_scatter_tensor"


def ids_of(tokens: int) -> Tensor:
    return torch.randint(0, 32, (tokens,), generator=torch.Generator().manual_seed(tokens))


class Case:
    """A layer's graph on this rank, as it came and as the pass leaves it."""

    def __init__(self, layer: Any, group: Any, known: bool, **options: Any) -> None:
        trace = capture(layer, ids_of(6))
        self.names = [given.name for given in trace.inputs]
        self.values = [given.value for given in trace.inputs]
        self.plain = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
        self.made = trace.gm
        same = [(known and (name in ("table", "weight") or "ids" in name)) or isinstance(v, torch.SymInt)
                for name, v in zip(self.names, self.values, strict=True)]  # fmt: skip
        self.hook = PostGradPass({"axes": {"tp": group}, "strategy": "tp", **options})
        self.hook.piece = Piece(self.names, same)
        vals = [n.meta["val"] for n in trace.gm.graph.find_nodes(op="placeholder")]
        mode = next(v.fake_mode for v in vals if isinstance(v, FakeTensor))
        with V.set_fake_mode(mode):
            self.hook(trace.gm.graph)
        trace.gm.recompile()

    def check(self) -> None:
        """Any number of tokens, also such that the ranks do not divide."""
        for tokens in (2, 5, 8):
            args = [
                tokens if isinstance(value, (int, torch.SymInt)) else ids_of(tokens) if "ids" in name else value
                for name, value in zip(self.names, self.values, strict=True)
            ]
            with torch.no_grad():
                for found, expected in zip(self.made(*args), self.plain(*args), strict=True):
                    assert found.shape == expected.shape
                    assert (found - expected).norm() <= TOLERANCE * expected.norm()

    @property
    def norm_rows(self) -> str:
        """How many rows the norm has, as an expression."""
        (node,) = self.made.graph.find_nodes(op="call_function", target=torch.ops.aten.rsqrt.default)
        return str(node.meta["val"].shape[0])

    @property
    def found(self) -> tuple[bool, ...]:
        assert self.hook.piece is not None
        return self.hook.piece.found


class Odd(Layer):
    """On rank 1 there is one step more in a summand, or behind the sum."""

    inside = True

    def forward(self, ids: Tensor) -> Tensor:
        x, odd = torch.nn.functional.embedding(ids, self.table), dist.get_rank() == 1
        part = x @ self.first
        h = x + self.sum(part.neg().neg() if odd and self.inside else part)
        normed = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        out = h + self.sum(torch.relu(normed @ self.up) @ self.down)
        return out.neg().neg() if odd and not self.inside else out


def rewritten(group: Any, rank: int) -> None:
    case = Case(Layer(group, rank, WORLD), group, known=True)
    assert SCATTER in case.made.code and "all_reduce" not in case.made.code
    assert case.found == (True,) and "//" in case.norm_rows
    case.check()
    vals = [n.meta["val"] for n in case.made.graph.nodes if isinstance(n.meta.get("val"), Tensor)]
    assert len(set(map(id, vals))) == len(vals)  # vLLM tells nodes apart by them


def unknown(group: Any, rank: int) -> None:
    """Nothing is said of a sum with what ranks may hold differently, and norms of it are not split."""
    case = Case(Layer(group, rank, WORLD), group, known=False)
    assert case.found == (False,) and "//" not in case.norm_rows
    case.check()


def steps_differ(group: Any, rank: int) -> None:
    layer = Odd(group, rank, WORLD)
    case = Case(layer, group, known=True)
    assert SCATTER in case.made.code, case.made.code
    case.check()
    layer.inside = False
    case = Case(layer, group, known=True)
    assert case.made.code == case.plain.code and case.found == ()


def keys(group: Any, rank: int) -> None:
    hook = PostGradPass({"axes": {"tp": group}})
    first = hook.uuid()
    assert hook.uuid() == first
    seen = {first, PostGradPass({"axes": {"tp": group}}).uuid()}  # another object may have met other ranks
    for name, value in (("strategy", "tp"), ("layout", "zigzag")):
        other = PostGradPass({"axes": {"tp": group}, name: value})
        other.start = hook.start
        seen.add(other.uuid())
    for same in ([True], [False]):
        hook.piece = Piece(["x"], same)
        seen.add(hook.uuid())
    assert len(seen) == 6


def on_rank(rank: int, store: str, work: Callable[..., None]) -> None:
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(WORLD)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        work(init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",)).get_group(), rank)
    finally:
        dist.destroy_process_group()


def everything(group: Any, rank: int) -> None:
    for work in (rewritten, unknown, steps_differ, keys):
        work(group, rank)


@pytest.mark.ranks
@needs_torch("2.13", "pieces are vLLM's, which needs 2.13")
def test_pieces_on_two_ranks(tmp_path: Any) -> None:
    mp.spawn(on_rank, (str(tmp_path / "store"), everything), nprocs=WORLD)
