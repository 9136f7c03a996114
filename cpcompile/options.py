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
PATTERNS = ("require", "replicated", "layer_sharding")
ROLES = ("embedding", "o_proj", "mlp", "lm_head", "none")
# Names that users of vllm-ascend know, and the roles that they stand for.
MODULE_SIZES = {
    "oproj_tensor_parallel_size": "o_proj",
    "lmhead_tensor_parallel_size": "lm_head",
    "embedding_tensor_parallel_size": "embedding",
    "mlp_tensor_parallel_size": "mlp",
}

# What each option is an instance of, and how to ask for it; the others are one of a few words.
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "axes": ((Mapping,), "a dict of axis name to process group"),
    "require": ((str, Sequence, Set), "a pattern or a list of patterns"),
    "replicated": ((str, Sequence, Set), "a pattern or a list of patterns"),
    "deterministic": ((bool,), "True or False"),
    "sparse_attention": ((bool,), "True or False"),
    "mc2": ((bool,), "True or False"),
    "uneven_collectives": ((bool,), "True or False"),
    "mla_prolog": ((bool,), "True or False"),
    "moe_dispatch": ((bool,), "True or False"),
    "routed_experts": ((bool,), "True or False"),
    "plan": ((Plan, str, Path, type(None)), "a Plan or the path of a saved one"),
    "dump_dir": ((str, Path, type(None)), "the path of a folder"),
    "profile": ((str, HardwareProfile), "the name of a profile or a HardwareProfile"),
    "timeout_s": ((int, float), "a positive number of seconds"),
    "finegrained_tp_config": ((Mapping,), f"a dict of {', '.join(MODULE_SIZES)} to numbers of ranks"),
    "flashcomm2_oproj_tensor_parallel_size": ((int,), "a number of ranks, 0 for no FlashComm 2"),
    "layer_sharding": ((str, Sequence, Set), "the modules whose layers are spread over ranks, such as ['o_proj']"),
    "modules": ((Mapping,), "a dict of role to patterns of module names, such as {'mlp': 'model.layers.0.mlp'}"),
    "release_weights": ((bool,), "True or False"),
    "group_tokens": ((str, int), "'exchange', 'equal' or a number of rows"),
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
        deterministic: keep every reduction order: all-reduces stay as they are, sparse attention dense, and causal
            masks where attention kernels are given them.
        plan: a saved plan (or its path) to apply instead of making one.
        dump_dir: write graphs, plan and report of every compilation there.
        profile: hardware profile, by name or as a ``HardwareProfile``; empty chooses by device.
        replicated: fnmatch patterns of inputs that are the same on every rank; ``"!pattern"`` says not.
        sparse_attention: recognise DeepSeek sparse attention, written as masked dense attention, and run it as
            ``lightning_indexer`` and ``sparse_attention``, which hold no scores of every query and key. It moves
            roundings, so ``deterministic`` leaves it as it came.
        routed_experts: recognise experts that sort the tokens and run them as ``routed_experts``, which a shard can run
            on its own tokens: the same steps, in one op that the compiler takes apart again.
        timeout_s: seconds to wait for the other ranks at compile time.
        finegrained_tp_config: module tensor parallelism, in vllm-ascend's words: ``oproj_tensor_parallel_size``,
            ``lmhead_tensor_parallel_size``, ``embedding_tensor_parallel_size``, ``mlp_tensor_parallel_size`` → ranks
            that share the module's weights, which each of them holds whole.
        flashcomm2_oproj_tensor_parallel_size: FlashComm 2: ranks within tp that share o_proj; 0 is off.
        layer_sharding: roles (``"o_proj"``) whose weights are spread over ranks layer by layer, and broadcast.
        groups: this rank's process groups for these, by kind: a ``cpcompile.mesh`` ``ProcessGroups``, or a dict of
            ``o_proj``, ``lm_head``, ``embedding``, ``mlp``, ``flashcomm2_otp``, ``flashcomm2_odp``, ``shared_weight``,
            ``mc2``.
        modules: role → fnmatch patterns of module names that have it, where dataflow says something else;
            ``"none"``: modules to leave alone.
        release_weights: give the memory of weights that are shared back. They cannot be read afterwards; see
            ``cpcompile.reallocate_weights``.
        group_tokens: how ranks that share a module and have tokens of their own agree on the rows that each pads to:
            ``"exchange"`` an all-reduce in each step, ``"equal"`` all have as many, a number is at least every rank's.
        compiler_config: torchair's ``CompilerConfig``, for the targets on Ascend; None for its defaults.
        mc2: on Ascend, run a matmul and the reduce-scatter behind it, or an all-gather and the matmul behind it, as one
            op where its constraints hold.
        uneven_collectives: on Ascend, scatter and gather as many rows as there are where the ranks do not divide them,
            in place of pads. Sums may be in another order.
        mla_prolog: on Ascend, run absorbed MLA ahead of attention (products, norms, rotations and the writes of keys)
            as one op where its constraints hold. Its weights have to be parameters ``[in, out]``, best in FRACTAL_NZ.
        moe_dispatch: on Ascend, in graphs of one token count, send each row to the ranks of its experts alone, in place
            of all rows to all ranks, where experts are split over ranks by their numbers. Needs the group ``mc2`` of
            ``groups``: the same ranks, and nothing else runs over it.
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
    sparse_attention: bool = True
    routed_experts: bool = True
    timeout_s: float = 120.0
    finegrained_tp_config: Mapping[str, int] = field(default_factory=dict)
    flashcomm2_oproj_tensor_parallel_size: int = 0
    layer_sharding: tuple[str, ...] = ()
    groups: Any = None
    modules: Mapping[str, Sequence[str]] = field(default_factory=dict)
    release_weights: bool = False
    group_tokens: str | int = "exchange"
    compiler_config: Any = None
    mc2: bool = False
    uneven_collectives: bool = False
    mla_prolog: bool = False
    moe_dispatch: bool = False

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> Options:
        """Check ``options``.

        Raises:
            OptionError: an option is unknown, or has a value of the wrong kind.
            PlanError: ``plan`` is the path of a file that is missing or no plan.
        """
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
        options["modules"] = {
            k: (v,) if isinstance(v, str) else tuple(v) for k, v in options.get("modules", {}).items()
        }
        parsed = cls(**options)
        for role in parsed.modules:
            _check_choice("modules", role, ROLES)
        for size in parsed.finegrained_tp_config.items():
            _check_size(*size)
        for role in parsed.layer_sharding:
            _check_choice("layer_sharding", role, ("o_proj",))
        if isinstance(parsed.group_tokens, str):
            _check_choice("group_tokens", parsed.group_tokens, ("exchange", "equal"))
        elif isinstance(parsed.group_tokens, bool) or parsed.group_tokens < 1:
            raise OptionError(f"group_tokens is {parsed.group_tokens!r}: give {KINDS['group_tokens'][1]}")
        _check_choice("strategy", parsed.strategy, STRATEGIES)
        _check_choice("layout", parsed.layout, LAYOUTS)
        _check_choice("target", parsed.target, (*TARGETS, ""))
        _check_choice("verify", parsed.verify, VERIFICATIONS)
        if parsed.target == "ge-export" and parsed.dump_dir is None:
            raise OptionError("target='ge-export' writes graphs and runs none: give dump_dir, the folder for them")
        if isinstance(parsed.profile, str):
            _check_choice("profile", parsed.profile, (*PROFILES, ""))
        if isinstance(parsed.plan, (str, Path)):
            Plan.load(parsed.plan)  # a graph without groups never looks at it: a mistake would go unnoticed
        return parsed


def parse_mode(mode: str | None) -> str:
    """``torch.compile``'s ``mode=``: one of inductor's, ``""`` for its default. Raises :class:`OptionError`."""
    if mode in (None, "default"):
        return ""
    from torch._inductor import list_mode_options

    _check_choice("mode", mode, tuple(list_mode_options()))
    return str(mode)


def parse_patterns(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``["mlp=a.*", "mlp=b"]`` as role to patterns. Raises :class:`OptionError`."""
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        role, equals, pattern = (part.strip() for part in text.partition("="))
        if not (role and equals and pattern):
            raise OptionError(f"--module: expected ROLE=PATTERN, such as mlp=model.layers.0.mlp; found {text!r}")
        found[role] = (*found.get(role, ()), pattern)
    return found


def _check_kind(name: str, value: Any) -> None:
    kinds, wanted = KINDS.get(name, ((object,), ""))
    good = isinstance(value, kinds)
    if name in PATTERNS and good and not isinstance(value, str):
        good = all(isinstance(pattern, str) for pattern in value)
    if name == "timeout_s":
        good = good and not isinstance(value, bool) and 0 < value < math.inf
    if not good:
        raise OptionError(f"{name} is {value!r}: give {wanted}")


def _check_size(name: str, size: object) -> None:
    _check_choice("finegrained_tp_config", name, tuple(MODULE_SIZES))
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise OptionError(f"finegrained_tp_config: {name} is {size!r}: give a number of ranks")


def _check_choice(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{name}={value!r} is not known{nearest(str(value), [k for k in known if k])}")
