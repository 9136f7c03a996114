"""Errors that a user can act on: one line each, saying what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable

log = logging.getLogger("cpcompile")


class CpcompileError(ValueError):
    """Base of every error that cpcompile raises for a user to act on."""


class OptionError(CpcompileError):
    """An option is unknown or has a value that it cannot take."""


class AxisError(CpcompileError):
    """A mesh axis, a process group and the graph do not agree."""


class RanksDifferError(AxisError):
    """Ranks of an axis compile different graphs: each runs its own as it came."""


class ExchangeError(RanksDifferError):
    """Ranks of an axis do not meet: one did not answer in time, or they exchange different things."""


class LayoutError(CpcompileError):
    """A token layout cannot be made from these arguments, or does not apply to these requests."""


class GroupError(CpcompileError):
    """Sizes of parallel groups do not fit together, or a group of that kind does not exist."""


class PlanError(CpcompileError):
    """A saved plan cannot be read, or does not belong to this graph."""


class TraceError(CpcompileError):
    """A model, a trace file or a configuration cannot be captured."""


class RequirementError(CpcompileError):
    """Something that ``require`` names was not rewritten, or a proof failed under ``require``."""


class VerificationError(CpcompileError):
    """A rewritten graph could not be proven equal to the original one."""


class ParameterChangedError(CpcompileError):
    """A weight that ranks share parts of was replaced or written after compilation."""


class ReloadError(CpcompileError):
    """Compiled code cannot be saved, or was read from a file and is not to be run."""


class AscendError(CpcompileError):
    """torch_npu is missing, does not fit, or has no way to lower something."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of ``known``, or the list of what is known."""
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1)
    return f" (did you mean {close[0]!r}?)" if close else f" (known: {', '.join(options)})"


def unexpected(error: Exception, what: str) -> str:
    """An exception that is a fault of ours as the reason why ``what`` was left out, in one line; it is logged."""
    line = next(iter(str(error).strip().splitlines()), "")
    log.warning(
        "cpcompile: %s failed and is left out, the rest goes on: %s: %s. Please report it with its traceback, which "
        "the log has at level DEBUG",
        what,
        type(error).__name__,
        line,
    )
    log.debug("cpcompile: %s", what, exc_info=error)
    return f"{type(error).__name__}: {line}"
