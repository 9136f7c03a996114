"""The backend: ``torch.compile(model, backend="cpcompile")``."""

from __future__ import annotations

import functools
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from functorch.compile import make_boxed_func
from torch._logging._internal import trace_structured

from cpcompile.axes import Axis, resolve_group
from cpcompile.capture import lower_inference, unknown_inputs
from cpcompile.compiled import Compiled, token_reader
from cpcompile.errors import ParameterChangedError, ReloadError
from cpcompile.exchange import Exchange, GroupExchange, OfflineExchange
from cpcompile.graph_breaks import where_broken
from cpcompile.graph_inputs import GraphInput, describe_inputs, written_places
from cpcompile.lowering.targets import BoxedCallable, Settings, lower, prepare
from cpcompile.module_floats import fix_module_floats
from cpcompile.module_groups import group_axis
from cpcompile.module_runtime import examples_of, keep_parts, row_limits
from cpcompile.module_tp import Sharing
from cpcompile.options import Options, parse_mode
from cpcompile.pipeline import compile_graph
from cpcompile.report import REWRITTEN, Report
from cpcompile.run_code import RunCode
from cpcompile.saved_code import Grounds, SavedCode, compiled_once, grounds_of, is_wanted
from cpcompile.weight_guard import PartGuard, WeightGuard
from cpcompile.weights import local_tensor

log = logging.getLogger("cpcompile")


# What the targets without modes do, and which other target or option there is.
_INSTEAD = {
    "eager": "it runs op by op; give target='inductor'",
    "torchair": "it runs GE graphs; give target='npugraph_ex' to capture kernels, compiler_config to tune",
    "npugraph_ex": "it captures kernels; give target='torchair' for GE graphs, compiler_config to tune",
    "ge-export": "it writes GE graphs and runs none",
}


def cpcompile_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Any:
    """Compile one dynamo graph: rewrite its collectives, prove the rewrite, lower it.

    Args:
        gm: dynamo's graph.
        example_inputs: its inputs: real parameters, fake activations.
        options: see :class:`cpcompile.options.Options`.
        mode: torch.compile's ``mode=``, for target inductor; other targets have one way to run, and say so.

    Raises:
        OptionError: an option or the mode is unknown or malformed.
        RequirementError: see ``options["require"]``.
        AxisError: axes and process groups do not agree, or a rank did not take part in time.
        PlanError: ``options["plan"]`` is not a plan, or not one of this graph.
        AscendError: a target on Ascend lacks torch_npu or an NPU, or has no form of an op.
    """
    parsed, known_mode = Options.parse(options), parse_mode(mode)
    prepare(parsed.target)
    fix_module_floats(gm)
    grounds: list[Grounds] = []

    def inference(aot: fx.GraphModule, aot_inputs: Sequence[Any]) -> BoxedCallable:
        known = describe_inputs(gm, example_inputs, written_places())
        if len(known) != len(aot.graph.find_nodes(op="placeholder")):
            log.warning(
                "cpcompile: the graph's inputs cannot be matched with the model's: only declared ones are replicated"
            )
            known = unknown_inputs(aot)
        return _compile_inference(aot, aot_inputs, known, parsed, known_mode, grounds, where_broken(gm))

    if not is_wanted():
        return lower_inference(gm, example_inputs, inference, _refuse_training)
    with compiled_once():
        call = lower_inference(gm, example_inputs, inference, _refuse_training)
    return SavedCode(call, grounds[0])


def _refuse_training(aot: fx.GraphModule, _: Sequence[Any]) -> Any:
    if is_wanted():
        raise ReloadError("cpcompile saves inference graphs only: call aot_compile under torch.no_grad()")
    warnings.warn(
        "cpcompile rewrites inference graphs only, and this one is for training: it runs unmodified; "
        "call the model under torch.no_grad() or torch.inference_mode()",
        stacklevel=2,
    )
    return make_boxed_func(aot.forward)


def exchange_for(axis: Axis, timeout_s: float) -> Exchange:
    """How to reach the other ranks of ``axis``: not at all in a fake process group, which is one process."""
    group = resolve_group(axis.group_name)
    if torch.distributed.get_backend(group) == "fake":
        return OfflineExchange(axis.size, axis.rank)
    return GroupExchange(group, timeout_s)


def _compile_inference(
    aot: fx.GraphModule,
    aot_inputs: Sequence[Any],
    inputs: Sequence[GraphInput],
    options: Options,
    mode: str,
    grounds: list[Grounds],
    broken: str,
) -> RunCode:
    """Rewrite and lower one graph; where code is to be saved, what it rests on joins ``grounds``."""
    compiled = compile_graph(aot, inputs, options, lambda axis: exchange_for(axis, options.timeout_s), broken=broken)
    folder, done = tell(compiled, options)
    target = options.target or ("inductor" if _device(aot_inputs) == "cuda" else "eager")
    if mode and target != "inductor":
        log.warning("cpcompile: mode=%r is inductor's: target %r has no modes (%s)", mode, target, _INSTEAD[target])
    parts = keep_parts(compiled, inputs, options)
    read_tokens = token_reader(compiled.original, compiled.tokens)
    variants = compiled.variants if read_tokens is not None else [compiled.at(_static_tokens(compiled))]
    lowered: dict[int, BoxedCallable] = {}
    for variant in variants:
        if id(variant.gm) not in lowered:
            where = folder / f"from_{variant.first}" if folder is not None else None
            examples = examples_of(variant.gm, aot_inputs, parts)
            lowered[id(variant.gm)] = lower(target, variant.gm, examples, settings_of(options, where, mode))
    if is_wanted():
        reach = functools.partial(exchange_for, timeout_s=options.timeout_s)
        grounds.append(grounds_of(compiled, inputs, options, target, reach, done))
    return RunCode(
        [lowered[id(v.gm)] for v in variants],
        [v.first for v in variants],
        read_tokens,
        _before(compiled, inputs, options, parts),
        lower("eager", compiled.original, ()),
        [*(v.gm for v in variants), compiled.original] if target == "eager" else [],
    )


def _before(
    compiled: Compiled, inputs: Sequence[GraphInput], options: Options, parts: Mapping[int, torch.Tensor]
) -> Callable[[list[Any]], bool]:
    """Looks after a call's inputs: says if the graph is for its weights, refuses too many rows, puts in parts."""
    of_parts = PartGuard([(inputs[i].name, local_tensor(inputs[i].value)) for i in parts])
    same = [(axis, [i for i in places if i not in parts]) for axis, places in compiled.watched()]
    weights = {i: (inputs[i].name, local_tensor(inputs[i].value)) for _, places in same for i in places}
    guard = WeightGuard(weights, same, functools.partial(exchange_for, timeout_s=options.timeout_s))
    check_rows = row_limits(compiled, options)

    def before(args: list[Any]) -> bool:
        of_parts.check([args[i] for i in parts])
        problem = guard.problem(args)
        if problem and parts:
            raise ParameterChangedError(f"weight {problem} and call torch._dynamo.reset()")
        if problem:
            return False
        check_rows(args)
        for place, part in parts.items():
            args[place] = part
        return True

    return before


def settings_of(options: Options, folder: Path | None, mode: str = "") -> Settings:
    """What the target is told. Raises :class:`GroupError` where a group that an option needs is not given."""
    own = group_axis(options.groups, "mc2", None, "moe_dispatch").group_name if options.moe_dispatch else ""
    return Settings(
        options.compiler_config, options.mc2, folder, options.uneven_collectives, options.mla_prolog, own, mode
    )


def _static_tokens(compiled: Compiled) -> int:
    tokens = compiled.tokens
    return int(tokens) if tokens is not None and tokens.is_number else compiled.variants[-1].first


def _device(values: Sequence[Any]) -> str:
    return next((v.device.type for v in values if isinstance(v, torch.Tensor)), "cpu")


def tell(compiled: Compiled, options: Options) -> tuple[Path | None, list[str]]:
    """Say what was done: in the log, in torch's structured trace, and in files in ``dump_dir``.

    Returns:
        The folder of the files, and the log's lines on all-reduces.
    """
    lines: list[str] = []
    reports = compiled.runner.attempt("the report", _reports, compiled).result or {}
    for variant in compiled.variants if reports else ():
        counts = Counter(c.decision for c in reports[variant.first].collectives)
        nothing = "no collectives" if compiled.sharing else "no collectives: unchanged"
        what = ", ".join(f"{n} {decision}" for decision, n in sorted(counts.items())) or nothing
        log.info("cpcompile: %s: %s", variant.span, what)
        reduced = [c for c in reports[variant.first].collectives if c.kind == "all_reduce"]
        done = sum(c.decision in REWRITTEN for c in reduced)
        if reduced:
            lines.append(f"{variant.span}{_ranks(compiled)}: {done} of {len(reduced)} all-reduces rewritten")
            log.info("cpcompile: %s", lines[-1])
    for axis, reason in compiled.refused.items():
        log.warning("cpcompile: axis %s is left alone: %s", axis, reason)
    for variant in compiled.variants:
        for axis in variant.refused.keys() - compiled.refused.keys():
            log.warning("cpcompile: axis %s is left alone at %s: %s", axis, variant.span, variant.refused[axis])
    _tell_modules(compiled.sharing)
    payload = {str(first): report.to_dict() for first, report in reports.items()}
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "cpcompile_report", "encoding": "json"},
        payload_fn=lambda: json.dumps(payload),
    )
    if options.dump_dir is None:
        return None, lines
    return compiled.runner.attempt("dump_dir", _dump, compiled, payload, Path(options.dump_dir)).result, lines


def _reports(compiled: Compiled) -> dict[int, Report]:
    return {v.first: compiled.report(v.typical) for v in compiled.variants}


def _tell_modules(sharing: Sharing | None) -> None:
    """Say which weights are shared, and which that were asked for are not."""
    rows = sharing.rows if sharing else []
    shared = Counter((r.role, r.axis, r.ranks, r.reason) for r in rows if r.decision == "share")
    for (role, axis, ranks, reason), count in shared.items():
        log.info("cpcompile: shared: %d %s over %s, ranks: %d (%s)", count, role, axis, ranks, reason)
    for row in rows:
        if row.decision == "keep":
            log.warning("cpcompile: %s stays whole: %s", f"{row.role} {row.module}".rstrip(), row.reason)


def _ranks(compiled: Compiled) -> str:
    return "".join(f", rank {axis.rank} of {axis.size} of axis {axis.name}" for axis in compiled.axes)


def _dump(compiled: Compiled, payload: dict[str, Any], directory: Path) -> Path:
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    number = len(list(directory.glob(f"rank_{rank}/graph_*"))) if directory.exists() else 0
    folder = directory / f"rank_{rank}" / f"graph_{number}"
    folder.mkdir(parents=True, exist_ok=True)
    graphs = [("original", compiled.original)] + [(f"from_{v.first}", v.gm) for v in compiled.variants]
    files: dict[str, Callable[[], str]] = {
        "report.json": lambda: json.dumps(payload, indent=1),
        "plan.json": lambda: compiled.plan.to_json() + "\n",
        **{f"{name}.py": functools.partial(gm.print_readable, print_output=False) for name, gm in graphs},
    }
    for name, text in files.items():  # one that cannot be made must not keep the others from being written
        made = compiled.runner.attempt(f"{name} of dump_dir", text)
        if made.result is not None:
            (folder / name).write_text(made.result, encoding="utf-8")
    compiled.runner.save(folder / "failures.txt")
    return folder
