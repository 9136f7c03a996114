"""The ordered table of targets: name → where its ``lower`` lives. A new target is one file here and one row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch.fx as fx

from cpcompile.errors import OptionError, nearest

BoxedCallable = Callable[[list[Any]], Any]

TARGETS = {
    "eager": "cpcompile.lowering.eager:lower",
    "inductor": "cpcompile.lowering.inductor:lower",
}


def lower(target: str, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> BoxedCallable:
    """Lower a functional ATen graph for ``target``.

    Args:
        target: a name of :data:`TARGETS`.
        gm: the graph.
        example_inputs: its fake inputs.

    Returns:
        A boxed callable: takes one list of inputs, which it may empty, and returns the graph's outputs.

    Raises:
        OptionError: the target is not known.
    """
    if target not in TARGETS:
        raise OptionError(f"unknown target {target!r}{nearest(target, TARGETS)}")
    module, _, function = TARGETS[target].partition(":")
    lowered: BoxedCallable = getattr(importlib.import_module(module), function)(gm, example_inputs)
    return lowered
