"""The plugin of vLLM (entry point ``vllm.general_plugins``): flags alone make ``backend="cpcompile"`` work.

vLLM calls ``register`` in every process. Hooks do nothing unless the configuration names this backend.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

from cpcompile.serving.vllm_entry import Entry
from cpcompile.serving.vllm_settings import IDENTITY, asks_for_us, identity, plain, read_options

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


def _hook(owner: type, name: str, around: Callable[..., Any]) -> None:
    """Let ``around(original, ...)`` run in the place of the method ``owner.name``."""
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
    if not asks_for_us(args.compilation_config):
        return original(args, *rest, **kwargs)
    options = read_options(args.additional_config, args.tensor_parallel_size)
    from vllm.config import CompilationMode

    wanted = CompilationMode.DYNAMO_TRACE_ONCE
    if args.compilation_config.mode is None:
        args.compilation_config.mode = wanted
    if args.compilation_config.ir_enable_torch_wrap is None:
        args.compilation_config.ir_enable_torch_wrap = True  # norms as one op each, that every platform has
    changed = _set_environment()
    args.additional_config = {**(args.additional_config or {}), IDENTITY: identity(options)}
    config = original(args, *rest, **kwargs)
    _log_as_vllm()
    for line in changed:
        log.info("cpcompile: %s", line)
    found = config.compilation_config
    if found.mode != wanted or not asks_for_us(found):
        log.warning(
            "cpcompile will NOT be called: vLLM made of the compilation configuration mode %s with backend %r "
            "(enforce_eager, TORCH_COMPILE_DISABLE and VLLM_USE_BREAKABLE_CUDAGRAPH do that); "
            "give mode DYNAMO_TRACE_ONCE and backend 'cpcompile'",
            getattr(found.mode, "name", found.mode),
            found.backend,
        )
    else:
        log.info("cpcompile: options %s", plain(options))
    return config


def _set_environment() -> list[str]:
    """Turn off what vLLM would do with compiled code and cannot do with ours; returns what was changed."""
    changed = []
    if os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") is None:
        # Set for DeepSeek-V3.2 by default, and it turns compilation off without a word.
        os.environ["VLLM_USE_BREAKABLE_CUDAGRAPH"] = "0"
        changed.append("set VLLM_USE_BREAKABLE_CUDAGRAPH=0: breakable CUDA graphs turn compilation off")
    if os.environ.get("VLLM_USE_AOT_COMPILE") != "0":
        os.environ["VLLM_USE_AOT_COMPILE"] = "0"
        changed.append("set VLLM_USE_AOT_COMPILE=0: an artifact of another run holds facts that its ranks agreed on")
    return changed


def _init_backend(original: Callable[..., Any], config: Any, vllm_config: Any, *rest: Any, **kwargs: Any) -> Any:
    backend = original(config, vllm_config, *rest, **kwargs)
    return Entry(vllm_config, kwargs.get("prefix", "")) if asks_for_us(config) else backend


def _use_custom_op_collectives(original: Callable[[], bool]) -> bool:
    """All-reduces as functional ops: on a CPU they are in place and name no group."""
    from vllm.config.vllm import get_current_vllm_config_or_none

    config = get_current_vllm_config_or_none()
    return original() or (config is not None and asks_for_us(config.compilation_config))


def _init_device(original: Callable[..., Any], wrapper: Any, *args: Any, **kwargs: Any) -> Any:
    """Prepare the worker, and look, once it has warmed up, whether the backend was called."""
    ours = asks_for_us(wrapper.vllm_config.compilation_config)
    if ours:
        _log_as_vllm()
        _show_weights()
    result = original(wrapper, *args, **kwargs)
    if ours:
        warm_up, calls = wrapper.worker.compile_or_warm_up_model, Entry.calls

        @functools.wraps(warm_up)
        def checked(*args: Any, **kwargs: Any) -> Any:
            done = warm_up(*args, **kwargs)
            Entry.tell_if_not_called_since(calls)
            return done

        wrapper.worker.compile_or_warm_up_model = checked
    return result


def _show_weights() -> None:
    """Plain products on a CPU: behind oneDNN's handles no one can see whether two ranks have the same weights."""
    from vllm import _custom_ops
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        _custom_ops._supports_onednn = False
