"""vllm-ascend, vLLM's platform of NPUs: what the plugin does otherwise there. Imports it only where vLLM has chosen it.

It compiles in mode VLLM_COMPILE alone, with a compiler of its own, which runs a pass manager of its own on the graph
that AOTAutograd makes of each piece: our pass goes there. Read and run in its releases 0.26.0rc1 and 0.29.0rc1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cpcompile.serving.settings import NAME
from cpcompile.serving.vllm_settings import IDENTITY

MODES = "mode VLLM_COMPILE with cudagraph_mode PIECEWISE and no backend"


def is_here() -> bool:
    """Whether it is the platform of this process."""
    from vllm.platforms import current_platform

    return type(current_platform).__module__.startswith("vllm_ascend.")


def hook(around: Callable[[Any, str, Callable[..., Any]], None]) -> None:
    """Hook it with ``around(owner, name, hook)``."""
    from vllm_ascend import ascend_config, platform

    for module in (ascend_config, platform):
        around(module, "init_ascend_config", without_our_options)


def without_our_options(original: Callable[..., Any], vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Since 0.29 it refuses words of ``additional_config`` that are not its own."""
    given = vllm_config.additional_config
    ours = {name: given.pop(name) for name in (NAME, IDENTITY) if name in (given or {})}
    try:
        return original(vllm_config, *args, **kwargs)
    finally:
        if ours:
            given.update(ours)


def skips_passes(vllm_config: Any) -> bool:
    """Whether its compiler hands graphs to npugraph_ex, past all passes."""
    found = (vllm_config.additional_config or {}).get("ascend_compilation_config", {})
    return bool(found.get("enable_npugraph_ex"))
