"""vLLM's saved code (its AOT artifacts): taken again if all ranks can, else compiled anew by all of them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

from cpcompile.errors import ReloadError
from cpcompile.reload import NOTHING, settle
from cpcompile.saved_code import SavedCode
from cpcompile.serving.vllm_entry import Entry, tensor_parallel_axes
from cpcompile.serving.vllm_settings import names_us, read_options

log = logging.getLogger("cpcompile")


def keeps_code(options: Mapping[str, Any]) -> bool:
    """Whether code of the target that ``options`` lead to on this platform can be saved: graphs that run op by op."""
    from vllm.platforms import current_platform

    return (options.get("target") or ("inductor" if current_platform.is_cuda_alike() else "eager")) == "eager"


def load(original: Callable[..., Any], model: Any, path: str) -> Any:
    """In the place of vLLM's ``_try_load_aot_compiled_fn(model, path)``, which every rank calls before it compiles.

    Raises:
        AxisError: a rank does not take part in time.
        ReloadError: ``VLLM_FORCE_AOT_LOAD`` is set, and some rank cannot take saved code.
    """
    import vllm.envs as envs

    config = model.vllm_config
    if not names_us(config.compilation_config):
        return original(model, path)
    options = read_options(config.additional_config, config.parallel_config.tensor_parallel_size)
    axes = tensor_parallel_axes(config)
    loaded, found, problem = _read(original, model, path)
    reason = settle(found, model, {**options, "axes": axes}, problem)
    where = ", ".join(f"rank {config.parallel_config.rank}, axis {name}" for name in axes) or "one rank"
    if not reason and found is not None:
        Entry.calls += 1
        log.info("cpcompile: %s: took the code of an earlier start from %s", where, path)
        for line in found.grounds.done:
            log.info("cpcompile: %s", line)
        return loaded
    level = logging.INFO if reason == NOTHING else logging.WARNING
    log.log(level, "cpcompile: %s: compiles anew: %s", where, reason)
    if envs.VLLM_FORCE_AOT_LOAD:
        raise ReloadError(f"VLLM_FORCE_AOT_LOAD is set, and saved code cannot be taken: {reason}")
    return None


def _read(original: Callable[..., Any], model: Any, path: str) -> tuple[Any, SavedCode | None, str]:
    """What vLLM reads, our code in it, and why there is none. No rank may end here: the others wait for its word."""
    try:
        loaded = original(model, path)
    except Exception as error:  # with VLLM_FORCE_AOT_LOAD
        return None, None, f"{type(error).__name__}: {error}".splitlines()[0]
    if loaded is None:
        return None, None, "saved code cannot be read (vLLM says why)" if os.path.exists(path) else NOTHING
    found = loaded._artifacts.compiled_fn
    return (loaded, found, "") if isinstance(found, SavedCode) else (None, None, "saved code is not of cpcompile")
