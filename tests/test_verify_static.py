"""The static proof: holds for what the planner emits and for hand-written rewrites, and fails for broken ones."""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import sympy
import torch
import torch.fx as fx
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx

import cpcompile.capture
from cpcompile.axes import Axis
from cpcompile.capture import capture
from cpcompile.costs import PROFILES
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.collectives import NATIVE
from cpcompile.passes.materialise import materialise
from cpcompile.passes.place import place
from cpcompile.passes.placement_problem import build as build_problem
from cpcompile.passes.token_dims import annotate
from cpcompile.passes.token_layout import size_expr
from cpcompile.passes.verify_call import Call
from cpcompile.passes.verify_index import Rows, Split, regroup, row_major
from cpcompile.passes.verify_proof import Proof
from cpcompile.passes.verify_rules import rows_of
from cpcompile.passes.verify_static import prove
from tests import models
from tests.simulate import fake_rank

aten = torch.ops.aten
Graph = fx.GraphModule
HARDWARE = PROFILES["ascend-a3"]


@dataclass
class Case:
    """An original graph and what the planner made of it."""

    original: Graph
    rewritten: list[Graph]
    axis: Axis
    tokens: sympy.Expr
    facts: dict[str, bool]

    def prove(self, graph: Graph, **changed: bool) -> Proof:
        facts = {**self.facts, **changed}
        return prove(self.original, graph, self.axis, self.tokens, lambda name: facts.get(name, False))


def make_case(kind: str, ranks: int, rank: int, shape: tuple[int, int], layers: int = 2) -> Case:
    """Trace, place and rewrite a tiny model at every interval of T and with the ``tp`` plan."""
    with fake_rank(rank, ranks) as mesh:
        model = models.shard(models.build(models.tiny_config(kind, layers)), mesh)
        trace = capture(model, input_ids=torch.zeros(shape, dtype=torch.int64), use_cache=False)
        axis = Axis("tp", mesh.get_group().group_name, ranks, rank, tuple(range(ranks)))
    Canonicalise()(trace.gm)
    facts = {}
    for node, given in zip(trace.gm.graph.find_nodes(op="placeholder"), trace.inputs, strict=True):
        dtensor = isinstance(given.value, DTensor)
        facts[node.name] = all(p.is_replicate() for p in given.value.placements) if dtensor else True
    known = annotate(trace.gm, axis, facts)
    problem = build_problem(known, HARDWARE)
    intervals = [i for strategy in ("tp", "auto") for i in place(problem, HARDWARE, strategy, "x").intervals]
    assert known.tokens is not None
    return Case(trace.gm, [materialise(trace.gm, problem, i) for i in intervals], axis, known.tokens, facts)


@pytest.fixture(scope="module")
def v3() -> Case:
    return make_case("v3", 2, 1, (2, 10))


@pytest.fixture(scope="module")
def v32() -> Case:
    return make_case("v32", 4, 3, (1, 10), layers=1)


@pytest.fixture(scope="module")
def static() -> Iterator[Case]:
    """Sizes known when tracing: token counts look like any other number."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpcompile.capture, "_mark_tokens", lambda values: None)
        yield make_case("v3", 4, 2, (2, 10), layers=1)


@pytest.mark.parametrize("name", ["v3", "v32", "static"])
def test_proves_every_interval(name: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(name)
    targets = {node.target for graph in case.rewritten for node in graph.graph.nodes}
    assert NATIVE.reduce_scatter_tensor.default in targets and NATIVE.all_gather_into_tensor.default in targets
    for graph in case.rewritten:
        proof = case.prove(graph)
        assert proof.failures == () and proof.holds
        tensors = [n.name for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)]
        assert set(tensors) <= proof.facts.keys()


def test_facts_are_readable(v3: Case) -> None:
    facts = set(v3.prove(v3.rewritten[0]).facts.values())
    assert any(fact.startswith("Shard(1) of mul") for fact in facts)
    assert any(fact.startswith("Shard(0) of mm") for fact in facts)


# Broken rewrites of a real model.


def copy_of(graph: Graph) -> Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    copied.output_node().meta.update(graph.graph.output_node().meta)
    return fx.GraphModule(graph, copied)


def nodes(graph: Graph, target: Any) -> list[fx.Node]:
    return list(graph.graph.find_nodes(op="call_function", target=target))


def refuted(case: Case, graph: Graph) -> str:
    """The failures' messages; each names a node of the graph."""
    proof = case.prove(graph)
    assert not proof.holds
    named = {node.name for node in graph.graph.nodes} | {"placeholder"}
    assert proof.failures and all(f.node in named and f.message and "\n" not in f.message for f in proof.failures)
    return " ".join(f.message for f in proof.failures)


def gathers(graph: Graph) -> list[fx.Node]:
    return nodes(graph, NATIVE.all_gather_into_tensor.default)


def drop_gather(case: Case, graph: Graph) -> None:
    gather = gathers(graph)[0]
    gather.replace_all_uses_with(gather.args[0])


def shard_as_whole(case: Case, graph: Graph) -> None:
    facts = case.prove(graph).facts
    whole = next(
        n
        for n in graph.graph.nodes
        if facts.get(n.name, "").startswith("Whole")
        and n.args
        and facts.get(str(n.args[0]), "").startswith("all padded")
    )
    shard = next(n for n in graph.graph.nodes if facts.get(n.name, "").startswith("Shard(1)"))
    whole.replace_all_uses_with(shard)


def slice_of_padded(case: Case, graph: Graph) -> fx.Node:
    facts = case.prove(graph).facts
    return next(n for n in nodes(graph, aten.slice.Tensor) if "padded" in facts[n.args[0].name] and n.args[2] == 0)


def shift_end(case: Case, graph: Graph) -> None:
    cut = slice_of_padded(case, graph)
    with graph.graph.inserting_before(cut):
        cut.update_arg(3, graph.graph.call_function(operator.add, (cut.args[3], -1)))


def forget_slice(case: Case, graph: Graph) -> None:
    cut = slice_of_padded(case, graph)
    cut.replace_all_uses_with(cut.args[0])


def other_rank(case: Case, graph: Graph) -> None:
    cut = next(n for n in nodes(graph, aten.slice.Tensor) if "constant_pad" in str(n.args[0]))
    cut.update_arg(3, cut.args[2])
    cut.update_arg(2, 0)


def partial_plus_whole(case: Case, graph: Graph) -> None:
    scatter = nodes(graph, NATIVE.reduce_scatter_tensor.default)[-1]
    source = scatter.args[0]
    while source.target in (aten.view.default, aten.clone.default, aten.permute.default, aten.constant_pad_nd.default):
        source = source.args[0]
    whole = next(n for n in nodes(graph, aten.embedding.default))
    with graph.graph.inserting_after(source):
        added = graph.graph.call_function(aten.add.Tensor, (source, whole))
    source.replace_all_uses_with(added, delete_user_cb=lambda user: user is not added)


def swap_pieces(case: Case, graph: Graph) -> None:
    split = next(n for n in nodes(graph, aten.split_with_sizes.default) if len(n.args[1]) > 2)
    first, second = [n for n in split.users if n.args[1] < 2]
    first.update_arg(1, 1)
    second.update_arg(1, 0)


def scatter_as_slice(case: Case, graph: Graph) -> None:
    """Each rank keeps its own summand's rows."""
    scatter = nodes(graph, NATIVE.reduce_scatter_tensor.default)[0]
    local = scatter.meta["val"].shape[0]
    with graph.graph.inserting_before(scatter):
        rows = graph.graph.call_function(
            aten.slice.Tensor, (scatter.args[0], 0, case.axis.rank * local, (case.axis.rank + 1) * local)
        )
    rows.meta = dict(scatter.meta)
    scatter.replace_all_uses_with(rows)


def other_group(case: Case, graph: Graph) -> None:
    gather = gathers(graph)[-1]
    gather.update_arg(2, "elsewhere")


def scatter_by_max(case: Case, graph: Graph) -> None:
    nodes(graph, NATIVE.reduce_scatter_tensor.default)[0].update_arg(1, "max")


def other_output(case: Case, graph: Graph) -> None:
    output = graph.graph.output_node()
    (value,) = output.args[0]
    same = [
        n for n in graph.graph.nodes if n.op == "call_function" and str(n.meta.get("val")) == str(value.meta["val"])
    ]
    other = next((n for n in same if n is not value), nodes(graph, aten.embedding.default)[0])
    output.args = ((other,),)


def unwaited(case: Case, graph: Graph) -> None:
    wait = next(iter(gathers(graph)[0].users))
    wait.replace_all_uses_with(wait.args[0])


def lie_about_shape(case: Case, graph: Graph) -> None:
    cut = slice_of_padded(case, graph)
    cut.meta = {**cut.meta, "val": cut.args[0].meta["val"]}


MUTATIONS = [drop_gather, shard_as_whole, shift_end, forget_slice, other_rank, partial_plus_whole, swap_pieces]
MUTATIONS += [scatter_as_slice, other_group, scatter_by_max, other_output, unwaited, lie_about_shape]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_refutes_broken_rewrite(v3: Case, mutate: Callable[[Case, Graph], None]) -> None:
    graph = copy_of(v3.rewritten[0])
    assert v3.prove(graph).holds
    mutate(v3, graph)
    refuted(v3, graph)


def test_refutes_removed_all_reduce(v3: Case) -> None:
    graph = next(g for g in map(copy_of, v3.rewritten) if nodes(g, NATIVE.all_reduce.default))
    reduce = nodes(graph, NATIVE.all_reduce.default)[0]
    reduce.replace_all_uses_with(reduce.args[0])
    refuted(v3, graph)


def test_refutes_another_rank(v3: Case) -> None:
    """Rank 1's graph keeps rank 1's rows: it is wrong on rank 0."""
    elsewhere = replace(v3, axis=replace(v3.axis, rank=0))
    assert "expected rows" in refuted(elsewhere, v3.rewritten[0])


def test_refutes_rank_varying_weights(v3: Case) -> None:
    """Every input that meets rows must be the same on all ranks: norms, q_a, kv_a, the router."""
    graph = v3.rewritten[0]
    facts = v3.prove(graph).facts
    met = set()
    for node in graph.graph.nodes:
        if facts.get(node.name, "").startswith("Shard") and node.target not in (aten.slice.Tensor,):
            for operand in node.all_input_nodes:
                root = operand.args[0] if operand.target is aten.t.default else operand
                met |= {root.name} if root.op == "placeholder" and isinstance(root.meta["val"], torch.Tensor) else set()
    assert len(met) >= 10
    for name in met:
        proof = v3.prove(graph, **{name: False})
        assert not proof.holds and "same on all ranks" in proof.failures[0].message


def test_refutes_any_swapped_operand(v3: Case) -> None:
    """Reading any other value of the same shape is noticed, unless it is the same value."""
    generator = random.Random(0)
    facts = v3.prove(v3.rewritten[0]).facts
    done = 0
    while done < 15:
        graph = copy_of(v3.rewritten[0])
        calls = [n for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor) and n.users]
        old = generator.choice(calls)
        like = [n for n in calls if str(n.meta["val"]) == str(old.meta["val"]) and facts[n.name] != facts[old.name]]
        if not like or old.target is aten.new_empty.default or _unread(old):
            continue
        new = generator.choice(like)
        order = {n: i for i, n in enumerate(graph.graph.nodes)}
        users = [u for u in old.users if order[u] > order[new]]
        if not users or users[0].target in (aten.new_empty.default, aten.new_ones.default):
            continue
        users[0].replace_input_with(old, new)
        assert not v3.prove(graph).holds, (users[0], old, new, facts[old.name], facts[new.name])
        done += 1


def _unread(node: fx.Node) -> bool:
    """Whether only shapes are read of ``node``, or nothing that reaches an output."""
    return all(u.target in (aten.new_empty.default, aten.new_ones.default, aten.sym_size.int) for u in node.users)


# Hand-written rewrites of one small block: all-reduce, norm weight, projection.

RANKS, RANK, WIDTH, OUT = 4, 1, 8, 6
AXIS = Axis("tp", "tp", RANKS, RANK, tuple(range(RANKS)))


def reduced(x: torch.Tensor, group: str = "tp") -> torch.Tensor:
    return NATIVE.wait_tensor(NATIVE.all_reduce(x, "sum", group))


def block(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
    batch, tokens, _ = x.shape
    h = aten.mul(reduced(x), scale)
    y = aten.view(aten.mm(aten.view(h, [batch * tokens, WIDTH]), weight), [batch, tokens, OUT])
    return [y, aten.add(h, row), aten.softmax.int(y, -1, False)]


@dataclass(frozen=True)
class Moves:
    """Moves of ``[B, T, W]``, written another way than the planner's, with one mistake if asked for."""

    mistake: str = ""

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The rank dim is moved to the front by ``transpose`` and the rows stay apart from the batch."""
        batch, tokens, width = x.shape
        local = (tokens + RANKS - 1) // RANKS
        x = aten.constant_pad_nd(x, [0, 0, 0, RANKS * local - tokens])
        x = aten.reshape(x, [batch, RANKS, local * width])
        x = aten.contiguous(aten.transpose(x, 0, 1)) if self.mistake != "order" else x
        x = aten.reshape(x, [RANKS * batch, local, width])
        group = "other" if self.mistake == "group" else "tp"
        return NATIVE.wait_tensor(NATIVE.reduce_scatter_tensor(x, "sum", RANKS, group))

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        local = (tokens + RANKS - 1) // RANKS
        rank = RANK + 1 if self.mistake == "rank" else RANK
        padded = aten.constant_pad_nd(x, [0, 0, 0, RANKS * local - tokens])
        return aten.slice(padded, 1, rank * local, (rank + 1) * local)

    def gather(self, x: torch.Tensor, tokens: int) -> torch.Tensor:
        batch, local, width = x.shape
        x = NATIVE.wait_tensor(NATIVE.all_gather_into_tensor(aten.clone(x), RANKS, "tp"))
        x = aten.transpose(aten.view(x, [RANKS, batch, local * width]), 0, 1)
        x = aten.reshape(aten.clone(x, memory_format=torch.contiguous_format), [batch, RANKS * local, width])
        return aten.slice(x, 1, 0, tokens + 1 if self.mistake == "end" else tokens)


def on_rows(
    mistake: str, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, row: torch.Tensor
) -> list[torch.Tensor]:
    batch, tokens, _ = x.shape
    moves = Moves(mistake)
    mine = moves.scatter(x)
    local = mine.shape[1]
    h = aten.mul(mine, scale)
    flat = [local * batch, WIDTH]
    turned = aten.view(h, flat)
    if mistake == "interleave":
        turned = aten.reshape(aten.transpose(aten.view(h, [local, batch, WIDTH]), 0, 1), flat)
    y = aten.view(aten.mm(turned, weight), [batch, local, OUT])
    soft = aten.softmax.int(y, 1 if mistake == "softmax" else -1, False)
    total = aten.add(h, moves.rows(row) if mistake != "mixed" else aten.slice(row, 1, 0, 1))
    width = OUT + WIDTH + OUT
    whole = moves.gather(aten.cat([y, total, soft], 2), tokens)
    if mistake == "widths":
        a, b, c = aten.split_with_sizes(whole, [OUT, OUT, width - 2 * OUT], 2)
        return [a, aten.clone(c), b]
    a, b, c = aten.split_with_sizes(whole, [OUT, WIDTH, OUT], 2)
    return [c, b, a] if mistake == "pieces" else [a, b, c]


@functools.cache
def traced(f: Callable[..., Any], tokens: int, mode: str) -> Graph:
    inputs = (torch.zeros(2, tokens, WIDTH), torch.ones(WIDTH), torch.ones(WIDTH, OUT), torch.zeros(2, tokens, WIDTH))
    with torch.no_grad():
        return make_fx(f, tracing_mode=mode)(*inputs)


def small_proof(
    f: Callable[..., Any], g: Callable[..., Any], tokens: int = 10, mode: str = "symbolic", varying: str = "x_1 arg0_1"
) -> Proof:
    original, rewritten = traced(f, tokens, mode), traced(g, tokens, mode)
    found = size_expr(original.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1])
    return prove(original, rewritten, AXIS, found, lambda name: name not in varying.split())


def mistaken(mistake: str) -> Callable[..., Any]:
    return lambda x, scale, weight, row: on_rows(mistake, x, scale, weight, row)


@pytest.mark.parametrize(
    ("tokens", "mode"), [(10, "symbolic"), (10, "fake"), (8, "fake"), (3, "fake"), (4, "fake"), (1, "fake")]
)
def test_proves_other_chains(tokens: int, mode: str) -> None:
    """Padded, divisible, fewer tokens than ranks, and one row a rank; the moves are not the planner's."""
    assert small_proof(block, mistaken(""), tokens, mode).failures == ()


SMALL_MISTAKES = {
    "order": "",
    "group": "",
    "rank": "expected rows",
    "end": "expected rows",
    "interleave": "interleaved",
    "softmax": "",
    "mixed": "",
    "widths": "expected pieces of widths",
    "pieces": "expected output 0",
}


# Of an even split nothing is sliced away, so a slice past its end is no mistake; one row has nothing to interleave.
TRUE = {("end", 8), ("interleave", 3)}
SIZES = [(10, "symbolic"), (10, "fake"), (8, "fake"), (3, "fake")]
SMALL = [(m, *size) for m in SMALL_MISTAKES for size in SIZES if (m, size[0]) not in TRUE]


@pytest.mark.parametrize(("mistake", "tokens", "mode"), SMALL)
def test_refutes_small_mistakes(mistake: str, tokens: int, mode: str) -> None:
    proof = small_proof(block, mistaken(mistake), tokens, mode)
    assert not proof.holds
    assert mode != "symbolic" or SMALL_MISTAKES[mistake] in " ".join(f.message for f in proof.failures)


@pytest.mark.parametrize("varying", ["x_1 scale_1", "x_1 weight_1", "x_1 row_1"])
def test_refutes_values_that_differ_between_ranks(varying: str) -> None:
    proof = small_proof(block, mistaken(""), varying=varying)
    assert not proof.holds
    told = "a value that all ranks share" if "row" in varying else "to be the same on all ranks, as it meets rows"
    assert told in proof.failures[0].message


def test_rows_of_different_values_make_no_whole() -> None:
    """Each rank's own rows of its own value, gathered, are nobody's value."""

    def rewritten(x: torch.Tensor, *_: torch.Tensor) -> list[torch.Tensor]:
        moves = Moves()
        return [moves.gather(moves.rows(x), x.shape[1])]

    assert not small_proof(lambda x, *_: [aten.clone(x)], rewritten).holds
    assert small_proof(lambda x, *_: [aten.clone(x)], rewritten, varying="").holds


def test_rows_meet_no_other_rows() -> None:
    """One row a rank would broadcast against all rows of another operand."""
    graph = traced(lambda x, scale, weight, row: aten.add(x, row), 3, "fake")
    (add,) = graph.graph.find_nodes(op="call_function", target=aten.add.Tensor)
    x, row = add.args
    shapes = {x: (2, 3, WIDTH), row: (2, 3, WIDTH)}
    assert rows_of(Call(add, shapes, {x: Rows(1), row: Rows(1)}, ((2, 3, WIDTH),))) == Rows(1)
    assert "every row" in str(rows_of(Call(add, shapes, {x: Rows(1)}, ((2, 3, WIDTH),))))
    assert "different dims" in str(rows_of(Call(add, shapes, {x: Rows(1), row: Rows(0)}, ((2, 3, WIDTH),))))


def test_softmax_along_the_tokens() -> None:
    """Even where the original does just that, it cannot be done on rows."""

    def original(x: torch.Tensor, *_: torch.Tensor) -> list[torch.Tensor]:
        return [aten.softmax.int(reduced(x), 1, False)]

    def rewritten(x: torch.Tensor, *_: torch.Tensor) -> list[torch.Tensor]:
        moves = Moves()
        return [moves.gather(aten.softmax.int(moves.scatter(x), 1, False), x.shape[1])]

    proof = small_proof(original, rewritten)
    assert "works along the rows" in proof.failures[0].message


def two_sums(x: torch.Tensor, scale: torch.Tensor, _: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
    return [aten.add(aten.mul(reduced(x), scale), reduced(row))]


def test_sums_are_carried_through_linear_ops() -> None:
    def once(x: torch.Tensor, scale: torch.Tensor, _: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
        moves = Moves()
        return [moves.gather(moves.scatter(aten.add(aten.mul(x, scale), row)), x.shape[1])]

    assert small_proof(two_sums, once, varying="x_1 row_1").failures == ()
    proof = small_proof(two_sums, once, varying="x_1 row_1 scale_1")
    assert not proof.holds and "factor of a sum" in proof.failures[0].message


def test_a_whole_value_is_no_summand() -> None:
    """``x + reduced(row)`` summed over the ranks counts the second one n times."""

    def twice(x: torch.Tensor, scale: torch.Tensor, _: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
        moves = Moves()
        return [moves.gather(moves.scatter(aten.add(aten.mul(x, scale), reduced(row))), x.shape[1])]

    assert not small_proof(two_sums, twice, varying="x_1 row_1").holds


@pytest.mark.parametrize("op", [aten.relu, aten.exp, lambda x: aten.add(x, 1.0), lambda x: aten.mul(x, x)])
def test_a_summand_goes_through_no_other_op(op: Callable[[Any], Any]) -> None:
    def original(x: torch.Tensor, *_: torch.Tensor) -> list[torch.Tensor]:
        return [op(reduced(x))]

    def rewritten(x: torch.Tensor, *_: torch.Tensor) -> list[torch.Tensor]:
        return [reduced(op(x))]

    assert small_proof(original, original).holds
    assert not small_proof(original, rewritten).holds


def test_constants_are_told_apart() -> None:
    def times(factor: object) -> Callable[..., Any]:
        return lambda x, *_: [aten.mul(x, factor)]

    assert small_proof(times(2), times(2)).holds
    assert not small_proof(times(2), times(3)).holds
    assert not small_proof(times(1), times(1.0)).holds
    assert not small_proof(times(1), times(True)).holds
    assert not small_proof(times(1.0), times(True)).holds
    assert not small_proof(times(0.0), times(-0.0)).holds
    assert small_proof(times(float("nan")), times(float("nan"))).holds


def test_random_ops_keep_their_order() -> None:
    def draws(swap: bool) -> Callable[..., Any]:
        def f(x: torch.Tensor, *_: torch.Tensor) -> list[torch.Tensor]:
            a, b = aten.rand_like(x), aten.rand_like(x)
            return [b, a] if swap else [a, b]

        return f

    assert small_proof(draws(False), draws(False)).holds
    assert not small_proof(draws(False), draws(True)).holds


def test_writes_into_inputs() -> None:
    """A cache that is written in place is read before or after, and the proof keeps them apart."""

    def writes(before: bool, value: int = 1) -> Callable[..., Any]:
        def f(x: torch.Tensor, scale: torch.Tensor, _: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
            first = aten.clone(row)
            aten.copy_(row, aten.mul(x, value))
            return [first if before else aten.clone(row)]

        return f

    assert small_proof(writes(True), writes(True)).holds
    assert small_proof(writes(False), writes(False)).holds
    assert not small_proof(writes(False), writes(True)).holds
    assert not small_proof(writes(True), writes(True, 2)).holds
    assert not small_proof(writes(True), lambda x, s, w, row: [aten.clone(row)]).holds


def test_rank_dependent_constants() -> None:
    """A mask against this rank's vocabulary differs between ranks though its operands do not."""

    def masked(x: torch.Tensor, scale: torch.Tensor, _: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
        return [aten.mul(reduced(x), aten.ge(scale, 16))]

    def by_rows(x: torch.Tensor, scale: torch.Tensor, _: torch.Tensor, row: torch.Tensor) -> list[torch.Tensor]:
        moves = Moves()
        return [moves.gather(aten.mul(moves.scatter(x), aten.ge(scale, 16)), x.shape[1])]

    original, rewritten = traced(masked, 10, "symbolic"), traced(by_rows, 10, "symbolic")
    tokens = size_expr(original.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1])
    assert prove(original, rewritten, AXIS, tokens, lambda name: name != "x_1").holds
    assert not prove(original, rewritten, AXIS, tokens, lambda name: name != "x_1", rank_dependent=["ge"]).holds


# Index arithmetic.


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 7, 8, 9])
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_digits_say_where_elements_are(tokens: int, batch: int) -> None:
    """Gathered digits against real tensors: the digits of every place name the element that lies there."""
    split = Split.of(sympy.Integer(tokens), RANKS, RANK)
    local, width = split.local, 3
    shards = [torch.arange(batch * RANKS * local * width).view(batch, RANKS, local, width)[:, r] for r in range(RANKS)]
    dims = split.gathered(row_major((batch, local, width)), width)
    assert dims is not None
    assert torch.equal(elements(dims), torch.cat(shards))
    turned = regroup(dims, (RANKS, batch, local * width))
    assert turned is not None
    assert torch.equal(
        elements((turned[1], turned[0], turned[2])).flatten(), torch.arange(batch * RANKS * local * width)
    )
    scattered = split.scattered(dims)
    assert scattered == (row_major((batch, local, width)), width)


def elements(dims: Any) -> torch.Tensor:
    """The content's element at every place."""
    flat = torch.zeros((), dtype=torch.int64)
    for dim in dims:
        inner = torch.zeros(1, dtype=torch.int64)
        for size, stride in dim:
            inner = (inner[:, None] + torch.arange(size) * stride).flatten()
        flat = flat[..., None] + inner
    return flat


def test_table_of_pointwise_ops_is_pointwise() -> None:
    """The tag that the table leans on: no overload of a reduction carries it."""
    reductions = [
        aten.max.dim,
        aten.max.default,
        aten.min.dim,
        aten.cumsum.default,
        aten.sort.default,
        aten.norm.Scalar,
    ]
    assert not any(torch.Tag.pointwise in op.tags for op in reductions)
