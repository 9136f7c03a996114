"""What one decode step tells, beside the job: how it is compiled on NPUs, and what becomes of another model's plan.

On NPUs SGLang compiles it by its own ``patch_model_npu``; here that runs with our hooks twice. With the backend of the
tests' platform ("eager") the logits are compared. With the one that SGLang itself makes of torchair, torch_npu loaded
over stand-ins for CANN, what torchair is asked is noted. Mocked there: that an NPU is here, and torchair's compiler.
"""

from __future__ import annotations

import sys
from types import MethodType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

REQUESTS = 5  # odd: no rank has the same rows as the other


class Asked(Exception):
    """Torchair was asked to compile a graph; the NPU is missing that would run it."""


def watch(runner: Any, body_forward: Any, job: dict[str, Any], told: dict[str, Any]) -> None:
    """Have the first decode step of ``REQUESTS`` tokens fill ``told``."""
    from cpcompile.serving import sglang_npu

    sglang_npu.install(job["options"])
    model, plain = runner.model, runner.model.forward

    def forward(ids: torch.Tensor, positions: Any, batch: Any, *rest: Any, **more: Any) -> Any:
        expected = plain(ids, positions, batch, *rest, **more)
        if batch.forward_mode.is_decode() and len(ids) == REQUESTS and not told:
            del model.forward
            given = (ids, positions, batch)
            with patch.object(model.model, "forward", body_forward):
                found = compiled(model, given)
                told["error"] = (found.next_token_logits - expected.next_token_logits).abs().max().item()
                told["torchair"] = by_torchair(model, given, job["torch_npu"])
            told["refused"] = refused(model, given, job["plan"])
        return expected

    model.forward = forward


def refused(model: Any, given: tuple[Any, ...], plan: str) -> str:
    """What the first step says of a plan that is not its model's."""
    from cpcompile.serving.sglang_entry import compile_model

    with patch.object(model.model, "forward", MethodType(type(model.model).forward, model.model)):
        compile_model(model, {"plan": plan})
        try:
            model.model.forward(*given)
        except Exception as error:
            return str(error).splitlines()[0]
    return ""


def compiled(model: Any, given: tuple[Any, ...]) -> Any:
    from sglang.srt.hardware_backend.npu.graph_runner import npu_graph_runner
    from sglang.srt.runtime_context import get_parallel

    with npu_graph_runner.patch_model_npu(model, True, len(given[0]), get_parallel().tp_group) as forward:
        return forward(*given)


def by_torchair(model: Any, given: tuple[Any, ...], path: str) -> dict[str, Any]:
    """What torchair is asked, by the backend that SGLang makes where it finds an NPU."""
    sys.path.append(path)
    from cpcompile.lowering.ascend.installation import import_torchair

    torchair, asked = import_torchair("npugraph_ex", device=False), {}
    from sglang.srt.utils import common

    # Torch_npu empties dynamo's table of torch's functions. On an NPU it has done so before one of them was hooked.
    with patch.object(torch, "bmm", torch.bmm.__wrapped__):
        torch._dynamo.trace_rules.get_torch_obj_rule_map()
    here = SimpleNamespace(is_out_of_tree=lambda: False)
    with patch.object(common, "current_platform", here), patch("torch.npu.is_available", lambda: True):
        backend = common.get_compiler_backend("npugraph_ex")

    def get_compiler(config: Any) -> Any:
        def compile_graph(gm: torch.fx.GraphModule, inputs: Any) -> Any:
            asked.update(mode=config.mode.value, eagerly=bool(config.debug.run_eagerly))
            asked["ops"] = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
            raise Asked

        return compile_graph

    runner = "sglang.srt.hardware_backend.npu.graph_runner.npu_graph_runner"
    with (
        patch(f"{runner}.get_compiler_backend", lambda mode: backend),
        patch("cpcompile.backend.prepare"),
        patch("cpcompile.lowering.ascend.device.import_torchair", lambda *_, **__: torchair),
        patch.object(torchair, "get_compiler", get_compiler),
    ):
        try:
            compiled(model, given)
        except Exception as error:
            if not asked:
                asked["failed"] = str(error)[:2000]
    return asked
