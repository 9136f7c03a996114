"""Traces of real models, shared by the whole session: tracing is what these tests spend their time on."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # there is no GPU; Triton reads it when it is imported, which torch may do
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # else `import torch` fails where torch_npu is and CANN is not

from cpcompile.lowering.ascend.installation import keep_transformers_off

keep_transformers_off()

import models
import pytest
import torch
import torch.fx as fx
from ascend_process import AscendProcess, missing
from simulate import Ranks, fake_rank, in_threads, none_failed

from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.errors import AscendError
from cpcompile.exchange import LocalExchange
from cpcompile.options import Options
from cpcompile.passes.describe import module_of
from cpcompile.pipeline import compile_graph, copy_graph

aten = torch.ops.aten


@dataclass(frozen=True)
class TurnTaking:
    """An exchange of threads that work one at a time: fake tensors that ranks share are not for several threads."""

    inner: LocalExchange
    turn: threading.Lock

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def rank(self) -> int:
        return self.inner.rank

    def all_gather(self, obj: object, what: str) -> list[object]:
        self.turn.release()
        try:
            return self.inner.all_gather(obj, what)
        finally:
            self.turn.acquire()


class SharedRanks(Ranks):
    """Ranks whose traces share fake tensors: their compilations take turns."""

    def outcomes(self, options: Sequence[dict[str, Any]]) -> list[Compiled | BaseException]:
        """What compiling with ``options[rank]`` gives or raises on each rank; the ranks really exchange."""
        ring, turn = LocalExchange.ring(self.size), threading.Lock()

        def work(rank: int) -> Compiled:
            trace, exchange = self.traces[rank], TurnTaking(ring[rank], turn)
            gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
            with turn:
                parsed = Options.parse(options[rank])
                return compile_graph(gm, trace.inputs, parsed, lambda _: exchange, [self.axes[rank]])

        return in_threads(work, self.size)

    def compile(self, **options: Any) -> list[Compiled]:
        return none_failed(self.outcomes([options] * self.size))


@dataclass
class Case:
    """One model: whole, and as every rank's trace."""

    whole: Any
    ranks: SharedRanks

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """What the unsharded model says."""
        return self.whole(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def make(kind: str, dtype: torch.dtype = torch.float32, layers: int = 2, **changes: Any) -> Any:
    """The model of a case. In bfloat16, routing and the indexer's choice are fixed: see ``_fix_choices``."""
    if dtype != torch.float32:
        changes["moe_intermediate_size"] = 192  # torch's grouped product wants rows of whole 16 bytes, on 8 ranks too
        if kind == "v32":
            changes["index_topk"] = 64
    model = models.build(models.tiny_config(kind, layers, **changes), dtype)
    return model if dtype == torch.float32 else _fix_choices(model)


def _fix_choices(model: Any) -> Any:
    """Let the router's bias alone choose the experts, by margins of 4 over scores in (0, 1).

    A choice between almost equal scores turns on one rounding and changes a token's output wholly, in the compiled and
    the uncompiled model alike: the two could not be compared. float32 tests choose freely.
    """
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.copy_(4.0 * torch.randperm(buffer.numel(), generator=torch.Generator().manual_seed(1)))
    return model


def as_rank(trace: Trace, rank: int, size: int, make_sharded: Callable[[Any], Any]) -> tuple[Trace, Any]:
    """Rank 0's trace as rank ``rank`` would have made it, and that rank's axis: its own shards and vocabulary rows.

    Ranks' graphs differ in the bounds of their rows of the embedding alone; a test holds this against real traces.
    Where experts are split by their numbers, routers compare with the rank's.
    """
    gm = fx.GraphModule(trace.gm, copy_graph(trace.gm.graph))
    with fake_rank(rank, size) as mesh:
        model, axis = make_sharded(mesh), axis_of("tp", mesh)
    state = dict([*model.named_parameters(), *model.named_buffers()])
    rows = models.TINY["vocab_size"] // size
    for node in gm.graph.nodes:
        bounds = (aten.lt.Scalar, aten.ge.Scalar, aten.sub.Tensor)
        if node.target in bounds and module_of(node) == "model.embed_tokens" and isinstance(node.args[1], int):
            node.args = (node.args[0], node.args[1] + rank * rows)
        if node.target is aten.ne.Scalar and module_of(node).endswith(".mlp.gate"):
            node.args = (node.args[0], rank)
    gm.recompile()
    values = [replace(i, value=state[i.name]) if i.kind in ("parameter", "buffer") else i for i in trace.inputs]
    return Trace(gm, values), axis


@functools.cache
def case(kind: str, size: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Case:
    """``kind`` ("v3" or "v32") on ``size`` simulated ranks, its batch dim symbolic where it is larger than 1."""

    def make_sharded(mesh: Any) -> Any:
        return models.shard(make(kind, dtype), mesh)

    with fake_rank(0, size) as mesh:
        first = capture(make_sharded(mesh), input_ids=torch.zeros((batch, 10), dtype=torch.long), use_cache=False)
    every = [as_rank(first, rank, size, make_sharded) for rank in range(size)]
    return Case(make(kind, dtype), SharedRanks([trace for trace, _ in every], [axis for _, axis in every]))


@pytest.fixture(scope="session")
def ascend() -> Iterator[AscendProcess]:
    """A process with torch_npu, without an NPU."""
    if why := missing():
        pytest.fail(why, pytrace=False)
    try:
        process = AscendProcess()
    except AscendError as error:
        pytest.fail(str(error), pytrace=False)
    yield process
    process.pool.shutdown()


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
    logging.getLogger("torch.__trace").propagate = False  # thousands of lines under every failure
