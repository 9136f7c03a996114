"""npu rope: rotary position embeddings as a model writes them out -> torch_npu's ops."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, is_contiguous, sizes
from cpcompile.passes.npu_ops import missing_ops

aten = torch.ops.aten
# float32 is for checks of a model at its own precision: npu_interleave_rope on Atlas A2 and A3 takes the halves.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERLEAVED_WIDTH = 64  # the one size of the last dim that npu_interleave_rope takes
HALF_WIDTHS = range(2, 896, 2)  # those that npu_rotary_mul takes
HALF_OUTER = 1000  # npu_rotary_mul takes fewer requests, and fewer heads


@dataclass(frozen=True)
class NpuRope:
    """Neighbours that are rotated into halves -> ``npu_interleave_rope``; rotated halves -> ``npu_rotary_mul``.

    Before: ``cat(even * cos - odd * sin, odd * cos + even * sin)`` of the even and odd elements of the last dim,
    with a cosine for each pair; or ``x * cos + cat(-second, first) * sin`` of its halves, with one for each element.
    After: one op, which rounds once; the cosines of pairs, and the sines, are repeated for both halves, once for all
    that use them.

    Refuses, with the reason, other rotations, layouts and sizes that the kernels do not take, and where torch_npu does
    not have an op. That cosines are within [-1, 1], as ``npu_rotary_mul`` wants them, is not known here.

    Source: torch_npu's documentation of ``npu_interleave_rope`` and ``npu_rotary_mul``.
    """

    name = "npu-rope"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        whole: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default):
            found = _interleaved(node) or _halves(node)
            if found is None:
                continue
            refused = missing_ops((found.op,)) or _refused(found)
            if refused:
                result.refuse(node, refused)
                continue
            _replace(found, whole)
            result.rewrites += 1
        return result.finish(gm)


@dataclass(frozen=True)
class _Rotation:
    """``out`` is ``x``, rotated by ``op``; ``cos`` and ``sin`` are of pairs where ``paired``, else of elements."""

    op: str
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    out: fx.Node
    paired: bool


def _interleaved(cat: fx.Node) -> _Rotation | None:
    given = arguments(cat)
    if len(given["tensors"]) != 2 or not _is_last(cat, given["dim"]):
        return None
    first, second = given["tensors"]
    if not (_plain(first, aten.sub.Tensor) and _plain(second, aten.add.Tensor)):
        return None
    products = [_factors(term) for term in (*first.args, *second.args)]
    if any(product is None for product in products):
        return None
    straight, turned, *others = (set(product or ()) for product in products)
    for even, odd in itertools.product(straight, turned):
        x = _every_second(even, odd)
        cos, sin = straight - {even}, turned - {odd}
        rest = [cos | {odd}, sin | {even}]
        if x is not None and len(cos) == len(sin) == 1 and others in (rest, rest[::-1]):
            return _Rotation("npu_interleave_rope", x, cos.pop(), sin.pop(), cat, paired=True)
    return None


def _halves(cat: fx.Node) -> _Rotation | None:
    given = arguments(cat)
    if len(given["tensors"]) != 2 or not _is_last(cat, given["dim"]):
        return None
    negated, first = given["tensors"]
    if not _plain(negated, aten.neg.default):
        return None
    x = _two_halves(first, negated.args[0])
    product = next(iter(cat.users)) if len(cat.users) == 1 else None
    turned = _factors(product)
    total = next(iter(product.users)) if product is not None and len(product.users) == 1 else None
    if x is None or turned is None or total is None or not _plain(total, aten.add.Tensor):
        return None
    straight = _factors(_other(total.args, product))
    if straight is None or x not in straight:
        return None
    return _Rotation("npu_rotary_mul", x, _other(straight, x), _other(turned, cat), total, paired=False)


def _refused(found: _Rotation) -> str:
    x, cos, sin = (sizes(node) for node in (found.x, found.cos, found.sin))
    dtypes = {node.meta["val"].dtype for node in (found.x, found.cos, found.sin, found.out)}
    if x is None or cos is None or cos != sin or not len(x) == len(cos) == 4:
        return "what is rotated has not 4 dims, or cosines and sines differ in shape"
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"operands of {', '.join(sorted(map(str, dtypes)))}: the kernels take one of {_DTYPES}"
    width = x[3]
    if cos[3] * (2 if found.paired else 1) != width or sizes(found.out) != x:
        return f"{cos[3]} cosines for {width} elements"
    if found.paired:
        if width != INTERLEAVED_WIDTH:
            return f"the last dim is {width}: npu_interleave_rope takes {INTERLEAVED_WIDTH}"
        return "" if cos[0] == x[0] and cos[1] == 1 and cos[2] in (1, x[2]) else "cosines are not [B, 1, S, D]"
    if width not in HALF_WIDTHS:
        return f"the last dim is {width}: npu_rotary_mul takes even sizes below {HALF_WIDTHS.stop}"
    rows = [dim for dim in (1, 2) if cos[dim] == x[dim] and cos[3 - dim] == 1]
    if not rows or cos[0] not in (1, x[0]):
        return "cosines are not [B, 1, S, D] or [B, S, 1, D]"
    outer = (x[0], x[3 - rows[0]])
    if not all(size.is_number and size < HALF_OUTER for size in outer):
        return f"{outer[0]} requests of {outer[1]} heads: npu_rotary_mul takes fewer than {HALF_OUTER}"
    return ""


def _replace(found: _Rotation, whole: dict[fx.Node, fx.Node]) -> None:
    out, angles = found.out, [found.cos, found.sin]
    if found.paired:
        angles = [_repeated(angle, whole) for angle in angles]
    x, *angles = (
        node if is_contiguous(node) else emit(out, aten.clone.default, node, memory_format=torch.contiguous_format)
        for node in (found.x, *angles)
    )
    target = getattr(torch.ops.npu, found.op).default
    out.replace_all_uses_with(emit(out, target, x, *angles))
    erase(out)


def _repeated(angle: fx.Node, whole: dict[fx.Node, fx.Node]) -> fx.Node:
    """``angle`` of pairs, for both elements of each: right behind it, so that all its users can share it."""
    if angle not in whole:
        behind = angle.next
        while behind.op == "placeholder":
            behind = behind.next
        whole[angle] = emit(behind, aten.cat.default, [angle, angle], -1)
    return whole[angle]


def _every_second(even: object, odd: object) -> fx.Node | None:
    """The value whose elements with even numbers, and with odd ones, along the last dim these are."""
    return _parts(even, odd, lambda width: ((0, width, 2), (1, width, 2)))


def _two_halves(first: object, second: object) -> fx.Node | None:
    """The value whose halves along the last dim these are."""
    return _parts(first, second, lambda width: ((0, width // 2, 1), (width // 2, width, 1)))


def _parts(first: object, second: object, wanted: Callable[[int], object]) -> fx.Node | None:
    if not (_calls(first, aten.slice.Tensor) and _calls(second, aten.slice.Tensor)):
        return None
    one, two = arguments(first), arguments(second)
    source = one["self"]
    width = source.meta["val"].shape[-1]
    if source is not two["self"] or not isinstance(width, int) or width % 2:
        return None
    if not all(_is_last(source, given["dim"]) for given in (one, two)):
        return None
    found = tuple((given["start"] or 0, min(_end(given["end"], width), width), given["step"]) for given in (one, two))
    return source if found == wanted(width) else None


def _end(end: object, width: int) -> int:
    return end if isinstance(end, int) and end >= 0 else width if end is None else -1


def _factors(node: object) -> tuple[fx.Node, fx.Node] | None:
    """Both operands of a product of tensors."""
    if not _calls(node, aten.mul.Tensor) or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    left, right = node.args
    return left, right  # type: ignore[return-value]


def _other(pair: Sequence[object] | None, one: object) -> fx.Node:
    """The operand beside ``one``; where both are ``one``, ``one``."""
    assert pair is not None
    other = pair[1] if pair[0] is one else pair[0]
    assert isinstance(other, fx.Node)
    return other


def _plain(node: object, target: object) -> TypeGuard[fx.Node]:
    """A call of ``target`` on tensors alone."""
    return _calls(node, target) and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)


def _is_last(node: fx.Node, dim: int) -> bool:
    ndim = node.meta["val"].ndim
    return bool(dim % ndim == ndim - 1)


def _calls(node: object, *targets: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
