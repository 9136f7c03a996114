"""npu MLA prolog: all of absorbed MLA ahead of attention, from tokens to queries and written keys -> torch_npu's op."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from cpcompile.passes.base import PassResult
from cpcompile.passes.collectives import arguments, emit, erase, is_collective, is_contiguous, is_wait, only_user, sizes
from cpcompile.passes.head_parts import CUTS, head_parts, is_laid_out, permuted, row_readers
from cpcompile.passes.npu_key_cache import (
    LATENT,
    MOVES,
    ROPE,
    Write,
    calls,
    hand_over,
    moved,
    places_of,
    unfit,
    written_keys,
)
from cpcompile.passes.npu_ops import base_name, first_result, missing_ops

aten = torch.ops.aten
OP = "npu_mla_prolog_v3_functional"
NEEDED = (OP, "npu_rms_norm", "npu_interleave_rope", "npu_scatter_nd_update")
# What the kernel takes.
DTYPE = torch.bfloat16
HIDDEN = (6144, 7168, 7680)
Q_LORA, NOPE = 1536, 128
HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
BLOCKS = (16, 128)  # tokens in a block of the caches
TOKENS = 1 << 20
GATHERED_KEYS = "a gather stands between the keys' product and their cache"
_Order = Mapping[fx.Node, int]


class Differs(Exception):
    """The graph is not of the form that the op computes."""


@dataclass(frozen=True)
class NpuMlaProlog:
    """Products, norms and rotations ahead of absorbed MLA, and two ``npu_scatter_nd_update`` -> ``npu_mla_prolog_v3``.

    Before: of tokens ``[T, H]``, a product that is normed ``[T, 1536]`` and multiplied again, for each head a part that
    meets ``weight_uk [N, 128, 512]`` and one that is rotated; and a product ``[T, 512 + 64]``, its first part normed
    and its second rotated, each written to its paged cache ``[blocks, size, 1, 512 or 64]`` at one list of places.
    After: one op, in its functional form, which also gives the normed queries where others, an indexer, read them.

    The three weights of the tokens and of the queries have to be inputs of the graph, ``[in, out]``: the kernel has
    them in FRACTAL_NZ, no converter of torchair makes that of a value, and a weight that is transposed or cut in the
    graph would be laid out anew at every call, which costs more than the op saves. A parameter that was given to
    ``torch_npu.npu_format_cast(weight, 29)`` ahead of compilation is taken as it is; of others that form is GE's to
    make, at every call.

    Refuses, with the reason, such weights, other sizes and dtypes, quantised products, queries or keys that are
    gathered on their way, or read elsewhere, and where torch_npu does not have the op. That places are within the cache
    is not known here.

    Source: torch_npu 2.13's documentation of ``npu_mla_prolog_v3_functional``, cache mode PA_BSND.
    """

    name = "npu-mla-prolog"

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place."""
        result = PassResult()
        for normed, rotated in written_keys(gm):
            order = {node: number for number, node in enumerate(gm.graph.nodes)}
            try:
                _require(not (missing := missing_ops(NEEDED)), missing)
                _require(not (reason := unfit(normed, rotated)), reason)
                assert rotated is not None
                _replace(_match(normed, rotated, order), order)
                result.rewrites += 1
            except Differs as differs:
                result.refuse(normed.node, str(differs))
        for node in _gathered_keys(gm):
            result.refuse(node, GATHERED_KEYS)
        return result.finish(gm)


@dataclass(frozen=True)
class _Prolog:
    """From ``tokens`` to ``absorbed [N, T, 512]``, ``rotated [T, N, 1, 64]``, and both writes.

    Args:
        tokens: ``[T, H]``.
        weights: ``[H, 1536]``, ``[1536, N (128 + 64)]``, ``[N, 128, 512]``, ``[H, 512 + 64]``.
        norm: of the queries, a call of ``npu_rms_norm``.
        normed: its result.
        up: product of that and the second weight.
    """

    tokens: fx.Node
    weights: tuple[fx.Node, fx.Node, fx.Node, fx.Node]
    norm: fx.Node
    normed: fx.Node
    up: fx.Node
    absorbed: fx.Node
    rotated: fx.Node
    writes: tuple[Write, Write]

    @property
    def shared(self) -> bool:
        """Whether the normed queries are read by others."""
        return any(user is not self.up for user, _ in row_readers(self.normed))


def _match(normed: Write, rotated: Write, order: _Order) -> _Prolog:
    product = moved(normed.keys)
    _require(not _gathered(product, "all_input_nodes"), GATHERED_KEYS)
    _require(not calls(product, operator.getitem, *CUTS), "the keys are columns of a wider product: part its weight")
    _require(calls(product, aten.mm.default), f"the keys are of {_called(product)}, not of tokens and a weight")
    tokens = moved(product.args[0])
    reason = "no other product of the keys' tokens is normed: queries have other tokens, or no norm"
    for norm in product.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_rms_norm.default):
        down = moved(norm.args[0])
        if not calls(down, aten.mm.default) or moved(down.args[0]) is not tokens:
            continue
        try:
            normed_queries, up, absorbed, turned = _queries(norm, rotated)
        except Differs as differs:
            reason = str(differs)
            continue
        given = min((down.args[0], product.args[0]), key=lambda node: order[node])  # type: ignore[index]
        weights = _weight(down), _weight(up), _plain(absorbed.args[1]), _weight(product)
        writes = normed, rotated
        found = _Prolog(given, weights, norm, normed_queries, up, absorbed, turned, writes)  # type: ignore[arg-type]
        _check(found, order)
        return found
    raise Differs(reason)


def _queries(norm: fx.Node, keys: Write) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node]:
    """Of a norm of queries its result, the product behind it, and what heads of that give: absorbed, and rotated."""
    normed = first_result(norm)
    if isinstance(normed, str):
        raise Differs(normed)
    products = [user for user, _ in row_readers(normed) if calls(user, aten.mm.default)]
    for up in products:
        ends = list(head_parts(up))
        absorbed = [end for end in ends if end[0].target is aten.bmm.default]
        if absorbed:
            break
    else:
        _require(not _gathered(normed, "users"), "a gather stands between the queries' norm and their second product")
        raise Differs("the normed queries have no second product whose heads meet a weight")
    turned = [end for end in ends if end[0].target is torch.ops.npu.npu_interleave_rope.default]
    others = [end[0] for end in ends if end not in (*absorbed[:1], *turned[:1])]
    _require(turned, f"the rest of the heads is not rotated by neighbours, but read by {_named(others)}")
    _require(not others, f"the heads are read elsewhere as well, by {_named(others)}")
    (product, plain), (rotation, angled) = absorbed[0], turned[0]
    found = [(plain.start, plain.end), (angled.start, angled.end)]
    wanted = [(0, NOPE), (NOPE, NOPE + ROPE)]
    _require(found == wanted, f"heads have columns {found}: the kernel takes {wanted}")
    _require(
        is_laid_out(plain.dims, "NTC") and is_laid_out(angled.dims, "TN1C"),
        "heads are not [N, T, D], or not [T, N, 1, D]",
    )
    _require(rotation.args[1:3] == keys.call.args[1:3], "queries and keys are rotated by different angles")
    return normed, up, product, rotation


def _check(found: _Prolog, order: _Order) -> None:
    """Sizes, dtypes, and that all is there where the op goes."""
    (rows, hidden), weights = sizes(found.tokens) or (), [sizes(weight) or () for weight in found.weights]
    (heads, _, latent), keys = weights[2], found.writes[0]
    block = (sizes(keys.cache) or ())[1]
    for what, size, sizes_taken in (
        ("tokens of", hidden, HIDDEN),
        ("queries that are normed of", weights[0][1], (Q_LORA,)),
        ("a number of heads,", heads, HEADS),
        ("absorbed queries of", latent, (LATENT,)),
        ("blocks of", block, BLOCKS),
    ):
        _require(size in sizes_taken, f"{what} {size}: the kernel takes {', '.join(map(str, sizes_taken))}")
    wide = [weights[1][1], weights[3][1], *(sizes(gamma) for gamma in _gammas(found))]
    wanted = [heads * (NOPE + ROPE), LATENT + ROPE, (Q_LORA,), (LATENT,)]
    _require(wide == wanted, f"weights have columns {wide}, expected {wanted}")
    several = [size for size in sizes(found.normed) or () if size != 1]
    _require(len(several) <= 2, "the normed queries have tokens in more than one dim")
    _require(not (rows.is_number and rows > TOKENS), f"{rows} tokens: the kernel takes up to {TOKENS}")
    operands = _operands(found)
    dtypes = {node.meta["val"].dtype for node in operands}
    _require(dtypes == {DTYPE}, f"operands of {', '.join(sorted(map(str, dtypes)))}: the kernel takes {DTYPE}")
    first = _first(found, order)
    late = [node for node in (*operands, keys.places) if order[node] >= order[first]]
    _require(not late, f"{', '.join(map(str, late))} is computed behind {first}, which the op gives")


def _operands(found: _Prolog) -> tuple[fx.Node, ...]:
    """As the op takes them, but for the places."""
    normed, rotated = found.writes
    _, cos, sin = rotated.call.args[:3]
    return (found.tokens, *found.weights, *_gammas(found), sin, cos, normed.cache, rotated.cache)  # type: ignore[return-value]


def _gammas(found: _Prolog) -> tuple[Any, Any]:
    return found.norm.args[1], found.writes[0].call.args[1]


def _first(found: _Prolog, order: _Order) -> fx.Node:
    """The first node that one of the op's results replaces, or that reads one."""
    nodes = [found.absorbed, found.rotated, *(write.node for write in found.writes)]
    return min(nodes + list(found.normed.users) * found.shared, key=order.__getitem__)


def _replace(found: _Prolog, order: _Order) -> None:
    at = _first(found, order)
    normed, rotated = found.writes
    *given, sin, cos, keys, ropes = (
        node if is_contiguous(node) else emit(at, aten.clone.default, node, memory_format=torch.contiguous_format)
        for node in _operands(found)
    )
    angles = [emit(at, aten.reshape.default, angle, [-1, ROPE]) for angle in (sin, cos)]
    epsilons = [arguments(norm)["epsilon"] for norm in (found.norm, normed.call)]
    made = emit(
        at, getattr(torch.ops.npu, OP).default, *given, *angles, keys, ropes, cache_index=places_of(at, normed),
        rmsnorm_epsilon_cq=epsilons[0], rmsnorm_epsilon_ckv=epsilons[1], query_norm_flag=found.shared,
    )  # fmt: skip
    query, turned = (emit(at, operator.getitem, made, number) for number in range(2))
    absorbed = only_user(found.absorbed)
    if absorbed is None or permuted(absorbed, "NTC") != "TNC":
        absorbed, query = found.absorbed, emit(at, aten.permute.default, query, [1, 0, 2])
    replaced = [(absorbed, query), (found.rotated, emit(at, aten.unsqueeze.default, turned, 2))]
    if found.shared:
        shape = [int(size) if size.is_number else -1 for size in sizes(found.normed) or ()]  # [1, T, 1536], or two dims
        latents = emit(at, operator.getitem, made, 3)
        replaced.append((found.normed, emit(at, aten.reshape.default, latents, shape)))
    hand_over(at, made, ((normed.node, 5, LATENT), (rotated.node, 6, ROPE)))
    for node, new in replaced:
        node.replace_all_uses_with(new)
        erase(node)


def _gathered_keys(gm: fx.GraphModule) -> list[fx.Node]:
    """Writes of latents that are gathered when they are normed already, as other ranks' are."""
    if missing_ops(NEEDED):
        return []
    writes = gm.graph.find_nodes(op="call_function", target=torch.ops.npu.npu_scatter_nd_update.default)
    latents = [node for node in writes if (sizes(node) or ())[-1:] == (LATENT,)]
    return [node for node in latents if _gathered(arguments(node)["updates"], "all_input_nodes")]


def _gathered(node: fx.Node, way: str) -> bool:
    """Whether ``node`` is gathered, or moves and cuts what is; where ``way`` is ``users``, is so later."""
    passes = (*MOVES, *CUTS, operator.getitem, aten.cat.default, aten.constant_pad_nd.default)
    moves = calls(node, *passes) or is_wait(node)
    return is_collective(node) or (moves and any(_gathered(other, way) for other in getattr(node, way)))


def _weight(product: fx.Node) -> fx.Node:
    """What multiplies the rows, as it came into the graph."""
    weight = product.args[1]
    assert isinstance(weight, fx.Node)
    _require(
        weight.op == "placeholder",
        f"the weight of {product} is a view of [out, in], or computed: the kernel has it as [in, out], in FRACTAL_NZ; "
        "hold it so",
    )
    return weight


def _plain(weight: object) -> fx.Node:
    """``weight``, ahead of views that change nothing."""
    source = moved(weight)
    return source if sizes(source) == sizes(weight) else weight  # type: ignore[return-value]


def _called(node: fx.Node) -> str:
    return base_name(node.target) or node.op


def _named(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(dict.fromkeys(map(_called, nodes))) or "no one"


def _require(holds: object, reason: str) -> None:
    if not holds:
        raise Differs(reason)
