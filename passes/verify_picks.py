"""The static proof of picked rows: that each rank keeps those that it owns, and zeros for all others, of rows it picks.

Numbers of rows are followed through arithmetic as ``base + offset``, comparisons as the interval of bases for which
they hold, so no chain of ops is expected: any that keeps exactly this rank's rows, each from its own place, will do.
Shares no code with what emits them. Row numbers within bounds are taken for granted, as the original call does.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx

from cpcompile.passes.verify_arguments import Arguments, Refused, op_name, reshaped
from cpcompile.passes.verify_index import Dims, Rows, Size, Split, product, regroup, row_major, same, shape
from cpcompile.passes.verify_moves import Value
from cpcompile.passes.verify_numbering import Numbering

LAST = torch.iinfo(torch.int64).max
INTEGERS = (None, torch.int32, torch.int64)
COMPARISONS = {"aten::lt", "aten::le", "aten::gt", "aten::ge"}
COMBINATIONS = {
    "aten::bitwise_and": False,
    "aten::logical_and": False,
    "aten::bitwise_or": True,
    "aten::logical_or": True,
}


@dataclass(frozen=True)
class Base:
    """What row numbers are counted from.

    Args:
        index: content that holds them, None for 0, 1, 2, ...
        wraps: the size from which negative ones have been counted, None if they have not.
    """

    index: int | None = None
    wraps: Size | None = None


@dataclass(frozen=True)
class Number:
    """Row numbers ``base + offset``, after that held between ``bounds``; ``dims`` are the digits into the base."""

    base: Base
    dims: Dims
    offset: Size = 0
    bounds: tuple[Size, Size] | None = None


@dataclass(frozen=True)
class Test:
    """Whether ``low <= base < high`` (None: no bound), or whether not."""

    base: Base
    dims: Dims
    low: Size | None
    high: Size | None
    negated: bool = False


@dataclass(frozen=True)
class Taken:
    """Rows of ``dim`` of a shard at the places ``number``."""

    shard: Value
    dim: int
    number: Number


Fact = Number | Test | Taken


class Picks:
    """Follows row numbers through a rewritten graph."""

    def __init__(self, original: Numbering, numbering: Arguments, split: Split) -> None:
        """``original`` is numbered, ``numbering`` reads the rewritten graph, ``split`` says how rows are split."""
        self.original, self.numbering, self.split = original, numbering, split
        # Per node, by whether values of the original are taken as they are or as what they are computed from.
        self.facts: dict[fx.Node, dict[bool, Fact]] = {}

    def visit(self, node: fx.Node, env: Mapping[fx.Node, tuple[tuple[Value, ...], ...]]) -> tuple[Value, ...]:
        """Note what ``node`` says of row numbers; returns the original's picked rows, as summands, if it is them.

        Raises:
            Refused: it keeps other rows than those that this rank owns.
        """
        if node.op != "call_function" or self.split.layout != "contiguous":  # rows are counted from the rank's first
            return ()
        for as_it_is in (True, False):
            name, args = op_name(node.target), self.numbering.arguments(node)
            of = {n: self._fact(n, env, as_it_is) for n in node.all_input_nodes if n not in self.numbering.sizes}
            if name in ("aten::masked_fill", "aten::where"):
                taken, test = self._kept(name, args, of)
                if taken is not None and test is not None:
                    return self._owned(taken, test)
            if name in ("aten::index_select", "aten::index"):
                found: Fact | None = self._taken(name, args, of, env)
            else:
                found = self._computed(node, name, args, of)
            if found is not None:
                self.facts.setdefault(node, {})[as_it_is] = found
        return ()

    def check_reader(self, node: fx.Node, env: Container[fx.Node]) -> None:
        """Refuse ``node`` if it reads row numbers or picked rows, and does nothing with them that a pick does."""
        read = next((n for n in node.all_input_nodes if n in self.facts and n not in env), None)
        if read is not None and node not in self.facts:
            taken = any(isinstance(fact, Taken) for fact in self.facts[read].values())
            expected = f"zeros for other ranks' rows of {read}" if taken else f"rows to be picked by {read}"
            raise Refused(f"expected {expected}; found {op_name(node.target)} of it", 2)

    def _fact(self, node: fx.Node, env: Mapping[fx.Node, tuple[tuple[Value, ...], ...]], as_it_is: bool) -> Fact | None:
        computed, own = self.facts.get(node, {}).get(as_it_is), self._held(node, env)
        return own or computed if as_it_is else computed or own

    def _held(self, node: fx.Node, env: Mapping[fx.Node, tuple[tuple[Value, ...], ...]]) -> Number | None:
        """A whole value of the original that holds integers, the same on all ranks."""
        said = node.meta.get("val")
        if node not in env or len(env[node]) != 1 or not isinstance(said, torch.Tensor) or said.dtype not in INTEGERS:
            return None
        value = env[node][0][0]
        if not value.whole or value.partial or value.content in self.original.volatile:
            return None
        return Number(Base(value.content), value.dims) if self.original.replicated[value.content] else None

    # Row numbers and what is asked of them.

    def _computed(
        self, node: fx.Node, name: str, args: Mapping[str, Any], of: Mapping[fx.Node, Fact | None]
    ) -> Fact | None:
        if name == "aten::arange":
            return _counted(args)
        other = args.get("other")
        if name == "aten::where":
            return self._wrapped(args, of)
        fact = _of(of, args.get("self"))
        if isinstance(fact, Taken) or fact is None:
            return None
        if (dims := reshaped(node, args, fact.dims)) is not None:
            return replace(fact, dims=dims)
        if isinstance(fact, Test):
            second = of.get(other) if isinstance(other, fx.Node) else None
            if name in ("aten::logical_not", "aten::bitwise_not"):
                return replace(fact, negated=not fact.negated)
            return _combined(fact, second, COMBINATIONS[name]) if name in COMBINATIONS else None
        if name == "aten::clamp" and fact.bounds is None:
            low, high = args["min"], args["max"]
            return replace(fact, bounds=(low, high)) if _is_size(low) and _is_size(high) else None
        if other is None or not _is_size(other) or fact.bounds is not None:
            return None
        if name in ("aten::add", "aten::sub") and args["alpha"] == 1:
            return replace(fact, offset=fact.offset + other if name == "aten::add" else fact.offset - other)
        return _compared(name, fact, other) if name in COMPARISONS else None

    def _wrapped(self, args: Mapping[str, Any], of: Mapping[fx.Node, Fact | None]) -> Number | None:
        """``where(index < 0, index + size, index)``."""
        test, below, above = (_of(of, args.get(name)) for name in ("condition", "self", "other"))
        if not isinstance(test, Test) or not isinstance(below, Number) or not isinstance(above, Number):
            return None
        alike = test.base == below.base == above.base and test.dims == below.dims == above.dims
        if not alike or test != Test(above.base, above.dims, None, 0) or above != Number(above.base, above.dims):
            return None
        if above.base.wraps is not None or below.bounds is not None:
            return None
        return Number(Base(above.base.index, below.offset), above.dims)

    # Rows.

    def _taken(
        self,
        name: str,
        args: Mapping[str, Any],
        of: Mapping[fx.Node, Fact | None],
        env: Mapping[fx.Node, tuple[tuple[Value, ...], ...]],
    ) -> Taken | None:
        source = env.get(args["self"], ())
        indices = args["indices"] if name == "aten::index" else None
        # Of what is true of it, that it is rows of one content: joined values also travel side by side.
        value = next((v for v in source[0] if _is_shard(v)), None) if len(source) == 1 else None
        if value is None or value.content in self.original.volatile:
            return None
        if indices is None:
            dim, index = args["dim"] % len(value.dims), args["index"]
        else:
            named = [d for d, i in enumerate(indices) if i is not None]
            if len(named) != 1:
                return None
            dim, index = named[0], indices[named[0]]
        number = _of(of, index)
        if indices is None and (not isinstance(number, Number) or len(number.dims) != 1):
            return None  # a number without dims picks a row that keeps its dim
        return Taken(value, dim, number) if isinstance(number, Number) else None

    def _kept(
        self, name: str, args: Mapping[str, Any], of: Mapping[fx.Node, Fact | None]
    ) -> tuple[Taken | None, Test | None]:
        """The rows, and the test by which they are kept, where all others become zeros."""
        rows, test = _of(of, args["self"]), _of(of, args["mask" if name == "aten::masked_fill" else "condition"])
        zero = args.get("value") if name == "aten::masked_fill" else args.get("other")
        if not isinstance(rows, Taken) or not isinstance(test, Test):
            return None, None
        if isinstance(zero, bool) or not isinstance(zero, int | float) or zero != 0:
            raise Refused(f"expected zeros for the rows of other ranks; found {zero}", 2)
        return rows, replace(test, negated=not test.negated) if name == "aten::masked_fill" else test

    def _owned(self, taken: Taken, test: Test) -> tuple[Value, ...]:
        """The original's picks that ``taken`` under ``test`` is a summand of."""
        sizes, number = shape(taken.shard.dims), taken.number
        ndim, width = len(sizes) - 1 + len(number.dims), len(number.dims)
        dims = ((),) * (ndim - len(test.dims)) + test.dims
        before, after = dims[: taken.dim], dims[taken.dim + width :]
        if len(dims) != ndim or dims[taken.dim : taken.dim + width] != number.dims or any(before) or any(after):
            raise Refused("expected one test for each picked row; found it along other dims", 2)
        if test.base != number.base or test.negated:
            raise Refused("expected the rows that this rank owns to be kept; found others", 2)
        found, reasons = [], [Refused("expected rows that the original picks; found others", 1)]
        for pick in self._original_picks(taken):
            try:
                self._check(pick, number, test)
            except Refused as refused:
                reasons.append(refused)
                continue
            picked = (*sizes[: taken.dim], *shape(number.dims), *sizes[taken.dim + 1 :])
            digits = regroup(pick.out[1], picked)
            if digits is not None and self.original.replicated[taken.shard.content]:
                found.append(Value(((pick.out[0], 1),), digits, partial=True))
        if not found:
            raise max(reasons, key=lambda r: r.specific)
        return tuple(dict.fromkeys(found))

    def _check(self, pick: Pick, number: Number, test: Test) -> None:
        """Row ``base + first`` is kept where this rank owns it, and is at ``base + first - rank * L`` of its shard."""
        mine = self.split.local * self.split.rank
        if number.base not in pick.bases or number.dims != _flattened(pick.dims, number.dims):
            raise Refused("expected the row numbers of the original's pick; found others", 1)
        low, high = test.low, test.high
        if low is None or high is None or not same(low + pick.first, mine):
            raise Refused(f"expected rows from {mine} on to be kept; found {_bounds(test, pick)}", 2)
        if not same(high + pick.first, mine + self.split.local):
            raise Refused(f"expected rows up to {mine + self.split.local} to be kept; found {_bounds(test, pick)}", 2)
        if not same(number.offset, pick.first - mine):
            raise Refused(f"expected row numbers less {mine}; found them less {pick.first - number.offset}", 2)
        inside = number.bounds
        if inside is None or not same(inside[0], 0) or not same(inside[1], self.split.local - 1):
            raise Refused(f"expected places held between 0 and {self.split.local - 1}; found {inside}", 2)

    def _original_picks(self, taken: Taken) -> list[Pick]:
        """The original's calls that pick rows of the value of which ``taken`` holds a shard."""
        wholes = [
            (taken.shard.content, dims)
            for dims, where in self.split.wholes(taken.shard.dims, taken.shard.post)
            if where == Rows(taken.dim)
        ]
        found = []
        for node in self.original.gm.graph.nodes:
            if node.op == "call_function" and op_name(node.target) in PICKS:
                source = self.original.env[node.args[0]][0]
                if source in wholes:
                    pick = self._pick(node, shape(source[1]), taken.dim)
                    found += [] if pick is None else [pick]
        return found

    def _pick(self, node: fx.Node, sizes: Sequence[Size], dim: int) -> Pick | None:
        """``node`` of the original, if it picks along ``dim``."""
        args, out = self.original.arguments(node), self.original.env[node][0]
        along, index = PICKS[op_name(node.target)](args, len(sizes))
        if along != dim or not same(sizes[dim], self.split.tokens):
            return None
        if isinstance(index, fx.Node):
            content, digits = self.original.env[index][0]
            if not self.original.replicated[content] or content in self.original.volatile:
                return None
            wrapped = Base(content, sizes[dim])
            bases = {wrapped} if "indices" in args else {wrapped, Base(content)}
            return Pick(frozenset(bases), digits, 0, out)
        count = shape(out[1])[dim] if "step" in args else 1
        to_the_end = "step" in args and (args["end"] in (None, LAST) or same(args["end"], sizes[dim]))
        first = sizes[dim] - count if to_the_end else _from_the_front(index, sizes[dim])
        return None if first is None else Pick(frozenset({Base()}), row_major((count,)), first, out)


@dataclass(frozen=True)
class Pick:
    """A call of the original: its rows are ``base + first``, ``base`` any of ``bases`` with digits ``dims``."""

    bases: frozenset[Base]
    dims: Dims
    first: Size
    out: tuple[int, Dims]


def _along_index(args: Mapping[str, Any], ndim: int) -> tuple[int | None, Any]:
    named = [d for d, i in enumerate(args["indices"]) if i is not None]
    return (named[0], args["indices"][named[0]]) if len(named) == 1 else (None, None)


PICKS: Mapping[str, Callable[[Mapping[str, Any], int], tuple[int | None, Any]]] = {
    "aten::slice": lambda args, ndim: (args["dim"] % ndim if args["step"] == 1 else None, args["start"] or 0),
    "aten::select": lambda args, ndim: (args["dim"] % ndim, args["index"]),
    "aten::index_select": lambda args, ndim: (args["dim"] % ndim, args["index"]),
    "aten::index": _along_index,
}


def _of(of: Mapping[fx.Node, Fact | None], argument: object) -> Fact | None:
    return of.get(argument) if isinstance(argument, fx.Node) else None


def _is_shard(value: Value) -> bool:
    return value.extent == "L" and not value.partial and len(value.pieces) == 1


def _is_size(value: object) -> bool:
    return not isinstance(value, bool) and (isinstance(value, int) or hasattr(value, "is_Integer"))


def _from_the_front(index: Size, size: Size) -> Size | None:
    if isinstance(index, int):
        return index if index >= 0 else size + index
    return index if index.is_nonnegative else size + index if index.is_negative else None


def _flattened(dims: Dims, like: Dims) -> Dims | None:
    return regroup(dims, shape(like)) if same(product(shape(dims)), product(shape(like))) else None


def _bounds(test: Test, pick: Pick) -> str:
    low, high = ("" if b is None else b + pick.first for b in (test.low, test.high))
    return f"{low}:{high}"


def _counted(args: Mapping[str, Any]) -> Number | None:
    start, end = args.get("start", 0), args["end"]
    if args.get("step", 1) != 1 or args["dtype"] not in INTEGERS or not _is_size(start) or not _is_size(end):
        return None
    return Number(Base(), row_major((end - start,)), start)


def _compared(name: str, fact: Number, other: Size) -> Test:
    """``base + offset`` compared with ``other``, as an interval of bases."""
    bound = other - fact.offset
    if name in ("aten::le", "aten::gt"):
        bound = bound + 1
    below = name in ("aten::lt", "aten::le")
    return Test(fact.base, fact.dims, None if below else bound, bound if below else None)


def _combined(a: Test, b: Fact | None, either: bool) -> Test | None:
    """Both of two tests, or at least one: neither of what they deny."""
    if not isinstance(b, Test) or (a.base, a.dims) != (b.base, b.dims):
        return None
    x, y = (_denied(a), _denied(b)) if either else (_told(a), _told(b))
    if x is None or y is None:
        return None
    lows, highs = ([bound for bound in pair if bound is not None] for pair in ((x.low, y.low), (x.high, y.high)))
    if len(lows) > 1 or len(highs) > 1:
        return None
    return Test(a.base, a.dims, next(iter(lows), None), next(iter(highs), None), either)


def _told(test: Test) -> Test | None:
    """A test without its ``negated``, if it is a half-line or says so already."""
    if not test.negated:
        return test
    if test.low is None or test.high is None:
        return Test(test.base, test.dims, test.high, test.low)
    return None


def _denied(test: Test) -> Test | None:
    """What ``test`` denies, as an interval."""
    return _told(replace(test, negated=not test.negated))
