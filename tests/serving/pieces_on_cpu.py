"""Piecewise compilation (mode VLLM_COMPILE) on vLLM's CPU platform, which makes another mode of it to save time."""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Patch this process's vLLM: the cuts, the pass manager, the piecewise backend and inductor's passes are real."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def keep_mode(cls: Any, config: Any) -> None:
        found = config.compilation_config
        kept = {name: getattr(found, name) for name in ("mode", "backend", "ir_enable_torch_wrap")}
        original(config)
        if kept["mode"] == CompilationMode.VLLM_COMPILE:
            for name, value in kept.items():
                setattr(found, name, value)
            found.compile_sizes = []  # as CUDA's platform leaves it

    CpuPlatform.check_and_update_config = classmethod(keep_mode)
    # It names ops of CUDA's library alone, which are not there; inductor does the same for every op.
    FixFunctionalizationPass.__call__ = lambda *_: None
    _run_op_by_op()


def _run_op_by_op() -> None:
    """Run the graph that inductor would turn into C++, which takes its compiler minutes."""
    import torch
    from torch._inductor import compile_fx, config
    from torch._inductor.output_code import MockFXGraphCacheOutput
    from torch._inductor.virtualized import V

    def compile(gm: Any, example_inputs: Any, *_: Any, is_inference: bool, **__: Any) -> Any:
        compile_fx.view_to_reshape(gm)
        with torch.no_grad(), V.set_fake_mode(compile_fx.fake_tensor_prop(gm, example_inputs)):
            compile_fx._recursive_post_grad_passes(gm, is_inference=is_inference)
        gm.recompile()
        return MockFXGraphCacheOutput(gm=lambda inputs: gm(*inputs))

    compile_fx.fx_codegen_and_compile = compile
    config.force_disable_caches = True  # it has no form that could be saved
