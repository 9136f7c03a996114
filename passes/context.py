"""What passes that run on their own, as ``cpcompile opt`` runs them, must be told of a graph; kept in its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.fx as fx

from cpcompile.axes import Axis
from cpcompile.errors import AxisError, TraceError, nearest
from cpcompile.passes.token_layout import Expr

KEY = "cpcompile"


@dataclass(frozen=True)
class Rewrite:
    """The last rewrite of a graph: what it was before, and over which axis and token count it was split."""

    before: fx.GraphModule
    axis: Axis
    tokens: Expr


@dataclass
class GraphContext:
    """Facts of a graph that the graph itself does not hold.

    Args:
        axes: the mesh axes.
        replicated: axis name → graph input name → whether every rank of the axis holds the same value.
        rewrite: the last rewrite, for a pass that proves it.
    """

    axes: tuple[Axis, ...]
    replicated: Mapping[str, Mapping[str, bool]]
    rewrite: Rewrite | None = None

    def axis(self, name: str) -> Axis:
        """The axis called ``name``. Raises :class:`AxisError` with the nearest name if there is none."""
        for axis in self.axes:
            if axis.name == name:
                return axis
        raise AxisError(f"the graph has no axis {name!r}{nearest(name, [a.name for a in self.axes])}")


def context_of(gm: fx.GraphModule) -> GraphContext:
    """The context of ``gm``. Raises :class:`TraceError` if it has none: nothing may be assumed of its inputs."""
    context = gm.meta.get(KEY)
    if not isinstance(context, GraphContext):
        raise TraceError("the graph has no axes and facts with it: load it with cpcompile.trace_file.load_trace")
    return context
