"""The static proof of module tensor parallelism: holds for what the pass makes, and fails for seeded faults."""

from __future__ import annotations

import functools
import operator
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.fx as fx
from conftest import case
from hand_modules import HANDS, run_hand, shared_hand, traced
from shared_modules import GROUP, group_of, ids_of, model, run, shared, trace_of
from versions import needs_torch

from cpcompile.axes import Axis
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.module_cuts import SharedModule
from cpcompile.passes.module_parallel import SharedGraph, share_modules
from cpcompile.passes.module_roles import ROLES, find_modules
from cpcompile.passes.verify_arguments import Refused
from cpcompile.passes.verify_module_counts import RowNumbers
from cpcompile.passes.verify_modules import prove_modules
from cpcompile.passes.verify_proof import Proof
from cpcompile.passes.weight_cuts import Cut
from cpcompile.pipeline import copy_graph

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
LAYERS, TOLERANCE = 3, 2e-5
COUNTS = [3, 7]  # rows of the ranks that faults are run on; the proof is rank 1's


@functools.cache
def shared_model(
    kind: str, size: int, rank: int, group_tokens: str | int, roles: tuple[str, ...] = ROLES
) -> SharedGraph:
    trace = trace_of(kind, LAYERS)
    return share_modules(trace.gm, shared(trace, group_of(size, rank), group_tokens != "equal", roles), group_tokens)


def proof_of_model(kind: str, size: int, rank: int, group_tokens: str | int, roles: tuple[str, ...] = ROLES) -> Proof:
    found = shared_model(kind, size, rank, group_tokens, roles)
    assert found.cuts
    return prove_modules(trace_of(kind, LAYERS).gm, found.gm, found.cuts, found.axes, group_tokens=group_tokens)


def told(proof: Proof) -> str:
    """The failures' messages; none where the proof holds."""
    assert proof.holds == (not proof.failures)
    assert all(f.node in f.message and "\n" not in f.message for f in proof.failures)
    return " ".join(f.message for f in proof.failures)


# What the pass makes.


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize(
    ("size", "rank", "group_tokens"),
    [(2, 0, "exchange"), (3, 2, "exchange"), (4, 1, "exchange"), (2, 1, "equal"), (4, 3, "equal"), (3, 1, 12)],
)
def test_holds_for_models(kind: str, size: int, rank: int, group_tokens: str | int) -> None:
    proof = proof_of_model(kind, size, rank, group_tokens)
    assert told(proof) == ""
    gm = shared_model(kind, size, rank, group_tokens).gm
    tensors = {n.name for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    assert tensors <= proof.facts.keys()


@pytest.mark.parametrize("role", ROLES)
def test_holds_for_each_role_alone(role: str) -> None:
    assert told(proof_of_model("v3", 4, 2, "exchange", (role,))) == ""


def test_facts_are_readable() -> None:
    facts = set(proof_of_model("v3", 2, 1, "exchange").facts.values())
    # Numbers of nodes are the library's: releases of transformers differ in them.
    padded = {value for fact in facts if (value := fact.removeprefix("padded rows of ")) != fact}
    assert any(f"this rank's part of all ranks' rows of {value}" in facts for value in padded if "view" in value)
    assert any(f"Partial, all ranks' rows of {value}" in facts for value in padded if value.startswith("mm"))
    assert any(fact.startswith("the most rows of any rank of module group, s") for fact in facts)


@functools.cache
def tensor_parallel(kind: str) -> fx.GraphModule:
    """Rank 1's canonical graph of two ranks of tensor parallelism."""
    gm = case(kind, 2).ranks.traces[1].gm
    copy = fx.GraphModule(gm, copy_graph(gm.graph))
    Canonicalise()(copy)
    return copy


@pytest.mark.parametrize("kind", ["v3", "v32"])
@pytest.mark.parametrize("group_tokens", ["exchange", "equal"])
def test_holds_inside_tensor_parallelism(kind: str, group_tokens: str) -> None:
    """Replicas of a tensor-parallel model share each rank's part once more: its all-reduces stay the original's."""
    gm = tensor_parallel(kind)
    found, _ = find_modules(gm, ROLES)
    modules = [
        SharedModule(m.role, m.name, tuple(n.name for n in m.nodes), group_of(4, 3), group_tokens != "equal")
        for m in found
    ]
    made = share_modules(gm, modules, group_tokens)
    assert {m.role for m in found} == set(ROLES)
    assert told(prove_modules(gm, made.gm, made.cuts, made.axes, group_tokens=group_tokens)) == ""


def test_holds_where_all_ranks_have_the_same_rows() -> None:
    """Summands are reduced, columns are sliced and gathered; nothing is exchanged, as no rank has rows of its own."""
    gm = trace_of("v3", LAYERS).gm
    every = [n.name for n in gm.graph.nodes]
    made = share_modules(gm, shared(trace_of("v3", LAYERS), group_of(4, 1), unequal=False), "exchange", same=every)
    proof = prove_modules(gm, made.gm, made.cuts, made.axes, group_tokens="exchange", same=every)
    assert told(proof) == ""
    assert "rows of all" not in " ".join(proof.facts.values()) and calls(made.gm, c10d.all_reduce.default)
    own = prove_modules(gm, made.gm, made.cuts, made.axes, group_tokens="exchange", equal=[GROUP])
    assert "expected ids that all ranks have; found this rank's own" in told(own)


MODES: dict[str, dict[str, Any]] = {
    "exchange": {},
    "equal": {"group_tokens": "equal"},
    "fixed": {"group_tokens": 9},
    "equal group": {"unequal": False},
    "same rows": {"unequal": False, "same": True},
}
ROWS_OF = {"exchange": [3, 7, 1], "fixed": [3, 7, 1]}


def proof_of_hand(name: str, mode: str, made: SharedGraph | None = None, rank: int = 1, size: int = 3) -> Proof:
    options = MODES[mode]
    made = made or shared_hand(name, size, rank, **options)
    same = [n.name for n in traced(name).graph.nodes] if options.get("same") else HANDS[name].uncut
    equal = [] if options.get("unequal", True) else [GROUP]
    tokens = options.get("group_tokens", "exchange")
    return prove_modules(traced(name), made.gm, made.cuts, made.axes, group_tokens=tokens, same=same, equal=equal)


ROW_SCALES = needs_torch("2.13", "its _scaled_mm on CPUs has one scale for a whole matrix only")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[ROW_SCALES] if n.startswith("fp8") else []) for n in HANDS])
def test_holds_for_hand_written_modules(name: str, mode: str) -> None:
    """Biases, fused weights and quantised products; and their numbers are right."""
    assert told(proof_of_hand(name, mode)) == ""
    assert run_hand(name, ROWS_OF.get(mode, [4, 4, 4]), **MODES[mode])


@pytest.mark.parametrize("name", [name for name, hand in HANDS.items() if hand.uncut])
def test_an_input_that_stays_whole_must_be_the_same_on_all_ranks(name: str) -> None:
    made = shared_hand(name, 3, 1)
    proof = prove_modules(traced(name), made.gm, made.cuts, made.axes, group_tokens="exchange")
    assert "to be the same on all ranks; it is not known to be" in told(proof)


# Seeded faults: refuted, and wrong if run.


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


def put(before: fx.Node, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
    """A call before ``before``, with the meta of ``like``, by default of its first argument."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)
    node.meta = dict((like or args[0]).meta)
    return node


def skip(node: fx.Node, source: fx.Node) -> None:
    node.replace_all_uses_with(source)
    node.graph.erase_node(node)


def wrong_group(gm: fx.GraphModule, rank: int) -> None:
    calls(gm, c10d.all_gather_into_tensor.default)[-1].update_arg(2, "another group")


def wait_dropped(gm: fx.GraphModule, rank: int) -> None:
    wait = next(iter(calls(gm, c10d.reduce_scatter_tensor.default)[0].users))
    skip(wait, wait.all_input_nodes[0])


def own_summand_only(gm: fx.GraphModule, rank: int) -> None:
    """This rank's rows of its own summand stand in for the reduce-scatter."""
    scatter = calls(gm, c10d.reduce_scatter_tensor.default)[0]
    count = calls(gm, aten._local_scalar_dense.default)[0]
    bounds = [put(scatter, operator.mul, count, k) for k in (rank, rank + 1)]
    for bound in bounds:
        bound.meta = {"val": count.meta["val"] * bound.args[1]}
    skip(scatter, put(scatter, aten.slice.Tensor, scatter.args[0], 0, *bounds, like=scatter))


def scattered_by_max(gm: fx.GraphModule, rank: int) -> None:
    calls(gm, c10d.reduce_scatter_tensor.default)[1].update_arg(1, "max")


def least_rows_for_most(gm: fx.GraphModule, rank: int) -> None:
    calls(gm, c10d.all_reduce.default)[0].update_arg(1, "min")


def sum_of_rows_for_most(gm: fx.GraphModule, rank: int) -> None:
    calls(gm, c10d.all_reduce.default)[0].update_arg(1, "sum")


def rows_of_one_rank_for_most(gm: fx.GraphModule, rank: int) -> None:
    wait = next(iter(calls(gm, c10d.all_reduce.default)[0].users))
    wait.replace_all_uses_with(calls(gm, c10d.all_reduce.default)[0].args[0])


def pad_dropped(gm: fx.GraphModule, rank: int) -> None:
    pad = calls(gm, aten.constant_pad_nd.default)[-1]
    skip(pad, pad.args[0])


def padding_kept(gm: fx.GraphModule, rank: int) -> None:
    cut = _row_slices(gm)[-1]
    skip(cut, cut.args[0])


def rows_off_by_one(gm: fx.GraphModule, rank: int) -> None:
    cut = _row_slices(gm)[-1]
    end = put(cut, operator.add, cut.args[3], 1)
    end.meta = {"val": cut.args[3].meta["val"] + 1}
    cut.args = (cut.args[0], 0, 1, end)


def first_row_dropped(gm: fx.GraphModule, rank: int) -> None:
    _row_slices(gm)[-1].update_arg(2, 1)


def last_row_dropped(gm: fx.GraphModule, rank: int) -> None:
    cut = _row_slices(gm)[-1]
    end = put(cut, operator.add, cut.args[3], -1)
    end.meta = {"val": cut.args[3].meta["val"] - 1}
    cut.update_arg(3, end)


def size_of_another_group(gm: fx.GraphModule, rank: int) -> None:
    calls(gm, c10d.all_gather_into_tensor.default)[0].update_arg(1, 4)


def _row_slices(gm: fx.GraphModule) -> list[fx.Node]:
    """Slices of padded rows: their operand has N of them."""
    return [n for n in calls(gm, aten.slice.Tensor) if str(n.args[0].meta["val"].shape[0]).startswith("u")]


def table_rows_of_another_rank(gm: fx.GraphModule, rank: int) -> None:
    lookup = calls(gm, aten.embedding.default)[0]
    shifted = lookup.args[1].args[0]
    assert shifted.target is aten.sub.Tensor
    shifted.update_arg(1, lookup.args[0].meta["val"].shape[0] * (1 - rank))


def mask_dropped(gm: fx.GraphModule, rank: int) -> None:
    mask = calls(gm, aten.masked_fill.Scalar)[0]
    skip(mask, mask.args[0])


def mask_fills_with_one(gm: fx.GraphModule, rank: int) -> None:
    calls(gm, aten.masked_fill.Scalar)[0].update_arg(2, 1)


def half_of_the_table_found(gm: fx.GraphModule, rank: int) -> None:
    clamp = calls(gm, aten.embedding.default)[0].args[1]
    clamp.update_arg(2, clamp.args[2] // 2)


def permutation_before_exchange_dropped(gm: fx.GraphModule, rank: int) -> None:
    """Rows go where columns should: the blocks of the all-to-all are not the ranks' columns."""
    exchange = calls(gm, c10d.all_to_all_single.default)[0]
    permute = next(n for n in calls(gm, aten.permute.default) if n < exchange)
    skip(permute, put(permute, aten.view.default, permute.args[0], _shape(permute), like=permute))


def _shape(node: fx.Node) -> list[Any]:
    """The size arguments of the view that made the operand of permute ``node``, permuted."""
    sizes = node.args[0].args[1]
    return [sizes[d] for d in node.args[1]]


def columns_joined_in_another_order(gm: fx.GraphModule, rank: int) -> None:
    """After lm_head's all-to-all, the ranks' parts of a row are read as if rows came first."""
    permute = calls(gm, aten.permute.default)[-1]
    skip(permute, put(permute, aten.view.default, permute.args[0], _shape(permute), like=permute))


def activation_of_a_summand(gm: fx.GraphModule, rank: int) -> None:
    scatter = calls(gm, c10d.reduce_scatter_tensor.default)[1]
    scatter.update_arg(0, put(scatter, aten.silu.default, scatter.args[0]))


def norm_across_all_ranks_rows(gm: fx.GraphModule, rank: int) -> None:
    gathered = _gathered(gm)
    product = next(u for u in gathered.users if u.target is aten.mm.default)
    product.update_arg(0, put(product, aten._softmax.default, gathered, 0, False))


def foreign_row_taken(gm: fx.GraphModule, rank: int) -> None:
    gathered = _gathered(gm)
    product = next(u for u in gathered.users if u.target is aten.mm.default)
    product.update_arg(0, put(product, aten.roll.default, gathered, [1], [0]))


def _gathered(gm: fx.GraphModule) -> fx.Node:
    """lm_head's rows of all ranks."""
    return next(iter(calls(gm, c10d.all_gather_into_tensor.default)[-1].users))


def weights_of_two_layers_swapped(gm: fx.GraphModule, rank: int) -> None:
    products = [s.args[0] for s in calls(gm, c10d.reduce_scatter_tensor.default)]
    first, second = [p for p in products if p.args[0].args[0].target is c10d.all_to_all_single.default][:2]
    weights = [p.args[1].args[0] for p in (first, second)]
    for product, weight in zip((first, second), reversed(weights), strict=True):
        old = product.args[1]
        product.update_arg(1, put(product, aten.t.default, weight, like=old))


def columns_of_another_rank(gm: fx.GraphModule, rank: int) -> None:
    """Where all ranks hold the same rows: another rank's columns meet this rank's rows of the weight."""
    cut = next(n for n in calls(gm, aten.slice.Tensor) if n.args[1] == 1)
    width = cut.args[3] - cut.args[2]
    cut.args = (cut.args[0], 1, (1 - rank) * width, (2 - rank) * width)


def gate_and_up_swapped(gm: fx.GraphModule, rank: int) -> None:
    gate, up = [n for n in calls(gm, aten.slice.Tensor) if n.args[1] == 1]
    gate.args, up.args = up.args, gate.args


def bias_in_every_summand(gm: fx.GraphModule, rank: int) -> None:
    (product,) = calls(gm, aten.mm.default)
    (added,) = calls(gm, aten.add.Tensor)
    summand = put(product, aten.addmm.default, added.args[1], *product.args, like=product)
    skip(product, summand)
    skip(added, added.args[0])


def bias_dropped(gm: fx.GraphModule, rank: int) -> None:
    (added,) = calls(gm, aten.add.Tensor)
    skip(added, added.args[0])


def summand_for_the_sum(gm: fx.GraphModule, rank: int) -> None:
    """Where all ranks hold the same rows: the summand is taken for the sum."""
    wait = next(iter(calls(gm, c10d.all_reduce.default)[0].users))
    skip(wait, calls(gm, c10d.all_reduce.default)[0].args[0])


def parts_joined_in_another_order(gm: fx.GraphModule, rank: int) -> None:
    permute = calls(gm, aten.permute.default)[-1]
    skip(permute, put(permute, aten.view.default, permute.args[0], _shape(permute), like=permute))


def other_dim_cut(cut: Cut) -> Cut:
    return replace(cut, dim=1 - cut.dim)


def fused_weight_cut_as_one(cut: Cut) -> Cut:
    return replace(cut, segments=1)


@dataclass(frozen=True)
class Fault:
    """A fault, where it is seeded, what the proof says, and who catches it.

    ``module`` and ``mode`` are of a hand-written graph, else it is a model; ``recut`` is a fault of the cuts.
    """

    seed: Callable[[fx.GraphModule, int], None]
    where: str
    message: str
    caught_by: str = "static, numeric"
    module: str = ""
    mode: str = "exchange"
    recut: Callable[[Cut], Cut] | None = None

    @property
    def name(self) -> str:
        return (self.recut or self.seed).__name__


def nothing(gm: fx.GraphModule, rank: int) -> None:
    """No fault."""


CALL, OWN = "expected a call of the original", "to be Whole of"
MODEL_FAULTS = [
    Fault(wrong_group, "shared modules", "expected a group that shares weights; found another group"),
    Fault(wait_dropped, "shared modules", "expected the wait_tensor of", "static"),
    Fault(own_summand_only, "shared modules", ""),
    Fault(scattered_by_max, "shared modules", "expected the sum of summands"),
    Fault(least_rows_for_most, "shared modules", "expected the largest number of rows"),
    Fault(sum_of_rows_for_most, "shared modules", "expected the largest number of rows", "static"),
    Fault(rows_of_one_rank_for_most, "shared modules", ""),
    Fault(pad_dropped, "shared modules", "expected rows padded to N"),
    Fault(padding_kept, "shared modules", ""),
    Fault(rows_off_by_one, "shared modules", "expected rows 0:"),
    Fault(first_row_dropped, "shared modules", "expected rows 0:"),
    Fault(last_row_dropped, "shared modules", "expected rows 0:"),
    Fault(size_of_another_group, "shared modules", "expected group_size 2; found 4"),
    Fault(table_rows_of_another_rank, "shared modules", "expected ids less 48, clamped to 0:47; found 0"),
    Fault(mask_dropped, "shared modules", "expected a masked lookup"),
    Fault(mask_fills_with_one, "shared modules", "expected zeros in the rows of ids that other ranks have"),
    Fault(half_of_the_table_found, "shared modules", "a last row 23"),
    Fault(permutation_before_exchange_dropped, "shared modules", ""),
    Fault(columns_joined_in_another_order, "shared modules", ""),
    Fault(activation_of_a_summand, "shared modules", ""),
    Fault(norm_across_all_ranks_rows, "shared modules", "expected an op that keeps rows and columns apart"),
    Fault(foreign_row_taken, "shared modules", "expected an op that keeps rows and columns apart"),
    Fault(weights_of_two_layers_swapped, "shared modules", CALL),
]
HAND_FAULTS = [
    Fault(bias_in_every_summand, "shared bias", "expected the bias to be added once", module="bias, rows cut"),
    Fault(bias_dropped, "shared bias", OWN, module="bias, rows cut"),
    Fault(columns_of_another_rank, "same rows", "", module="bias, rows cut", mode="same rows"),
    Fault(summand_for_the_sum, "same rows", "", module="bias, rows cut", mode="same rows"),
    Fault(parts_joined_in_another_order, "same rows", "", module="bias, columns cut", mode="same rows"),
    Fault(gate_and_up_swapped, "fused weight", CALL, module="fused, sliced"),
    Fault(nothing, "fused weight", "expected segments of", module="fused", recut=fused_weight_cut_as_one),
    Fault(nothing, "shared bias", "its meta says", module="bias, rows cut", recut=other_dim_cut),
]


def seeded(gm: fx.GraphModule, seed: Callable[[fx.GraphModule, int], None], rank: int) -> fx.GraphModule:
    broken = fx.GraphModule(gm, copy_graph(gm.graph))
    seed(broken, rank)
    broken.graph.lint()
    broken.recompile()
    return broken


def model_is_wrong(seed: Callable[[fx.GraphModule, int], None]) -> bool:
    """Whether ranks that all run graphs with ``seed`` in them stall or give wrong logits."""
    try:
        found = run(trace_of("v3", LAYERS), COUNTS, "exchange", lambda rank, gm: seeded(gm, seed, rank))
    except Exception:
        return True
    with torch.no_grad():
        whole = [model("v3", LAYERS)(input_ids=ids_of(count), use_cache=False).logits for count in COUNTS]
    pairs = list(zip(found, whole, strict=True))
    return any(f.shape != w.shape or ((f - w).norm() / w.norm()).item() > TOLERANCE for f, w in pairs)


def caught_by(proof: Proof, wrong: bool) -> str:
    return ", ".join(name for name, caught in (("static", not proof.holds), ("numeric", wrong)) if caught)


@pytest.mark.parametrize("fault", MODEL_FAULTS, ids=lambda fault: fault.seed.__name__)
def test_a_fault_in_a_model_is_refuted(fault: Fault) -> None:
    made = shared_model("v3", len(COUNTS), 1, "exchange")
    broken = seeded(made.gm, fault.seed, 1)
    proof = prove_modules(trace_of("v3", LAYERS).gm, broken, made.cuts, made.axes, group_tokens="exchange")
    assert caught_by(proof, model_is_wrong(fault.seed)) == fault.caught_by
    assert fault.message in proof.failures[0].message


def test_without_a_fault_nothing_is_refuted() -> None:
    assert not model_is_wrong(nothing)


@pytest.mark.parametrize("fault", HAND_FAULTS, ids=lambda fault: fault.name)
def test_a_fault_in_a_hand_written_module_is_refuted(fault: Fault) -> None:
    options = MODES[fault.mode]
    made = shared_hand(fault.module, 2, 1, **options)
    recut = fault.recut or (lambda cut: cut)
    cuts = {n: recut(cut) for n, cut in made.cuts.items()}
    proof = proof_of_hand(fault.module, fault.mode, replace(made, gm=seeded(made.gm, fault.seed, 1), cuts=cuts))
    counts = [4, 4] if "same" in options else COUNTS
    try:
        right = run_hand(
            fault.module, counts, **options, change=lambda rank, gm: seeded(gm, fault.seed, rank), recut=recut
        )
    except Exception:
        right = False
    assert caught_by(proof, not right) == fault.caught_by
    assert fault.message in proof.failures[0].message


def test_refutes_any_swapped_operand() -> None:
    """Reading any other value of the same shape is noticed, unless it is the same value."""
    generator, made, done = random.Random(0), shared_model("v3", 2, 1, "exchange"), 0
    facts = proof_of_model("v3", 2, 1, "exchange").facts
    while done < 40:
        graph = seeded(made.gm, nothing, 1)
        values = [n for n in graph.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor) and n.users]
        old = generator.choice(values)
        alike = [n for n in values if str(n.meta["val"]) == str(old.meta["val"]) and facts[n.name] != facts[old.name]]
        order = {n: i for i, n in enumerate(graph.graph.nodes)}
        new = generator.choice(alike) if alike else old
        users = [
            u
            for u in old.users
            if order[u] > order[new] and u.target not in (aten.new_empty.default, aten.new_ones.default)
        ]
        if new is old or not users or old.target is aten.new_empty.default:
            continue
        users[0].replace_input_with(old, new)
        proof = prove_modules(trace_of("v3", LAYERS).gm, graph, made.cuts, made.axes, group_tokens="exchange")
        assert not proof.holds, (users[0], old, new, facts[old.name], facts[new.name])
        done += 1


def test_a_number_of_rows_other_than_stated() -> None:
    made = shared_hand("fused", 2, 1, 9)
    proof = prove_modules(traced("fused"), made.gm, made.cuts, made.axes, group_tokens=8)
    assert "rows padded to 8; found 9" in told(proof)
    with pytest.raises(Refused, match="expected 9 rows padded to 8"):
        RowNumbers(8, ()).check(8, 9)


def test_groups_of_several_sizes() -> None:
    """A module of two ranks and one of four: their N is agreed on by the four, of each number of rows for itself."""
    gm = traced("two groups")
    first, second = calls(gm, aten.mm.default)
    small, large = Axis("dp", "small", 2, 1, (0, 1)), group_of(4, 1)
    modules = [SharedModule("o_proj", "a", (first.name,), large, True)]
    modules += [SharedModule("lm_head", "b", (second.name,), small, True)]
    made = share_modules(gm, modules, "exchange")

    def messages(seed: Callable[[fx.GraphModule, int], None]) -> str:
        broken = seeded(made.gm, seed, 1)
        return told(prove_modules(gm, broken, made.cuts, made.axes, group_tokens="exchange"))

    def agreed_on_by_two(graph: fx.GraphModule, rank: int) -> None:
        calls(graph, c10d.all_reduce.default)[0].update_arg(2, "small")

    def padded_to_the_other(graph: fx.GraphModule, rank: int) -> None:
        one, other = calls(graph, aten.select.int)
        one.args, other.args = other.args, one.args

    def over_the_other_group(graph: fx.GraphModule, rank: int) -> None:
        calls(graph, c10d.all_to_all_single.default)[-1].update_arg(3, GROUP)

    assert messages(nothing) == ""
    assert "to be agreed on by all of module group" in messages(agreed_on_by_two)
    assert "rows padded to the largest of all ranks" in messages(padded_to_the_other)
    assert "expected a collective over small; found module group" in messages(over_the_other_group)
