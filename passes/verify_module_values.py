"""What the static proof of module tensor parallelism can say of a tensor: whose rows, which columns, a summand or not.

A tensor is digits (``verify_index``) into ``[P, extent]``: the extent holds the elements of one rank's original value,
or of its rows padded to N; the P are the ranks of the group. A digit of the ranks says that every rank's rows are here,
a digit that is left out because it is this rank's own number says that this rank's part of the columns is here. So
padding, views, permutations and collectives are index arithmetic; ops are understood on the :class:`Form`, which says
the same in terms of rows and columns of one original value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cpcompile.axes import Axis
from cpcompile.passes.verify_arguments import View
from cpcompile.passes.verify_index import (
    Digit,
    Dims,
    Shape,
    Size,
    divide,
    is_row_major,
    merged,
    product,
    regroup,
    row_major,
    shape,
    times,
)


@dataclass(frozen=True)
class Value:
    """One true statement about a tensor of the shared graph.

    Args:
        content: the original value.
        dims: the tensor's digits into ``[P, extent]``.
        base: digits of the original value as ``[R, ...]``, if the extent is its rows padded to ``count``.
        count: N, on every rank.
        gathered: all ranks' rows are here: one digit is the ranks'.
        part: stride of the digit of P that is left out: this rank's part is here.
        partial: the sum of all ranks' copies is meant.
        axis: the ranks, where there is more to say than this rank's own rows.
    """

    content: int
    dims: Dims
    base: Dims | None = None
    count: Size | None = None
    gathered: bool = False
    part: Size | None = None
    partial: bool = False
    axis: Axis | None = None

    @property
    def local(self) -> bool:
        """Whether the elements are this rank's own, and all of them."""
        return not self.gathered and self.part is None and not self.partial

    @property
    def whole(self) -> bool:
        """Whether this is all of an original value and nothing else."""
        return self.local and self.base is None

    @property
    def view(self) -> View:
        """The original value that a whole one is."""
        assert self.whole
        return self.content, self.dims


@dataclass(frozen=True)
class Cut:
    """Of dim ``dim``, in ``outer`` segments of ``P * inner``, this rank's ``inner`` of each."""

    dim: int
    outer: Size
    inner: Size


@dataclass(frozen=True)
class Form:
    """A value in terms of the whole original value ``view``.

    Args:
        view: the original value, rows in dim 0 where ``rows`` is not empty.
        rows: ``""`` the rows of this rank, ``"own"`` padded to ``count``, ``"all"`` those of every rank.
        count: N, None where nothing is padded.
        cut: which columns are here, None for all.
        partial: a summand.
        axis: the group.
    """

    view: View
    rows: str = ""
    count: Size | None = None
    cut: Cut | None = None
    partial: bool = False
    axis: Axis | None = None

    @property
    def sizes(self) -> Shape:
        """Shape of the whole original value."""
        return shape(self.view[1])


def extent_of(value: Value, size: Size) -> Size:
    """Elements of one rank; ``size`` is the content's."""
    if value.base is None:
        return size
    assert value.count is not None
    return times(value.count, product(shape(value.base)[1:]))


def leading(dims: Dims, parts: int) -> tuple[Size, Dims] | None:
    """The stride of a first digit of size ``parts`` in dim 0, and the dims without it."""
    if not dims or not dims[0]:
        return None
    (size, stride), rest = dims[0][0], dims[0][1:]
    low = divide(size, parts)
    if low is None:
        return None
    return times(stride, low), (merged([(low, stride), *rest]), *dims[1:])


def led_by(digit: Digit, dims: Dims) -> Dims:
    """``dims`` with ``digit`` put first in dim 0."""
    return (merged([digit, *dims[0]]), *dims[1:])


def forms_of(value: Value, size: Size) -> list[Form]:
    """What ``value`` is in terms of rows and columns: none, or several where a part may be of several dims.

    Args:
        value: of a content of ``size`` elements.
        size: elements of the content.
    """
    dims = value.dims
    if value.gathered:
        assert value.axis is not None
        led = leading(dims, value.axis.size)
        if led is None or led[0] != extent_of(value, size):
            return []
        dims = led[1]
    rows = "all" if value.gathered else "own" if value.base is not None else ""
    found = []
    for filled, cut in [(dims, None)] if value.part is None else _filled(dims, value.part, value.axis):
        view = _unpadded(value, filled)
        if view is not None and not (cut and cut.dim == 0 and rows):
            found.append(Form(view, rows, value.count, cut, value.partial, value.axis))
    return found


def _filled(dims: Dims, part: Size, axis: Axis | None) -> list[tuple[Dims, Cut]]:
    """``dims`` with the digit of the part put back where it joins its neighbours; every answer is true."""
    assert axis is not None
    found = []
    for d, digits in enumerate(dims):
        for at in range(len(digits) + 1):
            before, after = digits[:at], digits[at:]
            joins_next = bool(after) and times(*after[0]) == part
            joins_last = bool(before) and before[-1][1] == times(axis.size, part)
            if joins_next or (joins_last and not after) or not digits:
                filled = merged([*before, (axis.size, part), *after])
                cut = Cut(d, product(s for s, _ in before), product(s for s, _ in after))
                found.append(((*dims[:d], filled, *dims[d + 1 :]), cut))
    return found


def _unpadded(value: Value, dims: Dims) -> View | None:
    """The whole original value whose own rows, all columns of them, are ``dims``."""
    if value.base is None:
        return value.content, tuple(merged(d) for d in dims)
    rows = shape(value.base)[0]
    row = product(shape(value.base)[1:])
    if not dims or dims[0] != merged([(value.count, row)]) or not is_row_major(dims[1:]):
        return None
    view = regroup(value.base, (rows, *shape(dims[1:])))
    return None if view is None else (value.content, view)


def value_of(form: Form, size: Size) -> Value | None:
    """The digits of ``form``, of a content of ``size`` elements; None where its columns cannot be told apart."""
    content, dims = form.view
    value = Value(content, dims, axis=form.axis, partial=form.partial)
    if form.count is not None:
        value = replace(value, dims=row_major((form.count, *shape(dims)[1:])), base=dims, count=form.count)
    if form.cut is not None:
        assert form.axis is not None
        d, parts = form.cut.dim, form.axis.size
        groups = regroup((value.dims[d],), (form.cut.outer, parts, form.cut.inner))
        if groups is None or len(groups[1]) != 1:
            return None
        kept = merged([*groups[0], *groups[2]])
        value = replace(value, dims=(*value.dims[:d], kept, *value.dims[d + 1 :]), part=groups[1][0][1])
    if form.rows == "all":
        assert form.axis is not None
        digit = (form.axis.size, extent_of(value, size))
        value = replace(value, dims=led_by(digit, value.dims), gathered=True)
    return value


def flat(view: View) -> View | None:
    """``view`` as a matrix of all leading dims and the last one; of a vector, one row."""
    sizes = shape(view[1])
    dims = regroup(view[1], (product(sizes[:-1]), sizes[-1] if sizes else 1))
    return None if dims is None else (view[0], dims)


def broadcast(shapes: Sequence[Shape]) -> Shape | None:
    """The shape of an elementwise result."""
    ndim = max((len(s) for s in shapes), default=0)
    padded = [(1,) * (ndim - len(s)) + s for s in shapes]
    found = []
    for sizes in zip(*padded, strict=True):
        told = list(dict.fromkeys(s for s in sizes if s != 1))
        if len(told) > 1:
            return None
        found.append(told[0] if told else 1)
    return tuple(found)
