"""Which rank holds what, for the proofs: a collective's meaning, told from what each of its ranks puts in.

A whole value that the ranks of an axis group share is one symbol for all of them; one that differs is a symbol of its
rank; a rank's rows are a symbol of the axis group and of the block's number. A reduction is the bag of what its ranks
put in: equal bags are equal results. Of a rank of which nothing is known, nothing is proven.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from cpcompile.axes import Axis

Bag = Counter[tuple[object, ...]]


class Holdings:
    """What the ranks that meet in a collective hold of values that are placed over ``axis``."""

    def __init__(self, axis: Axis) -> None:
        """``axis`` knows the rank lists."""
        self.axis = axis
        self._bags: dict[tuple[str, str], dict[int, Bag] | None] = {}

    def same_ranks(self, group: str) -> bool:
        """Whether the collective is one of the axis's own ranks."""
        return sorted(self._joined(group)) == sorted(self.axis.ranks)

    def same_order(self, group: str) -> bool:
        """Whether it is, and rank k of the one is rank k of the other."""
        return self._joined(group) == self.axis.ranks

    def gathers_all(self, group: str) -> bool:
        """Whether one run of the collective serves every rank of the axis: it gives all of them the same."""
        return all(rank in self._joined(group) for rank in self.axis.ranks)

    def reduces_alike(self, group: str) -> bool:
        """Whether ranks of the axis reduce the same values, where an axis group's ranks share a value."""
        bags = self._of(group, "shared")
        return bags is not None and len({frozenset(bag.items()) for bag in bags.values()}) == 1

    def reduces_copies(self, group: str) -> bool:
        """Whether every rank of the axis reduces copies of its own value only, where an axis group shares a value."""
        bags = self._of(group, "shared")
        return bags is not None and all(set(bag) == {self._symbol("shared", rank)} for rank, bag in bags.items())

    def reduces_rows(self, group: str) -> bool:
        """Whether reducing each rank's rows gives each rank its rows of the reduced whole."""
        rows, wholes = self._of(group, "rows"), self._of(group, "shared")
        if rows is None or wholes is None:
            return False
        wanted = {rank: _at_block(self._block(rank), bag) for rank, bag in wholes.items()}
        return rows == wanted and self.reduces_alike(group)

    def passes_sums(self, group: str) -> bool:
        """Whether a sum over the group of summands over the axis is a summand of the sum of the sums."""
        own, wholes = self._of(group, "own"), self._of(group, "shared")
        if own is None or wholes is None:
            return False
        summed = sum(own.values(), start=Counter())
        for bag in wholes.values():
            wanted: Bag = Counter()
            for (_, ranks), times in bag.items():
                wanted += Counter({("own", rank): times for rank in ranks})  # type: ignore[attr-defined]
            if wanted != summed:
                return False
        return True

    def _joined(self, group: str) -> tuple[int, ...]:
        return self.axis.members(group, self.axis.me) or ()

    def _block(self, rank: int) -> int | None:
        ranks = self.axis.members(self.axis.group_name, rank)
        return None if ranks is None else ranks.index(rank)

    def _symbol(self, kind: str, rank: int) -> tuple[object, ...] | None:
        """What ``rank`` puts in: its own value, the one that it shares, or its rows of that."""
        ranks = self.axis.members(self.axis.group_name, rank)
        if kind == "own":
            return ("own", rank)
        if ranks is None:
            return None
        return ("shared", ranks) if kind == "shared" else ("rows", ranks, ranks.index(rank))

    def _of(self, group: str, kind: str) -> dict[int, Bag] | None:
        """What every rank of the axis has reduced, None where one of them meets a rank that is not known."""
        if (group, kind) not in self._bags:
            self._bags[group, kind] = self._gathered(group, lambda rank: self._symbol(kind, rank))
        return self._bags[group, kind]

    def _gathered(self, group: str, symbol: Callable[[int], tuple[object, ...] | None]) -> dict[int, Bag] | None:
        found: dict[int, Bag] = {}
        for rank in self.axis.ranks:
            symbols = [symbol(other) for other in self.axis.members(group, rank) or ()]
            if not symbols or any(s is None for s in symbols):
                return None
            found[rank] = Counter(s for s in symbols if s is not None)
        return found


def _at_block(block: int | None, wholes: Bag) -> Bag:
    """Rows ``block`` of every whole value of a bag."""
    return Counter({("rows", ranks, block): times for (_, ranks), times in wholes.items()})
