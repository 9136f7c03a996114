"""The plugin of vLLM (entry point ``vllm.general_plugins``): flags alone make ``backend="cpcompile"`` work.

vLLM calls ``register`` in every process. Hooks do nothing unless the configuration names this backend.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from cpcompile.errors import OptionError
from cpcompile.serving import vllm_ascend, vllm_reload
from cpcompile.serving.settings import NAME, identity, plain
from cpcompile.serving.vllm_entry import Entry
from cpcompile.serving.vllm_modules import check_modules, keep_what_others_read, make_groups
from cpcompile.serving.vllm_settings import IDENTITY, asks_for_us, names_us, read_options

log = logging.getLogger("cpcompile")
_HOOKED = "__cpcompile_hook__"


def register() -> None:
    """Hook vLLM. May be called again."""
    from vllm.config import CompilationConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    _hook(EngineArgs, "create_engine_config", _create_engine_config)
    _hook(CompilationConfig, "init_backend", _init_backend)
    _hook(type(current_platform), "use_custom_op_collectives", _use_custom_op_collectives)
    _hook(WorkerWrapperBase, "init_device", _init_device)
    _hook_reload()
    _hook_pieces()
    if vllm_ascend.is_here():
        vllm_ascend.hook(_hook)


def _hook_reload() -> None:
    from vllm.compilation import decorators

    _hook(decorators, "_try_load_aot_compiled_fn", vllm_reload.load)


def _hook_pieces() -> None:
    from vllm.compilation.backends import CompilerManager, VllmBackend
    from vllm.compilation.piecewise_backend import PiecewiseBackend

    from cpcompile.serving import vllm_pieces

    _hook(VllmBackend, "__call__", vllm_pieces.whole_model)
    _hook(PiecewiseBackend, "__init__", vllm_pieces.one_piece)
    _hook(CompilerManager, "compile", vllm_pieces.one_range)


def _hook(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Let ``around(original, ...)`` run in the place of ``owner.name``, a method or a module's function."""
    original = getattr(owner, name)
    if getattr(original, _HOOKED, False):
        return
    is_bound_to_class = hasattr(original, "__self__")

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        return around(functools.partial(original), *args[is_bound_to_class:], **kwargs)

    setattr(hooked, _HOOKED, True)
    setattr(owner, name, classmethod(hooked) if is_bound_to_class else hooked)


def _log_as_vllm() -> None:
    """What this project logs goes where vLLM's own lines go."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("cpcompile")
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.setLevel(theirs.getEffectiveLevel())
    ours.propagate = False


def _create_engine_config(original: Callable[..., Any], args: Any, *rest: Any, **kwargs: Any) -> Any:
    from vllm.config import CompilationMode

    in_pieces = _asks_for_pieces(args)
    if not in_pieces and not asks_for_us(args.compilation_config):
        return original(args, *rest, **kwargs)
    options = read_options(args.additional_config, args.tensor_parallel_size)
    wanted = CompilationMode.VLLM_COMPILE if in_pieces else CompilationMode.DYNAMO_TRACE_ONCE
    if in_pieces:
        _pass_on_pieces(args.compilation_config, options)
    elif args.compilation_config.mode is None:
        args.compilation_config.mode = wanted
    if args.compilation_config.ir_enable_torch_wrap is None:
        args.compilation_config.ir_enable_torch_wrap = True  # norms as one op each, that every platform has
    changed = _set_environment(in_pieces, options)
    args.additional_config = {**(args.additional_config or {}), IDENTITY: identity(options)}
    config = original(args, *rest, **kwargs)
    check_modules(options, config, in_pieces)
    _log_as_vllm()
    for line in changed:
        log.info("cpcompile: %s", line)
    found = config.compilation_config
    if found.mode != wanted or not asks_for_us(found):
        log.warning(
            "cpcompile will NOT be called: vLLM made of the compilation configuration mode %s with backend %r "
            "(enforce_eager, TORCH_COMPILE_DISABLE and VLLM_USE_BREAKABLE_CUDAGRAPH do that); "
            "give %s",
            getattr(found.mode, "name", found.mode),
            found.backend,
            vllm_ascend.MODES if vllm_ascend.is_here() else "mode DYNAMO_TRACE_ONCE and backend 'cpcompile'",
        )
    elif vllm_ascend.is_here() and vllm_ascend.skips_passes(config):
        log.warning(
            "cpcompile will NOT be called: vllm-ascend hands graphs to npugraph_ex past all passes; give %s",
            vllm_ascend.MODES,
        )
    else:
        log.info("cpcompile: options %s", plain(options))
    return config


def _asks_for_pieces(args: Any) -> bool:
    """Whether inductor compiles the model in pieces and ``additional_config`` names us: vLLM takes no backend there."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    config = args.compilation_config
    named = isinstance(args.additional_config, Mapping) and NAME in args.additional_config
    theirs = ("", "inductor", current_platform.get_compile_backend())
    return named and config.mode == CompilationMode.VLLM_COMPILE and config.backend in theirs


def _pass_on_pieces(compilation_config: Any, options: Mapping[str, Any]) -> None:
    """Have inductor run our pass on each piece that vLLM cuts the model into.

    Raises:
        OptionError: inductor has a pass there already.
    """
    from vllm.platforms import current_platform

    from cpcompile.serving.vllm_pieces import PiecePass

    key, passes = current_platform.pass_key, compilation_config.inductor_compile_config
    if key in passes:
        raise OptionError(f"inductor_passes has a {key} already, and cpcompile runs there: leave one of them out")
    passes[key] = PiecePass(options)


def _set_environment(in_pieces: bool, options: Mapping[str, Any]) -> list[str]:
    """Turn off what vLLM would do with compiled code and cannot do with ours; returns what was changed."""
    changed = []
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") is None:
        # Set for DeepSeek-V3.2 by default, and it turns compilation off without a word.
        os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "0"
        changed.append("set VLLM_USE_BREAKABLE_CUDAGRAPH=0: breakable CUDA graphs turn compilation off")
    if (in_pieces or not vllm_reload.keeps_code(options)) and os.environ.get("VLLM_USE_AOT_COMPILE") != "0":
        os.environ["VLLM_USE_AOT_COMPILE"] = "0"
        changed.append("set VLLM_USE_AOT_COMPILE=0: only a whole graph that runs op by op is taken again")
    if in_pieces and os.environ.get("VLLM_DISABLE_COMPILE_CACHE") != "1":
        os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"
        changed.append("set VLLM_DISABLE_COMPILE_CACHE=1: all ranks prove a rewrite together, at every start")
    return changed


def _init_backend(original: Callable[..., Any], config: Any, vllm_config: Any, *rest: Any, **kwargs: Any) -> Any:
    backend = original(config, vllm_config, *rest, **kwargs)
    return Entry(vllm_config, kwargs.get("prefix", "")) if names_us(config) else backend


def _use_custom_op_collectives(original: Callable[[], bool]) -> bool:
    """All-reduces as functional ops: on a CPU they are in place and name no group."""
    from vllm.config.vllm import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return original() or (config is not None and asks_for_us(config.compilation_config))


def _init_device(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Prepare the worker, and look, once it has warmed up, whether the backend was called."""
    config = wrapper.vllm_config
    if not asks_for_us(config.compilation_config):
        return original(wrapper, *args, **kwargs)
    _log_as_vllm()
    _show_weights()
    _reduce_out_of_place()
    result = original(wrapper, *args, **kwargs)
    options = read_options(config.additional_config, config.parallel_config.tensor_parallel_size)
    Entry.groups = make_groups(options, config)
    worker, calls = wrapper.worker, Entry.calls
    _after(worker, "load_model", lambda: keep_what_others_read(options, worker.model_runner.get_model()))
    _after(worker, "compile_or_warm_up_model", lambda: Entry.tell_if_not_called_since(calls))
    return result


def _after(worker: Any, name: str, then: Callable[[], None]) -> None:
    """Call ``then`` when the worker's method ``name`` is done."""
    original = getattr(worker, name)

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        done = original(*args, **kwargs)
        then()
        return done

    setattr(worker, name, hooked)


def _show_weights() -> None:
    """Plain products on a CPU: behind oneDNN's handles no one can see whether two ranks have the same weights."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _custom_ops._supports_onednn = False


def _reduce_out_of_place() -> None:
    """On a CPU vLLM's op returns its argument, reduced in place: PyTorch forbids that, and inductor relies on it."""
    from vllm.distributed.parallel_state import GroupCoordinator
    from vllm.platforms import current_platform

    def copied(original: Callable[..., Any], group: Any, value: Any) -> Any:
        return original(group, value.clone())

    if current_platform.is_cpu():
        _hook(GroupCoordinator, "_all_reduce_out_place", copied)
