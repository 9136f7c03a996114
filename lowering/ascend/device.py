"""Targets ``torchair`` and ``npugraph_ex``: on an NPU, by torchair, as a GE graph or as a captured graph of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from cpcompile.errors import AscendError
from cpcompile.lowering.ascend.conversion import Unsupported, collecting, ge_config, require_all
from cpcompile.lowering.ascend.converters import register_missing
from cpcompile.lowering.ascend.forms import to_ascend
from cpcompile.lowering.ascend.installation import import_torchair
from cpcompile.lowering.ascend.transpositions import prepare_transpositions
from cpcompile.lowering.targets import BoxedCallable, Settings
from cpcompile.lowering.used_inputs import used_inputs
from cpcompile.passes.describe import module_of

GE_MODE = "max-autotune"
HOST_READS = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
CAPTURE_MODES = ("npugraph_ex", "reduce-overhead")  # the name in this release and in earlier ones


def lower_torchair(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> BoxedCallable:
    """Compile ``gm`` to a GE graph.

    Raises:
        AscendError: torch_npu or an NPU is missing, the configuration is for another target, or an op has no form.
    """
    torchair = import_torchair("torchair", device=True)
    config = settings.compiler_config if settings.compiler_config is not None else ge_config(torchair)
    if config.mode.value != GE_MODE:
        raise AscendError(f"compiler_config has mode {config.mode.value!r}: target 'torchair' needs {GE_MODE!r}")
    register_missing(torchair)
    unsupported: list[Unsupported] = []
    with collecting(unsupported):
        lowered = _compile(torchair, gm, example_inputs, config, settings)
    require_all(unsupported)
    return lowered


def lower_npugraph_ex(gm: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings) -> BoxedCallable:
    """Compile ``gm`` to a captured graph of kernels.

    Raises:
        AscendError: torch_npu or an NPU is missing, the configuration is for another target, or an op's result has a
            size that its inputs' values decide.
    """
    torchair = import_torchair("npugraph_ex", device=True)
    config = settings.compiler_config if settings.compiler_config is not None else capture_config(torchair)
    if config.mode.value not in CAPTURE_MODES:
        raise AscendError(f"compiler_config has mode {config.mode.value!r}: target 'npugraph_ex' needs 'npugraph_ex'")
    _check_capturable(gm)
    return _compile(torchair, gm, example_inputs, config, settings)


def _check_capturable(gm: fx.GraphModule) -> None:
    """Refuse what stops a capture: the host would wait for a value of the device, which computes nothing yet."""
    for node in gm.graph.nodes:
        if HOST_READS.intersection(getattr(node.target, "tags", ())) and not _picks_by_number(node):
            where = f" in {module_of(node)}" if module_of(node) else ""
            raise AscendError(
                f"{node.target} ({node.name}{where}) brings a value to the host, which a captured graph cannot: "
                "write it with sizes that are known without, or use target 'torchair'"
            )


def _picks_by_number(node: fx.Node) -> bool:
    """Whether ``node`` is an index by numbers alone: a mask would decide how many rows there are, numbers do not."""
    if node.target is not torch.ops.aten.index.Tensor:
        return False
    indices: Any = node.args[1]
    masks = (torch.bool, torch.uint8)
    return all(index is None or index.meta["val"].dtype not in masks for index in indices)


def capture_config(torchair: Any) -> Any:
    """Torchair's configuration for captured graphs, by the name that this release has for them."""
    config = torchair.CompilerConfig()
    for mode in CAPTURE_MODES:
        try:
            config.mode = mode
            return config
        except ValueError:
            continue
    raise AscendError(f"torchair has none of the modes {', '.join(CAPTURE_MODES)}: install a torch_npu that fits")


def _compile(
    torchair: Any, gm: fx.GraphModule, example_inputs: Sequence[Any], config: Any, settings: Settings
) -> BoxedCallable:
    inner, used = used_inputs(gm, example_inputs)
    for _ in to_ascend(inner, settings):
        pass
    prepare_transpositions(inner)
    compiled = torchair.get_compiler(config)(inner, [example_inputs[i] for i in used])

    def boxed(args: list[Any]) -> Any:
        mine = [args[i] for i in used]
        args.clear()
        return compiled(*mine)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed
