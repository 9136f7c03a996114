"""Heads in a product's columns: who reads which part of them, past views, permutations and cuts."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.fx as fx

from cpcompile.passes.collectives import arguments, sizes
from cpcompile.passes.npu_key_cache import MOVES, calls, moved
from cpcompile.passes.token_layout import Expr

aten = torch.ops.aten
CUTS = (aten.split_with_sizes.default, aten.slice.Tensor)


@dataclass(frozen=True)
class HeadPart:
    """``node`` has columns ``start`` to ``end`` of heads; ``dims`` are T, N and C for columns, and 1 for those of 1."""

    node: fx.Node
    dims: str
    start: int
    end: int


def head_parts(up: fx.Node) -> Iterator[tuple[fx.Node, HeadPart]]:
    """Who reads the heads in the rows of ``up``, past what moves or cuts them, and which part."""
    shape = sizes(up) or ()
    pending = [HeadPart(up, _marks(shape, "TC"), 0, int(shape[1]))]
    while pending:
        part = pending.pop()
        for user in part.node.users:
            behind = list(_behind(user, part))
            pending += behind
            if not behind:
                yield user, part


def _behind(user: fx.Node, part: HeadPart) -> Iterator[HeadPart]:
    """What ``user`` makes of a part, if it only moves or cuts it."""
    if calls(user, *MOVES) and (dims := _viewed(part.dims, part.node, user)):
        yield HeadPart(user, dims, part.start, int((sizes(user) or ())[dims.index("C")]) + part.start)
    elif calls(user, aten.permute.default, aten.transpose.int):
        yield HeadPart(user, permuted(user, part.dims), part.start, part.end)
    elif calls(user, *CUTS) and part.dims[arguments(user)["dim"] % len(part.dims)] == "C":
        given = arguments(user)
        if user.target is aten.slice.Tensor:
            if given["step"] == 1 and (given["start"] or 0) >= 0:
                start = part.start + (given["start"] or 0)
                yield HeadPart(user, part.dims, start, start + int(user.meta["val"].shape[part.dims.index("C")]))
            return
        for item in user.users:
            assert calls(item, operator.getitem)
            start = part.start + sum(given["split_sizes"][: item.args[1]])
            yield HeadPart(item, part.dims, start, start + given["split_sizes"][item.args[1]])


def _viewed(dims: str, node: fx.Node, user: fx.Node) -> str:
    """The dims of a view: those of more than 1 in the same order, or columns told apart by head; else empty."""
    old, new = ((sizes(n) or ()) for n in (node, user))
    kept = [(mark, size) for mark, size in zip(dims, old, strict=True) if mark != "1"]
    wide = [size for size in new if size != 1]
    if [size for _, size in kept] == wide:
        return _marks(new, [mark for mark, _ in kept])
    heads = [("N", size) for size in wide[len(kept) - 1 : -1]]
    told = [*kept[:-1], *heads, ("C", wide[-1] if wide else 0)]
    apart = dims.endswith("C") and len(heads) == 1 and [size for _, size in told] == wide
    return _marks(new, [mark for mark, _ in told]) if apart else ""


def _marks(shape: Sequence[Expr], marks: Sequence[str]) -> str:
    """One mark for each dim, in order; 1 for those of one element."""
    rest = iter(marks)
    if len(shape) == len(marks):
        return "".join("1" if size == 1 else mark for size, mark in zip(shape, marks, strict=True))
    return "".join("1" if size == 1 else next(rest) for size in shape)


def permuted(user: fx.Node, dims: str) -> str:
    """The dims of a permutation; empty for what is none."""
    if not calls(user, aten.permute.default, aten.transpose.int):
        return ""
    given = arguments(user)
    order = list(range(len(dims)))
    if user.target is aten.permute.default:
        order = [dim % len(dims) for dim in given["dims"]]
    else:
        a, b = given["dim0"] % len(dims), given["dim1"] % len(dims)
        order[a], order[b] = b, a
    return "".join(dims[dim] for dim in order)


def is_laid_out(dims: str, wanted: str) -> bool:
    """Whether ``dims`` are those; a dim of one element is any."""
    return len(dims) == len(wanted) and all(found in ("1", mark) for found, mark in zip(dims, wanted, strict=True))


def row_readers(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Who reads the rows of ``node``, through views of whole rows, and as what."""
    for user in node.users:
        if calls(user, *MOVES) and moved(user) is moved(node):
            yield from row_readers(user)
        else:
            yield user, node
