"""Causal attention: a fused attention kernel of CUDA under a mask that is causal -> the same kernel without a mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, op_name, sizes
from cpcompile.passes.fused_attention import FUSED
from cpcompile.passes.mask_meaning import Affine, Shown
from cpcompile.passes.mask_reader import MaskReader
from cpcompile.passes.token_layout import ONE

# Both fix the causal diagonal in the upper left corner, which is that of the mask for as many queries as keys.
_KERNELS = frozenset(f"aten::_scaled_dot_product_{n}_attention" for n in ("cudnn", "efficient"))


@dataclass(frozen=True)
class CausalAttention:
    """``kernel(q, k, v, mask)`` -> ``kernel(q, k, v, is_causal=True)``; without both where the mask shows every key.

    The kernel skips what is hidden, and the mask ``[T, T]`` is not made. Under tracing models make a mask of tensors
    that they leave to the kernel elsewhere; on two H200 that took 63 of the 100 ms of two layers at 16K tokens.

    Refuses: a mask that is not exactly causal (padding, windows, several requests), and one of other than as many
    queries as keys (a prefix, a shard's rows).

    Source: ``torch.nn.functional.scaled_dot_product_attention``: ``is_causal`` is ``ones(Tq, Tk).tril(diagonal=0)``.
    """

    name = "causal-attention"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result, reader = PassResult(), MaskReader(gm)
        for node in find_masked(gm):
            mask = FUSED[op_name(node.target)].mask
            causal = _is_causal(node, arguments(node)[mask], reader)
            if isinstance(causal, str):
                result.refuse(node, causal)
                continue
            _set(node, mask, None)
            _set(node, "is_causal", causal)
            result.rewrites += 1
        if result.rewrites:
            gm.graph.eliminate_dead_code()
        return result.finish(gm)


def find_masked(gm: fx.GraphModule) -> list[fx.Node]:
    """CUDA's kernels that are given a mask."""
    calls = (n for n in gm.graph.nodes if n.op == "call_function" and op_name(n.target) in _KERNELS)
    return [n for n in calls if arguments(n).get(FUSED[op_name(n.target)].mask) is not None]


def _set(node: fx.Node, name: str, value: bool | None) -> None:
    """Give an argument by its name, with the defaults of those before it."""
    if name in node.kwargs:
        node.update_kwarg(name, value)
        return
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    at = next(i for i, argument in enumerate(schema) if argument.name == name)
    node.args = (*node.args, *(argument.default_value for argument in schema[len(node.args) : at + 1]))
    node.update_arg(at, value)


def _is_causal(node: fx.Node, mask: fx.Node, reader: MaskReader) -> bool | str:
    """Whether the mask is causal (True) or shows everything (False); else why it stays."""
    args, found = arguments(node), reader.read(mask)
    if args.get("is_causal"):
        return "attention that is causal and has a mask"
    if not isinstance(found, Shown) or found.negated or not found.additive:
        return "its mask is not known to be causal"
    if not found.conditions:
        return False
    shapes = [sizes(args[name]) for name in ("query", "key")]
    queries, keys = (shape[-2] if shape else None for shape in shapes)
    (condition, *others) = found.conditions
    if others or not isinstance(condition, Affine) or condition.steps[-2:] != (ONE, -ONE) or any(condition.steps[:-2]):
        return "its mask is not causal alone"
    if queries is None or queries != keys or condition.offset != 0:
        return f"causal attention of {queries} queries and {keys} keys: its kernels begin where as many are"
    return True
