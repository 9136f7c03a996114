"""cpcompile: optimal, proven and explained token parallelism for tensor-parallel DeepSeek inference.

Use it as ``torch.compile(model, backend="cpcompile")``; importing this package loads nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cpcompile.declared_ops import row_wise
    from cpcompile.errors import CpcompileError
    from cpcompile.explanation import explain
    from cpcompile.idle import idle_step
    from cpcompile.options import Options
    from cpcompile.plan import Plan
    from cpcompile.weights import reallocate_weights

_HOMES = {
    "CpcompileError": "cpcompile.errors",
    "Options": "cpcompile.options",
    "Plan": "cpcompile.plan",
    "explain": "cpcompile.explanation",
    "idle_step": "cpcompile.idle",
    "reallocate_weights": "cpcompile.weights",
    "row_wise": "cpcompile.declared_ops",
}
__all__ = ["CpcompileError", "Options", "Plan", "explain", "idle_step", "reallocate_weights", "row_wise"]


def __getattr__(name: str) -> Any:
    """Load the public names on first use: the backend's entry point must not import what it does not need."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cpcompile' has no attribute {name!r}")
