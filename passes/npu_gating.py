"""npu gating: a router that scores with sigmoids and chooses by groups, as a model writes it out -> torch_npu's op."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, getitems, only_user, sizes
from cpcompile.passes.npu_ops import missing_ops

aten = torch.ops.aten
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST = 2048  # experts, each group counted as a multiple of 32
SIGMOID, TWO_BEST = 1, 1  # values of norm_type and group_select_mode


class Differs(Exception):
    """The graph is not of the form that the op computes."""


@dataclass(frozen=True)
class NpuGating:
    """Sigmoids, a bias, the best groups, their best experts, weights that sum to a factor -> ``npu_moe_gating_top_k``.

    Before: ``sigmoid``, ``add`` of the bias, the sum of each group's two best, the best groups by ``topk``, all other
    groups at minus infinity, ``topk``, ``gather`` of the scores without bias, over their sum plus an epsilon, times a
    factor.
    After: one op, and its choice as int64 where that is read. Experts that score alike, and the order of an unsorted
    ``topk``, are left to the op, as PyTorch leaves them to ``topk``.

    Refuses, with the reason: weights that are not over their sum, other groups than of three experts or more, other
    arithmetic, and where torch_npu does not have the op.

    Source: torch_npu's documentation of ``npu_moe_gating_top_k``; ``DeepseekV3TopkRouter`` of transformers.
    """

    name = "npu-gating"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for choice in gm.graph.find_nodes(op="call_function", target=aten.topk.default):
            masked = choice.args[0]
            if not _calls(masked, aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.where.self):
                continue
            try:
                _require(not (missing := missing_ops(("npu_moe_gating_top_k",))), missing)
                _replace(_match(choice))
                result.rewrites += 1
            except Differs as differs:
                result.refuse(choice, str(differs))
        return result.finish(gm)


@dataclass(frozen=True)
class _Router:
    """``ids`` and ``weights [N, K]`` of ``logits [N, E]`` and ``bias [E]``."""

    logits: fx.Node
    bias: fx.Node
    ids: fx.Node
    weights: fx.Node
    chosen: int
    groups: int
    open_groups: int
    factor: float
    epsilon: float


def _match(choice: fx.Node) -> _Router:
    """From the choice up to the logits, and down to the weights."""
    best = _topk(choice)
    results = getitems(choice)
    _require(results is not None and results.keys() == {1}, "the chosen scores are read with their bias")
    assert results is not None
    biased, mask = _masked(choice.args[0])
    scores, bias = _biased(biased)
    groups, open_groups = _groups(_opened(mask, biased), biased)
    experts = scores.meta["val"].shape[1]
    size = experts // groups
    _require(size > 2 and groups * -(-size // 32) * 32 <= MOST, f"{groups} groups of {size} experts: too few or many")
    _require(best <= open_groups * size, f"{best} experts of {open_groups} groups of {size}")
    weights, factor, epsilon = _weights(results[1], scores)
    logits = arguments(scores)["self"]
    return _Router(logits, bias, results[1], weights, best, groups, open_groups, factor, epsilon)


def _masked(node: Any) -> tuple[fx.Node, fx.Node]:
    """The scores with bias, and what is true where a group is not open."""
    _require(node.target is aten.masked_fill.Scalar, "closed groups are not filled")
    given = arguments(node)
    _require(given["value"] == -math.inf, f"closed groups are at {given['value']}: expected minus infinity")
    return given["self"], given["mask"]


def _biased(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    _require(node.target is aten.add.Tensor and not node.kwargs, "what chooses is not scores and a bias")
    scores, bias = node.args[:2]
    if not _calls(scores, aten.sigmoid.default):
        scores, bias = bias, scores
    _require(_calls(scores, aten.sigmoid.default), "the scores are no sigmoids")
    assert isinstance(scores, fx.Node) and isinstance(bias, fx.Node)
    logits = arguments(scores)["self"].meta["val"]
    dtypes = {logits.dtype, scores.meta["val"].dtype, node.meta["val"].dtype}
    _require(len(dtypes) == 1 and logits.dtype in _DTYPES, f"scores of {', '.join(sorted(map(str, dtypes)))}")
    _require(logits.ndim == 2 and isinstance(logits.shape[1], int), "the scores are not [N, E]")
    _require(sizes(bias) == (sizes(scores) or ())[1:], "the bias is not one number for each expert")
    wide = torch.promote_types(bias.meta["val"].dtype, logits.dtype)
    _require(wide == logits.dtype, f"a bias of {bias.meta['val'].dtype} and scores of {logits.dtype}")
    return scores, bias


def _opened(mask: fx.Node, biased: fx.Node) -> fx.Node:
    """The zeros and ones of groups ``[N, G]`` that say in ``mask [N, E]`` which experts are closed."""
    _require(mask.target in (aten.bitwise_not.default, aten.logical_not.default), "the mask is not of open groups")
    node = _before(mask)
    if _calls(node, aten._to_copy.default) and node.kwargs == {"dtype": torch.bool}:
        node = _before(node)
    _require(node.target in _VIEWS and sizes(node) == sizes(biased), "the mask is not spread over experts")
    node = _before(node)
    if _calls(node, aten.clone.default):
        node = _before(node)
    _require(_calls(node, aten.expand.default), "the mask is not spread over experts")
    column = _before(node)
    spread, ones = sizes(node) or (), sizes(column) or ()
    _require(len(spread) == len(ones) == 3 and ones[2] == 1 and ones[:2] == spread[:2], "the mask is not of groups")
    _require(_calls(column, aten.unsqueeze.default), "the mask is not of groups")
    return _before(column)


def _groups(opened: fx.Node, biased: fx.Node) -> tuple[int, int]:
    """The number of groups, and of open ones."""
    _require(_calls(opened, aten.scatter.value), "the open groups are not marked")
    given = arguments(opened)
    zeros, item = given["self"], given["index"]
    zero = _calls(zeros, aten.zeros_like.default, aten.new_zeros.default, aten.zeros.default) or (
        _calls(zeros, aten.full.default, aten.full_like.default) and arguments(zeros)["fill_value"] == 0
    )
    _require(zero and given["value"] == 1 and given["dim"] in (1, -1), "the open groups are not marked by ones")
    _require(_calls(item, operator.getitem) and item.args[1] == 1, "the open groups are not chosen")
    topk = item.args[0]
    open_groups = _topk(topk)
    total = _before(topk)
    _require(_calls(total, aten.sum.dim_IntList), "groups are not chosen by sums")
    summed = arguments(total)
    _require([d % 3 for d in summed["dim"]] == [2] and not summed["keepdim"], "groups are not chosen by sums")
    part = summed["self"]
    _require(_calls(part, operator.getitem) and part.args[1] == 0, "groups are not chosen by their best")
    pair = part.args[0]
    _require(_topk(pair) == 2, "groups are not chosen by their two best")
    grouped = _before(pair)
    shape = sizes(grouped) or ()
    _require(grouped.target in _VIEWS and _before(grouped) is biased and len(shape) == 3, "the groups are not of it")
    _require(shape[0] == (sizes(biased) or ())[0] and sizes(zeros) == shape[:2], "the groups are not of its rows")
    return int(shape[1]), open_groups


def _topk(node: Any) -> int:
    """How many are the largest of the last dim."""
    _require(_calls(node, aten.topk.default), "the largest are not chosen")
    given = arguments(node)
    ndim = given["self"].meta["val"].ndim
    _require(
        given["dim"] % ndim == ndim - 1 and given["largest"], "the largest of another dim, or the least, are chosen"
    )
    _require(isinstance(given["k"], int), "how many are chosen is no constant")
    return int(given["k"])


def _weights(ids: fx.Node, scores: fx.Node) -> tuple[fx.Node, float, float]:
    """The weights, what they sum to, and the epsilon beside their sum."""
    gathered = next((user for user in ids.users if _calls(user, aten.gather.default)), None)
    _require(gathered is not None, "the chosen scores are not gathered")
    assert gathered is not None
    given = arguments(gathered)
    _require(given["self"] is scores and given["dim"] in (1, -1) and given["index"] is ids, "other scores are gathered")
    quotient = next((user for user in gathered.users if _calls(user, aten.div.Tensor)), None)
    _require(quotient is not None and len(gathered.users) == 2, "weights are not over their sum, as the op has them")
    assert quotient is not None
    shifted = quotient.args[1]
    _require(quotient.args[0] is gathered and _calls(shifted, aten.add.Tensor), "weights are not over their sum")
    assert isinstance(shifted, fx.Node)
    total, epsilon = shifted.args
    _require(isinstance(epsilon, float) and _calls(total, aten.sum.dim_IntList), "weights are not over their sum")
    assert isinstance(total, fx.Node) and isinstance(epsilon, float)
    summed = arguments(total)
    over = summed["self"] is gathered and [d % 2 for d in summed["dim"]] == [1] and summed["keepdim"]
    _require(over and len(total.users) == len(shifted.users) == 1, "weights are not over their sum")
    scaled = only_user(quotient)
    if scaled is not None and _calls(scaled, aten.mul.Tensor) and isinstance(scaled.args[1], int | float):
        return scaled, float(scaled.args[1]), epsilon
    return quotient, 1.0, epsilon


def _replace(router: _Router) -> None:
    # Ahead of whichever comes first of what stands for the results.
    like = router.ids
    dtype = router.logits.meta["val"].dtype
    bias = router.bias
    if bias.meta["val"].dtype != dtype:
        bias = emit(like, aten._to_copy.default, bias, dtype=dtype)
    routed = emit(
        like, torch.ops.npu.npu_moe_gating_top_k.default, router.logits, router.chosen, bias=bias,
        k_group=router.open_groups, group_count=router.groups, group_select_mode=TWO_BEST, renorm=0, norm_type=SIGMOID,
        out_flag=False, routed_scaling_factor=router.factor, eps=router.epsilon,
    )  # fmt: skip
    weights, ids = (emit(like, operator.getitem, routed, index) for index in range(2))
    wide = emit(like, aten._to_copy.default, ids, dtype=torch.int64)
    router.weights.replace_all_uses_with(weights)
    erase(router.weights)
    router.ids.replace_all_uses_with(wide)
    erase(router.ids)


def _before(node: Any) -> fx.Node:
    first = node.args[0]
    _require(isinstance(first, fx.Node), "an operand is no tensor")
    assert isinstance(first, fx.Node)
    return first


def _calls(node: object, *targets: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _require(holds: object, reason: str) -> None:
    if not holds:
        raise Differs(reason)
