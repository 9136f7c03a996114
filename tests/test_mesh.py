"""Groups against the systems' own formulas, written here once more; and the mistakes that stay behind."""

from __future__ import annotations

import itertools
import math
import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpcompile.errors import GroupError
from cpcompile.mesh import RankGroups, Sizes, rank_groups
from cpcompile.mesh.orders import AXES
from cpcompile.mesh.sizes import MODULES

MANY = settings(max_examples=300, deadline=None)


def sets(groups) -> set[frozenset[int]]:
    return {frozenset(int(rank) for rank in group) for group in groups}


def of(kind: str, groups: RankGroups) -> set[frozenset[int]]:
    return sets(groups[kind].groups)


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def split(draw, whole: int) -> tuple[int, int, int]:
    first = draw(st.sampled_from(divisors(whole)))
    second = draw(st.sampled_from(divisors(whole // first)))
    return first, second, whole // first // second


@st.composite
def valid(draw, *orders: str) -> tuple[Sizes, str | tuple[str, ...]]:
    """Sizes that fit, with an order; no world is larger than 96."""
    order = draw(st.sampled_from(orders or ["vllm", "sglang", "cann-recipes", "tuple"]))
    inside = order in ("sglang", "cann-recipes")
    left = 96
    grid_sizes = []
    for most in (12, 3, 1 if inside else 4, 1 if inside else 3, 2):
        grid_sizes.append(draw(st.integers(1, min(most, left))))
        left //= grid_sizes[-1]
    tp, pp, dp, cp, external_dp = grid_sizes
    attn_dp, attn_cp, attn_tp = draw(split(tp))
    stage = dp * cp * tp
    moe_dp, moe_ep, moe_tp = draw(split(stage))
    if order == "sglang":
        moe_dp, moe_ep = draw(st.sampled_from([(1, 1), (1, tp), (attn_cp, 1), (attn_cp, tp // attn_cp)]))
        moe_tp = tp // moe_dp // moe_ep
    along = draw(st.sampled_from(["dp", "cp", "tp", "stage"]))
    extent = {"dp": dp * attn_dp, "cp": cp * attn_cp, "tp": attn_tp, "stage": stage}[along]
    modules = {m: draw(st.sampled_from(divisors(extent))) for m in MODULES if draw(st.booleans())}
    otp = draw(st.none() | st.sampled_from(divisors(attn_tp)))
    if otp is not None:
        modules.pop("o_proj", None)
    ratio = draw(st.none() | st.sampled_from(divisors(attn_tp)))
    sizes = Sizes(
        external_dp=external_dp,
        dp=None if inside else dp,
        pp=pp,
        cp=None if inside else cp,
        tp=tp,
        **{"attn_dp": attn_dp, "attn_cp": attn_cp, "attn_tp": attn_tp},
        **{"moe_dp": moe_dp, "moe_ep": moe_ep, "moe_tp": moe_tp},
        **modules,
        flashcomm2_otp=otp,
        prefill_tp_ratio=ratio,
        head_replicas=None if ratio is None else draw(st.sampled_from(divisors(ratio))),
        shared_weight=otp in (None, 1) and draw(st.booleans()),
        mc2=draw(st.booleans()),
        module_along=along,
    )
    return sizes, draw(st.permutations(AXES)).copy() if order == "tuple" else order


# ---- what always holds ---------------------------------------------------------------------------------------------


@given(valid())
@settings(max_examples=1000, deadline=None)
def test_invariants(case):
    sizes, order = case
    found = rank_groups(sizes, order)
    s = found.sizes
    assert s.attn_tp * s.attn_cp * s.attn_dp == s.tp
    stage_of = stages(found)
    for kind in found.kinds.values():
        ranks = [rank for group in kind.groups for rank in group]
        assert sorted(ranks) == list(range(found.world)), kind.name  # a partition: each rank in exactly one group
        assert {len(group) for group in kind.groups} == {kind.size}
        # torch's process groups order their ranks: a place in the data is a place in the communicator
        assert all(list(group) == sorted(group) for group in kind.groups)
        for group in kind.groups:
            stages_met = {stage_of[rank] for rank in group}
            assert len(stages_met) == (kind.size if kind.name == "pp" else 1), kind.name
    asked = [name for name in (*MODULES, "flashcomm2_otp") if getattr(s, name) is not None]
    assert all(found[name].size == getattr(s, name) for name in asked)
    for name in ("attn_dp", "attn_cp", "attn_tp", "moe_ep", "moe_tp", "pp", "tp"):
        assert found[name].size == getattr(s, name)
    users = {}
    for communicator in found.communicators():
        assert users.setdefault((communicator.ranks, communicator.purpose), communicator) is communicator
        if {"shared_weight", "mc2", "p_tp"} & set(communicator.kinds):
            assert len(communicator.kinds) == 1  # nothing of the model's runs in it
    assert {(g, k.purpose) for k in found.kinds.values() for g in k.groups} == set(users)


def stages(found: RankGroups) -> dict[int, tuple[int, int]]:
    """Rank to its (external replica, stage), from the axes' sizes alone."""
    shape = [getattr(found.sizes, axis) for axis in found.order.axes]
    where = {}
    for place in itertools.product(*(range(n) for n in shape)):
        rank = 0
        for coordinate, n in zip(place, shape, strict=True):
            rank = rank * n + coordinate
        named = dict(zip(found.order.axes, place, strict=True))
        where[rank] = (named["external_dp"], named["pp"])
    return where


@given(valid(), st.data())
@MANY
def test_filling_in_is_stable_and_orders_are_deterministic(case, data):
    sizes, order = case
    found = rank_groups(sizes, order)
    again = rank_groups(found.sizes, order)  # all sizes given, world too
    assert again == found
    assert again.communicators() == found.communicators()
    rank = data.draw(st.integers(0, found.world - 1))
    assert found.of(rank) == {name: kind.groups[kind.index(rank)] for name, kind in found.kinds.items()}
    axes = data.draw(st.lists(st.sampled_from(list(found.grid)), unique=True, min_size=1))
    sub = found.submesh(rank, axes)
    assert sub.shape == tuple(found.grid[axis] for axis in axes)
    assert (sub == rank).sum() == 1
    for dim, axis in enumerate(axes):
        lines = np.moveaxis(sub, dim, -1).reshape(-1, sub.shape[dim])
        if axis in found.kinds:
            assert {tuple(line) for line in lines.tolist()} <= set(found[axis].groups)


# ---- the systems' formulas -----------------------------------------------------------------------------------------


@given(valid("sglang"))
@MANY
def test_sglang_formulas(case):
    s = replace(case[0], external_dp=1)
    found = rank_groups(s, "sglang")
    tp, atp, cp, dp = s.tp, s.attn_tp, s.attn_cp, s.attn_dp
    ep, mtp, mdp = s.moe_ep, s.moe_tp, s.moe_dp
    base = [p * tp for p in range(s.pp)]
    a, d_range = range, range(dp)
    assert of("attn_tp", found) == sets(a(b + k * atp, b + (k + 1) * atp) for b in base for k in range(cp * dp))
    assert of("attn_cp", found) == sets(
        [b + d * atp * cp + t + c * atp for c in range(cp)] for b in base for d in d_range for t in range(atp)
    )
    assert of("moe_ep", found) == sets(
        [b + m * ep * mtp + t + e * mtp for e in range(ep)] for b in base for m in range(mdp) for t in range(mtp)
    )
    assert of("moe_tp", found) == sets(a(b + k * mtp, b + (k + 1) * mtp) for b in base for k in range(ep * mdp))
    copies = sets([b + j + m * ep * mtp for m in range(mdp)] for b in base for j in range(ep * mtp))
    assert of("moe_dp", found) == (of("attn_cp", found) if cp > mdp else copies)
    assert of("pp", found) == sets(range(j, s.pp * tp, tp) for j in range(tp))
    # rank in stage = (dp_rank·cp + cp_rank)·attn_tp + attn_tp_rank
    for d, c, t in itertools.product(range(dp), range(cp), range(atp)):
        rank = (d * cp + c) * atp + t
        assert [found[k].of(rank).index(rank) for k in ("attn_dp", "attn_cp", "attn_tp")] == [d, c, t]


@given(valid("vllm"))
@MANY
def test_vllm_formulas(case):
    s = case[0]
    found = rank_groups(s)
    x_range, pp, cp, tp, dp = range(s.external_dp), s.pp, s.cp, s.tp, s.dp

    def at(x, d, p, c, t):
        return (((x * dp + d) * pp + p) * cp + c) * tp + t

    fixed = list(itertools.product(x_range, range(pp), range(cp), range(tp)))
    assert of("dp", found) == sets([at(x, d, p, c, t) for d in range(dp)] for x, p, c, t in fixed)
    stage = sets(
        [at(x, d, p, c, t) for d in range(dp) for c in range(cp) for t in range(tp)] for x in x_range for p in range(pp)
    )
    for name in ("mc2", "shared_weight"):
        if getattr(s, name):
            assert of(name, found) == stage
    if s.module_along == "dp" and s.attn_dp == 1:
        for module in [m for m in MODULES if getattr(s, m) is not None]:
            size = getattr(s, module)
            assert of(module, found) == sets(
                [at(x, k * size + i, p, c, t) for i in range(size)] for x, p, c, t in fixed for k in range(dp // size)
            )
    if s.attn_tp == tp:
        otp, bases = s.flashcomm2_otp, range(0, found.world, tp)
        if otp is not None:
            step = tp // otp
            assert of("flashcomm2_otp", found) == sets(
                [b + i + j * step for j in range(otp)] for b in bases for i in range(step)
            )
            assert of("flashcomm2_odp", found) == sets(
                range(b + j * step, b + (j + 1) * step) for b in bases for j in range(otp)
            )
        if s.prefill_tp_ratio is not None and s.head_replicas == 1:
            ratio = s.prefill_tp_ratio
            assert of("p_tp", found) == sets(range(k, k + ratio) for k in range(0, found.world, ratio))


@given(valid("cann-recipes"))
@MANY
def test_cann_recipes_formulas(case):
    s = replace(case[0], pp=1, external_dp=1, moe_dp=1, moe_ep=case[0].moe_ep * case[0].moe_dp)
    found = rank_groups(s, "cann-recipes")
    world = found.world
    contiguous = [("attn_tp", s.attn_tp), ("moe_tp", s.moe_tp)]
    if s.module_along == "stage":
        contiguous += [(m, getattr(s, m)) for m in MODULES if getattr(s, m) is not None]
    if s.attn_tp == 1:
        contiguous.append(("attn_cp", s.attn_cp))
    for name, size in contiguous:
        assert of(name, found) == sets(range(k, k + size) for k in range(0, world, size))
    assert of("moe_ep", found) == sets(range(k, world, world // s.moe_ep) for k in range(world // s.moe_ep))


def test_the_worked_examples():
    found = rank_groups(Sizes(tp=8, flashcomm2_otp=2))
    assert found["flashcomm2_otp"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found["flashcomm2_odp"].groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    found = rank_groups(Sizes(tp=8, flashcomm2_otp=1))
    (tp,) = [c for c in found.communicators() if len(c.ranks) == 8]
    assert "flashcomm2_odp" in tp.kinds and "tp" in tp.kinds  # a full o_proj: ODP is TP, in TP's communicator
    found = rank_groups(Sizes(tp=8, prefill_tp_ratio=4, head_replicas=2))
    assert found["p_tp"].groups == ((0, 2), (1, 3), (4, 6), (5, 7))
    found = rank_groups(Sizes(cp=4, o_proj=2, module_along="cp"))
    assert found["o_proj"].groups == ((0, 1), (2, 3))
    found = rank_groups(Sizes(dp=2, tp=4, attn_tp=2), ("tp", "dp"))
    assert found["dp"].groups == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert found["tp"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert found["attn_tp"].groups == ((0, 2), (1, 3), (4, 6), (5, 7))


def test_pipeline_and_context_parallelism_together():
    found = rank_groups(Sizes(tp=8, dp=2, cp=2, pp=2, moe_dp=2, moe_ep=4), "sglang")
    assert found["attn_cp"].groups[:2] == ((0, 2), (1, 3)) and found["attn_cp"].groups[-1] == (13, 15)
    assert found["moe_dp"].of(9) == (9, 13) and found["pp"].of(9) == (1, 9)
    found = rank_groups(Sizes(cp=2, pp=2, tp=2))
    assert found["cp"].groups == ((0, 2), (1, 3), (4, 6), (5, 7)) and found["pp"].of(5) == (1, 5)


def test_what_nobody_gave():
    sglang = rank_groups(Sizes(world=16, pp=2, dp=2, cp=2), "sglang").sizes
    assert (sglang.tp, sglang.attn_dp, sglang.attn_cp, sglang.attn_tp, sglang.moe_tp) == (8, 2, 2, 2, 8)
    vllm = rank_groups(Sizes(world=16, dp=2, tp=4)).sizes
    assert (vllm.external_dp, vllm.attn_tp, vllm.moe_ep, vllm.moe_tp) == (2, 4, 1, 8)
    cann = rank_groups(Sizes(world=16, attn_tp=4), "cann-recipes").sizes
    assert (cann.tp, cann.attn_dp, cann.moe_ep, cann.moe_tp) == (16, 4, 16, 1)
    assert rank_groups(Sizes(world=16), "cann-recipes").sizes.attn_dp == 16
    assert rank_groups(Sizes(dp=4, attn_tp=2), "sglang").sizes.tp == 8
    assert rank_groups(Sizes()).world == 1
    # Module groups run along dp, or are contiguous in cann-recipes.
    assert rank_groups(Sizes(tp=8, attn_tp=2, o_proj=4), "cann-recipes")["o_proj"].groups == (
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    )
    assert rank_groups(Sizes(tp=8, attn_tp=2, o_proj=4), "sglang")["o_proj"].groups == ((0, 2, 4, 6), (1, 3, 5, 7))


# ---- mistakes of vllm-ascend's parallel_state.py (December 2025), and what is right ---------------------------------


def grid(*shape: int) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def test_mlp_has_its_own_size_and_exists():
    """There, mlp's size is read from the embedding's key, and the group is bound to a local name and lost."""
    sizes = {"dp": 4, "embedding": 2, "mlp": 4}
    config = {"embedding": 2, "mlp": 4}
    wrong = sets(grid(4).reshape(-1, config["embedding"]))
    found = rank_groups(Sizes(**sizes))
    assert wrong == {frozenset({0, 1}), frozenset({2, 3})}
    assert of("mlp", found) == {frozenset({0, 1, 2, 3})} != wrong
    assert found["mlp"].of(3) == (0, 1, 2, 3)
    with pytest.raises(GroupError, match=r"no groups of kind 'mlp' \(known: .*embedding"):
        rank_groups(Sizes(dp=4, embedding=2))["mlp"]


def test_module_groups_do_not_cross_stages():
    """There, the grid is (pp, dp, tp), although ranks are laid out with dp before pp."""
    wrong = sets(grid(2, 2, 2).transpose(0, 2, 1).reshape(-1, 2))
    found = rank_groups(Sizes(pp=2, dp=2, tp=2, o_proj=2))
    assert frozenset({0, 2}) in wrong and found["pp"].of(0) == (0, 2)  # rank 2 is rank 0's next stage
    assert found["o_proj"].groups == ((0, 4), (1, 5), (2, 6), (3, 7))


@pytest.mark.parametrize("more", [{"cp": 2}, {"external_dp": 2}])
def test_module_groups_with_context_parallelism_or_external_replicas(more):
    """There, (pp, dp, tp) does not hold all ranks, and the reshape fails."""
    with pytest.raises(ValueError, match="cannot reshape"):
        np.arange(8).reshape(1, 2, 2)
    found = rank_groups(Sizes(dp=2, tp=2, lm_head=2, **more))
    right = ((0, 4), (1, 5), (2, 6), (3, 7)) if "cp" in more else ((0, 2), (1, 3), (4, 6), (5, 7))
    assert found["lm_head"].groups == right


def test_mc2_stays_in_its_stage():
    """There, ranks are cut into runs of dp·cp·tp, as if pp were outside of dp."""
    wrong = sets(grid(8).reshape(-1, 4))
    found = rank_groups(Sizes(pp=2, dp=2, tp=2, mc2=True))
    assert frozenset({0, 1, 2, 3}) in wrong  # ranks 2 and 3 are the second stage
    assert found["mc2"].groups == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_one_communicator_for_the_same_ranks_and_purpose_under_all_its_names():
    """There, the cache's key is the size: one communicator under the first name, destroyed under each."""
    found = rank_groups(Sizes(dp=4, tp=2, o_proj=2, lm_head=2, mlp=4))
    by_size = {}
    for kind in (found["tp"], found["o_proj"]):
        by_size.setdefault(kind.size, kind.of(0))
    assert by_size[2] == (0, 1)  # what o_proj would get: tp's ranks
    mine = {c.kinds: c.ranks for c in found.communicators() if 0 in c.ranks and len(c.ranks) > 1}
    assert mine[("o_proj", "lm_head")] == (0, 2)
    assert mine[("dp", "mlp")] == (0, 2, 4, 6)
    assert len(mine) == len({*mine.values()})


def test_chunks_that_leave_ranks_out_are_refused():
    """There, dp // size floors: dp 6 in chunks of 4 leaves ranks 4 and 5 in no group."""
    wrong = sets(np.arange(6)[: 6 // 4 * 4].reshape(-1, 4))
    assert frozenset().union(*wrong) == {0, 1, 2, 3}
    with pytest.raises(GroupError) as error:
        rank_groups(Sizes(dp=6, lm_head=4))
    assert str(error.value) == (
        "rank groups (vllm): expected dp % lm_head = 0, found 6 % 4 = 2; nearest that work: lm_head 3 or 6, dp 4 or 8"
    )
    assert of("lm_head", rank_groups(Sizes(dp=6, lm_head=3))) == {frozenset({0, 1, 2}), frozenset({3, 4, 5})}


def test_p_tp_is_found_by_the_global_rank():
    """There, the index comes from the rank within the node: rank 9, second of its node of 8, is taken for rank 1."""
    found = rank_groups(Sizes(dp=2, tp=8, prefill_tp_ratio=2))
    local_rank = 9 % 8
    wrong = next(i for i, ranks in enumerate(found["p_tp"].groups) if local_rank in ranks)
    assert (wrong, found["p_tp"].groups[wrong]) == (0, (0, 1))
    assert (found["p_tp"].index(9), found["p_tp"].of(9)) == (4, (8, 9))


def test_p_tp_with_head_replicas_stays_in_its_tp_group():
    """There, all that is not dp counts as heads: with pp 2, heads of different stages are put together."""
    dp, pp, tp, ratio, replicas = 1, 2, 8, 4, 2
    heads = grid(dp * pp * tp).reshape(dp, -1, replicas).transpose(0, 2, 1).reshape(dp * replicas, -1)
    size = heads.shape[1] // (tp // ratio)
    assert frozenset({0, 2, 4, 6}) in sets(heads.reshape(-1, size))  # both halves of the heads
    found = rank_groups(Sizes(dp=dp, pp=pp, tp=tp, prefill_tp_ratio=ratio, head_replicas=replicas))
    assert found["p_tp"].groups == ((0, 2), (1, 3), (4, 6), (5, 7), (8, 10), (9, 11), (12, 14), (13, 15))


def test_shared_weight_is_made_once_in_its_own_communicator():
    """There, two features each make the group, and the second overwrites the first, which nobody destroys."""
    found = rank_groups(Sizes(pp=2, dp=2, tp=2, shared_weight=True, mc2=True, flashcomm2_otp=1))
    assert found["shared_weight"].groups == tuple(
        tuple((d * 2 + p) * 2 + t for d in range(2) for t in range(2)) for p in range(2)
    )
    users = [c.kinds for c in found.communicators() if c.ranks == (0, 1, 4, 5)]
    assert sorted(users) == [("mc2",), ("moe_tp",), ("shared_weight",)]


def test_sglangs_moe_dp_formula_stays_in_its_stage():
    """A review called ``range(i·T + j, (i+1)·T + j, ep·mtp)`` wrong, as if it reached the next stage: it does not."""
    tp, ep, mtp, pp = 8, 4, 1, 2
    formula = sets(range(i * tp + j, (i + 1) * tp + j, ep * mtp) for i in range(pp) for j in range(ep * mtp))
    assert all(len({rank // tp for rank in group}) == 1 for group in formula)
    found = rank_groups(Sizes(tp=tp, pp=pp, cp=2, moe_ep=ep, moe_dp=2), "sglang")
    assert of("moe_dp", found) == formula


# ---- sizes that do not fit -----------------------------------------------------------------------------------------

SUGGESTED = re.compile(r"nearest that work: (.*)$")


@pytest.mark.parametrize(
    ("order", "sizes", "message"),
    [
        ("vllm", {"world": 12, "tp": 8}, "= 8 and world 12; nearest that work: tp 6 or 12, world 8 or 16"),
        ("vllm", {"tp": 8, "attn_tp": 3}, "attn_tp 3 = 6 and tp 8; nearest that work: attn_tp 2 or 4, tp 6 or 9"),
        ("sglang", {"tp": 6, "dp": 4}, "nearest that work: tp 4 or 8, dp 3 or 6"),
        (
            "sglang",
            {"tp": 8, "moe_ep": 4},
            "expected moe_ep·moe_dp = tp where moe_ep > 1, found moe_ep 4, moe_dp 1, tp 8",
        ),
        ("sglang", {"tp": 8, "cp": 4, "moe_dp": 2}, "expected moe_dp to be 1 or attn_cp, found moe_dp 2, attn_cp 4"),
        (
            "sglang",
            {"tp": 8, "dp": 2, "attn_dp": 4},
            "expected dp = attn_dp (it divides tp here), found dp 2, attn_dp 4",
        ),
        ("vllm", {"dp": 4, "tp": 2, "moe_ep": 3}, "and ranks of a stage 8; nearest that work: moe_ep 2 or 4"),
        ("vllm", {"tp": 8, "flashcomm2_otp": 3}, "expected attn_tp % flashcomm2_otp = 0, found 8 % 3 = 2; nearest"),
        ("vllm", {"cp": 4, "o_proj": 2}, "found 1 % 2 = 1; nearest that work: o_proj 1, module_along cp or stage"),
        ("vllm", {"tp": 8, "prefill_tp_ratio": 4, "head_replicas": 3}, "nearest that work: head_replicas 2 or 4"),
        ("vllm", {"tp": 8, "flashcomm2_otp": 2, "shared_weight": True}, "nearest that work: flashcomm2_otp 1"),
        ("vllm", {"tp": 8, "dp": 2, "flashcomm2_otp": 2, "o_proj": 2}, "to be cut by one of o_proj and flashcomm2_otp"),
        (("pp", "tp"), {"dp": 2, "tp": 2}, "expected dp = 1, since the order has no such axis, found dp 2"),
        ("vllm", {"dp": 8, "lm_head": 3, "mlp": 5}, "nearest that work: dp 15"),
        ("vllm", {"tp": 8, "lm_head": 3, "attn_tp": 5}, "expected attn_dp·attn_cp·attn_tp = tp"),
        ("vllm", {"tp": 0}, "tp: expected an integer of at least 1, found 0; use 1 or more"),
        ("vllm", {"tp": True}, "tp: expected an integer of at least 1, found True"),
        ("vllm", {"module_along": "pp"}, "module_along: found 'pp'"),
        ("vlm", {}, "found 'vlm' (did you mean 'vllm'?)"),
        (("tp", "ddp"), {}, "no axis is called 'ddp' (did you mean 'dp'?)"),
        (("tp", "tp"), {}, "axis 'tp' is listed 2 times"),
    ],
)
def test_errors_name_constraint_numbers_and_what_works(order, sizes, message):
    with pytest.raises(GroupError) as error:
        rank_groups(Sizes(**sizes), order)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert_works(order, sizes, str(error.value))


def assert_works(order, sizes: dict, message: str) -> int:
    """Try every value that ``message`` says works; the number of them."""
    found = SUGGESTED.search(message)
    tried = 0
    for part in found[1].split(", ") if found else ():
        name, values = part.split(" ", 1)
        for value in values.split(" or "):
            rank_groups(Sizes(**{**sizes, name: value if name == "module_along" else int(value)}), order)
            tried += 1
    return tried


def test_two_mistakes_are_both_named():
    with pytest.raises(GroupError, match=r"nearest for this alone: .*lm_head 2 or 4.*; broken too: .*8 % 3 = 2"):
        rank_groups(Sizes(dp=8, tp=8, lm_head=3, flashcomm2_otp=3))


sizes_at_random = st.fixed_dictionaries(
    {},
    optional={
        name: st.integers(1, 5)
        for name in ("dp", "pp", "cp", "tp", "attn_dp", "attn_cp", "attn_tp", "moe_ep", "moe_tp", "o_proj", "lm_head")
    },
)


@given(sizes_at_random, st.sampled_from(["vllm", "sglang", "cann-recipes"]))
@MANY
def test_any_sizes_work_or_are_refused_with_values_that_work(sizes, order):
    try:
        found = rank_groups(Sizes(**sizes), order)
    except GroupError as error:
        message = str(error)
        assert "expected" in message and "found" in message
        assert_works(order, sizes, message)
        assert "nearest" in message or "no change of one size" in message
    else:
        assert all(getattr(found.sizes, name) == size for name, size in sizes.items())


def test_a_rank_or_an_axis_that_does_not_exist():
    found = rank_groups(Sizes(dp=2, tp=2))
    for rank in (-1, 4):
        with pytest.raises(GroupError, match=f"expected a rank from 0 to 3, found {rank}"):
            found.of(rank)
    for axes in (["tp", "attn_tp"], ["dp", "dp"], ["experts"]):
        with pytest.raises(GroupError, match="expected each axis of"):
            found.submesh(0, axes)
    assert found.submesh(3, ["tp", "dp"]).tolist() == [[0, 2], [1, 3]]


def test_data_needs_no_torch():
    """Groups are data: they are computed where no torch is imported."""
    code = "from cpcompile.mesh import Sizes, rank_groups; rank_groups(Sizes(tp=8)); print('torch' in sys.modules)"
    code = f"import sys; {code}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
