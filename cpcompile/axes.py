"""A mesh axis as the passes see it: a name, a size, this rank's place, and the group's names in the graph."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One mesh axis.

    Args:
        name: the mesh dim's name, such as ``"tp"``.
        group_name: the functional-collectives name of the process group (``ProcessGroup.group_name``).
        size: number of ranks ``n`` in the group.
        rank: this process's rank within the group, ``0 <= rank < size``.
        ranks: the global ranks of the group, in group order.
        aliases: other names by which collectives of the graph call the same group (vLLM's ``"tp:0"``).
    """

    name: str
    group_name: str
    size: int
    rank: int
    ranks: tuple[int, ...]
    aliases: tuple[str, ...] = ()

    def owns(self, group_name: object) -> bool:
        """Whether a collective over ``group_name`` runs over this axis."""
        return group_name == self.group_name or group_name in self.aliases
