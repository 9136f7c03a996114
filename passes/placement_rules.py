"""The one table of what ops do to tokens: which are row-wise (each output row from the same input row), which linear.

An op that is not in the table mixes tokens, with that as the recorded reason; nothing is guessed. Every row says
where its knowledge comes from, and ``tests/test_placement_rules.py`` holds each aten row against DTensor's own
sharding propagation.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.fx as fx

from cpcompile.passes.fused_attention import FUSED, is_random, named_arguments
from cpcompile.passes.token_layout import ONE, Expr, Shape, TokenDim, through_view

Layouts = Mapping[fx.Node, tuple[TokenDim | None, ...]]


class Unused:
    """Demand of an operand whose data the op does not read (``new_ones``, ``sym_size``): any copy will do."""


UNUSED = Unused()
Demand = TokenDim | None | Unused


@dataclass(frozen=True)
class RowWise:
    """The op computes each row from the same row of its operands.

    Args:
        operands: per tensor operand, where its rows lie, ``None`` if every row needs all of it, or ``UNUSED``.
        outputs: per output, where the rows lie.
        size_arg: position of a size list in ``args`` that names the token dim and must be made local in a shard.
        identity: the op passes its input on unchanged (a slice over all tokens).
    """

    operands: Mapping[fx.Node, Demand]
    outputs: tuple[TokenDim | None, ...]
    size_arg: int | None = None
    identity: bool = False


@dataclass(frozen=True)
class Mixing:
    """The op needs whole operands, and why."""

    reason: str


@dataclass(frozen=True)
class Call:
    """One op call as the rules see it: its operands' shapes and token dims, and its outputs' shapes."""

    node: fx.Node
    tokens: Expr
    layouts: Layouts
    shapes: Mapping[fx.Node, tuple[Shape, ...]]

    def shape(self, node: fx.Node) -> Shape:
        """Shape of ``node``'s first output."""
        return self.shapes[node][0]

    def layout(self, node: object) -> TokenDim | None:
        """Token dim of ``node``'s first output, if known."""
        known = self.layouts.get(node) if isinstance(node, fx.Node) else None
        return known[0] if known else None

    def arg(self, index: int, name: str, default: object = None) -> object:
        """The argument at ``index``, or called ``name``."""
        if index < len(self.node.args):
            return self.node.args[index]
        return self.node.kwargs.get(name, default)

    def dims(self, index: int, name: str) -> list[int]:
        """A dim or list of dims among the arguments; ``[]`` where absent."""
        value = self.arg(index, name)
        if value is None:
            return []
        return list(value) if isinstance(value, list | tuple) else [value]  # type: ignore[list-item]

    @property
    def tensors(self) -> list[fx.Node]:
        """The operands that are tensors, each once, in argument order."""
        return [n for n in self.node.all_input_nodes if self.shapes.get(n)]

    @property
    def out(self) -> Shape:
        """Shape of the first output."""
        return self.shapes[self.node][0]


Rule = Callable[[Call], RowWise | Mixing]


@dataclass(frozen=True)
class OpRule:
    """A row of the table.

    Args:
        rule: what the op does to token dims.
        source: where that is documented.
        linear: ``"additive"`` (a sum of partial operands is a partial result), ``"homogeneous"`` (linear in one
            operand, the others constant) or ``""``.
    """

    rule: Rule = field(repr=False)
    source: str
    linear: str = ""


def _dim(value: object, ndim: int) -> int:
    assert isinstance(value, int), value
    return value + ndim if value < 0 else value


FirstRule = Callable[[Call, Shape, TokenDim], "tuple[TokenDim, bool] | TokenDim | Mixing"]


def _first(rule: FirstRule, size_arg: int | None = None) -> Rule:
    """A rule in the first operand's shape and token dim that says where its rows end up; other operands stay whole.

    ``rule`` returns the token dim of every output, or that and whether the op is the identity on the tokens.
    """

    def applied(call: Call) -> RowWise | Mixing:
        source = call.tensors[0]
        layout = call.layout(source)
        if layout is None:
            return Mixing("its first operand carries no tokens")
        out = rule(call, call.shape(source), layout)
        if isinstance(out, Mixing):
            return out
        out, identity = out if isinstance(out, tuple) else (out, False)
        demands: dict[fx.Node, Demand] = dict.fromkeys(call.tensors)
        demands[source] = layout
        return RowWise(demands, (out,) * len(call.shapes[call.node]), size_arg, identity)

    return applied


def _aligned(call: Call, out: Shape, operands: list[fx.Node]) -> tuple[TokenDim, dict[fx.Node, Demand]] | Mixing:
    """Operands broadcast against ``out``: the dim on which all token-carrying operands agree.

    Where one operand's tokens are queries and another's are keys (``[T, 1] >= [1, T]`` of a causal mask), rows are the
    queries', which come first, and keys are needed whole.
    """
    places: dict[fx.Node, TokenDim] = {}
    for node in operands:
        layout = call.layout(node)
        if layout is not None:
            here = layout.shifted(len(out) - len(call.shape(node)))
            if call.shape(node)[layout.dim] != out[here.dim]:
                return Mixing("the token dim is broadcast against a longer one")
            places[node] = here
    if not places:
        return Mixing("no operand carries tokens")
    found = min(places.values(), key=lambda place: place.dim)
    demands: dict[fx.Node, Demand] = {}
    for node in operands:
        shape = call.shape(node)
        dim = found.dim - (len(out) - len(shape))
        broadcast = dim < 0 or (shape[dim] == ONE and places.get(node) != found)
        if not broadcast and places.get(node, found) != found:
            return Mixing("operands carry their tokens on different dims")
        if not broadcast and shape[dim] != out[found.dim]:
            return Mixing("nothing says that its operands have as many tokens")
        demands[node] = None if broadcast else TokenDim(dim, found.outer, found.inner)
    return found, demands


def pointwise(call: Call) -> RowWise | Mixing:
    """Elementwise with broadcasting."""
    if not call.shapes[call.node]:
        return Mixing("returns no tensor")
    aligned = _aligned(call, call.out, call.tensors)
    if isinstance(aligned, Mixing):
        return aligned
    return RowWise(aligned[1], (aligned[0],) * len(call.shapes[call.node]))


def view(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """Row-major reshaping; ``view.dtype`` reinterprets bits instead."""
    if isinstance(call.arg(1, "dtype"), torch.dtype):
        return Mixing("reinterprets the elements as another dtype")
    out = through_view(shape, call.out, layout, call.tokens)
    return Mixing("the tokens would be split over several dims") if out is None else out


def expand(call: Call) -> RowWise | Mixing:
    """Repeats dims of size 1. Keys repeated for each query (a batched product's other operand) have a row per query."""
    source = call.tensors[0]
    layout = call.layout(source)
    if layout is None:
        return Mixing("its first operand carries no tokens")
    by = len(call.out) - len(call.shape(source))
    for dim in range(layout.dim + by):
        if call.out[dim] == call.tokens != ONE and (dim < by or call.shape(source)[dim - by] == ONE):
            return RowWise({source: None}, (TokenDim(dim),), 1)
    out = layout.shifted(by)
    if call.out[out.dim] != call.shape(source)[layout.dim]:
        return Mixing("the token dim is expanded")
    return RowWise({source: layout}, (out,), 1)


def permute(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    order = [_dim(d, len(shape)) for d in call.dims(1, "dims")]
    return TokenDim(order.index(layout.dim), layout.outer, layout.inner)


def transpose(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    a, b = _dim(call.arg(1, "dim0"), len(shape)), _dim(call.arg(2, "dim1"), len(shape))
    return TokenDim({a: b, b: a}.get(layout.dim, layout.dim), layout.outer, layout.inner)


def t(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    return TokenDim(len(shape) - 1 - layout.dim, layout.outer, layout.inner)


def unsqueeze(call: Call, shape: Shape, layout: TokenDim) -> TokenDim:
    return layout.shifted(_dim(call.arg(1, "dim"), len(shape) + 1) <= layout.dim)


def squeeze(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    named = [_dim(d, len(shape)) for d in call.dims(1, "dim")] or list(range(len(shape)))
    if layout.dim in named:
        return Mixing("may squeeze the token dim: a shard can have one row")
    return layout.shifted(-sum(d < layout.dim and shape[d] == ONE for d in named))


def select(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    dim = _dim(call.arg(1, "dim"), len(shape))
    return Mixing("selects some tokens") if dim == layout.dim else layout.shifted(-(dim < layout.dim))


def slice_(call: Call, shape: Shape, layout: TokenDim) -> tuple[TokenDim, bool] | Mixing:
    if _dim(call.arg(1, "dim", 0), len(shape)) != layout.dim:
        return layout, False
    whole = call.out == shape and call.arg(4, "step", 1) == 1
    return (layout, True) if whole else Mixing("takes some of the tokens")


def _along(index: int, name: str, default: int | None = None) -> Rule:
    """Row-wise in the first operand as long as the dim that the op works along is not the token dim."""

    def rule(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
        along = _dim(call.arg(index, name, default), len(shape))
        return Mixing("works along the token dim") if along == layout.dim else layout

    return _first(rule)


def _aligned_along(index: int, name: str, default: int | None = None) -> Rule:
    """Like ``_along`` for ops whose tensor operands (index, source) run in step with the first."""

    def rule(call: Call) -> RowWise | Mixing:
        aligned = _aligned(call, call.out, call.tensors)
        if isinstance(aligned, Mixing):
            return aligned
        found, demands = aligned
        if _dim(call.arg(index, name, default), len(call.out)) == found.dim:
            return Mixing("works along the token dim")
        shapes = [call.shape(n) for n in call.tensors]
        if any(len(s) != len(call.out) or s[found.dim] != call.out[found.dim] for s in shapes):
            return Mixing("operands have different token counts")
        return RowWise(demands, (found,))

    return rule


def reduction(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    reduced = [_dim(d, len(shape)) for d in call.dims(1, "dim") or range(len(shape))]
    if layout.dim in reduced:
        return Mixing("reduces over the tokens")
    return layout if len(call.out) == len(shape) else layout.shifted(-sum(d < layout.dim for d in reduced))


def norm(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    """Normalisation over trailing dims: ``(input, normalized_shape, weight, …)``."""
    first = len(shape) - len(call.dims(1, "normalized_shape"))
    return Mixing("normalises over the tokens") if layout.dim >= first else layout


def matmul(call: Call) -> RowWise | Mixing:
    """``mm``, ``bmm``, ``linear`` and ``addmm``: rows of the left operand (queries), or batches of both."""
    args = [a for a in call.node.args if isinstance(a, fx.Node)]
    if "addmm" in str(call.node.target):
        bias, left, right = args[:3]
        if len(call.shape(bias)) != 1:
            return Mixing("adds a matrix to a product")
        others: dict[fx.Node, Demand] = {bias: None}
    else:
        left, right = args[:2]
        others = dict.fromkeys(args[2:])
    a, b = call.layout(left), call.layout(right)
    ndim = len(call.shape(left))
    if left is right:
        return Mixing("multiplies a value with itself")
    batched = "bmm" in str(call.node.target)
    if a is not None and batched and a.dim == 0 and b in (None, a):
        return RowWise({left: a, right: a}, (a,))
    if a is not None and a.dim < ndim - 1 and not (batched and a.dim == 0):
        # Of two operands with tokens the right one holds keys or values: a row of queries meets all of them.
        return RowWise({left: a, right: None, **others}, (a,))
    if a is None and b is not None and b.dim == ndim - 1 and "linear" not in str(call.node.target):
        return RowWise({left: None, right: b, **others}, (b,)) if not others else Mixing("bias along the tokens")
    return Mixing("multiplies tokens with tokens")


def embedding(call: Call) -> RowWise | Mixing:
    weight, indices = call.tensors[:2]
    layout = call.layout(indices)
    if layout is None:
        return Mixing("looks up rows of a token table")
    return RowWise({weight: None, indices: layout}, (layout,))


def _is_mask(node: fx.Node) -> bool:
    return node.meta["val"].dtype in (torch.bool, torch.uint8)


def lookup(call: Call) -> RowWise | Mixing:
    """``index(table, [ids, ...])``: a row for each row of the ids, which broadcast, from the whole table."""
    table, indices = call.node.args[0], call.arg(1, "indices")
    assert isinstance(table, fx.Node) and isinstance(indices, list | tuple)
    if any(not isinstance(i, fx.Node) or _is_mask(i) for i in indices):
        return Mixing("selects by a mask, or keeps leading dims of what it looks rows up in")
    ids = list(dict.fromkeys(indices))
    if table in ids:
        return Mixing("looks up rows of itself")
    rest = len(call.shape(table)) - len(indices)
    aligned = _aligned(call, call.out[: len(call.out) - rest], ids)
    if isinstance(aligned, Mixing):
        return Mixing("looks up rows of a token table") if call.layout(table) else aligned
    return RowWise({table: None, **aligned[1]}, (aligned[0],))


def masked_write(call: Call) -> RowWise | Mixing:
    """``index_put(x, [mask], scalar)``: elementwise, the mask being of the leading dims."""
    indices, value = call.arg(1, "indices"), call.arg(2, "values")
    target = call.node.args[0]
    assert isinstance(target, fx.Node) and isinstance(indices, list | tuple) and isinstance(value, fx.Node)
    if len(indices) != 1 or not isinstance(indices[0], fx.Node) or not _is_mask(indices[0]):
        return Mixing("writes to rows that it names")
    mask, shape = indices[0], call.shape(target)
    if call.shape(value) != () or call.shape(mask) != shape[: len(call.shape(mask))]:
        return Mixing("writes several values")
    found = {place for place in map(call.layout, (target, mask)) if place is not None}
    if len(found) != 1 or mask is target:
        return Mixing("operands carry their tokens on different dims")
    rows = found.pop()
    return RowWise({target: rows, mask: rows if rows.dim < len(call.shape(mask)) else None, value: None}, (rows,))


def routed(call: Call) -> RowWise | Mixing:
    """Tokens, their experts' ids and weights in step; every row needs all experts."""
    tokens, tables = call.tensors[:3], call.tensors[3:]
    places = {call.layout(n) for n in tokens}
    rows = places.pop()
    if places or rows is None or rows.dim != 0 or len(tables) != 2 or any(call.layout(n) for n in tables):
        return Mixing("its tokens, ids and weights are not split alike, by their rows")
    return RowWise({**dict.fromkeys(tokens, rows), **dict.fromkeys(tables)}, (rows,))


def index_select(call: Call) -> RowWise | Mixing:
    """Rows of the indices, or of a table whose rows are not looked up."""
    source, index = call.tensors[0], call.tensors[-1]
    dim = _dim(call.arg(1, "dim"), len(call.shape(source)))
    layout, places = call.layout(index), call.layout(source)
    if layout is not None and index is not source:
        return RowWise({source: None, index: layout}, (layout.shifted(dim),))
    if places is None or places.dim == dim:
        return Mixing("looks up rows of a token table")
    return RowWise({source: places, index: None}, (places,))


def queries(keys: frozenset[int], dim: int = 1) -> Rule:
    """Row-wise in the queries, rows in ``dim``, and in all but the operands numbered ``keys``, which stay whole."""

    def rule(call: Call) -> RowWise | Mixing:
        rows_at = TokenDim(dim)
        operands = [n for n in call.node.args if isinstance(n, fx.Node) and call.shapes.get(n)]
        whole = {operands[i] for i in keys}
        rows = [n for i, n in enumerate(operands) if i not in keys]
        if whole & set(rows):
            return Mixing("one value is queries and keys")
        if call.layout(operands[0]) != rows_at or any(call.layout(n) not in (None, rows_at) for n in rows):
            return Mixing("the tokens are not the rows of the queries")
        if any(call.shape(n)[dim] != call.out[dim] for n in rows):
            return Mixing("nothing says that its operands have as many tokens")
        return RowWise({**dict.fromkeys(whole, None), **dict.fromkeys(rows, rows_at)}, (rows_at,))

    return rule


def npu_norm(call: Call) -> RowWise | Mixing:
    """Normalisation over the trailing dims that the weight, the last operand, has; one or two operands of rows."""
    *rows, gamma = call.tensors
    aligned = _aligned(call, call.out, rows)
    if isinstance(aligned, Mixing):
        return aligned
    found, demands = aligned
    if found.dim >= len(call.out) - len(call.shape(gamma)):
        return Mixing("normalises over the tokens")
    return RowWise({**demands, gamma: None}, (found,) * len(call.shapes[call.node]))


def npu_rope(call: Call) -> RowWise | Mixing:
    """Rotation of the last dim, with broadcasting."""
    found = pointwise(call)
    if isinstance(found, RowWise) and found.outputs[0] is not None and found.outputs[0].dim == len(call.out) - 1:
        return Mixing("rotates the tokens")
    return found


def fused_attention(call: Call) -> RowWise | Mixing:
    """Row-wise in the queries and the mask's rows, given whole keys and values."""
    args, op = named_arguments(call.node), FUSED[op_name(call.node.target)]
    query, mask = args["query"], args.get(op.mask)
    place, rows = TokenDim(len(call.shape(query)) - 2), call.layout(query)
    if args.get("is_causal"):
        return Mixing("is causal by the numbers of its rows: give it a mask")
    if args.get("return_debug_mask") or args.get("dropout_mask") is not None:
        return Mixing("returns or takes a mask of dropped scores")
    if rows != place or query in (args["key"], args["value"], mask):
        return Mixing("the tokens are not the rows of the queries alone")
    demands: dict[fx.Node, Demand] = {query: place, args["key"]: None, args["value"]: None}
    if mask is not None:
        ndim = len(call.shape(mask))
        here = TokenDim(ndim - 2) if ndim > 1 and call.shape(mask)[-2] != ONE else None
        if here is not None and call.layout(mask) not in (None, here):
            return Mixing("the mask's tokens are not the rows of the queries")
        demands[mask] = here
    if any(
        isinstance(u.args[1], int) and u.args[1] >= op.rows for u in call.node.users if u.target is operator.getitem
    ):
        return Mixing("more is read of it than has a row for each query")
    count = len(call.shapes[call.node])
    return RowWise(demands, tuple(place if i < op.rows else None for i in range(count)))


def data_free(call: Call) -> RowWise | Mixing:
    """Reads only its operand's shape, dtype and device; the result is the same whatever the operand's placement.

    A constant with a dim of T has its rows there: the first such dim, as queries come before keys.
    """
    demands: dict[fx.Node, Demand] = dict.fromkeys(call.tensors, UNUSED)
    places: tuple[TokenDim | None, ...] = (None,) * len(call.shapes[call.node])
    if op_name(call.node.target) in CONSTANTS and call.tokens != ONE and call.tokens in call.out:
        return RowWise(demands, (TokenDim(call.out.index(call.tokens)),), 1)
    return RowWise(demands, places)


def getitem(call: Call) -> RowWise | Mixing:
    source = call.tensors[0]
    index = call.node.args[1]
    assert isinstance(index, int)
    layout = call.layouts[source][index]
    return Mixing("carries no tokens") if layout is None else RowWise({source: layout}, (layout,))


def pad(call: Call, shape: Shape, layout: TokenDim) -> TokenDim | Mixing:
    amounts = call.dims(1, "pad")  # pairs, the last dim's first
    mine = amounts[2 * (len(shape) - 1 - layout.dim) :][:2]
    return layout if all(amount == 0 for amount in mine) else Mixing("pads the tokens")


_VIEW = "DTensor view ops"
_MATH = "DTensor math ops"
_TENSOR = "DTensor tensor ops"
_POINTWISE = "torch.Tag.pointwise"
_OWN = "own: reads no data"
_ROWS = "own: row-wise in the queries, given whole keys"
_NPU = "torch_npu 2.13 operator reference"
CONSTANTS = frozenset(f"aten.new_{n}" for n in ("ones", "zeros", "empty", "full"))

RULES: Mapping[str, OpRule] = {
    **{
        f"aten.{n}": OpRule(_first(view, size_arg=1), _VIEW, "homogeneous") for n in ("view", "_unsafe_view", "reshape")
    },
    "aten.expand": OpRule(expand, _VIEW, "homogeneous"),
    "aten.permute": OpRule(_first(permute), _VIEW, "homogeneous"),
    "aten.transpose": OpRule(_first(transpose), _VIEW, "homogeneous"),
    "aten.t": OpRule(_first(t), _VIEW, "homogeneous"),
    "aten.unsqueeze": OpRule(_first(unsqueeze), _VIEW, "homogeneous"),
    "aten.squeeze": OpRule(_first(squeeze), _VIEW, "homogeneous"),
    "aten.select": OpRule(_first(select), _TENSOR, "homogeneous"),
    "aten.slice": OpRule(_first(slice_), _TENSOR, "homogeneous"),
    **{
        f"aten.{n}": OpRule(_along(2, "dim", 0), _TENSOR, "homogeneous") for n in ("split", "split_with_sizes", "chunk")
    },
    "aten.cat": OpRule(_aligned_along(1, "dim", 0), _TENSOR, "additive"),
    "aten.slice_scatter": OpRule(_aligned_along(2, "dim", 0), _TENSOR),
    **{f"aten.{n}": OpRule(_first(reduction), _MATH, "homogeneous") for n in ("sum", "mean")},
    **{
        f"aten.{n}": OpRule(_first(reduction), _MATH)
        for n in ("amax", "amin", "any", "all", "prod", "argmax", "argmin")
    },
    **{f"aten.{n}": OpRule(_along(1, "dim"), _MATH) for n in ("_softmax", "_log_softmax", "_safe_softmax", "cumsum")},
    "aten.softmax": OpRule(_along(1, "dim"), _MATH),
    "aten.sort": OpRule(_along(1, "dim", -1), _TENSOR),
    "aten.topk": OpRule(_along(2, "dim", -1), _TENSOR),
    "aten.gather": OpRule(_aligned_along(1, "dim"), _TENSOR),
    "aten.scatter": OpRule(_aligned_along(1, "dim"), _TENSOR),
    "aten.native_layer_norm": OpRule(_first(norm), _MATH),
    "aten.layer_norm": OpRule(_first(norm), _MATH),
    "aten.rms_norm": OpRule(_first(norm), _MATH),
    "aten._fused_rms_norm": OpRule(_first(norm), _MATH),
    **{f"aten.{n}": OpRule(matmul, "DTensor matrix ops", "homogeneous") for n in ("mm", "bmm", "linear")},
    "aten.addmm": OpRule(matmul, "DTensor matrix ops"),
    "aten.embedding": OpRule(embedding, "DTensor embedding ops"),
    "aten.index": OpRule(lookup, "DTensor index ops"),
    "aten.index_put": OpRule(masked_write, "DTensor index ops"),
    "aten.index_select": OpRule(index_select, _TENSOR),
    "aten.constant_pad_nd": OpRule(_first(pad), "DTensor tensor ops"),
    **{f"aten.{n}": OpRule(pointwise, _TENSOR, "homogeneous") for n in ("clone", "alias", "detach", "contiguous")},
    **{f"aten.{n}": OpRule(pointwise, _TENSOR) for n in ("zeros_like", "ones_like", "full_like", "empty_like")},
    **{f"aten.{n}": OpRule(pointwise, _POINTWISE) for n in ("_to_copy", "masked_fill", "lift_fresh_copy", "copy")},
    **{f"aten.{n}": OpRule(pointwise, _POINTWISE, "additive") for n in ("add", "sub")},
    **{f"aten.{n}": OpRule(pointwise, _POINTWISE, "homogeneous") for n in ("mul", "div", "neg")},
    **{
        f"aten.{n}": OpRule(data_free, _OWN)
        for n in ("new_ones", "new_zeros", "new_empty", "new_full", "new_empty_strided", "sym_size", "sym_numel")
    },
    "cpcompile.routed_experts": OpRule(routed, "own: row-wise in the tokens, given all experts"),
    "cpcompile.lightning_indexer": OpRule(queries(frozenset({1})), _ROWS),
    "cpcompile.sparse_attention": OpRule(queries(frozenset({1, 4})), _ROWS),
    "cpcompile.paged_lightning_indexer": OpRule(queries(frozenset({1}), 0), _ROWS),
    "cpcompile.paged_sparse_attention": OpRule(queries(frozenset({1, 4}), 0), _ROWS),
    "cpcompile.paged_attention": OpRule(queries(frozenset({1, 3}), 0), _ROWS),
    **{f"npu.{n}": OpRule(npu_norm, _NPU) for n in ("npu_rms_norm", "npu_add_rms_norm")},
    **{f"npu.{n}": OpRule(npu_rope, _NPU) for n in ("npu_interleave_rope", "npu_rotary_mul")},
    **{name: OpRule(fused_attention, "torch.nn.functional.scaled_dot_product_attention") for name in FUSED},
    "getitem": OpRule(getitem, "own: picks one output", "homogeneous"),
    "_c10d_functional.all_reduce": OpRule(pointwise, "own: elementwise over the ranks of another axis", "homogeneous"),
    "_c10d_functional.wait_tensor": OpRule(pointwise, "own: identity", "homogeneous"),
}

_POINTWISE_RULE = OpRule(pointwise, _POINTWISE)


def op_name(target: object) -> str:
    """``aten.add`` for ``aten.add.Tensor``; the function's name for Python functions."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    return getattr(target, "__name__", str(target))


def _keeps_linearity(node: fx.Node) -> bool:
    """Whether this call of a linear op is linear, too: no bias, rounding, scalar term, or product with itself."""
    name, args, kwargs = op_name(node.target), node.args, node.kwargs
    if name == "aten.linear":
        return (args[2] if len(args) > 2 else kwargs.get("bias")) is None and args[0] is not args[1]
    if name in ("aten.add", "aten.sub"):
        return isinstance(args[1], fx.Node) and isinstance(args[1].meta.get("val", torch.Tensor()), torch.Tensor)
    if name == "_c10d_functional.all_reduce":
        return args[1] in ("sum", "avg")
    if name in ("aten.mul", "aten.div", "aten.mm", "aten.bmm"):
        return args[0] is not args[1] and kwargs.get("rounding_mode") is None
    return True


def find_rule(node: fx.Node) -> OpRule | None:
    """The table's row for ``node``, ``linear`` as this call has it, or None for an unknown, random or in-place op."""
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        return RULES["getitem"]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if is_random(node) or node.target._schema.is_mutable:
        return None
    known = RULES.get(op_name(node.target))
    if known is None and torch.Tag.pointwise in node.target.tags:
        return _POINTWISE_RULE
    if known is not None and known.linear and not _keeps_linearity(node):
        return dataclasses.replace(known, linear="")
    return known


def classify(
    node: fx.Node, tokens: Expr, layouts: Layouts, shapes: Mapping[fx.Node, tuple[Shape, ...]]
) -> RowWise | Mixing:
    """Apply the table to one node, given the token dims of its operands.

    Returns ``Mixing`` with a reason where the op is unknown, mixes tokens, or no operand carries any.
    """
    known = find_rule(node)
    if known is None:
        return Mixing(f"{op_name(node.target)} is not in the table of token-wise ops")
    if known.rule is data_free:
        return data_free(Call(node, tokens, layouts, shapes))
    if not any(any(layouts.get(n, ())) for n in node.all_input_nodes):
        return Mixing("no operand carries tokens")
    return known.rule(Call(node, tokens, layouts, shapes))


__all__ = ["RULES", "UNUSED", "Call", "Demand", "Mixing", "OpRule", "RowWise", "classify", "find_rule", "op_name"]
