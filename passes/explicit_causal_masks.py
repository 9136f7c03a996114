"""Explicit causal masks: fused attention that is causal by the numbers of its rows -> the same with a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, getitems, op_name
from cpcompile.passes.fused_attention import FUSED, is_random
from cpcompile.passes.token_layout import size_expr

aten = torch.ops.aten
# They fix the causal diagonal in the upper left corner (of the others that is known for as many queries as keys only),
# and stay, with a mask; the others give way to ``aten.scaled_dot_product_attention``.
_UPPER_LEFT = frozenset(
    f"aten::{n}"
    for n in (
        "scaled_dot_product_attention",
        "_scaled_dot_product_attention_math",
        "_scaled_dot_product_flash_attention_for_cpu",
    )
)
_CARRIED = ("scale", "enable_gqa")


@dataclass(frozen=True)
class ExplicitCausalMasks:
    """``attention(q, k, v, is_causal=True)`` -> ``attention(q, k, v, mask)``, a row of which stands for itself.

    Before -> after: query row ``i`` sees keys up to ``i`` -> ``mask = arange(Tq)[:, None] >= arange(Tk)[None, :]``, as
    what is added to the scores where the op takes no booleans. A part of the queries can be computed with its rows of
    the mask, and not by its rows' numbers. Ops without a mask that fits any length (CUDA's flash, memory-efficient
    and cuDNN kernels) -> ``aten.scaled_dot_product_attention``, which chooses a kernel for the mask.

    Refuses:
        - dropout, and a mask beside ``is_causal``;
        - other than as many queries as keys, where the op's corner of alignment is not documented;
        - an op of which more than the attended values is read and which takes no such mask itself.

    Source: ``torch.nn.functional.scaled_dot_product_attention``: ``is_causal`` is ``ones(Tq, Tk).tril(diagonal=0)``.
    """

    name = "explicit-causal-masks"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for node in find_causal(gm):
            reason = _refusal(node)
            if reason:
                result.refuse(node, reason)
                continue
            _rewrite(node)
            result.rewrites += 1
        return result.finish(gm)


def find_causal(gm: fx.GraphModule) -> list[fx.Node]:
    """Fused attention with ``is_causal=True``."""
    calls = (n for n in gm.graph.nodes if n.op == "call_function" and op_name(n.target) in FUSED)
    return [n for n in calls if arguments(n).get("is_causal") is True]


def _refusal(node: fx.Node) -> str:
    args, name = arguments(node), op_name(node.target)
    queries, keys = (size_expr(args[n].meta["val"].shape[-2]) for n in ("query", "key"))
    if is_random(node):
        return "attention with dropout: it is left whole"
    if FUSED[name].mask and args.get(FUSED[name].mask) is not None:
        return "attention that is causal and has a mask: give it one mask"
    if name not in _UPPER_LEFT and queries != keys:
        return f"causal attention of {queries} queries and {keys} keys: where its mask begins is not documented"
    if name not in _UPPER_LEFT and list(getitems(node) or ()) != [0]:
        return f"{name} takes no causal mask of any length, and more than its first result is read"
    return ""


def _rewrite(node: fx.Node) -> None:
    args, name = arguments(node), op_name(node.target)
    query, key, value = args["query"], args["key"], args["value"]
    kept = name in _UPPER_LEFT
    mask = _mask(node, query, key, boolean=not kept or FUSED[name].boolean)
    carried = {n: args[n] for n in _CARRIED if args.get(n)}
    if kept:
        new = emit(node, node.target, query, key, value, **{FUSED[name].mask: mask}, **carried)  # type: ignore[arg-type]
        node.replace_all_uses_with(new)
        erase(node)
        return
    new = emit(node, aten.scaled_dot_product_attention.default, query, key, value, mask, **carried)
    (first,) = (getitems(node) or {}).values()
    first.replace_all_uses_with(new)
    erase(first, node)


def _mask(like: fx.Node, query: fx.Node, key: fx.Node, *, boolean: bool) -> fx.Node:
    """``[Tq, Tk]``: whether key ``j`` is seen by query ``i``, or what is added to their score."""
    value = query.meta["val"]
    rows, columns = (_counted(like, node) for node in (query, key))
    seen = emit(
        like,
        aten.ge.Tensor,
        emit(like, aten.unsqueeze.default, rows, 1),
        emit(like, aten.unsqueeze.default, columns, 0),
    )
    if boolean:
        return seen
    zero, never = (
        emit(like, aten.scalar_tensor.default, number, dtype=value.dtype, device=value.device)
        for number in (0.0, float("-inf"))
    )
    return emit(like, aten.where.self, seen, zero, never)


def _counted(like: fx.Node, tokens: fx.Node) -> fx.Node:
    """``0, 1, ...`` for the rows of queries or keys."""
    value = tokens.meta["val"]
    count = value.shape[-2]
    size = count if isinstance(count, int) else emit(like, aten.sym_size.int, tokens, value.ndim - 2)
    return emit(like, aten.arange.default, size, device=value.device)
