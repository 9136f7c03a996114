"""SGLang on NPUs: where it compiles its decode steps by torchair, our backend comes first.

With ``--enable-torch-compile`` its graph runner compiles every size of decode step, the whole model with ``lm_head``,
in ``patch_model_npu``, by the backend that ``get_compiler_backend("npugraph_ex")`` gives: torchair's, or that of the
platform's ``get_compile_backend``. Then it captures the result. Read in release 0.5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cpcompile.errors import OptionError
from cpcompile.lowering.targets import TARGETS
from cpcompile.serving.sglang_entry import Entry, with_batch

CAPTURED = "npugraph_ex"
BACKEND = "sglang.srt.utils.common.get_compiler_backend"
PATCH = "sglang.srt.hardware_backend.npu.graph_runner.npu_graph_runner.patch_model_npu"


def install(options: Mapping[str, Any]) -> None:
    """Register and apply the hooks, with the user's options. May be called again."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if PATCH in HookRegistry._hooks:
        return

    def backend(original: Callable[..., Any], mode: str | None = None) -> Any:
        theirs = original(mode)
        return Entry({**options, **after_us(theirs)}) if mode == CAPTURED else theirs

    HookRegistry.register(BACKEND, backend, HookType.AROUND)
    HookRegistry.register(PATCH, patched, HookType.AROUND)
    HookRegistry.apply_hooks()


def after_us(theirs: Any) -> dict[str, Any]:
    """The options with which our backend lowers as ``theirs`` would: torchair's with its configuration, or a name.

    Raises:
        OptionError: it is neither torchair's nor the name of a target.
    """
    config = getattr(theirs, "keywords", {}).get("compiler_config")
    if config is not None:
        return {"target": CAPTURED, "compiler_config": config}
    if isinstance(theirs, str) and theirs in TARGETS:
        return {"target": theirs}
    raise OptionError(
        f"SGLang's platform compiles decode steps with {theirs!r}, which cpcompile cannot lower to: "
        f"leave --enable-torch-compile out (found neither torchair's backend nor one of {', '.join(TARGETS)})"
    )


@contextmanager
def patched(original: Callable[..., Any], model: Any, enable_compile: bool, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """The compiled forward, with its batch where opaque ops find it."""
    with original(model, enable_compile, *args, **kwargs) as forward:
        yield with_batch(forward, forward) if enable_compile else forward
