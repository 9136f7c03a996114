"""The plugin of SGLang (entry point ``sglang.srt.plugins``): a flag alone makes a model run through cpcompile.

SGLang calls ``register`` in every process. Hooks do nothing unless ``--json-model-override-args`` names cpcompile.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from cpcompile.serving.settings import plain
from cpcompile.serving.sglang_settings import FLAG, read_options

log = logging.getLogger("cpcompile")
_RUNNER = "sglang.srt.model_executor.model_runner.ModelRunner"


def register() -> None:
    """Hook SGLang; SGLang calls this once in a process."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang.srt.server_args.ServerArgs.resolve_once", _resolve, HookType.BEFORE)
    HookRegistry.register(f"{_RUNNER}.load_model", _load, HookType.AROUND)


@functools.cache
def _tell(options: str) -> None:
    log.info("cpcompile: options %s", options)


def _resolve(server_args: Any, *_: Any, **__: Any) -> None:
    """Check the options before anything is loaded."""
    options = read_options(server_args)
    if options is None:
        return
    _log_as_sglang()
    _tell(plain(options))
    if server_args.enable_torch_compile and not _compiles_decode():
        log.warning(
            "cpcompile: --enable-torch-compile would compile decode steps with SGLang's own backend: leave it out (%s "
            "alone turns cpcompile on)",
            FLAG,
        )


def _load(original: Any, runner: Any, *args: Any, **kwargs: Any) -> Any:
    """Compile the model once it is loaded."""
    options = read_options(runner.server_args)
    if options is None or runner.is_draft_worker:
        return original(runner, *args, **kwargs)
    from cpcompile.serving import sglang_npu
    from cpcompile.serving.sglang_entry import compile_model
    from cpcompile.serving.sglang_hooks import install

    _log_as_sglang()
    install()
    if runner.server_args.enable_torch_compile and _compiles_decode():
        sglang_npu.install(options)
    done = original(runner, *args, **kwargs)
    compile_model(runner.model, options)
    return done


def _compiles_decode() -> bool:
    """Whether SGLang's platform names a backend for decode steps: that of NPUs, and whoever has one of its own."""
    from sglang.srt.platforms import current_platform
    from sglang.srt.platforms.interface import SRTPlatform

    own = type(current_platform).get_compile_backend is not SRTPlatform.get_compile_backend
    return own or current_platform.is_npu()


def _log_as_sglang() -> None:
    """What this project logs goes where SGLang's own lines go: the root's handlers."""
    logging.getLogger("cpcompile").setLevel(logging.getLogger().getEffectiveLevel())
