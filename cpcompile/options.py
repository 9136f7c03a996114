"""Options of the backend: ``torch.compile(model, backend="cpcompile", options={...})``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpcompile.costs import PROFILES, HardwareProfile
from cpcompile.errors import OptionError, nearest
from cpcompile.layouts import KINDS as LAYOUTS
from cpcompile.plan import Plan

STRATEGIES = ("auto", "tp", "cp", "hybrid", "off")
TARGETS = ("eager", "inductor", "torchair", "npugraph_ex", "ge-export")
VERIFICATIONS = ("static", "numeric", "off")
PATTERNS = ("require", "replicated")

# What each option is an instance of, and how to ask for it; the others are one of a few words.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "axes": ((Mapping,), "a dict of axis name to process group"),
    "require": ((str, Sequence, Set), "a pattern or a list of patterns"),
    "replicated": ((str, Sequence, Set), "a pattern or a list of patterns"),
    "deterministic": ((bool,), "True or False"),
    "sparse_attention": ((bool,), "True or False"),
    "mc2": ((bool,), "True or False"),
    "routed_experts": ((bool,), "True or False"),
    "plan": ((Plan, str, Path, type(None)), "a Plan or the path of a saved one"),
    "dump_dir": ((str, Path, type(None)), "the path of a folder"),
    "profile": ((str, HardwareProfile), "the name of a profile or a HardwareProfile"),
    "timeout_s": ((int, float), "a positive number of seconds"),
}


@dataclass(frozen=True)
class Options:
    """What a user can ask for.

    Args:
        axes: mesh axis name → its process group: a ``ProcessGroup``, a one-dimensional ``DeviceMesh``, or a group's
            name. Empty: every group that the graph all-reduces over, named after its mesh dim where there is one.
        layout: which rows of the tokens each rank holds on axes over which attention is repeated: ``"contiguous"``,
            ``"zigzag"`` or ``"interleave"`` (which balance causal attention whose kernels skip what a row may not see;
            interleave for any batch, zigzag for one long request), ``"sp"``; see ``cpcompile.layouts``.
        strategy: ``"auto"`` (best plan per interval of the token count), or the plan of a large step, at every token
            count, on axes over which attention is split (``"tp"``), repeated (``"cp"``) or on all (``"hybrid"``);
            ``"off"``.
        target: ``"eager"``, ``"inductor"``, on Ascend ``"torchair"`` (GE graph) or ``"npugraph_ex"``; ``"ge-export"``
            writes the GE graph to ``dump_dir`` and runs nothing. Empty chooses inductor on CUDA and eager elsewhere.
        verify: ``"static"`` proves every rewritten graph, ``"numeric"`` also runs all ranks in lockstep on random
            inputs and weights, ``"off"`` does neither.
        require: fnmatch patterns of all-reduces or modules; each must match one that is rewritten, else an error.
            With it, a failed proof is an error too.
        deterministic: keep every reduction order: all-reduces stay as they are.
        plan: a saved plan (or its path) to apply instead of making one.
        dump_dir: write graphs, plan and report of every compilation there.
        profile: hardware profile, by name or as a ``HardwareProfile``; empty chooses by device.
        replicated: fnmatch patterns of inputs that are the same on every rank; ``"!pattern"`` says not.
        sparse_attention: recognise DeepSeek sparse attention in its eager form and run it as ``lightning_indexer`` and
            ``sparse_attention``, which hold no scores of every query and key. Opt-in, as it moves roundings.
        routed_experts: recognise experts that sort the tokens and run them as ``routed_experts``, which a shard can run
            on its own tokens: the same steps, in one op that the compiler takes apart again.
        timeout_s: seconds to wait for the other ranks at compile time.
        compiler_config: torchair's ``CompilerConfig``, for the targets on Ascend; None for its defaults.
        mc2: on Ascend, run a matmul and the reduce-scatter behind it, or an all-gather and the matmul behind it, as one
            op where its constraints hold.
    """

    axes: Mapping[str, Any] = field(default_factory=dict)
    strategy: str = "auto"
    layout: str = "contiguous"
    target: str = ""
    verify: str = "static"
    require: tuple[str, ...] = ()
    deterministic: bool = False
    plan: Plan | str | Path | None = None
    dump_dir: str | Path | None = None
    profile: str | HardwareProfile = ""
    replicated: tuple[str, ...] = ()
    sparse_attention: bool = False
    routed_experts: bool = True
    timeout_s: float = 120.0
    compiler_config: Any = None
    mc2: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Check ``options``. Raises :class:`OptionError` for an unknown name or a value of the wrong kind."""
        options = dict(options or {})
        known = {f.name for f in dataclasses.fields(cls)}
        for name in options:
            if name not in known:
                raise OptionError(f"unknown option {name!r}{nearest(str(name), known)}")
        for name, value in options.items():
            _check_kind(name, value)
        for name in PATTERNS:
            value = options.get(name, ())
            options[name] = (value,) if isinstance(value, str) else tuple(value)
        parsed = cls(**options)
        _check_choice("strategy", parsed.strategy, STRATEGIES)
        _check_choice("layout", parsed.layout, LAYOUTS)
        _check_choice("target", parsed.target, (*TARGETS, ""))
        _check_choice("verify", parsed.verify, VERIFICATIONS)
        if parsed.target == "ge-export" and parsed.dump_dir is None:
            raise OptionError("target='ge-export' writes graphs and runs none: give dump_dir, the folder for them")
        if isinstance(parsed.profile, str):
            _check_choice("profile", parsed.profile, (*PROFILES, ""))
        return parsed


def _check_kind(name: str, value: Any) -> None:
    kinds, wanted = KINDS.get(name, ((object,), ""))
    good = isinstance(value, kinds)
    if name in PATTERNS and good and not isinstance(value, str):
        good = all(isinstance(pattern, str) for pattern in value)
    if name == "timeout_s":
        good = good and not isinstance(value, bool) and 0 < value < math.inf
    if not good:
        raise OptionError(f"{name} is {value!r}: give {wanted}")


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name}={value!r} is not known{nearest(str(value), [k for k in known if k])}")
