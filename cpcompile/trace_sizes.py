"""Sizes as data: symbols with their example values and ranges, and expressions of them as nested lists.

``8*s27 + 1`` is ``["Add", ["Mul", 8, "s27"], 1]``. What is read back is built from a table of functions; text from a
file is never evaluated.
"""

from __future__ import annotations

import itertools
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import sympy
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy import functions
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from cpcompile.errors import TraceError

MOST_DEPTH, MOST_BITS, MOST_ARGUMENTS, MOST_POWER = 16, 63, 64, 8
_NAMES = ("FloorDiv", "CeilDiv", "CleanDiv", "Mod", "PythonMod", "ModularIndexing", "Max", "Min")
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "Add": sympy.Add, "Mul": sympy.Mul, "Pow": sympy.Pow, "Rational": sympy.Rational,
    "Eq": sympy.Eq, "Ne": sympy.Ne, "Lt": sympy.Lt, "Le": sympy.Le, "Gt": sympy.Gt, "Ge": sympy.Ge,
    "And": sympy.And, "Or": sympy.Or, "Not": sympy.Not,
    **{name: getattr(functions, name) for name in _NAMES},
}  # fmt: skip
_KNOWN = {function: name for name, function in FUNCTIONS.items()} | {
    sympy.Equality: "Eq", sympy.Unequality: "Ne", sympy.StrictLessThan: "Lt", sympy.LessThan: "Le",
    sympy.StrictGreaterThan: "Gt", sympy.GreaterThan: "Ge",
}  # fmt: skip
_SYMBOL = re.compile(r"[a-z]+[0-9]{1,6}")


def size_data(expr: Any) -> Any:
    """``expr`` as JSON values.

    Raises:
        TraceError: it has a function that the table lacks.
    """
    if isinstance(expr, sympy.Symbol):
        return expr.name
    if expr in (sympy.true, sympy.false):
        return bool(expr)
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if isinstance(expr, sympy.Rational):
        return ["Rational", int(expr.p), int(expr.q)]
    name = _KNOWN.get(expr.func)
    if name is None:
        raise TraceError(f"a size of the graph is {expr}: {expr.func.__name__} cannot be stored")
    return [name, *(size_data(arg) for arg in expr.args)]


def symbols_data(env: ShapeEnv, used: set[sympy.Symbol]) -> dict[str, Any]:
    """Of each symbol: whether it is positive, its value in the traced example, and its least and greatest value."""
    found = {}
    for symbol in sorted(used, key=str):
        given, bounds = _values(env).get(symbol), env.var_to_range.get(symbol)
        low, high = (bounds.lower, bounds.upper) if bounds is not None else (-int_oo, int_oo)
        found[symbol.name] = {
            "positive": bool(symbol.is_positive),
            "hint": None if given is None else int(given),
            "range": [int(bound) if bound.is_Integer else None for bound in (low, high)],
        }
    return found


class Sizes:
    """Symbols and expressions read from data, in a shape environment of their own.

    Args:
        data: what :func:`symbols_data` gave.

    Raises:
        TraceError: it is something else.
    """

    def __init__(self, data: object) -> None:
        """Make the symbols."""
        self.env = ShapeEnv()
        self.symbols: dict[str, sympy.Symbol] = {}
        for name, about in checked(data, dict, "symbols").items():
            if not _SYMBOL.fullmatch(name):
                raise TraceError(f"expected the name of a symbol; found {name[:20]!r}")
            about = checked(about, dict, name)
            hint, (low, high) = about.get("hint"), _pair(about.get("range"))
            positive = {"positive": True} if checked(about.get("positive"), bool, name) else {}
            symbol = sympy.Symbol(name, integer=True, **positive)
            self.symbols[name] = symbol
            self.env.var_to_range[symbol] = ValueRanges(
                -int_oo if low is None else low, int_oo if high is None else high
            )
            self.env.var_to_sources[symbol] = [ConstantSource(name)]
            if hint is not None:
                _values(self.env)[symbol] = sympy.Integer(integer(hint))
        last = max([int(n.lstrip("uz")) for n in self.symbols if re.fullmatch(r"u[0-9]+", n)], default=-1)
        counter = self.env.unbacked_symint_counter
        self.env.unbacked_symint_counter = last + 1 if isinstance(counter, int) else itertools.count(last + 1)

    def expr(self, data: object, depth: int = 0) -> sympy.Basic:
        """The expression that :func:`size_data` wrote."""
        if isinstance(data, bool):
            return sympy.true if data else sympy.false
        if isinstance(data, int):
            return sympy.Integer(integer(data))
        if isinstance(data, str) and data in self.symbols:
            return self.symbols[data]
        if not isinstance(data, list) or not data or depth > MOST_DEPTH or len(data) > MOST_ARGUMENTS:
            raise TraceError(f"expected a size; found {told(data)}")
        name, function = data[0], FUNCTIONS.get(data[0]) if isinstance(data[0], str) else None
        if function is None:
            raise TraceError(f"expected a function of sizes; found {told(name)}")
        args = [self.expr(part, depth + 1) for part in data[1:]]
        if name == "Pow" and not (len(args) == 2 and args[0].is_Symbol and args[1] in range(-1, MOST_POWER)):
            raise TraceError("expected a small power of a symbol; found another")
        made = function(*args)
        if not isinstance(made, sympy.Basic):
            raise TraceError(f"expected a size; {name} gives {type(made).__name__}")
        return made

    def symint(self, data: object) -> Any:
        """A size: an int, or a ``SymInt`` of this environment."""
        expr = self.expr(data)
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if not isinstance(expr, sympy.Expr):
            raise TraceError(f"expected a size; found {expr}")
        if not expr.free_symbols:
            raise TraceError(f"expected a whole number; found {expr}")
        return self.env.create_symintnode(expr, hint=self._hint(expr))

    def symbool(self, data: object) -> Any:
        """A condition: a bool, or a ``SymBool`` of this environment."""
        expr = self.expr(data)
        if expr in (sympy.true, sympy.false):
            return bool(expr)
        if not isinstance(expr, sympy.logic.boolalg.Boolean) or isinstance(expr, sympy.Symbol):
            raise TraceError(f"expected a condition; found {expr}")
        return self.env.create_symboolnode(expr)

    def _hint(self, expr: sympy.Expr) -> int | None:
        values = _values(self.env)
        known = expr.subs({s: values[s] for s in expr.free_symbols if s in values})
        return int(known) if known.is_Integer else None


def checked(value: object, kind: type, what: str) -> Any:
    """``value``, which must be of ``kind``. Raises :class:`TraceError`."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TraceError(f"{what[:60]}: expected {kind.__name__}; found {told(value)}")
    return value


def told(value: object) -> str:
    """The beginning of ``value``, for messages."""
    return reprlib.repr(value)[:80]


def integer(value: object) -> int:
    """An integer of 64 bits. Raises :class:`TraceError`."""
    number: int = checked(value, int, "a number")
    if number.bit_length() > MOST_BITS:
        raise TraceError(f"expected an integer of 64 bits; found one of {number.bit_length()}")
    return number


def _pair(value: object) -> tuple[int | None, int | None]:
    pair = checked(value, list, "range")
    if len(pair) != 2:
        raise TraceError("expected a least and a greatest value")
    low, high = (None if bound is None else integer(bound) for bound in pair)
    if low is not None and high is not None and low > high:
        raise TraceError(f"expected a range; found {low} to {high}")
    return low, high


def _values(env: ShapeEnv) -> dict[sympy.Symbol, Any]:
    """Symbol → its value in the traced example; PyTorch 2.11 calls it otherwise."""
    name = "backed_var_to_val" if hasattr(env, "backed_var_to_val") else "var_to_val"
    found: dict[sympy.Symbol, Any] = getattr(env, name)
    return found
