"""npu key cache: normed and rotated keys that are written to two paged caches -> torch_npu's op that does all of it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, is_contiguous, only_user, sizes
from cpcompile.passes.npu_ops import missing_ops
from cpcompile.passes.token_layout import product

aten = torch.ops.aten
OP = "npu_kv_rmsnorm_rope_cache_v2_functional"
LATENT, ROPE = 512, 64  # the sizes of keys that the kernel takes
_DTYPES = (torch.float16, torch.bfloat16)
_MOVES = (
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.unsqueeze.default, aten.select.int, aten.clone.default,
)  # fmt: skip


@dataclass(frozen=True)
class NpuKeyCache:
    """``npu_rms_norm, npu_interleave_rope``, two ``npu_scatter_nd_update`` -> ``npu_kv_rmsnorm_rope_cache_v2``.

    Before: of rows ``[T, 512 + 64]``, the first part normed and the second rotated, each written to its paged cache
    ``[blocks, size, 1, 512 or 64]`` at one list of places.
    After: one op, in its functional form: the caches that it returns are what the graph returns, and those that it was
    given stay.

    Refuses, with the reason, keys that are read elsewhere, or gathered before they are written, other sizes and dtypes,
    and where torch_npu does not have the op.

    Source: torch_npu's documentation of ``npu_kv_rmsnorm_rope_cache``, cache mode PA.
    """

    name = "npu-key-cache"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        scatter = getattr(torch.ops.npu, "npu_scatter_nd_update", None)
        if scatter is None:
            return result
        writes = [w for n in gm.graph.find_nodes(op="call_function", target=scatter.default) if (w := _write(n))]
        place = {node: number for number, node in enumerate(gm.graph.nodes)}
        rotated = [w for w in writes if w.op == "npu_interleave_rope"]
        for normed in (w for w in writes if w.op == "npu_rms_norm"):
            partner = next((w for w in rotated if _together(normed, w)), None)
            refused = missing_ops((OP,)) or _refused(normed, partner, place)
            if refused or partner is None:
                result.refuse(normed.node, refused)
                continue
            _replace(normed, partner)
            rotated.remove(partner)
            result.rewrites += 1
        return result.finish(gm)


@dataclass(frozen=True)
class _Write:
    """``node`` writes to rows of ``cache`` what ``call`` of ``op`` makes of columns ``start`` and on of ``keys``."""

    node: fx.Node
    op: str
    call: fx.Node
    cache: fx.Node
    places: fx.Node
    keys: fx.Node
    start: int


def _write(node: fx.Node) -> _Write | None:
    given = arguments(node)
    cache, places, made = _moved(given["input"]), given["indices"], _moved(given["updates"])
    op, call = "npu_interleave_rope", made
    if _calls(made, operator.getitem) and made.args[1] == 0 and isinstance(made.args[0], fx.Node):
        op, call = "npu_rms_norm", made.args[0]
    if not _calls(call, *(getattr(torch.ops.npu, op).default for op in (op,) if not missing_ops((op,)))):
        return None
    if _calls(places, aten.unsqueeze.default):
        places = places.args[0]
    part = _columns(_moved(call.args[0]))
    return (
        _Write(node, op, call, cache, places, *part) if part and (sizes(places) or (0, 0))[1:] in ((), (1,)) else None
    )


def _moved(node: object) -> fx.Node:
    """What ``node`` has the elements of, through views that keep all of them and the last dim."""
    assert isinstance(node, fx.Node)
    while _calls(node, *_MOVES):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        old, new = sizes(source) or (), sizes(node) or ()
        if product(old) != product(new) or old[-1:] != new[-1:]:
            break
        node = source
    return node


def _columns(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The rows ``[T, D]`` that ``node`` has columns of, and from which one on."""
    if _calls(node, operator.getitem) and _calls(node.args[0], aten.split_with_sizes.default):
        given = arguments(node.args[0])
        start = sum(given["split_sizes"][: node.args[1]])
    elif _calls(node, aten.slice.Tensor) and arguments(node)["step"] == 1:
        given = arguments(node)
        start = given["start"] or 0
    else:
        return None
    rows: fx.Node = given["self"]
    last = rows.meta["val"].ndim == 2 and given["dim"] % 2 == 1
    return (rows, start) if last and isinstance(start, int) and start >= 0 else None


def _together(normed: _Write, rotated: _Write) -> bool:
    width = int(normed.call.args[1].meta["val"].shape[0])  # type: ignore[union-attr]
    return (normed.keys, normed.places, normed.start + width) == (rotated.keys, rotated.places, rotated.start)


def _refused(normed: _Write, rotated: _Write | None, place: dict[fx.Node, int]) -> str:
    if rotated is None:
        return "no rotated keys of the same rows are written to the same places"
    gamma, (_, cos, sin) = normed.call.args[1], rotated.call.args[:3]
    assert isinstance(gamma, fx.Node) and isinstance(cos, fx.Node) and isinstance(sin, fx.Node)
    tokens, *widths = (sizes(normed.keys) or ())[0], gamma.meta["val"].shape[0], cos.meta["val"].shape[-1]
    if widths != [LATENT, ROPE]:
        return f"keys of {widths[0]} and {widths[1]}: the kernel takes {LATENT} and {ROPE}"
    operands = (normed.keys, gamma, cos, sin, normed.cache, rotated.cache)
    dtypes = {node.meta["val"].dtype for node in operands}
    if len(dtypes) != 1 or not dtypes <= set(_DTYPES):
        return f"operands of {', '.join(sorted(map(str, dtypes)))}: the kernel takes one of {_DTYPES}"
    for write, width in ((normed, LATENT), (rotated, ROPE)):
        shape = sizes(write.cache) or ()
        if len(shape) != 4 or shape[2:] != (1, width):
            return f"the cache is not [blocks, size, 1, {width}]"
        if only_user(write.call) is None or not _ends_in(write.call, write.node):
            return "keys are read elsewhere than in the cache"
    if not all(sizes(angle) == (tokens, 1, 1, ROPE) for angle in (cos, sin)):
        return "cosines are not [T, 1, 1, D]"
    first = min(place[normed.node], place[rotated.node])
    if any(place[node] > first for node in (cos, sin, rotated.cache, normed.cache)):
        return "cosines or caches are computed behind the first write"
    return ""


def _ends_in(node: fx.Node, end: fx.Node) -> bool:
    """Whether ``node`` is read by ``end`` alone, through what has one reader each."""
    while node is not end:
        user = only_user(node)
        if user is None or not (user is end or _calls(user, operator.getitem, *_MOVES)):
            return False
        node = user
    return True


def _replace(normed: _Write, rotated: _Write) -> None:
    at = min((normed.node, rotated.node), key=list(normed.node.graph.nodes).index)
    _, cos, sin = rotated.call.args[:3]
    width = LATENT + ROPE
    keys = normed.keys
    if normed.start or keys.meta["val"].shape[1] != width:
        keys = emit(at, aten.slice.Tensor, keys, 1, normed.start, normed.start + width)
    if not is_contiguous(keys):
        keys = emit(at, aten.clone.default, keys, memory_format=torch.contiguous_format)
    for dim in (1, 1):
        keys = emit(at, aten.unsqueeze.default, keys, dim)
    places = emit(at, aten.reshape.default, normed.places, [-1])
    if places.meta["val"].dtype != torch.int64:
        places = emit(at, aten._to_copy.default, places, dtype=torch.int64)
    made = emit(
        at, getattr(torch.ops.npu, OP).default, keys, normed.call.args[1], cos, sin, places, rotated.cache,
        normed.cache, epsilon=arguments(normed.call)["epsilon"], cache_mode="PA",
    )  # fmt: skip
    results = ((rotated.node, 2, ROPE), (normed.node, 3, LATENT))
    flat = [emit(at, aten.reshape.default, emit(at, operator.getitem, made, n), [-1, cols]) for _, n, cols in results]
    for (node, _, _), cache in zip(results, flat, strict=True):
        node.replace_all_uses_with(cache)
        erase(node)


def _calls(node: object, *targets: object) -> TypeGuard[fx.Node]:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
