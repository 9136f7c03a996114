"""Target ``eager``: the graph's own Python code, op by op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.fx as fx
from functorch.compile import make_boxed_func

from cpcompile.lowering.targets import BoxedCallable, Settings


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> BoxedCallable:
    """Run ``gm`` as it is."""
    boxed: BoxedCallable = make_boxed_func(gm.forward)
    return boxed
