"""Target ``inductor``: PyTorch's own compiler, on the rewritten graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch._functorch.config
import torch.fx as fx
import torch.fx.experimental._config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

from cpcompile.lowering.targets import BoxedCallable, Settings
from cpcompile.lowering.used_inputs import used_inputs


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> BoxedCallable:
    """Compile ``gm`` with inductor, which traces the graph again with its own decompositions."""
    inner, used = used_inputs(gm, example_inputs)
    # A shard has one row wherever T <= n: code for more rows must not be guarded against that, since the guards of all
    # variants are dynamo's for the whole graph, and one of n = 2 ("T is not 2") would contradict mark_dynamic.
    oblivious = torch.fx.experimental._config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    # The cache of AOTAutograd is keyed by the names of this project's ops, not by what this version makes of them.
    patches: dict[str, Any] = list_mode_options(settings.mode) if settings.mode else {}
    with oblivious, torch._functorch.config.patch(enable_autograd_cache=False):
        compiled: Any = compile_fx(inner, [example_inputs[i] for i in used], config_patches=patches)

    def boxed(args: list[Any]) -> Any:
        mine = [args[i] for i in used]
        args.clear()
        return compiled(*mine)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed
