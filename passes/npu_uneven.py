"""npu uneven: pads around a reduce-scatter or an all-gather -> torch_npu's ops that move as many rows as there are."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx as fx
from torch.utils._sympy.functions import FloorDiv

from cpcompile.axes import resolve_group
from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import NATIVE, arguments, bound, emit, erase, group_name_of, is_wait, only_user, sizes
from cpcompile.passes.ge_forms import slices
from cpcompile.passes.npu_ops import missing_ops
from cpcompile.passes.token_layout import Expr, size_expr

aten = torch.ops.aten
_OPS = ("reduce_scatter_tensor_uneven", "allgather_in_tensor_uneven")
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
Rows = fx.Node | int


@dataclass(frozen=True)
class Group:
    """A process group as torchair's ops name it: PyTorch's tag, global ranks, and which of them this is."""

    tag: str
    ranks: Sequence[int]
    rank: int


def group_of(name: str) -> Group:
    """The process group that PyTorch calls ``name``."""
    group = resolve_group(name)
    tag = torch.distributed.distributed_c10d._get_group_tag(group)
    ranks = torch.distributed.get_process_group_ranks(group)
    return Group(tag, ranks, torch.distributed.get_rank(group))


@dataclass(frozen=True)
class NpuUneven:
    """``pad, reduce_scatter`` -> ``reduce_scatter_tensor_uneven, pad``; ``all_gather, cut`` -> ``cut,
    allgather_in_tensor_uneven``.

    Before: T rows, padded to n * ceil(T/n), then scattered; or ceil(T/n) rows of each rank gathered, of which T are
    kept.
    After: T rows are scattered, of which rank r gets those from r * ceil(T/n) on, fewer or none on the last ranks, and
    pads its own up to ceil(T/n); or each rank sends its rows without pads, and T arrive. Any T is right, 0 and less
    than n too.

    Row counts are sums, products and quotients of T: torchair has no converter for a minimum.

    The library may add ranks' values in another order than in an even reduce-scatter.

    Args:
        group_of: what is known of a process group, by its name.

    Refuses, with the reason, collectives without pads, pads that others read, and where torch_npu does not have an op.
    """  # noqa: D205  the first line has the ops

    group_of: Callable[[str], Group] = field(default_factory=lambda: group_of)
    name = "npu-uneven"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for target, change in (
            (NATIVE.reduce_scatter_tensor.default, self._scatter),
            (NATIVE.all_gather_into_tensor.default, self._gather),
        ):
            for node in gm.graph.find_nodes(op="call_function", target=target):
                refused = missing_ops(_OPS, "npu_define") or change(node)
                if refused:
                    result.refuse(node, refused)
                else:
                    result.rewrites += 1
        return result.finish(gm)

    def _scatter(self, node: fx.Node) -> str:
        value, reduce_op, size, _ = bound(node)
        wait, pad = only_user(node), _pad_behind(value)
        if pad is None or wait is None or not is_wait(wait):
            return "no rows are appended to what is scattered"
        source = arguments(pad)["self"]
        if reduce_op != "sum":
            return f"the reduction is {reduce_op!r}"
        if _padded(size, (sizes(source) or ())[-2]) != (sizes(pad) or ())[-2]:
            return "rows are appended otherwise than to the next multiple of the ranks"
        width = value.meta["val"].shape[1:]
        if not all(isinstance(one, int) for one in width):
            return "the size of a row is not said"
        group = self.group_of(group_name_of(node))
        tokens = _rows(node, source, source.meta["val"].ndim - 2)
        counts = _counts(node, tokens, size)
        made = emit(
            node, torch.ops.npu_define.reduce_scatter_tensor_uneven.default,
            emit(node, aten.reshape.default, source, [tokens, *width]), counts, counts[group.rank], "sum", group.tag,
            list(group.ranks), size, [],
        )  # fmt: skip
        if group.rank:  # the first rank's rows are as many as any
            behind = _plus(node, counts[0], _times(node, counts[group.rank], -1))
            made = emit(node, aten.cat.default, [made, slices(node, made, 0, behind, 0)], 0)
        made.meta["val"] = wait.meta["val"]
        wait.replace_all_uses_with(made)
        wait.graph.erase_node(wait)
        erase(node, collectives=True)
        return ""

    def _gather(self, node: fx.Node) -> str:
        x, size, _ = bound(node)
        wait = only_user(node)
        cut = only_user(wait) if wait is not None and is_wait(wait) else None
        given = arguments(cut) if cut is not None and cut.target is aten.slice.Tensor else {}
        if not given or given["dim"] != 0 or given["start"] or given["step"] != 1:
            return "no rows are cut off what is gathered"
        assert cut is not None
        tokens: Rows = given["end"]
        expr = size_expr(tokens.meta["val"] if isinstance(tokens, fx.Node) else tokens)
        if _padded(size, expr) != (sizes(wait) or ())[0]:
            return "rows are cut off otherwise than from the next multiple of the ranks"
        group = self.group_of(group_name_of(node))
        counts = _counts(cut, tokens, size)  # here, as what says T may be behind the gather
        own = emit(cut, aten.slice.Tensor, x, 0, 0, counts[group.rank]) if group.rank else x
        made = emit(
            cut, torch.ops.npu_define.allgather_in_tensor_uneven.default, own, counts[group.rank], counts, group.tag,
            list(group.ranks), size, [],
        )  # fmt: skip
        made.meta["val"] = cut.meta["val"]
        cut.replace_all_uses_with(made)
        erase(cut, collectives=True)
        return ""


def _pad_behind(value: fx.Node) -> fx.Node | None:
    """The rows of zeros appended to what ``value`` is a view of, if it is read here alone."""
    while value.op == "call_function" and value.target in _VIEWS and len(value.users) == 1:
        value = value.args[0]  # type: ignore[assignment]
    if value.target is not aten.constant_pad_nd.default or len(value.users) != 1:
        return None
    given = arguments(value)
    outer = (sizes(value) or ())[:-2]
    appended = len(given["pad"]) >= 4 and given["pad"][:3] == [0, 0, 0] and not any(given["pad"][4:])
    return value if appended and not given["value"] and all(size == 1 for size in outer) else None


def _padded(size: int, tokens: Expr) -> Expr:
    return size * FloorDiv(tokens + size - 1, size)


def _counts(at: fx.Node, tokens: Rows, size: int) -> list[Rows]:
    """How many of the T rows lie from ``r * c`` to ``(r + 1) * c``, for each rank r, where c is ceil(T/n).

    Up to ``k * c`` there are ``k * c - q * (k * c - T)`` rows, where q says whether that is at least T: 1 if so, else
    0. It is ``(k * c + n) // (T + n)``, as ``k * c <= T + n - 1``.
    """
    plus, times, over = (partial(each, at) for each in (_plus, _times, _over))
    each = over(plus(tokens, size - 1), size)
    ends: list[Rows] = [0, each]  # the first rank's are never beyond T
    for k in range(2, size):
        end = times(each, k)
        beyond = over(plus(end, size), plus(tokens, size))
        ends.append(plus(end, times(beyond, plus(tokens, times(end, -1)))))
    ends.append(tokens)
    return [each, *(plus(b, times(a, -1)) for a, b in itertools.pairwise(ends[1:]))]


def _rows(at: fx.Node, value: fx.Node, dim: int) -> Rows:
    size = value.meta["val"].shape[dim]
    return size if isinstance(size, int) else emit(at, aten.sym_size.int, value, dim)


def _arithmetic(op: Callable[[Any, Any], Any], at: fx.Node, a: Rows, b: Rows) -> Rows:
    known = isinstance(a, int) and isinstance(b, int)
    return int(op(a, b)) if known else emit(at, op, a, b)


_plus = partial(_arithmetic, operator.add)
_times = partial(_arithmetic, operator.mul)
_over = partial(_arithmetic, operator.floordiv)
