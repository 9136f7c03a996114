"""What a mask in a graph says, exactly: which keys it shows, from the arithmetic on positions that made it.

Before: nodes that compare, combine and move positions. After: a conjunction of conditions, each linear in the indices
(``q - k + c >= 0``) or "is among the indices of this top-k". What cannot be said so is None: nothing is guessed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import sympy
import torch
import torch.fx as fx

from cpcompile.passes.collectives import bound, op_name, sizes
from cpcompile.passes.mask_meaning import HIDDEN, Affine, Among, Meaning, Number, Shown, normal
from cpcompile.passes.token_layout import ONE, Expr, size_expr


@dataclass
class MaskReader:
    """Reads nodes of one graph; each node once."""

    gm: fx.GraphModule
    known: dict[fx.Node, Meaning] = field(default_factory=dict)

    def read(self, node: fx.Node) -> Meaning:
        """What ``node`` holds, None if that cannot be said."""
        if node not in self.known:
            self.known[node] = normal(self._read(node), sizes(node))
        return self.known[node]

    def _read(self, node: fx.Node) -> Meaning:
        if node.op == "get_attr":
            return _constant(operator.attrgetter(str(node.target))(self.gm))
        rule = _RULES.get(op_name(node.target).removeprefix("aten::"))
        if node.op != "call_function" or rule is None or sizes(node) is None:
            return None
        return rule(self, node)

    def operand(self, value: object, ndim: int) -> Meaning:
        """A node or number, broadcast to ``ndim`` dims."""
        if not isinstance(value, fx.Node) or sizes(value) is None:
            return _number(value, ndim)
        found, shape = self.read(value), sizes(value)
        assert shape is not None
        return None if found is None else found.moved([None] * (ndim - len(shape)) + list(range(len(shape))))


def _number(value: object, ndim: int) -> Meaning:
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    if isinstance(value, bool):
        return Shown(negated=not value)
    if isinstance(value, int | torch.SymInt):
        return Affine((sympy.S.Zero,) * ndim, size_expr(value))
    return Number(value) if isinstance(value, float) else None


def _constant(value: object) -> Meaning:
    if not isinstance(value, torch.Tensor) or value.ndim or isinstance(value, torch._subclasses.FakeTensor):
        return None
    return _number(value.item(), 0)


def _ndim(node: fx.Node) -> int:
    shape = sizes(node)
    assert shape is not None
    return len(shape)


def _size(value: object) -> Expr | None:
    """An int or a size node as an expression."""
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    return size_expr(value) if isinstance(value, int | torch.SymInt) else None


def _arange(reader: MaskReader, node: fx.Node) -> Meaning:
    args = {a.name: v for a, v in zip(node.target._schema.arguments, bound(node), strict=True)}  # type: ignore[union-attr]
    start, step = _size(args.get("start", 0)), _size(args.get("step", 1))
    if start is None or step is None or node.meta["val"].dtype.is_floating_point:
        return None
    return Affine((step,), start)


def _sum(reader: MaskReader, node: fx.Node) -> Meaning:
    left, right, alpha = bound(node)[:3]
    ndim = _ndim(node)
    a, b = reader.operand(left, ndim), reader.operand(right, ndim)
    if not isinstance(a, Affine) or not isinstance(b, Affine) or alpha != 1:
        return None
    return a.plus(b, -1 if "sub" in op_name(node.target) else 1)


def _same(reader: MaskReader, node: fx.Node) -> Meaning:
    return reader.operand(node.args[0], _ndim(node))


def _to_copy(reader: MaskReader, node: fx.Node) -> Meaning:
    found, dtype = _same(reader, node), node.meta["val"].dtype
    kept = {
        Affine: dtype in (torch.int32, torch.int64),
        Number: dtype.is_floating_point,
        Shown: dtype.is_floating_point if getattr(found, "additive", False) else dtype == torch.bool,
    }
    return found if found is not None and kept[type(found)] else None


def _unsqueeze(reader: MaskReader, node: fx.Node) -> Meaning:
    source, dim = bound(node)
    order: list[int | None] = list(range(_ndim(source)))
    order.insert(dim % _ndim(node), None)
    found = reader.read(source)
    return None if found is None else found.moved(order)


def _select(reader: MaskReader, node: fx.Node) -> Meaning:
    source, dim, index = bound(node)
    shape, found = sizes(source), reader.read(source)
    assert shape is not None
    dim %= len(shape)
    if found is None or shape[dim] != ONE or index not in (0, -1):
        return None
    return found.moved([d for d in range(len(shape)) if d != dim])


def _expand(reader: MaskReader, node: fx.Node) -> Meaning:
    found, shape, old = _same(reader, node), sizes(node), sizes(node.args[0])
    assert shape is not None and old is not None
    before = [ONE] * (len(shape) - len(old)) + list(old)
    # Along a dim that was 1 before, nothing changes.
    order = [d if size == old_size else None for d, (size, old_size) in enumerate(zip(shape, before, strict=True))]
    return None if found is None else found.moved(order)


def _slice(reader: MaskReader, node: fx.Node) -> Meaning:
    source, dim, start, _, step = bound(node)
    if _is_padded(source) and step == 1 and not start and sizes(source.args[0]) == sizes(node):
        return reader.read(source.args[0])  # what CUDA's kernels have done to masks, for their alignment
    found, first = reader.read(source), _size(0 if start is None else start)
    if not isinstance(found, Affine) or first is None or step != 1 or not first.is_nonnegative:
        return found if sizes(source) == sizes(node) and step == 1 else None
    return Affine(found.steps, found.offset + found.steps[dim % len(found.steps)] * first)


def _is_padded(node: fx.Node) -> bool:
    """Whether ``node`` is its operand with something appended to the last dim."""
    if node.target is not torch.ops.aten.constant_pad_nd.default:
        return False
    before, after = (*bound(node)[1], 0, 0)[:2]
    return len(bound(node)[1]) == 2 and before == 0 and isinstance(after, int | fx.Node)


def _cat(reader: MaskReader, node: fx.Node) -> Meaning:
    """One linear run, cut into pieces."""
    pieces, dim = bound(node)[:2]
    ndim = _ndim(node)
    dim, start, runs = dim % ndim, sympy.S.Zero, []
    for piece in pieces:
        found, shape = reader.operand(piece, ndim), sizes(piece)
        if not isinstance(found, Affine) or shape is None or len(shape) != ndim:
            return None
        runs.append((found, start, shape[dim]))
        start += shape[dim]
    first, rest = runs[0][0], runs[1:]
    # One position alone has no step: that of a longer piece, or from one position to the next.
    step = next((found.steps[dim] for found, _, length in runs if length != ONE), None)
    if step is None:
        step = rest[0][0].offset - first.offset if rest else sympy.S.Zero
    whole = Affine((*first.steps[:dim], step, *first.steps[dim + 1 :]), first.offset)
    for found, at, length in runs:
        steps = tuple(step if d == dim and length == ONE else s for d, s in enumerate(found.steps))
        if steps != whole.steps or sympy.expand(found.offset - whole.offset - whole.steps[dim] * at) != 0:
            return None
    return whole


def _compare(reader: MaskReader, node: fx.Node) -> Meaning:
    """``a <= b`` as ``b - a >= 0``; equality where it always or never holds."""
    ndim, name = _ndim(node), op_name(node.target).removeprefix("aten::")
    a, b = (reader.operand(value, ndim) for value in bound(node)[:2])
    if not isinstance(a, Affine) or not isinstance(b, Affine):
        return None
    more = b.plus(a, -1) if name in ("le", "lt") else a.plus(b, -1)
    if name in ("eq", "ne"):
        if any(sympy.expand(s) != 0 for s in more.steps) or not sympy.expand(more.offset).is_number:
            return None
        return Shown(negated=(sympy.expand(more.offset) == 0) != (name == "eq"))
    return Shown(frozenset({replace(more, offset=more.offset - int(name in ("lt", "gt")))}))


def _and(reader: MaskReader, node: fx.Node) -> Meaning:
    a, b = (reader.operand(value, _ndim(node)) for value in bound(node)[:2])
    if not isinstance(a, Shown) or not isinstance(b, Shown) or a.negated or b.negated or a.additive or b.additive:
        return None
    return Shown(a.conditions | b.conditions)


def _not(reader: MaskReader, node: fx.Node) -> Meaning:
    found = _same(reader, node)
    return replace(found, negated=not found.negated) if isinstance(found, Shown) and not found.additive else None


def _filled(value: Callable[[fx.Node], object]) -> Callable[[MaskReader, fx.Node], Meaning]:
    """A factory of one value."""

    def rule(reader: MaskReader, node: fx.Node) -> Meaning:
        number = value(node)
        if node.meta["val"].dtype == torch.bool:
            number = bool(number) if isinstance(number, bool | int) else None
        elif isinstance(number, int) and node.meta["val"].dtype.is_floating_point:
            number = float(number)
        return _number(number, _ndim(node))

    return rule


def _cumsum(reader: MaskReader, node: fx.Node) -> Meaning:
    """Of what is false everywhere."""
    nothing = reader.operand(node.args[0], _ndim(node)) == Shown(negated=True)
    return _number(0, _ndim(node)) if nothing else None


def _index(reader: MaskReader, node: fx.Node) -> Meaning:
    """Of what is the same everywhere."""
    found = reader.read(bound(node)[0])
    if not isinstance(found, Affine) or any(found.steps):
        return None
    return Affine((sympy.S.Zero,) * _ndim(node), found.offset)


def _scatter(reader: MaskReader, node: fx.Node) -> Meaning:
    """``scatter(all true, -1, top-k indices, False)``, or the reverse."""
    source, dim, index, value = bound(node)[:4]
    found, topk, ndim = reader.read(source), topk_of(index), _ndim(node)
    empty = isinstance(found, Shown) and not found.conditions and not found.additive
    if not empty or topk is None or dim % ndim != ndim - 1 or sizes(topk.args[0]) != sizes(node):
        return None
    assert isinstance(found, Shown)
    if not isinstance(value, bool) or value != found.negated:
        return None
    return Shown(frozenset({Among(topk, tuple(range(ndim)))}), negated=not value)


def topk_of(index: object) -> fx.Node | None:
    """The largest-k over the last dim whose indices these are, as any integer type."""
    while isinstance(index, fx.Node) and index.target is torch.ops.aten._to_copy.default:
        if index.meta["val"].dtype not in (torch.int32, torch.int64):
            return None
        index = index.args[0]
    if not isinstance(index, fx.Node) or index.target is not operator.getitem or index.args[1] != 1:
        return None
    topk = index.args[0]
    if not isinstance(topk, fx.Node) or topk.target is not torch.ops.aten.topk.default:
        return None
    source, _, dim, largest, _ = bound(topk)
    return topk if dim % _ndim(source) == _ndim(source) - 1 and largest else None


def _where(reader: MaskReader, node: fx.Node) -> Meaning:
    mask, true, false = (reader.operand(value, _ndim(node)) for value in bound(node))
    if not isinstance(mask, Shown) or mask.additive:
        return None
    zero, hidden = (false, true) if mask.negated else (true, false)  # CUDA's kernels are given the second
    return replace(mask, negated=False, additive=True) if _is_zero(zero) and _is_hidden(hidden) else None


def _masked_fill(reader: MaskReader, node: fx.Node) -> Meaning:
    shown, mask, hidden = (reader.operand(value, _ndim(node)) for value in bound(node))
    if not isinstance(shown, Shown) or not shown.additive or not _is_hidden(hidden):
        return None
    if not isinstance(mask, Shown) or not mask.negated:
        return None
    return replace(shown, conditions=shown.conditions | mask.conditions)


def _is_zero(found: Meaning) -> bool:
    return found == Number(0.0) or (isinstance(found, Affine) and not any(found.steps) and found.offset == 0)


def _is_hidden(found: Meaning) -> bool:
    return isinstance(found, Number) and found.value <= HIDDEN


_RULES: dict[str, Callable[[MaskReader, fx.Node], Meaning]] = {
    "arange": _arange,
    **dict.fromkeys(("add", "sub"), _sum),
    **dict.fromkeys(("clone", "alias", "detach", "lift_fresh_copy"), _same),
    "_to_copy": _to_copy,
    "unsqueeze": _unsqueeze,
    "select": _select,
    "expand": _expand,
    "slice": _slice,
    "cat": _cat,
    **dict.fromkeys(("le", "lt", "ge", "gt", "eq", "ne"), _compare),
    **dict.fromkeys(("bitwise_and", "logical_and"), _and),
    **dict.fromkeys(("bitwise_not", "logical_not"), _not),
    **dict.fromkeys(("ones", "new_ones", "ones_like"), _filled(lambda _: 1)),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), _filled(lambda _: 0)),
    "full": _filled(lambda node: bound(node)[1]),
    **dict.fromkeys(("new_full",), _filled(lambda node: bound(node)[2])),
    "scalar_tensor": _filled(lambda node: bound(node)[0]),
    "cumsum": _cumsum,
    "index": _index,
    "scatter": _scatter,
    "where": _where,
    "masked_fill": _masked_fill,
}
