"""Target ``ge-export``: the GE graph as files. Needs torch_npu, and neither CANN nor an NPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.fx as fx

from cpcompile.errors import AscendError, OptionError
from cpcompile.lowering.ascend.conversion import convert, require_all, without_guards
from cpcompile.lowering.ascend.forms import to_ascend
from cpcompile.lowering.ascend.ge_graph import GeSummary, write
from cpcompile.lowering.ascend.installation import import_torchair
from cpcompile.lowering.targets import BoxedCallable, Settings


def lower(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> BoxedCallable:
    """Write ``gm`` as a GE graph; what is returned raises when it is called: nothing here can run it.

    Raises:
        OptionError: there is no folder to write to.
        AscendError: torch_npu is missing or does not fit, or has no form of an op.
    """
    if settings.folder is None:
        raise OptionError("target 'ge-export' writes graphs: give a folder")
    folder = settings.folder
    require_all(export(gm, folder, settings)[1])

    def exported(args: list[Any]) -> Any:
        raise AscendError(f"target 'ge-export' runs nothing: the GE graph is in {folder}")

    exported._boxed_call = True  # type: ignore[attr-defined]
    return exported


def export(
    gm: fx.GraphModule, folder: Path, settings: Settings, known: Sequence[Mapping[str, Any]] = ()
) -> tuple[GeSummary, list[Any]]:
    """Write ``gm`` as a GE graph to ``folder``; returns its summary and what has no place in it.

    Args:
        gm: the pipeline's graph; not changed.
        folder: where to write.
        settings: what the target is told.
        known: what the summary is to say of each input of ``gm``, its ``source`` among it.

    Raises:
        AscendError: torch_npu is missing or does not fit, or the trace serves some sizes only.
    """
    import_torchair("ge-export", device=False)
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    own = fx.GraphModule(gm, graph)
    with without_guards(own):
        for _ in to_ascend(own, settings):
            pass
    converted = convert(own, settings.compiler_config)
    return write(folder, own, converted, known), converted.unsupported
