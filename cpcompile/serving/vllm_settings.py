"""What a vLLM user asks cpcompile for, checked before anything is loaded; nothing here imports vLLM."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from cpcompile.errors import GroupError, OptionError, PlanError, nearest
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.options import Options
from cpcompile.plan import Plan

NAME = "cpcompile"
BACKENDS = (NAME, "cpcompile.backend:cpcompile_backend", "cpcompile.backend.cpcompile_backend")
IDENTITY = "cpcompile_identity"
#: Options that vLLM's own configuration decides, and what decides them.
DECIDED = {"axes": "vLLM's tensor_parallel_size", "groups": "vLLM's parallel sizes"}


def names_us(compilation_config: Any) -> bool:
    """Whether the compilation configuration, an object or a dict, names this backend."""
    backend = compilation_config.get("backend") if isinstance(compilation_config, Mapping) else None
    return (backend or getattr(compilation_config, "backend", "")) in BACKENDS


def asks_for_us(compilation_config: Any) -> bool:
    """Whether the compilation configuration, an object or a dict, names this backend or holds its pass."""
    passes = getattr(compilation_config, "inductor_compile_config", {}).values()
    return names_us(compilation_config) or any(getattr(each, "name", "") == NAME for each in passes)


def read_options(additional_config: Any, tensor_parallel_size: int) -> dict[str, Any]:
    """``additional_config["cpcompile"]``, checked.

    Raises:
        OptionError: an option is unknown, malformed, or decided by vLLM's configuration.
        PlanError: ``plan`` cannot be read, or was made for another tensor-parallel size.
    """
    given = additional_config.get(NAME, {}) if isinstance(additional_config, Mapping) else {}
    where = f"additional_config[{NAME!r}]"
    return check_options(given, where, "vLLM", DECIDED, ("tensor_parallel_size", tensor_parallel_size))


def check_options(
    given: Any, where: str, server: str, decided: Mapping[str, str], tp: tuple[str, int]
) -> dict[str, Any]:
    """What a user gave to ``server`` as ``where``, checked; ``tp``: its name of the tensor-parallel size, and that."""
    if not isinstance(given, Mapping):
        raise OptionError(f"{where} is {given!r}: give a dict of options")
    for name in given:
        if name in decided:
            raise OptionError(f"{where}: {name} is decided by {decided[name]}: leave it out")
    if Options.parse(given).verify == "numeric":
        raise OptionError(f"verify='numeric' runs graphs on random data, without {server}'s caches: use 'static'")
    if given.get("plan") is not None:
        _check_plan(str(given["plan"]), *tp)
    return dict(given)


def _check_plan(path: str, size_name: str, ranks: int) -> None:
    sizes = {axis.axis: axis.size for axis in Plan.load(path).axes}
    if "tp" not in sizes:
        raise PlanError(
            f"the plan {path} has no axis 'tp'{nearest('tp', sizes)}: make it with cpcompile in this server"
        )
    if sizes["tp"] != ranks:
        raise PlanError(f"the plan {path} is for {size_name} {sizes['tp']}, found {ranks}: make a new plan")


def check_ranks(parallel_config: Any, world: int, tp_ranks: Sequence[int]) -> None:
    """Check that vLLM's tensor-parallel group of this rank is one of ours for the same sizes and rank order.

    Raises:
        GroupError: it is not, or the sizes do not fit.
    """
    sizes = Sizes(
        world=world,
        dp=parallel_config.data_parallel_size,
        pp=parallel_config.pipeline_parallel_size,
        cp=parallel_config.prefill_context_parallel_size,
        tp=parallel_config.tensor_parallel_size,
    )
    groups = rank_groups(sizes, "vllm").kinds["tp"].groups
    if tuple(tp_ranks) not in groups:
        raise GroupError(f"vLLM's tensor-parallel ranks {list(tp_ranks)}: expected one of {[list(g) for g in groups]}")


def identity(options: Mapping[str, Any]) -> dict[str, str]:
    """What compiled code depends on besides ``options``: it goes into vLLM's compile-cache key."""
    found = {"version": _version(), "torch": torch.__version__}
    if options.get("plan") is not None:
        found["plan"] = hashlib.sha256(Path(str(options["plan"])).read_bytes()).hexdigest()
    return found


def _version() -> str:
    try:
        return version(NAME)
    except PackageNotFoundError:
        return "uninstalled"


def plain(options: Mapping[str, Any]) -> str:
    """Options as one line, for logs."""
    return json.dumps(dict(options), sort_keys=True, default=str)
