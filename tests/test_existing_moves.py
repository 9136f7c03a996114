"""Gathers and own rows that a model writes itself: removed, moved or left, and the answers stay."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from conftest import SharedRanks
from simulate import fake_rank
from test_context_parallel import close, ids_of
from torch import nn

from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled, count_at, token_reader
from cpcompile.passes.collectives import group_name_of, is_collective, op_name
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.token_layout import size_expr
from cpcompile.passes.verify_static import prove
from cpcompile.pipeline import copy_graph

HIDDEN = models.TINY["hidden_size"]
aten, c10d = torch.ops.aten, torch.ops._c10d_functional


def traced_ranks(size: int, make: Any, *args: torch.Tensor) -> SharedRanks:
    """Every rank's own trace: each takes rows of its own."""
    traces, axes = [], []
    for rank in range(size):
        with fake_rank(rank, size) as mesh:
            trace = capture(make(mesh["tp"]), *args)
            axes.append(dataclasses.replace(axis_of("tp", mesh), name="cp", group_name="cp group"))
        for node in trace.gm.graph.nodes:
            if is_collective(node):
                group = group_name_of(node)
                node.args = tuple("cp group" if i and a == group else a for i, a in enumerate(node.args))
        traces.append(trace)
    return SharedRanks(traces, axes)


def run(ranks: SharedRanks, graphs: Sequence[fx.GraphModule], given: Sequence[torch.Tensor]) -> list[Any]:
    """Every rank's graph on its own input."""
    programs = []
    for gm, trace, axis, value in zip(graphs, ranks.traces, ranks.axes, given, strict=True):
        programs.append(RankProgram(gm, feed(trace, value), {axis.group_name: axis.ranks}))
    return run_lockstep(programs)


def feed(trace: Trace, given: torch.Tensor) -> list[Any]:
    nodes = trace.gm.graph.find_nodes(op="placeholder")
    sizes: dict[Any, int] = {}
    for node, known in zip(nodes, trace.inputs, strict=True):
        if known.kind == "input" and isinstance(node.meta["val"], torch.Tensor):
            for said, real in zip(node.meta["val"].shape, given.shape, strict=True):
                sizes[size_expr(said)] = real
    values: list[Any] = []
    for node, known in zip(nodes, trace.inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            values.append(sizes[value.node.expr])
        elif known.kind == "input" and isinstance(value, torch.Tensor):
            values.append(given)
        else:
            values.append(known.value.detach() if isinstance(known.value, torch.Tensor) else None)
    return values


def widths(gm: fx.GraphModule) -> list[tuple[str, Any]]:
    """What is communicated, by kind and width of a row."""
    nodes = [n for n in gm.graph.nodes if is_collective(n)]
    return [(op_name(n.target).split("::")[1], n.meta["val"].shape[-1]) for n in nodes]


def rewritten(compiled: Sequence[Compiled]) -> list[fx.GraphModule]:
    for one in compiled:
        assert not one.refused and one.proofs and all(p["holds"] for p in one.proofs), (one.refused, one.proofs)
        assert one.variants[-1].steps
    return [one.variants[-1].gm for one in compiled]


# ---- pipeline stages -----------------------------------------------------------------------------------------------


@functools.cache
def v3() -> Any:
    return models.build(models.tiny_config("v3", 4, first_k_dense_replace=4))


class Stage(nn.Module):
    """Two of four layers. The first stage takes ids and ends with own rows; the second starts with a gather of them."""

    def __init__(self, first: bool, mesh: Any, size: int | None = None) -> None:
        super().__init__()
        model = v3().model
        self.first, self.group, self.n, self.rank = first, mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self.layers = nn.ModuleList(model.layers[:2] if first else model.layers[2:])
        self.embed, self.rotary = model.embed_tokens, model.rotary_emb
        self.norm, self.head = model.norm, v3().lm_head

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(given.long()) if self.first else funcol.all_gather_tensor(given, 0, self.group)[None]
        tokens = hidden.shape[1]
        positions = torch.arange(tokens)[None]
        mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
        rotary = self.rotary(hidden, positions)
        for layer in self.layers:
            out = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            hidden = out[0] if isinstance(out, tuple) else out
        if not self.first:
            return self.head(self.norm(hidden))
        local = tokens // self.n
        return hidden[0, local * self.rank : local * (self.rank + 1)]


def rows_of(size: int, tokens: int) -> torch.Tensor:
    value = torch.zeros(tokens // size, HIDDEN)
    torch._dynamo.mark_dynamic(value, 0)
    return value


@pytest.mark.parametrize("size", [2, 4])
def test_stages_hand_over_rows(size: int) -> None:
    tokens, ids = 4 * size, ids_of(1, 4 * size).double()  # integers would be of any number: 4n tokens divide
    first = traced_ranks(size, lambda mesh: Stage(True, mesh), ids)
    second = traced_ranks(size, lambda mesh: Stage(False, mesh), rows_of(size, tokens))
    compiled = [
        r.compile(strategy="cp", profile="ascend-a3", replicated=declared)
        for r, declared in ((first, ["*given*"]), (second, []))
    ]
    graphs = [rewritten(c) for c in compiled]
    keys = [("all_gather_into_tensor", 24)] * 2
    assert widths(graphs[0][0]) == keys
    # Of the second stage's hidden rows, before or after the head, the output alone is gathered.
    assert widths(graphs[1][0])[:2] == keys and len(widths(graphs[1][0])) == 3
    (row,) = [c for c in compiled[1][0].report(tokens).collectives if c.elements_before]
    assert (row.decision, row.elements_after) == ("remove", 0)
    with torch.no_grad():
        expected = v3()(input_ids=ids.long(), use_cache=False).logits
    handed = [out for (out,) in run(first, graphs[0], [ids] * size)]
    for rank, (logits,) in enumerate(run(second, graphs[1], handed)):
        close(logits, expected, rank)


# ---- experts by all-to-all -----------------------------------------------------------------------------------------

EXPERTS = 4


class Dispatched(nn.Module):
    """Norm and router on own rows, all-to-all to the experts' ranks and back, gather: ``[1, T]`` ids to ``[T, H]``.

    A rank sends a slot for each of its rows to every rank, zero where the row is not for it: shapes are static.
    """

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) / 8)

        self.embed, self.router = weight(96, HIDDEN), weight(HIDDEN, EXPERTS)
        self.tables, self.last = weight(EXPERTS, HIDDEN, HIDDEN), weight(HIDDEN, HIDDEN)
        self.group, self.n, self.rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        own = EXPERTS // self.n
        self.own = nn.Parameter(self.tables[own * self.rank : own * (self.rank + 1)].detach().clone())

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed[ids.long()[0]]
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)

    def whole(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(ids)
        scores = (hidden @ self.router).softmax(-1)
        best = scores.argmax(-1)
        out = (hidden[:, None] @ self.tables[best])[:, 0] * scores.amax(-1, keepdim=True)
        return (hidden + out) @ self.last

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.hidden(ids)
        local, own = hidden.shape[0] // self.n, EXPERTS // self.n
        mine = hidden[local * self.rank : local * (self.rank + 1)]
        scores = (mine @ self.router).softmax(-1)
        best = scores.argmax(-1)
        sent = torch.cat([mine * ((best // own) == r)[:, None] for r in range(self.n)])
        numbers = torch.cat([best % own] * self.n).to(sent.dtype)[:, None]
        given = funcol.all_to_all_single(torch.cat([sent, numbers], 1), None, None, self.group)
        rows, numbers = given[:, :HIDDEN], given[:, HIDDEN].long()
        done = sum((rows @ self.own[e]) * (numbers == e)[:, None] for e in range(own))
        back = funcol.all_to_all_single(done, None, None, self.group)
        out = back.view(self.n, local, HIDDEN).sum(0) * scores.amax(-1, keepdim=True)
        return (hidden + funcol.all_gather_tensor(out, 0, self.group)) @ self.last


@pytest.mark.parametrize("size", [2, 4])
def test_experts_by_all_to_all_keep_their_rows(size: int) -> None:
    """No hidden rows are gathered before the dispatch or after the combine; the output is, as the graph returns it."""
    ids = ids_of(1, 4 * size).double()
    ranks = traced_ranks(size, Dispatched, ids)
    graphs = rewritten(ranks.compile(strategy="hybrid", profile="ascend-a3", replicated=["*", "!*own*"]))
    assert [kind for kind, _ in widths(graphs[0])] == [*["all_to_all_single"] * 2, "all_gather_into_tensor"]
    with fake_rank(0, size) as mesh, torch.no_grad():
        expected = Dispatched(mesh["tp"]).whole(ids)
    for rank, (found,) in enumerate(run(ranks, graphs, [ids] * size)):
        close(found, expected, rank)


# ---- hidden states for MTP -----------------------------------------------------------------------------------------


@functools.cache
def with_hidden(size: int, how: str) -> SharedRanks:
    """A stage that hands over its hidden rows: all of them, this rank's, or the next rank's."""

    class Both(Stage):
        def forward(self, given: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
            hidden = self.embed(given.long())
            layer = self.layers[0]
            tokens = hidden.shape[1]
            positions = torch.arange(tokens)[None]
            mask = torch.full((tokens, tokens), -torch.inf).triu(1)[None, None]
            rotary = self.rotary(hidden, positions)
            hidden = layer(hidden, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
            local = tokens // self.n
            if how == "split":
                return (torch.split(hidden, local, 1)[self.rank],)
            rank = (self.rank + (how == "next")) % self.n
            return (hidden,) if how == "all" else (hidden[:, local * rank : local * (rank + 1)],)

    return traced_ranks(size, lambda mesh: Both(True, mesh), ids_of(1, 4 * size).double())


@pytest.mark.parametrize("how", ["all", "own", "split", "next"])
def test_hidden_rows_are_whole_only_where_the_graph_asks(how: str) -> None:
    """Own rows, by slice or split, are handed over as they are; all rows, or another rank's, are gathered."""
    size, tokens = 2, 8
    ranks, ids = with_hidden(size, how), ids_of(1, tokens).double()
    graphs = rewritten(ranks.compile(strategy="cp", profile="ascend-a3", replicated=["*given*"]))
    own = how in ("own", "split")
    assert [width for _, width in widths(graphs[0])] == [24] + [HIDDEN] * (not own)
    whole = run(with_hidden(size, "all"), [t.gm for t in with_hidden(size, "all").traces], [ids] * size)[0][0]
    for rank, (found,) in enumerate(run(ranks, graphs, [ids] * size)):
        at = {"own": rank, "split": rank, "next": 1 - rank}
        expected = whole if how == "all" else whole[:, 4 * at[how] : 4 * (at[how] + 1)]
        close(found, expected, (how, rank))


# ---- seeded faults -------------------------------------------------------------------------------------------------


def proof_holds(ranks: SharedRanks, rank: int, fault: Any, side: str) -> bool:
    """Whether the proof of ``rank`` accepts its graph with ``fault`` in the original or in the rewritten one."""
    compiled = ranks.compile(strategy="cp", profile="ascend-a3", replicated=["*given*"])[rank]
    variant = compiled.variants[-1]
    known = variant.steps[0].graph.known
    before = next(iter(known.shapes)).graph.owning_module
    graphs = {"original": before, "rewritten": variant.gm}
    graphs = {name: fx.GraphModule(gm, copy_graph(gm.graph)) for name, gm in graphs.items()}
    fault(graphs[side])
    facts = dict.fromkeys((n.name for n in before.graph.find_nodes(op="placeholder")), True)
    assert known.tokens is not None
    return prove(graphs["original"], graphs["rewritten"], known.axis, known.tokens, facts.__getitem__).holds


def nothing(gm: fx.GraphModule) -> None:
    pass


def other_rows(gm: fx.GraphModule) -> None:
    """The graph takes the first rank's rows instead of this rank's."""
    part = gm.graph.output_node().all_input_nodes[0]
    part.args = (*part.args[:2], 0, 4)


def other_group(gm: fx.GraphModule) -> None:
    gather = gm.graph.find_nodes(op="call_function", target=c10d.all_gather_into_tensor.default)[0]
    gather.args = (*gather.args[:2], "another group")


def test_the_proof_tells_rows_apart() -> None:
    """Rows that the original takes must be this rank's for a shard to stand for them."""
    ranks = with_hidden(2, "own")
    assert proof_holds(ranks, 1, nothing, "original")
    assert not proof_holds(ranks, 1, other_rows, "original")


def test_the_proof_tells_groups_apart() -> None:
    """A gather over another group is of other rows than this axis's."""
    ranks = traced_ranks(2, lambda mesh: Stage(False, mesh), rows_of(2, 8))
    assert proof_holds(ranks, 1, nothing, "original")
    assert not proof_holds(ranks, 1, other_group, "original")
    assert not proof_holds(ranks, 1, other_group, "rewritten")


def test_a_gather_over_another_group_is_left() -> None:
    ranks = traced_ranks(2, lambda mesh: Stage(False, mesh), rows_of(2, 8))
    for trace in ranks.traces:
        other_group(trace.gm)
    compiled = ranks.compile(strategy="cp", profile="ascend-a3")[0]
    assert not compiled.rewritten and "carries tokens" in compiled.refused["cp"]


def test_tokens_are_counted_from_each_ranks_rows() -> None:
    """The second stage's input holds T/n rows: the count of tokens, costs and reports are of T."""
    ranks = traced_ranks(2, lambda mesh: Stage(False, mesh), rows_of(2, 8))
    compiled = ranks.compile(strategy="auto", profile="ascend-a3", verify="off")[0]
    read = token_reader(compiled.original, compiled.tokens)
    assert read is not None and read(feed(ranks.traces[0], torch.zeros(4, HIDDEN))) == 8
    gathered = {c.elements_before for c in compiled.report(1000).collectives} - {0}
    assert gathered == {500 * HIDDEN}
    assert count_at(compiled.tokens / 2, compiled.tokens, 10) == 5  # type: ignore[operator]
