"""What a user gives to a server for cpcompile, checked before anything is loaded; nothing here imports a server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cpcompile.errors import OptionError, PlanError, nearest
from cpcompile.identity import our_sources, our_version, plan_digest
from cpcompile.options import Options
from cpcompile.plan import Plan

NAME = "cpcompile"


def check_options(
    given: Any, where: str, server: str, decided: Mapping[str, str], lacking: Sequence[str], tp: tuple[str, int]
) -> dict[str, Any]:
    """What a user gave to ``server``, checked.

    Args:
        given: that.
        where: how a user gives it.
        server: the server's name.
        decided: options that the server's configuration decides, and what decides them.
        lacking: options that need process groups which nobody makes in this server.
        tp: the server's name of the tensor-parallel size, and that.

    Raises:
        OptionError: an option is unknown, malformed, or not for this server.
        PlanError: ``plan`` cannot be read, or was made for another tensor-parallel size.
    """
    if not isinstance(given, Mapping):
        raise OptionError(f"{where} is {given!r}: give a dict of options")
    for name in given:
        if name in decided:
            raise OptionError(f"{where}: {name} is decided by {decided[name]}: leave it out")
    parsed = Options.parse(given)
    for name in lacking:
        if getattr(parsed, name):
            raise OptionError(f"{where}: {name} needs process groups that nobody makes in {server}: leave it out")
    if parsed.verify == "numeric":
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


def identity(options: Mapping[str, Any]) -> dict[str, str]:
    """What compiled code depends on besides ``options``: it goes into vLLM's compile-cache key."""
    found = {"version": our_version(), "sources": our_sources(), "torch": torch.__version__}
    if options.get("plan") is not None:
        found["plan"] = plan_digest(str(options["plan"]))
    return found


def plain(options: Mapping[str, Any]) -> str:
    """Options as one line, for logs."""
    return json.dumps(dict(options), sort_keys=True, default=str)
