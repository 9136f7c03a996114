"""npu MoE dispatch: experts on gathered rows, summed and scattered -> rows to their experts' ranks and back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from cpcompile import expert_ops  # noqa: F401  registers the op
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import (
    NATIVE,
    arguments,
    bound,
    emit,
    erase,
    group_name_of,
    is_collective,
    is_wait,
    only_user,
    sizes,
)
from cpcompile.passes.expert_shares import Numbers
from cpcompile.passes.npu_mc2 import hcom_name
from cpcompile.passes.npu_ops import missing_ops
from cpcompile.passes.npu_routed_experts import NEEDED, applied
from cpcompile.passes.npu_uneven import Group, group_of

aten = torch.ops.aten
_OPS = ("npu_moe_distribute_dispatch_v2", "npu_moe_distribute_combine_v2")
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
HIDDEN, ROWS, CHOSEN, EXPERTS, RANKS = (1024, 7168), 512, 16, 512, (2, 384)


class Differs(Exception):
    """The graph is not of the form that is rewritten, or the ops do not take it."""


@dataclass(frozen=True)
class Site:
    """Experts between gathers and a reduce-scatter.

    Args:
        experts: the ``routed_experts`` call.
        scatter: the reduce-scatter of what they give.
        adds: sums between the two, and what each adds.
        rows: this rank's ``hidden``, ``ids`` and ``weights`` ahead of their gathers, ``[c, ..]``.
        tokens: T, of which every rank has up to ``c`` in order.
    """

    experts: fx.Node
    scatter: fx.Node
    adds: list[tuple[fx.Node, fx.Node]]
    rows: list[fx.Node]
    tokens: int


@dataclass(frozen=True)
class NpuMoeDispatch:
    """``all_gather, routed_experts, reduce_scatter`` -> ``npu_moe_distribute_dispatch_v2``, grouped products,
    ``npu_moe_distribute_combine_v2``.

    Before: all ranks' rows with their experts' numbers and weights on every rank, this rank's experts on them, and a
    sum over the ranks of which each keeps its rows.
    After: each row goes to the ranks of its K experts alone, and what these make of it comes back and is summed by
    weight. Pad rows are inactive: they go nowhere, and are 0 as they were. What else the sum had stays scattered.

    The sum of a row is of its K experts in float32, not of the ranks' sums in the rows' dtype.

    Args:
        group: PyTorch's name of a group of the same ranks that nothing else runs over, as the ops demand.
        name_of: what the communication library calls a process group, by PyTorch's name of it.
        members: what is known of a process group, by its name.

    Refuses, with the reason, other graphs, groups, and what the ops do not take on Atlas A3 (A2 has limits of its own):
    bfloat16 or float16, rows of 1024 to 7168, at most 512 on a rank, whose number the graph knows (the documentation
    has them in static graphs alone), 16 different experts of 512 a token, 2 to 384 ranks.

    Source: the documentation of both ops, ``torch_npu-npu_moe_distribute_dispatch_v2.md`` and ``.._combine_v2.md`` of
    Ascend's op-plugin; the narrower limit where they differ.
    """  # noqa: D205  the first line has the ops

    group: str = ""
    name_of: Callable[[str], str] = field(default_factory=lambda: hcom_name)
    members: Callable[[str], Group] = field(default_factory=lambda: group_of)
    name = "npu-moe-dispatch"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for node in gm.graph.find_nodes(op="call_function", target=torch.ops.cpcompile.routed_experts.default):
            try:
                missing = missing_ops((*_OPS, *NEEDED))
                _require(not missing, missing)
                site = _match(node)
                _check(site)
                self._replace(site, self._own(site, gm))
                result.rewrites += 1
            except Differs as differs:
                result.refuse(node, str(differs))
        return result.finish(gm)

    def _own(self, site: Site, gm: fx.GraphModule) -> Group:
        """This rank among those of ``group``, once that is seen to be right."""
        _require(self.group, "no group of its own is given, which these ops demand")
        own, others = self.members(self.group), self.members(group_name_of(site.scatter))
        experts, (first, _) = _tables(site), arguments(site.experts)["part"]
        _require(
            list(own.ranks) == list(others.ranks),
            f"its group has ranks {list(own.ranks)}, and the experts are on {list(others.ranks)}",
        )
        shared = next((n for n in gm.graph.nodes if is_collective(n) and group_name_of(n) == self.group), None)
        _require(shared is None, f"{shared} runs over its group, which these ops demand for themselves")
        _require(first == own.rank * experts, f"rank {own.rank} has experts from {first} on, not {own.rank * experts}")
        return own

    def _replace(self, site: Site, own: Group) -> None:
        given, at = arguments(site.experts), site.scatter
        hidden, ids, weights = site.rows
        each = int(hidden.meta["val"].shape[0])
        valid = min(max(site.tokens - own.rank * each, 0), each)
        active = None
        if site.tokens % len(own.ranks):
            numbers = emit(at, aten.arange.default, each, device=hidden.meta["val"].device, pin_memory=False)
            active = emit(at, aten.lt.Scalar, numbers, valid)
        dispatch, combine = (getattr(torch.ops.npu, op).default for op in _OPS)
        name, total = self.name_of(self.group), given["part"][1]
        ids, weights = _cast(at, ids, torch.int32), _cast(at, weights, torch.float32)
        sent = emit(at, dispatch, hidden, ids, name, len(own.ranks), own.rank, total, x_active_mask=active)
        rows, _, info, counts, ends = (emit(at, operator.getitem, sent, index) for index in range(5))
        out = applied(at, rows, given["gate_up"], given["down"], counts)
        made = emit(
            at, combine, out, ids, info, ends, weights, name, len(own.ranks), own.rank, total, x_active_mask=active
        )
        if active is not None:  # what an inactive row holds is not said
            column = emit(at, aten.unsqueeze.default, active, -1)
            made = emit(at, aten.where.self, column, made, emit(at, aten.zeros_like.default, made))
        _put(site, made)


def _put(site: Site, made: fx.Node) -> None:
    """``made`` in the place of the experts' part of what is scattered; the rest, if any, is scattered as before."""
    wait = only_user(site.scatter)
    assert wait is not None
    if not site.adds:
        wait.replace_all_uses_with(made)
        erase(wait, collectives=True)
        return
    for add, other in site.adds:
        add.replace_all_uses_with(other)
    after = wait.next
    total = emit(after, aten.add.Tensor, wait, made)
    wait.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    for add, _ in reversed(site.adds):
        if not add._erased:
            erase(add, collectives=True)


def _require(holds: object, reason: str) -> None:
    if not holds:
        raise Differs(reason)


def _tables(site: Site) -> int:
    return int(arguments(site.experts)["gate_up"].meta["val"].shape[0])


def _cast(at: fx.Node, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else emit(at, aten._to_copy.default, node, dtype=dtype)


def _match(node: fx.Node) -> Site:
    given = arguments(node)
    _require(given["part"] is not None, "its experts are not split over ranks by their numbers")
    tokens = given["hidden"].meta["val"].shape[0]
    _require(isinstance(tokens, int), "T is not one number: these ops are for static graphs (--static)")
    scatter, adds = _scattered(node)
    gathers = [_gathered(given[name]) for name in ("hidden", "expert_ids", "expert_weights")]
    same = {(group_name_of(n), bound(n)[1]) for n in gathers} == {(group_name_of(scatter), bound(scatter)[2])}
    _require(same, "its rows are gathered and its sum is scattered over different groups")
    return Site(node, scatter, adds, [bound(n)[0] for n in gathers], tokens)


def _gathered(node: fx.Node) -> fx.Node:
    """The all-gather of which ``node`` are the first rows, in order and in whole."""
    width, cut, rows = (sizes(node) or ())[1:], False, (sizes(node) or ())[0]
    while not is_wait(node):
        _require(node.op == "call_function", "its rows are not gathered from the ranks")
        if node.target is aten.slice.Tensor and not cut:
            given = arguments(node)
            good = given["dim"] == 0 and not given["start"] and given["step"] == 1
            _require(good, "its gathered rows are reordered")
            cut = True
        else:
            plain = node.target in _VIEWS and (sizes(node) or ())[-1:] == width
            _require(plain, "its rows are not gathered alone and in order")
        node = node.args[0]  # type: ignore[assignment]
    gather: fx.Node = node.args[0]  # type: ignore[assignment]
    _require(gather.target is NATIVE.all_gather_into_tensor.default, "its rows are not gathered from the ranks")
    whole, ranks = (sizes(node) or ())[0], bound(gather)[1]
    _require((sizes(node) or ())[1:] == width, "its rows are not gathered alone and in order")
    _require(whole == -(-rows // ranks) * ranks, "its rows are padded otherwise than to the next multiple of the ranks")
    return gather


def _scattered(node: fx.Node) -> tuple[fx.Node, list[tuple[fx.Node, fx.Node]]]:
    """The reduce-scatter of ``node``'s rows in order, and what was added to them on the way."""
    adds: list[tuple[fx.Node, fx.Node]] = []
    width, padded, source = (sizes(node) or ())[-1:], False, node
    while True:
        user = only_user(node)
        _require(user is not None, "its sum is not only scattered")
        assert user is not None
        if user.target is NATIVE.reduce_scatter_tensor.default:
            break
        if user.target is aten.add.Tensor and arguments(user)["alpha"] == 1:
            other = user.args[1] if user.args[0] is node else user.args[0]
            like = isinstance(other, fx.Node) and sizes(other) == sizes(node) and _dtype(other) == _dtype(node)
            _require(like, "something of another shape is added to its sum")
            adds.append((user, other))  # type: ignore[arg-type]
        elif user.target is aten.constant_pad_nd.default and not padded:
            pads = arguments(user)["pad"]
            _require(len(pads) >= 4 and pads[:3] == [0, 0, 0] and not any(pads[4:]), "its sum is padded elsewhere")
            padded = True
        else:
            cast = user.target is aten._to_copy.default and not adds
            view = user.target in _VIEWS and (sizes(user) or ())[-1:] == width
            _require(cast or view, f"its sum is read by {user.target} and not only scattered")
        node = user
    value, reduce_op, ranks, _ = bound(user)
    _require(reduce_op == "sum", f"its sum is scattered with the reduction {reduce_op!r}")
    tokens = (sizes(source) or ())[0]
    rows = -(-tokens // ranks) * ranks
    _require(sizes(value) == (rows, *width), "its sum is not scattered row by row")
    wait = only_user(user)
    _require(wait is not None and is_wait(wait), "its sum is not only scattered")
    _require(_dtype(value) == _dtype(arguments(source)["hidden"]), f"its sum is scattered as {_dtype(value)}")
    return user, adds


def _dtype(node: fx.Node) -> torch.dtype:
    return node.meta["val"].dtype  # type: ignore[no-any-return]


def _check(site: Site) -> None:
    """What the ops take."""
    given, (hidden, ids, _) = arguments(site.experts), site.rows
    (each, width), chosen = hidden.meta["val"].shape, ids.meta["val"].shape[1]
    (_, total), ranks, dtype = given["part"], bound(site.scatter)[2], _dtype(hidden)
    _require(dtype in (torch.bfloat16, torch.float16), f"rows of {dtype}: the ops take bfloat16 and float16")
    _require(_dtype(given["gate_up"]) == _dtype(given["down"]) == dtype, f"its tables are not of {dtype} as its rows")
    _require(HIDDEN[0] <= width <= HIDDEN[1], f"rows of {width}: the ops take {HIDDEN[0]} to {HIDDEN[1]}")
    _require(each <= ROWS, f"{each} rows on a rank: the ops take up to {ROWS}")
    _require(chosen <= CHOSEN, f"{chosen} experts of a token: the ops take up to {CHOSEN}")
    _require(RANKS[0] <= ranks <= RANKS[1], f"{ranks} ranks: the ops take {RANKS[0]} to {RANKS[1]}")
    _require(total == ranks * _tables(site), f"{_tables(site)} of {total} experts are here, on each of {ranks} ranks")
    _require(total <= EXPERTS, f"{total} experts: the ops take up to {EXPERTS}")
    numbers = Numbers(ids)
    found = numbers.of(ids)
    router = numbers.total == total and found is not None and torch.equal(found, torch.arange(total))
    _require(router, "its experts are not a router's topk: the ops take different ones alone")
