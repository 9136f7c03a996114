"""How a collective's group meets the mesh axis, for the planner: from the rank lists of both and nothing else.

A group joins the axis's own ranks under another name, lies inside the axis, crosses it, or joins ranks that stand at
the same place of their own axis groups, as the other dims of a mesh do: only those hold the same rows.
"""

from __future__ import annotations

from collections import Counter

from cpcompile.axes import Axis

# Reductions of equal values that give that value again.
IDEMPOTENT = frozenset({"max", "min", "avg"})


class GroupRelations:
    """What is known of groups with respect to one axis."""

    def __init__(self, axis: Axis) -> None:
        """Remember ``axis``; a group is looked at when it is asked for."""
        self.axis = axis
        self._apart: dict[str, str] = {}
        self._alike: dict[str, bool] = {}

    def is_axis(self, name: str) -> bool:
        """Whether the group joins the ranks of the axis and no others, in whatever order."""
        ranks = self.axis.members(name, self.axis.me)
        return ranks is not None and set(ranks) == set(self.axis.ranks)

    def in_rank_order(self, name: str) -> bool:
        """Whether it is the axis, its ranks in the axis's order: gathers and scatters go by that."""
        return self.axis.members(name, self.axis.me) == self.axis.ranks

    def covers(self, name: str) -> bool:
        """Whether all ranks of the axis run the collective together, with others or not."""
        return set(self.axis.ranks) <= set(self.axis.members(name, self.axis.me) or ())

    def lies_inside(self, name: str) -> bool:
        """Whether every rank of the axis runs the collective with ranks of the axis only."""
        groups = [self.axis.members(name, rank) for rank in self.axis.ranks]
        return all(group is not None and set(group) <= set(self.axis.ranks) for group in groups)

    def why_rows_meet(self, name: str) -> str:
        """Why a reduction over the group cannot run on rows; empty where its ranks hold the same rows."""
        if name not in self._apart:
            self._apart[name] = self._why_rows_meet(name)
        return self._apart[name]

    def _why_rows_meet(self, name: str) -> str:
        axis, unknown = self.axis, "give `axes` dims of one DeviceMesh that has all groups"
        for place, rank in enumerate(axis.ranks):
            together = axis.members(name, rank)
            if together is None:
                return f"nobody says with which ranks rank {rank} reduces over group {name!r}: {unknown}"
            for other in together:
                line = axis.members(axis.group_name, other)
                if line is None:
                    return f"nobody says which rows rank {other} of group {name!r} holds: {unknown}"
                if line.index(other) != place:
                    return f"reduces over group {name!r}, whose ranks {rank} and {other} hold different rows"
        return ""

    def keeps_replication(self, name: str) -> bool:
        """Whether values that each axis group's ranks share are reduced to one that they share.

        Every rank of the axis must meet the same axis groups, each as often.
        """
        if name not in self._alike:
            met = [self._met(name, rank) for rank in self.axis.ranks]
            self._alike[name] = met[0] is not None and all(found == met[0] for found in met)
        return self._alike[name]

    def _met(self, name: str, rank: int) -> Counter[frozenset[int]] | None:
        lines = [self.axis.members(self.axis.group_name, other) for other in self.axis.members(name, rank) or ()]
        return Counter(frozenset(line) for line in lines if line is not None) if lines and None not in lines else None
