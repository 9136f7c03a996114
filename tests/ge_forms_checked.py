"""A function's GE graph, made by the passes and torchair, interpreted and compared with the function itself."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import torch
import torch.fx as fx
from test_ge_forms import traced
from torch import Tensor

from cpcompile.capture import capture
from cpcompile.lowering.ge import GeProgram, interpret, load


def whole(kind: str, **changes: Any) -> fx.GraphModule:
    """The graph of an unsharded model of one dense and one sparse layer, for passes to rewrite."""
    model = models.build(models.tiny_config(kind, **changes))
    return capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False).gm


def worst_of_lowered(function: Callable[..., Any], given: Sequence[Tensor]) -> tuple[float, dict[str, int]]:
    """The largest error of the lowered graph's results, and its ops by type; in a process with torch_npu."""
    from cpcompile.lowering.ascend.export import export
    from cpcompile.lowering.targets import Settings

    gm = traced(function, *given, mode="fake")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        summary, unsupported = export(gm, Path(folder), Settings())
        assert not unsupported
        graph = load(Path(folder) / "model.pb")
        (found,) = interpret([GeProgram(graph, list(given))])
        expected = function(*given)
    expected = expected if isinstance(expected, tuple) else (expected,)
    errors = [float((f.double() - e.double()).abs().max()) for f, e in zip(found, expected, strict=True)]
    return max(errors), summary.ops
