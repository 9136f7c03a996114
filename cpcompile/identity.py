"""What compiled code depends on besides the model: versions, our own sources, options."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cpcompile.options import Options
from cpcompile.plan import Plan

#: Options that change nothing about the code: how to reach the ranks, and where to write.
_NOT_CODE = frozenset({"axes", "groups", "timeout_s", "dump_dir", "plan"})


def our_version() -> str:
    """The version of this package, ``"uninstalled"`` where it is run from its sources alone."""
    try:
        return version("cpcompile")
    except PackageNotFoundError:
        return "uninstalled"


@functools.cache
def our_sources() -> str:
    """A digest of this package's Python files: an installation from a checkout changes without its version."""
    root = Path(__file__).parent
    rooms = (root, root / "passes", root / "lowering")  # in a checkout the last two are links: glob may not follow them
    digest = hashlib.sha256()
    for path in sorted({path for room in rooms for path in room.glob("**/*.py")}):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(options: Options) -> dict[str, str]:
    """What is wanted of compiled code: versions and ``option NAME`` → its value; a plan by its hash."""
    found = {"cpcompile": f"{our_version()} ({our_sources()})", "torch": torch.__version__}
    for field in dataclasses.fields(options):
        if field.name not in _NOT_CODE:
            found[f"option {field.name}"] = repr(getattr(options, field.name))
    found["option plan"] = "none" if options.plan is None else plan_digest(options.plan)
    return found


def plan_digest(plan: Plan | str | Path) -> str:
    """A digest of a plan, or of the file that it is saved in."""
    text = plan.to_json().encode() if isinstance(plan, Plan) else Path(plan).read_bytes()
    return hashlib.sha256(text).hexdigest()[:16]


def difference(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """The first thing in which two identities differ, as words; empty where they are the same."""
    for name in sorted({*saved, *wanted}):
        if saved.get(name) != wanted.get(name):
            return f"{name} was {saved.get(name)} and is {wanted.get(name)}"
    return ""
