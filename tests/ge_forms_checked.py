"""A function's GE graph, made by the passes and torchair, interpreted and compared with the function itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import torch
import torch.fx as fx
from simulate import real_inputs
from test_ge_forms import traced
from torch import Tensor

from cpcompile.capture import capture
from cpcompile.lowering.ge import GeProgram, interpret, load
from cpcompile.passes.base import GraphPass


def rewritten(kind: str, rewrite: GraphPass, tokens: int, **changes: Any) -> tuple[fx.GraphModule, float]:
    """The graph of an unsharded model of one dense and one sparse layer, rewritten, and how far its logits are off."""
    model = models.build(models.tiny_config(kind, **changes))
    trace = capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)
    ids = torch.randint(0, models.TINY["vocab_size"], (1, tokens), generator=torch.Generator().manual_seed(tokens))
    given = real_inputs(trace, ids)
    with torch.no_grad():
        (expected,) = trace.gm(*given)
        rewrite(trace.gm)
        (found,) = trace.gm(*given)
    return trace.gm, float((found - expected).abs().max())


def worst_of_lowered(function: Callable[..., Any], given: Sequence[Tensor]) -> tuple[float, dict[str, int]]:
    """The largest error of the lowered graph's results, and its ops by type; in a process with torch_npu."""
    from cpcompile.lowering.ascend.export import export
    from cpcompile.lowering.targets import Settings

    def several(*values: Tensor) -> tuple[Tensor, ...]:
        out = function(*values)
        return out if isinstance(out, tuple) else (out,)

    gm = traced(several, *given, mode="fake")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        summary, unsupported = export(gm, Path(folder), Settings())
        assert not unsupported
        (found,) = interpret([GeProgram(load(Path(folder) / "model.pb"), list(given))])
        expected = several(*given)
    errors = [float((f.double() - e.double()).abs().max()) for f, e in zip(found, expected, strict=True)]
    return max(errors), summary.ops
