"""The runner of the pipeline: it times what it runs, notes what was done, and makes a refusal of what raises.

The unit of a failure is what :meth:`Runner.attempt` is given: one pass, one axis, one interval, one report.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch.fx as fx

from cpcompile.errors import CpcompileError, LayoutError, RanksDifferError, VerificationError
from cpcompile.report import PassRun

log = logging.getLogger("cpcompile")
T = TypeVar("T")

# What says why a rewrite is not done, where the graph as it came can run. All other errors of ours are the user's.
_REASONS = (RanksDifferError, LayoutError, VerificationError)


@dataclass(frozen=True)
class Attempt(Generic[T]):
    """What became of a unit of work: its result, or why it is left out.

    Args:
        result: what the work returned; None where it raised.
        reason: why there is no result, in one line; empty where there is one.
        error: what was raised.
    """

    result: T | None = None
    reason: str = ""
    error: Exception | None = None


@dataclass
class Runner:
    """Runs passes.

    Args:
        runs: what ran, in order.
        failures: the traceback of each exception that became a refusal, and what it was raised in.
    """

    runs: list[PassRun] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def run(self, name: str, work: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call ``work`` and note its time; a :class:`PassResult` tells rewrites and refusals. What it raises passes."""
        began = time.perf_counter()
        try:
            result = work(*args, **kwargs)
        except Exception as error:
            error.__dict__.setdefault("cpcompile_pass", name)
            raise
        refusals = tuple((r.node, r.reason) for r in getattr(result, "refusals", ()))
        self.runs.append(PassRun(name, time.perf_counter() - began, getattr(result, "rewrites", 0), refusals))
        return result

    def attempt(self, unit: str, work: Callable[..., T], *args: Any, **kwargs: Any) -> Attempt[T]:
        """Call ``work``; an exception that is no mistake of the user's becomes the reason to leave ``unit`` out.

        Raises:
            CpcompileError: a mistake of the user's.
        """
        try:
            return Attempt(work(*args, **kwargs))
        except _REASONS as error:
            return Attempt(None, str(error), error)
        except CpcompileError:
            raise
        except Exception as error:
            return Attempt(None, self._note(unit, error), error)

    def change(self, name: str, apply: Callable[[fx.GraphModule], Any], gm: fx.GraphModule) -> None:
        """Run a pass that changes ``gm`` in place; where it raises, ``gm`` is as it was and the pass is refused."""
        before = copy_graph(gm.graph)
        failed = self.attempt(f"pass {name}", self.run, name, apply, gm)
        if failed.reason:
            gm.graph = before
            self.runs.append(PassRun(name, 0.0, 0, (("", failed.reason),)))

    def save(self, path: Path) -> None:
        """Write the tracebacks to ``path``, if there are any."""
        if self.failures:
            path.write_text("\n".join(self.failures), encoding="utf-8")

    def _note(self, unit: str, error: Exception) -> str:
        reason = describe_error(error)
        self.failures.append(f"{unit}\n{''.join(traceback.format_exception(error))}")
        log.warning(
            "cpcompile: %s is left out, the rest goes on: %s; this is a fault of cpcompile's: please report it with "
            "failures.txt and the graphs, which the option dump_dir writes",
            unit,
            reason,
        )
        log.debug("cpcompile: %s", unit, exc_info=error)
        return reason


def describe_error(error: Exception) -> str:
    """Name of the pass, type, first line and place of an exception, in one line."""
    line = next(iter(str(error).strip().splitlines()), "")
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    of_pass = f"{name}: " if (name := error.__dict__.get("cpcompile_pass")) else ""
    return f"{of_pass}{type(error).__name__}: {line}{where}"


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` with its metadata."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy
