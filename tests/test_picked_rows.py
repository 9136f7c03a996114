"""Rows picked from shards: real models that keep the last logits, packed requests, every form of a pick, and faults."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import models
import pytest
import sympy
import torch
import torch.fx as fx
from conftest import SharedRanks, as_rank
from placed import Layer, annotated
from simulate import fake_rank
from torch import Tensor, nn

from cpcompile.axes import axis_of
from cpcompile.capture import Trace, capture
from cpcompile.compiled import Compiled
from cpcompile.costs import profile
from cpcompile.passes.collectives import is_collective, op_name
from cpcompile.passes.lockstep import RankProgram, run_lockstep
from cpcompile.passes.materialise import materialise
from cpcompile.passes.mincut import LABELS, P, S, available_levels, raise_route
from cpcompile.passes.picked_rows import Picks
from cpcompile.passes.place import place
from cpcompile.passes.token_layout import size_expr
from cpcompile.passes.verify_numeric import check_numerically
from cpcompile.passes.verify_proof import Proof
from cpcompile.passes.verify_static import prove
from cpcompile.pipeline import copy_graph

TOLERANCE = 2e-5
HIDDEN = models.TINY["hidden_size"]
aten, c10d = torch.ops.aten, torch.ops._c10d_functional


def ids_of(tokens: int) -> Tensor:
    return torch.randint(0, models.TINY["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(tokens))


def run(ranks: SharedRanks, graphs: Sequence[fx.GraphModule], *given: Tensor) -> list[Any]:
    """One graph per rank in lockstep; ``given`` are the integer inputs, told apart by their number of dims."""
    programs = [
        RankProgram(gm, feed(trace, given), {axis.group_name: axis.ranks})
        for gm, trace, axis in zip(graphs, ranks.traces, ranks.axes, strict=True)
    ]
    return run_lockstep(programs)


def feed(trace: Trace, given: Sequence[Tensor]) -> list[object]:
    nodes = trace.gm.graph.find_nodes(op="placeholder")
    by_dims = {value.ndim: value for value in given}
    sizes: dict[Any, int] = {}
    for node, known in zip(nodes, trace.inputs, strict=True):
        if known.kind == "input" and isinstance(value := node.meta["val"], Tensor):
            sizes |= {size_expr(s): real for s, real in zip(value.shape, by_dims[value.ndim].shape, strict=True)}
    found: list[object] = []
    for node, known in zip(nodes, trace.inputs, strict=True):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            found.append(sizes[size_expr(value)])
        elif known.kind == "input" and isinstance(value, Tensor):
            found.append(by_dims[value.ndim])
        else:
            found.append(getattr(known.value, "_local_tensor", known.value))
    return found


def rewritten(compiled: Sequence[Compiled]) -> list[list[fx.GraphModule]]:
    """Every rewritten variant, as one graph per rank."""
    assert not compiled[0].refused and compiled[0].proofs and all(p["holds"] for p in compiled[0].proofs)
    return [[c.variants[i].gm for c in compiled] for i, v in enumerate(compiled[0].variants) if v.steps]


def all_reduced(gm: fx.GraphModule) -> list[list[str]]:
    return [
        [str(size_expr(s)) for s in n.meta["val"].shape]
        for n in gm.graph.nodes
        if is_collective(n) and "all_reduce" in op_name(n.target)
    ]


def close(found: Tensor, expected: Tensor, what: object) -> None:
    assert found.shape == expected.shape, what
    assert ((found - expected).norm() / expected.norm()).item() <= TOLERANCE, what


# ---- real models ---------------------------------------------------------------------------------------------------


@functools.cache
def whole(kind: str) -> Any:
    return models.build(models.tiny_config(kind, layers=1))


@functools.cache
def context_parallel(kind: str, size: int, rows: int = 0) -> SharedRanks:
    """Every rank holds the same model; the last token is kept, or ``rows`` that a tensor names."""
    keep: Any = torch.zeros(rows, dtype=torch.int64) if rows else 1
    with fake_rank(0, size) as mesh:
        trace = capture(whole(kind), input_ids=ids_of(10), use_cache=False, logits_to_keep=keep)
        axis = dataclasses.replace(axis_of("tp", mesh), name="cp")
    return SharedRanks([trace] * size, [dataclasses.replace(axis, rank=rank) for rank in range(size)])


@functools.cache
def tensor_parallel(kind: str, size: int) -> SharedRanks:
    def sharded(mesh: Any) -> Any:
        return models.shard(models.build(models.tiny_config(kind, layers=1)), mesh)

    with fake_rank(0, size) as mesh:
        first = capture(sharded(mesh), input_ids=ids_of(10), use_cache=False, logits_to_keep=1)
    every = [as_rank(first, rank, size, sharded) for rank in range(size)]
    return SharedRanks([trace for trace, _ in every], [axis for _, axis in every])


CASES = [*(("v3", "cp", size) for size in (2, 3, 8)), ("v3", "tp", 4), ("v32", "cp", 3), ("v32", "tp", 2)]


@pytest.mark.parametrize(("kind", "strategy", "size"), CASES)
def test_only_the_last_row_crosses_ranks_for_its_logits(kind: str, strategy: str, size: int) -> None:
    ranks = context_parallel(kind, size) if strategy == "cp" else tensor_parallel(kind, size)
    compiled = ranks.compile(strategy=strategy, profile="ascend-a3")
    (row,) = [c for c in compiled[0].report(4096).collectives if c.kind == "picked rows"]
    assert (row.becomes, row.elements_after_in_t) == ("all_reduce", str(sympy.Rational(2 * HIDDEN * (size - 1), size)))
    for graphs in rewritten(compiled):
        (picked,) = all_reduced(graphs[0])
        assert picked == ["1", "1", str(HIDDEN)]
        for tokens in range(1, 4 * size + 2):
            with torch.no_grad():
                expected = whole(kind)(input_ids=ids_of(tokens), use_cache=False, logits_to_keep=1).logits
            for rank, (logits,) in enumerate(run(ranks, graphs, ids_of(tokens))):
                close(logits, expected, (tokens, rank))


def test_rows_that_a_tensor_names_of_a_real_model() -> None:
    """The last tokens of three packed requests, with the numpy number of the last: serving's form."""
    ranks = context_parallel("v3", 3, rows=3)
    for graphs in rewritten(ranks.compile(strategy="cp", profile="ascend-a3", verify="numeric")):
        for tokens, rows in ((14, [0, 5, -1]), (14, [13, 13, -14]), (1, [0, -1, 0]), (2, [1, 0, 1, 0, -2])):
            keep = torch.tensor(rows)
            with torch.no_grad():
                expected = whole("v3")(input_ids=ids_of(tokens), use_cache=False, logits_to_keep=keep).logits
            for rank, (logits,) in enumerate(run(ranks, graphs, ids_of(tokens), keep)):
                close(logits, expected, (tokens, rows, rank))


# ---- every form, on one layer --------------------------------------------------------------------------------------

Pick = Callable[[Tensor, Tensor], Tensor]


class Picking(nn.Module):
    """A layer over token ids ``[T]``, then ``pick(hidden [T, H], last rows of the requests)``."""

    def __init__(self, pick: Pick, *where: Any) -> None:
        super().__init__()
        self.layer, self.pick = Layer(*where), pick

    def forward(self, ids: Tensor, lengths: Tensor) -> Tensor:
        return self.pick(self.layer(ids), lengths.flatten().cumsum(0) - 1)


FORMS: dict[str, Pick] = {
    "last": lambda h, rows: h[-1:],
    "last three": lambda h, rows: h[-3:],
    "before the last": lambda h, rows: h[-3:-1],
    "second": lambda h, rows: h[1:2],
    "from the front": lambda h, rows: h[:3],
    "one of them": lambda h, rows: h[-2],
    "select from the front": lambda h, rows: h.select(0, 2),
    "a constant row": lambda h, rows: h[torch.tensor([2])],  # no guard says that there are three
    "symbolic start": lambda h, rows: h[h.shape[0] - 2 :],
    "as many as requests": lambda h, rows: h[-rows.shape[0] :],
    "named": lambda h, rows: h[rows],
    "named from the end": lambda h, rows: h[rows - h.shape[0]],
    "named in two dims": lambda h, rows: h[torch.stack([rows, rows - 0]).t()],
    "index_select": lambda h, rows: h.index_select(0, rows),
    "named by int32": lambda h, rows: h[rows.to(torch.int32)],
    "of a transposed": lambda h, rows: h.t()[:, rows],
    "of a batch": lambda h, rows: h[None, :, :][:, rows],
    "of a view": lambda h, rows: h.view(-1, 2, 4)[-1:],
    "of joined features": lambda h, rows: torch.cat([h[:, 4:], h[:, :4].tanh()], 1)[-1:],
}


@functools.cache
def toy(form: str, size: int) -> SharedRanks:
    traces, axes = [], []
    for rank in range(size):
        with fake_rank(rank, size) as mesh:
            model = Picking(FORMS[form], mesh, rank, size)
            ids = torch.zeros(14, dtype=torch.int64)
            traces.append(capture(model, ids, torch.tensor([[1, 5, 8]])))
            axes.append(axis_of("tp", mesh))
    return SharedRanks(traces, axes)


REQUESTS = [[1, 5, 8], [8, 5, 1], [3, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1], [7, 2]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [3])
def test_every_form_on_packed_requests(form: str, size: int) -> None:
    ranks = toy(form, size)
    # Lengths are drawn from 0 and 1, and what these forms make of 0 is out of bounds.
    verify = "static" if form in ("named from the end", "index_select") else "numeric"
    compiled = ranks.compile(strategy="tp", profile="ascend-a3", verify=verify)
    for graphs in rewritten(compiled):
        (picked,) = all_reduced(graphs[0])
        assert "T" not in picked
        for requests in REQUESTS:
            lengths = torch.tensor([requests])
            ids = torch.arange(sum(requests)) * 7 % 32
            expected = Picking(FORMS[form])(ids, lengths)
            for (found,) in run(ranks, graphs, ids, lengths):
                torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("form", ["named", "last", "one of them"])
@pytest.mark.parametrize("tokens", [3, 4, 9])
def test_a_static_count(form: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer tokens than ranks too: a shard of one row, of padding on the last rank."""
    monkeypatch.setattr("cpcompile.capture._mark_tokens", lambda values: None)
    with fake_rank(3, 4) as mesh:
        model = Picking(FORMS[form], mesh, 3, 4)
        lengths = torch.tensor([[1, tokens - 1]])
        trace, axis = capture(model, torch.zeros(tokens, dtype=torch.int64), lengths), axis_of("tp", mesh)
    found = annotated(trace, axis)
    graph = found.graph()
    label = {False: S, True: P}
    labels = [label[c.picks or c.reduced] for c in graph.choices]
    problem = graph.problem(tokens, profile("ascend-a3"))
    levels = available_levels(problem, labels)
    routes = [raise_route(v, labels[v.op], level)[1] for v, level in zip(problem.values, levels, strict=True)]
    interval = dataclasses.replace(
        place(graph, profile("ascend-a3"), "tp", "").intervals[0],
        labels={c.node.name: LABELS[at] for c, at in zip(graph.choices, labels, strict=True) if not c.reduced},
        raises={node.name: route for node, route in zip(graph.values, routes, strict=True) if route},
    )
    same = {n.name: n in found.known.replicated for n in found.gm.graph.nodes}
    made = materialise(found.gm, graph, interval)
    assert len(all_reduced(made)) == 1 and found.known.tokens == tokens
    assert prove(found.gm, made, axis, found.known.tokens, same.__getitem__).failures == ()
    assert check_numerically(found.gm, graph, interval, same.__getitem__) == []


LEFT_ALONE: dict[str, Pick] = {
    "most of the tokens": lambda h, rows: h[1:],
    "every second": lambda h, rows: h[:6:2],
    "a mask": lambda h, rows: h.where((h > 0), 0.0)[:, rows.clamp(max=7)],
    "integers": lambda h, rows: h.argmax(-1)[rows],
    "two index tensors": lambda h, rows: h[rows, rows.clamp(max=7)],
    "a folded batch": lambda h, rows: h.repeat_interleave(2, 0)[rows],
}


@pytest.mark.parametrize("form", LEFT_ALONE)
def test_what_is_no_pick_of_rows(form: str) -> None:
    with fake_rank(0, 2) as mesh:
        model = Picking(LEFT_ALONE[form], mesh, 0, 2)
        trace, axis = capture(model, torch.zeros(14, dtype=torch.int64), torch.tensor([[1, 5, 8]])), axis_of("tp", mesh)
    assert not any(isinstance(o, Picks) for o in annotated(trace, axis).known.classes.values())


def test_an_index_that_differs_between_ranks_names_whole_rows() -> None:
    with fake_rank(0, 2) as mesh:
        model = Picking(FORMS["named"], mesh, 0, 2)
        trace, axis = capture(model, torch.zeros(14, dtype=torch.int64), torch.tensor([[1, 5, 8]])), axis_of("tp", mesh)
    name = next(i.name for i in trace.inputs if "lengths" in i.name and isinstance(i.value, Tensor))
    same = annotated(trace, axis)
    assert any(c.picks for c in same.graph().choices)
    with fake_rank(0, 2) as mesh:
        trace = capture(model, torch.zeros(14, dtype=torch.int64), torch.tensor([[1, 5, 8]]))
    assert not any(c.picks for c in annotated(trace, axis, **{name: False}).graph().choices)


# ---- seeded faults -------------------------------------------------------------------------------------------------


def first(gm: fx.GraphModule, target: Any) -> fx.Node:
    return gm.graph.find_nodes(op="call_function", target=target)[-1]


def kept(gm: fx.GraphModule) -> fx.Node:
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar)
    return node


def taken(gm: fx.GraphModule) -> fx.Node:
    node = kept(gm).args[0]
    assert isinstance(node, fx.Node) and node.target is aten.index_select.default
    return node


def local(gm: fx.GraphModule) -> fx.Node:
    """Row numbers counted from this rank's first."""
    return taken(gm).args[2].args[0]  # type: ignore[union-attr,return-value]


def shifted(node: fx.Node, argument: int) -> None:
    with node.graph.inserting_before(node):
        more = node.graph.call_function(operator.add, (node.args[argument], 1))
    node.update_arg(argument, more)


def offset_wrong(gm: fx.GraphModule) -> None:
    shifted(local(gm), 1)


def place_wrong(gm: fx.GraphModule) -> None:
    """The right rows are kept, and each is taken from its neighbour's place."""
    clamp = taken(gm).args[2]
    assert isinstance(clamp, fx.Node)
    with gm.graph.inserting_before(clamp):
        moved = gm.graph.call_function(aten.add.Tensor, (clamp.args[0], 1))
    moved.meta = dict(clamp.meta)
    clamp.update_arg(0, moved)


def mask_missing(gm: fx.GraphModule) -> None:
    kept(gm).replace_all_uses_with(taken(gm))


def one_row_more(gm: fx.GraphModule) -> None:
    """``<=`` for ``<``: the next rank's first row counts twice."""
    first(gm, aten.ge.Scalar).target = aten.gt.Scalar


def first_row_missing(gm: fx.GraphModule) -> None:
    next(n for n in local(gm).users if n.target is aten.lt.Scalar).target = aten.le.Scalar


def others_kept(gm: fx.GraphModule) -> None:
    mask = first(gm, aten.bitwise_or.Tensor)
    with gm.graph.inserting_after(mask):
        denied = gm.graph.call_function(aten.logical_not.default, (mask,))
    denied.meta = dict(mask.meta)
    mask.replace_all_uses_with(denied, delete_user_cb=lambda user: user is not denied)


def half_a_mask(gm: fx.GraphModule) -> None:
    mask = first(gm, aten.bitwise_or.Tensor)
    mask.replace_all_uses_with(mask.args[0])  # type: ignore[arg-type]


def ones_for_zeros(gm: fx.GraphModule) -> None:
    kept(gm).update_arg(2, 1)


def not_held(gm: fx.GraphModule) -> None:
    clamp = taken(gm).args[2]
    clamp.replace_all_uses_with(clamp.args[0])  # type: ignore[union-attr,arg-type]


def held_short(gm: fx.GraphModule) -> None:
    """A rank's last row is taken from the one before."""
    clamp = taken(gm).args[2]
    assert isinstance(clamp, fx.Node)
    with gm.graph.inserting_before(clamp):
        less = gm.graph.call_function(operator.sub, (clamp.args[2], 1))
    clamp.update_arg(2, less)


def reduce_missing(gm: fx.GraphModule) -> None:
    wait = next(n for n in first(gm, c10d.all_reduce.default).users)
    wait.replace_all_uses_with(wait.args[0].args[0])  # type: ignore[union-attr,arg-type]


def maximum_for_sum(gm: fx.GraphModule) -> None:
    first(gm, c10d.all_reduce.default).update_arg(1, "max")


def another_group(gm: fx.GraphModule) -> None:
    first(gm, c10d.all_reduce.default).update_arg(2, "another")


def summed_twice(gm: fx.GraphModule) -> None:
    wait = next(n for n in first(gm, c10d.all_reduce.default).users)
    with gm.graph.inserting_after(wait):
        again = gm.graph.call_function(c10d.all_reduce.default, (wait, *wait.args[0].args[1:]))  # type: ignore[union-attr]
    again.meta = dict(wait.meta)
    with gm.graph.inserting_after(again):
        waited = gm.graph.call_function(c10d.wait_tensor.default, (again,))
    waited.meta = dict(wait.meta)
    wait.replace_all_uses_with(waited, delete_user_cb=lambda user: user is not again)


def other_rows(gm: fx.GraphModule) -> None:
    """Rows of another value of the same shape."""
    shard = taken(gm).args[0]
    assert isinstance(shard, fx.Node)
    with gm.graph.inserting_before(taken(gm)):
        other = gm.graph.call_function(aten.neg.default, (shard,))
    other.meta = dict(shard.meta)
    taken(gm).update_arg(0, other)


def not_counted_from_the_end(gm: fx.GraphModule) -> None:
    where = first(gm, aten.where.self)
    where.replace_all_uses_with(where.args[2])  # type: ignore[arg-type]


def counted_from_elsewhere(gm: fx.GraphModule) -> None:
    shifted(first(gm, aten.where.self).args[1], 1)  # type: ignore[arg-type]


FAULTS = [offset_wrong, place_wrong, mask_missing, one_row_more, first_row_missing, others_kept, half_a_mask]
FAULTS += [ones_for_zeros, not_held, held_short, reduce_missing, maximum_for_sum, another_group, summed_twice]
FAULTS += [other_rows]
NAMED = [*FAULTS, not_counted_from_the_end, counted_from_elsewhere]
SEEDED = [(form, fault) for form in ("last", "last three", "one of them", "of a batch") for fault in FAULTS]
SEEDED += [("named", fault) for fault in NAMED] + [("index_select", fault) for fault in FAULTS]


@functools.cache
def unverified(form: str) -> list[Compiled]:
    return toy(form, 2).compile(strategy="tp", profile="ascend-a3", verify="off")


def proof_of(form: str, change: Callable[[fx.GraphModule], None] | None, rank: int = 1) -> Proof:
    compiled = unverified(form)[rank]
    (variant,) = [v for v in compiled.variants if v.steps]
    known = variant.steps[0].graph.known
    before = next(iter(known.shapes)).graph.owning_module
    broken = fx.GraphModule(variant.gm, copy_graph(variant.gm.graph))
    if change is not None:
        change(broken)
        broken.graph.lint()
    assert isinstance(before, fx.GraphModule) and known.tokens is not None
    same = {n.name: n in known.replicated for n in known.shapes}
    return prove(before, broken, known.axis, known.tokens, same.__getitem__)


@pytest.mark.parametrize("form", FORMS)
def test_the_proof_names_the_summand(form: str) -> None:
    found = proof_of(form, None)
    assert found.holds and any(fact.startswith("Partial of") for fact in found.facts.values())


@pytest.mark.parametrize(("form", "fault"), SEEDED)
def test_a_fault_is_refuted(form: str, fault: Callable[[fx.GraphModule], None]) -> None:
    found = proof_of(form, fault)
    assert not found.holds and all(f.message for f in found.failures)


def test_another_ranks_graph_is_refuted() -> None:
    compiled = unverified("last")
    mine, theirs = (next(v for v in c.variants if v.steps) for c in compiled)
    known = mine.steps[0].graph.known
    before = next(iter(known.shapes)).graph.owning_module
    assert isinstance(before, fx.GraphModule) and known.tokens is not None
    same = {n.name: n in known.replicated for n in known.shapes}
    assert prove(before, mine.gm, known.axis, known.tokens, same.__getitem__).holds
    assert not prove(before, theirs.gm, known.axis, known.tokens, same.__getitem__).holds


def test_few_rows_are_summed_and_many_are_gathered() -> None:
    """An index longer than the prompt costs more than the gather of what it names: those rows are gathered."""
    with fake_rank(0, 2) as mesh:
        model = Picking(lambda h, rows: h[rows], mesh, 0, 2)
        many = torch.zeros((1, 1 << 17), dtype=torch.int64)
        trace, axis = capture(model, torch.zeros(14, dtype=torch.int64), many), axis_of("tp", mesh)
    graph = annotated(trace, axis).graph()
    (choice,) = [c for c in graph.choices if c.picks]
    (interval,) = place(graph, profile("ascend-a3"), "tp", "").intervals
    assert choice.node.name not in interval.labels
    assert math.isclose(interval.bound_s, interval.cost_s)
