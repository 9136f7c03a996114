"""Replication facts: each source, the fingerprint's strength, and graphs compared over simulated ranks."""

import re
import time

import pytest
import torch
import torch.distributed as dist
from simulate import in_threads
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import cpcompile.replication as replication
from cpcompile.axes import Axis
from cpcompile.errors import AxisError, OptionError
from cpcompile.exchange import GroupExchange, LocalExchange, OfflineExchange, agree
from cpcompile.replication import (
    exchange_facts,
    fingerprint,
    graph_signature,
    input_facts,
    rank_dependent_nodes,
)

AXIS = Axis("tp", "tp", 4, 0, (0, 1, 2, 3))


def on_ranks(n, body, timeout_s=10.0):
    """Run ``body(exchange)`` for each simulated rank in its own thread: results, or the exception, in rank order."""
    ring = LocalExchange.ring(n, timeout_s)
    return in_threads(lambda rank: body(ring[rank]), n)


def facts_on_ranks(value_of, kind, n=4, **options):
    """The fact of one input named ``x``, which is ``value_of(rank)``; checks that all ranks agree."""
    facts = on_ranks(n, lambda e: input_facts(["x"], [value_of(e.rank)], [kind], AXIS, e, **options))
    assert all(fact == facts[0] for fact in facts), facts
    return facts[0][0].replicated, facts[0][0].source


# ---- exchange


def test_local_ring_gathers_in_group_order_many_times():
    got = on_ranks(4, lambda e: [e.all_gather((e.rank, turn), "turns") for turn in range(50)])
    assert got == [[[(rank, turn) for rank in range(4)] for turn in range(50)]] * 4


def test_exchanging_different_things_names_the_ranks():
    errors = on_ranks(3, lambda e: e.all_gather(0, "plan" if e.rank == 1 else "facts"))
    assert all(isinstance(error, AxisError) for error in errors)
    assert "expected 'facts' on every rank, found rank 1 'plan'" in str(errors[0])
    assert "found rank 0 'facts', rank 2 'facts'" in str(errors[1])


def test_absent_rank_is_named_and_the_ring_stays_broken():
    ring = LocalExchange.ring(2, timeout_s=0.1)
    with pytest.raises(AxisError, match=r"'plan' over a local ring: ranks \[1\] did not take part within 0.1 s"):
        ring[0].all_gather(0, "plan")
    with pytest.raises(AxisError, match="another rank gave up"):
        ring[1].all_gather(0, "plan")


def test_agree_lists_ranks_by_value():
    assert on_ranks(4, lambda e: agree(e, "same", "hash of the plan")) == [None] * 4
    errors = on_ranks(4, lambda e: agree(e, "odd" if e.rank == 2 else "same", "hash of the plan"))
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "hash of the plan" in str(errors[0]) and "ranks [0, 1, 3] against ranks [2]" in str(errors[0])


def test_timeout_must_be_positive():
    for timeout_s in (0, -1.0, float("nan")):
        with pytest.raises(OptionError, match="positive"):
            LocalExchange.ring(2, timeout_s)


# ---- sources of facts


@pytest.fixture
def mesh():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


def test_fake_group_and_unknown_group_are_refused(mesh):
    with pytest.raises(AxisError, match="use OfflineExchange"):
        GroupExchange(mesh.get_group("tp"))
    with pytest.raises(AxisError, match="found 'tq'"):
        GroupExchange("tq")


def test_dtensor_placement_on_the_axis_decides(mesh):
    dp, tp = Axis("dp", "", 2, 0, (0, 2)), Axis("tp", "", 2, 0, (0, 1))
    both, other = Axis("world", "", 4, 0, (0, 1, 2, 3)), Axis("far", "", 2, 0, (0, 4))
    cases = [
        ((Replicate(), Shard(0)), [(dp, True), (tp, False), (both, False)]),
        ((Shard(1), Replicate()), [(dp, False), (tp, True), (both, False)]),
        ((Partial(), Replicate()), [(dp, False), (tp, True), (both, False)]),
        ((Replicate(), Replicate()), [(dp, True), (tp, True), (both, True), (other, None)]),
    ]
    for placements, wanted in cases:
        value = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, placements, run_check=False))
        for axis, replicated in wanted:
            # Every rank holds ones, and the user says "*": neither may overrule the placement.
            [fact] = input_facts(["w"], [value], ["parameter"], axis, OfflineExchange(axis.size), declared=["*"])
            if replicated is None:
                assert not fact.replicated and fact.source == "unknown: its DTensor mesh lacks ranks of axis 'far'"
            else:
                assert (fact.replicated, fact.source) == (replicated, "dtensor"), (placements, axis)


def test_dtensor_on_a_submesh_is_known_only_there(mesh):
    value = distribute_tensor(torch.ones(4), mesh["tp"], [Replicate()])
    [on_tp] = input_facts(["w"], [value], ["parameter"], Axis("tp", "", 2, 0, (0, 1)), OfflineExchange(2))
    [on_dp] = input_facts(["w"], [value], ["parameter"], Axis("dp", "", 2, 0, (0, 2)), OfflineExchange(2))
    assert on_tp.replicated and not on_dp.replicated


def test_declared_patterns_and_exclusion_wins_in_any_order():
    names = ["L.norm.weight", "L.q.weight", "L.cache"]
    values = [torch.zeros(2) for _ in names]
    for declared in (["L.*", "!*.q.*"], ["!*.q.*", "L.*"]):
        offline = input_facts(names, values, ["input"] * 3, AXIS, OfflineExchange(4), declared=declared)
        assert [(f.replicated, f.source) for f in offline] == [
            (True, "offline declaration"),
            (False, "offline declaration"),
            (True, "offline declaration"),
        ]
    assert facts_on_ranks(lambda r: torch.zeros(2), "input", declared=["x"]) == (True, "declared")


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_weights_are_compared_by_contents(kind):
    weight = torch.randn(33, 7)
    assert facts_on_ranks(lambda r: nn.Parameter(weight.clone()), kind) == (True, "fingerprint")
    assert facts_on_ranks(lambda r: weight + (r == 3), kind) == (False, "fingerprint: differs between ranks")
    assert facts_on_ranks(lambda r: weight[: 30 + r], kind) == (False, "fingerprint: differs between ranks")


def test_contents_that_prove_nothing_are_unknown():
    with FakeTensorMode():
        fake = torch.zeros(4)
    unknown = (False, 'unknown: declare it with replicated=["x"]')
    assert facts_on_ranks(lambda r: fake, "parameter") == unknown
    assert facts_on_ranks(lambda r: torch.zeros(4, device="meta"), "parameter") == unknown
    assert facts_on_ranks(lambda r: torch.zeros(4), "input") == unknown
    assert facts_on_ranks(lambda r: torch.zeros(4), "buffer", mutated=["x"]) == unknown
    assert facts_on_ranks(lambda r: torch.zeros(4, dtype=torch.uint8), "input") == unknown  # a quantised cache
    assert facts_on_ranks(lambda r: object(), "other") == unknown
    assert facts_on_ranks(lambda r: 1.0, "other") == unknown
    [offline] = input_facts(["x"], [torch.zeros(4)], ["parameter"], AXIS, OfflineExchange(4))
    assert (offline.replicated, offline.source) == unknown


def test_integers_are_the_same_by_contract_unless_seen_to_differ():
    contract, broken = (True, "integer input"), (False, "integer input: differs between ranks")
    for dtype in (torch.int64, torch.int32, torch.bool):
        assert facts_on_ranks(lambda r, d=dtype: torch.arange(5).to(d), "input") == contract
        assert facts_on_ranks(lambda r, d=dtype: torch.arange(5).eq(r).to(d), "input") == broken
    with FakeTensorMode():
        fakes = [torch.empty(5, dtype=torch.int64) for _ in range(4)]
    assert facts_on_ranks(lambda r: fakes[r], "input") == contract
    assert facts_on_ranks(lambda r: 7, "other") == contract
    assert facts_on_ranks(lambda r: r, "other") == broken


def symbolic_size(n):
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return mode.from_tensor(torch.empty(n), symbolic_context=context).shape[0]


def test_a_symbolic_rank_number_is_told_from_a_token_count():
    sizes = {n: symbolic_size(n) for n in (8, 9)}
    assert isinstance(sizes[8], torch.SymInt)
    assert facts_on_ranks(lambda r: sizes[8], "other") == (True, "integer input")
    assert facts_on_ranks(lambda r: sizes[9 if r == 2 else 8], "other")[0] is False


def test_an_input_that_another_rank_lacks_is_not_replicated():
    def body(e):
        names = ["a", "b"] if e.rank else ["a"]
        values = [torch.ones(2)] * len(names)
        return input_facts(names, values, ["parameter"] * len(names), AXIS, e)

    results = on_ranks(2, body)
    assert results[0][0].replicated and [f.replicated for f in results[1]] == [True, False]


# ---- fingerprint


def changed(tensor, place, value):
    other = tensor.clone()
    other.view(-1)[place] = value
    return other


def flip_bits(tensor, bit, places):
    other = tensor.clone()
    words = other.view(torch.int32).view(-1)
    words[list(places)] ^= -(2**31) if bit == 31 else 1 << bit
    return other


def test_fingerprint_tells_small_changes_apart(monkeypatch):
    monkeypatch.setattr(replication, "_CHUNK", 256)  # several chunks and several rows of dim 0
    x = torch.randn(64, 16)
    x[0, 0] = 0.0
    permuted = x.view(-1)[torch.randperm(1024)].view(64, 16)
    assert fingerprint(x) != fingerprint(changed(x, 0, -0.0))
    variants = [x, x.flip(0), x.flip(1), permuted, -x, x.view(16, 64), x.double()]
    variants += [changed(x, 3, float("nan")), torch.cat([x, torch.zeros(1, 16)]), x.roll(64 // 4, 0), x.roll(1, 1)]
    variants += [flip_bits(x, bit, [place]) for bit in range(32) for place in (0, 1, 63, 64, 1023)]
    # The same bit in many words: what cancels in a linear hash. Sign bits of odd places are the top bits of words.
    variants += [flip_bits(x, bit, places) for bit in range(32) for places in ((1, 3), (0, 2), range(1, 1024, 2))]
    assert len({fingerprint(v) for v in variants}) == len(variants)


def test_fingerprint_does_not_depend_on_how_the_cpu_cuts_it(monkeypatch):
    x = torch.randn(3, 100_003)
    whole = fingerprint(x)
    for block in (7, 1 << 20):
        monkeypatch.setattr(replication, "_CPU_BLOCK", block)
        assert fingerprint(x) == whole


def test_fingerprint_of_swapped_equal_words_chunks_and_rows():
    size = replication._CHUNK // 8
    x = torch.arange(2 * size, dtype=torch.int64)
    swapped = torch.cat([x[size:], x[:size]])
    assert len({fingerprint(v) for v in (x, swapped, x.view(2, size), swapped.view(2, size), x.view(size, 2))}) == 5


def test_fingerprint_has_few_collisions_on_tiny_alphabets():
    prints = {fingerprint(torch.tensor([(i >> b) & 1 for b in range(12)], dtype=torch.int8)) for i in range(4096)}
    assert len(prints) == 4096


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.int8, torch.int64]
)
@pytest.mark.parametrize("width", [5, 8])  # rows that end within a word, and rows that do not
def test_fingerprint_sees_contents_not_layout(dtype, width, monkeypatch):
    monkeypatch.setattr(replication, "_CHUNK", 64)
    x = torch.randn(13, width).mul(8).to(dtype)
    layouts = [x, x.t().contiguous().t(), nn.Parameter(x.float(), False).to(dtype)]
    raw = torch.zeros(x.numel() + 3, dtype=dtype)  # an odd offset: not on a word's boundary
    raw[3:] = x.view(-1)
    layouts.append(raw[3:].view(13, width))
    assert len({fingerprint(v) for v in layouts}) == 1
    assert fingerprint(x) != fingerprint(x.t())
    with torch.inference_mode():
        assert fingerprint(x.clone()) == fingerprint(x)
    with FakeTensorMode():
        assert fingerprint(x) == fingerprint(layouts[1])


def test_fingerprint_of_scalars_and_empty_tensors():
    tensors = [torch.tensor(1.0), torch.tensor(2.0), torch.ones(1), torch.ones(0), torch.ones(0, 2), torch.ones(2, 0)]
    assert len({fingerprint(t) for t in tensors}) == len(tensors)
    assert fingerprint(torch.ones(0)) == fingerprint(torch.zeros(0))
    assert fingerprint(torch.ones(5)[::3][:1]) == fingerprint(torch.ones(1))  # contiguous, though its stride is 3


# ---- graphs


aten, funcol = torch.ops.aten, torch.ops._c10d_functional


def embedding_graph(start=0, group="tp", device="cpu", rows=None, extra=False, reverse=False):
    """A vocabulary-parallel embedding: ids below ``start`` are masked, then the ranks' rows are summed."""
    graph = fx.Graph()
    ids, table = graph.placeholder("ids"), graph.placeholder("table")
    local = graph.call_function(aten.sub.Tensor, (ids, start))
    mask = graph.call_function(aten.lt.Scalar, (local, 0))
    position = graph.call_function(aten.arange.default, (8,), {"device": torch.device(device)})
    rows_of = graph.call_function(aten.embedding.default, (table, local))
    if rows is not None:
        rows_of = graph.call_function(aten.mul.Tensor, (rows_of, graph.get_attr("rows")))
    summed = graph.call_function(funcol.all_reduce.default, (rows_of, "sum", group))
    waited = graph.call_function(funcol.wait_tensor.default, (summed,))
    if extra:
        waited = graph.call_function(aten.neg.default, (waited,))
    graph.output((position, mask, waited) if reverse else (waited, mask, position))
    root = nn.Module()
    if rows is not None:
        root.register_buffer("rows", rows)
    return fx.GraphModule(root, graph)


def compare(graph_of, n=4):
    results = on_ranks(n, lambda e: rank_dependent_nodes(graph_of(e.rank), e))
    assert all(result == results[0] for result in results) or isinstance(results[0], Exception)
    return results[0]


def test_signature_text():
    assert graph_signature(embedding_graph(start=16)) == [
        "placeholder | ",
        "placeholder | ",
        "call_function aten.sub.Tensor(%0,?) | 16",
        "call_function aten.lt.Scalar(%2,?) | 0",
        "call_function aten.arange.default(?,device=?) | 8,cpu",
        "call_function aten.embedding.default(%1,%2) | ",
        "call_function _c10d_functional.all_reduce.default(%5,?,group) | 'sum'",
        "call_function _c10d_functional.wait_tensor.default(%6) | ",
        "output output([%7,%3,%4]) | ",
    ]


def test_constants_of_the_rank_are_found_and_groups_and_devices_are_not():
    assert compare(lambda r: embedding_graph(group=f"tp:{r}", device=f"cuda:{r}")) == frozenset()
    assert compare(lambda r: embedding_graph(start=16 * r)) == {"sub_tensor"}
    assert compare(lambda r: embedding_graph(rows=torch.ones(4))) == frozenset()
    assert compare(lambda r: embedding_graph(rows=torch.ones(4) * (r + 1))) == {"rows"}
    assert rank_dependent_nodes(embedding_graph(start=3), OfflineExchange(4)) == frozenset()


def test_constants_that_cannot_be_compared_are_never_the_same():
    assert compare(lambda r: embedding_graph(rows=torch.ones(4, device="meta"))) == {"rows"}
    gm = fx.symbolic_trace(lambda x: torch.rand_like(x))
    next(n for n in gm.graph.nodes if n.op == "call_function").kwargs = {"generator": torch.Generator()}
    assert rank_dependent_nodes(gm, OfflineExchange(4)) == {"rand_like"}


def test_constants_inside_a_subgraph_name_its_node():
    def outer(rank, opaque=False):
        inner = embedding_graph(start=rank, rows=torch.ones(4, device="meta") if opaque else None)
        graph = fx.Graph()
        x, table = graph.placeholder("x"), graph.placeholder("table")
        body = graph.get_attr("body")
        graph.output(graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, "body", x, table)))
        return fx.GraphModule({"body": inner}, graph)

    assert compare(lambda r: outer(0)) == frozenset()
    assert compare(lambda r: outer(r)) == {"body"}
    assert rank_dependent_nodes(outer(0, opaque=True), OfflineExchange(2)) == {"body"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (
            {"extra": True},
            "node 8 (output): .*'output output([%7,%3,%4])' on ranks [0, 1, 3] against 'call_function aten.neg",
        ),
        (
            {"reverse": True},
            "node 8 (output): .*[%7,%3,%4])' on ranks [0, 1, 3] against 'output output([%4,%3,%7])' on ranks [2]",
        ),
    ],
)
def test_another_structure_is_an_error_at_its_first_node(change, found):
    error = compare(lambda r: embedding_graph(start=r, **(change if r == 2 else {})))
    assert isinstance(error, AxisError)
    assert re.search(re.escape(found).replace(r"\.\*", ".*"), str(error)), error


class Counted:
    """An exchange that records what went over it."""

    def __init__(self, exchange):
        self.exchange, self.whats = exchange, []
        self.size, self.rank = exchange.size, exchange.rank

    def all_gather(self, obj, what):
        self.whats.append(what)
        return self.exchange.all_gather(obj, what)


@pytest.mark.parametrize(("step", "exchanges"), [(0, 1), (16, 2)])
def test_one_exchange_for_inputs_and_graph(step, exchanges):
    def body(exchange):
        counted = Counted(exchange)
        gm = embedding_graph(start=step * exchange.rank)
        table = torch.full((4, 4), float(exchange.rank))
        facts = exchange_facts(gm, ["ids", "table"], [torch.arange(8), table], ["input", "parameter"], AXIS, counted)
        return facts, counted.whats

    for facts, whats in on_ranks(4, body):
        assert [fact.replicated for fact in facts.inputs] == [True, False]
        assert facts.rank_dependent == ({"sub_tensor"} if step else frozenset())
        assert len(whats) == exchanges


def test_costs_stay_small():
    """The bound is several times what was measured: 0.1 s for 12,000 nodes."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    for i in range(6000):
        value = graph.call_function(aten.add.Tensor, (value, value), {"alpha": i})
        value = graph.call_function(aten.slice.Tensor, (value, 0, 0, 9223372036854775807))
    graph.output(value)
    gm = fx.GraphModule(nn.Module(), graph)
    start = time.perf_counter()
    rank_dependent_nodes(gm, OfflineExchange(4))
    assert time.perf_counter() - start < 1.5
