"""Ops of which a user states that they are row-wise: what no graph shows of an op that is opaque to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cpcompile.errors import OptionError

# Of these ops the table and the proof know what they do: a statement would overrule them.
KNOWN_NAMESPACES = frozenset({"aten", "prims", "_c10d_functional", "c10d_functional", "cpcompile"})


@dataclass(frozen=True)
class RowWiseOp:
    """What was stated of an op.

    Args:
        name: ``"namespace::op"``, all overloads.
        rows: positions of the arguments whose rows lie in dim ``dim``; every other tensor is needed whole.
        out: how many of its results, counted from the first, have their rows there.
        dim: the dim of the rows, counted from 0.
    """

    name: str
    rows: tuple[int, ...]
    out: int
    dim: int


_STATED: dict[str, RowWiseOp] = {}


def row_wise(name: str, *, rows: Sequence[int] = (0,), out: Sequence[int] = (0,), dim: int = 0) -> None:
    """State that an opaque op computes each row of its results from the same row of some operands.

    The op must be a function of its arguments: alike arguments give alike results on every rank, nothing is written,
    and nothing else is read. All ranks must state the same, before they compile. The static proof takes this on trust
    and says so; ``verify="numeric"`` runs the op on rows and on the whole, and catches a statement that is wrong.

    Args:
        name: the op, ``"namespace::op"``, such as one made with ``torch.library.custom_op``.
        rows: positions of the arguments that have a row for each token; every rank needs all others whole.
        out: numbers of the results that have a row for each token, from 0 without gaps; others cannot be used by rows.
        dim: the dim of the rows, in those arguments and results alike, counted from 0.

    Raises:
        OptionError: a name without namespace or of an op that is known, positions or a dim that cannot be.

    Example:
        ``cpcompile.row_wise("lib::op", rows=(0, 2), out=(0,))``
    """
    namespace, _, op = name.partition("::")
    if not namespace or not op or "." in op:
        raise OptionError(f'row_wise({name!r}): expected the name of an op, "namespace::op" without an overload')
    if namespace in KNOWN_NAMESPACES:
        raise OptionError(f"row_wise({name!r}): ops of {namespace!r} are known already, and need no statement")
    places, results = tuple(rows), tuple(sorted(out))
    if not places or len(set(places)) != len(places) or not all(_is_position(p) for p in places):
        raise OptionError(
            f"row_wise({name!r}): rows={places}: expected positions of arguments, at least one, each once"
        )
    if not results or results != tuple(range(len(results))):
        raise OptionError(
            f"row_wise({name!r}): out={tuple(out)}: expected results from the first on, such as (0,) or (0, 1)"
        )
    if not _is_position(dim):
        raise OptionError(f"row_wise({name!r}): dim={dim!r}: expected a dim counted from 0")
    _STATED[name] = RowWiseOp(name, places, len(results), dim)


def stated(name: str) -> RowWiseOp | None:
    """What was stated of the op called ``name``, without its overload."""
    return _STATED.get(name)


def forget_row_wise(name: str) -> None:
    """Take back what was stated of ``name``; graphs that are compiled already keep it."""
    _STATED.pop(name, None)


def _is_position(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
