"""The ordered table of targets: name → where its ``lower`` lives. A new target is one file here and one row."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.fx as fx

from cpcompile.errors import OptionError, nearest

BoxedCallable = Callable[[list[Any]], Any]

TARGETS = {
    "eager": "cpcompile.lowering.eager:lower",
    "inductor": "cpcompile.lowering.inductor:lower",
    "torchair": "cpcompile.lowering.ascend.device:lower_torchair",
    "npugraph_ex": "cpcompile.lowering.ascend.device:lower_npugraph_ex",
    "ge-export": "cpcompile.lowering.ascend.export:lower",
}
ON_DEVICE = {"torchair": True, "npugraph_ex": True, "ge-export": False}  # targets on Ascend: whether they need an NPU


@dataclass(frozen=True)
class Settings:
    """What a target may be told.

    Args:
        compiler_config: of torchair, for the targets on Ascend: its ``CompilerConfig``.
        mc2: on Ascend, matmuls and the reduce-scatter or all-gather next to them as one op.
        folder: where ``ge-export`` writes.
        uneven_collectives: on Ascend, reduce-scatters and all-gathers of as many rows as there are, in place of pads.
        mla_prolog: on Ascend, absorbed MLA ahead of attention as one op, where it fits.
        moe_dispatch: on Ascend, name of the group over which rows go to their experts and back, where that fits.
        mode: of inductor, for that target: what ``torch.compile(mode=...)`` says; empty for its default.
    """

    compiler_config: Any = None
    mc2: bool = False
    folder: Path | None = None
    uneven_collectives: bool = False
    mla_prolog: bool = False
    moe_dispatch: str = ""
    mode: str = ""


def prepare(target: str) -> None:
    """Import what ``target`` needs, before anything is compiled: torch_npu changes torch when it is imported.

    Raises:
        AscendError: it is not there.
    """
    if target in ON_DEVICE:
        from cpcompile.lowering.ascend.installation import import_torchair

        import_torchair(target, device=ON_DEVICE[target])


def lower(
    target: str, gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings = Settings()
) -> BoxedCallable:
    """Lower a functional ATen graph for ``target``.

    Args:
        target: a name of :data:`TARGETS`.
        gm: the graph.
        example_inputs: its fake inputs.
        settings: what the target is told.

    Returns:
        A boxed callable: takes one list of inputs, which it may empty, and returns the graph's outputs.

    Raises:
        OptionError: the target is not known, or a setting is missing.
        AscendError: what the target needs is not there, or it has no form of an op.
    """
    if target not in TARGETS:
        raise OptionError(f"unknown target {target!r}{nearest(target, TARGETS)}")
    module, _, function = TARGETS[target].partition(":")
    lowered: BoxedCallable = getattr(importlib.import_module(module), function)(gm, example_inputs, settings)
    return lowered
