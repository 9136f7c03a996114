"""What a pass returns: how often it rewrote, and what it refused, with reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch.fx as fx


@dataclass(frozen=True)
class Refusal:
    """A place that a pass looked at and left alone.

    Args:
        node: name of the FX node.
        reason: one line, in the words of the user.
    """

    node: str
    reason: str


@dataclass
class PassResult:
    """Outcome of one pass over one graph. ``rewrites`` counts changes to the graph, truthfully: 0 means untouched."""

    rewrites: int = 0
    refusals: list[Refusal] = field(default_factory=list)

    def refuse(self, node: fx.Node | str, reason: str) -> None:
        """Record that ``node`` was left alone, and why."""
        self.refusals.append(Refusal(str(node), reason))

    def finish(self, gm: fx.GraphModule) -> PassResult:
        """Check ``gm`` and make its code anew, if it was changed; what a pass returns."""
        if self.rewrites:
            gm.graph.lint()
            gm.recompile()
        return self


class GraphPass(Protocol):
    """A pass: a frozen dataclass whose fields are its options, applied to a graph in place."""

    @property
    def name(self) -> str:
        """Kebab-case name, as ``cpcompile opt -p`` takes it."""

    def __call__(self, gm: fx.GraphModule) -> PassResult:
        """Rewrite ``gm`` in place and say what was done and what was refused."""
