"""The backend as SGLang's models call it: with the process groups that SGLang has made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.fx as fx

from cpcompile.backend import cpcompile_backend
from cpcompile.serving.sglang_hooks import Batch, name_modules

log = logging.getLogger("cpcompile")
#: Classes of SGLang's, and so those that are derived from them, whose body is known to be one graph with our hooks.
KNOWN = {
    "DeepseekV2ForCausalLM",
    "Glm4MoeForCausalLM",
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "Qwen3MoeForCausalLM",
}


class Entry:
    """Dynamo's backend for a model of SGLang's.

    Args:
        options: what the user gave, checked.
    """

    calls: ClassVar[int] = 0

    def __init__(self, options: Mapping[str, Any]) -> None:
        """Remember the options."""
        self.options = options

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Any:
        """Compile one dynamo graph."""
        from sglang.srt.runtime_context import get_parallel

        Entry.calls += 1
        tp = get_parallel().tp_group
        axes = {"tp": tp.device_group} if tp.world_size > 1 else {}
        return cpcompile_backend(gm, example_inputs, options={**self.options, "axes": axes})


def compile_model(model: torch.nn.Module, options: Mapping[str, Any]) -> None:
    """Compile the body of ``model``, all but ``lm_head``, from its next call on."""
    if not {cls.__name__ for cls in type(model).__mro__} & KNOWN:
        log.warning(
            "cpcompile will NOT be called: %s is not one of the models that it knows in SGLang (%s)",
            type(model).__name__,
            ", ".join(sorted(KNOWN)),
        )
        return
    name_modules(model)
    body: Any = model.model
    compiled = torch.compile(body.forward, backend=Entry(options), dynamic=True, fullgraph=True)
    body.forward = with_batch(compiled, body.forward)


def with_batch(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """``compiled``, a model's forward, with its batch where opaque ops find it; says so if it was not compiled.

    Args:
        compiled: the forward, compiled.
        plain: the forward itself, for whoever compiles a larger graph around it.
    """
    told = False

    @torch.no_grad()
    def run(input_ids: Any, positions: Any, forward_batch: Any, *rest: Any, **more: Any) -> Any:
        nonlocal told
        Batch.current, calls = forward_batch, Entry.calls
        try:
            return compiled(input_ids, positions, forward_batch, *rest, **more)
        finally:
            Batch.current = None
            if not told and Entry.calls == calls:
                log.warning("cpcompile was NEVER called: this model runs uncompiled (look for TORCH_COMPILE_DISABLE)")
            told = True

    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs) if torch.compiler.is_compiling() else run(*args, **kwargs)

    return forward
