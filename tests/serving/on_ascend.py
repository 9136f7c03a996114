"""One process of vllm-ascend, its torch_npu loaded over stand-ins for CANN: what vLLM's configuration becomes there.

``on_ascend.py JOB.json``, alone or under torchrun. The job: ``path``, where vllm-ascend and torch_npu are (processes
that vLLM starts of its own would fail to load them), ``arguments`` of EngineArgs, ``out``, and ``compile``: also let
vllm-ascend's compiler compile a layer, on gloo, and run it. What is written: the configuration, and how far the
compiled layer is from the layer at each number of tokens.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol

from cpcompile.lowering.ascend.installation import import_torchair

HIDDEN, TOKENS = (
    512,
    (2, 5, 3000, 3001),
)  # without an option the all-reduce is kept in small steps, rewritten in large ones


def main() -> None:
    job, heard = json.loads(Path(sys.argv[1]).read_text()), Heard()
    sys.path.append(job["path"])
    import_torchair("ge-export", device=False)
    logging.getLogger("cpcompile").addHandler(heard)
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    config = EngineArgs(**job["arguments"]).create_engine_config()
    found = config.compilation_config
    passes = found.inductor_compile_config
    told: dict[str, Any] = {
        "platform": type(current_platform).__name__,
        "mode": found.mode.name,
        "backend": str(found.backend),
        "passes": {key: type(passes[key]).__name__ for key in passes if key == current_platform.pass_key},
        "additional": sorted(config.additional_config),
        "heard": heard.lines,
    }
    if job.get("compile"):
        told["errors"] = compiled(config)
    Path(f"{job['out']}.{os.environ.get('RANK', '0')}").write_text(json.dumps(told))


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


class Layer(torch.nn.Module):
    """A product of rows of the weight, summed over the ranks, and what the next piece starts with."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.own = torch.nn.Parameter(torch.randn(HIDDEN, HIDDEN, generator=generator) / HIDDEN**0.5)
        self.gamma = torch.nn.Parameter(torch.arange(HIDDEN) / HIDDEN)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = funcol.all_reduce(x @ self.own, "sum", dist.group.WORLD) + residual
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6) * self.gamma, h


def compiled(config: Any) -> dict[int, float]:
    """Largest error by number of tokens; raises where nothing was rewritten."""
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config.utils import Range
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from cpcompile.serving.post_grad import Piece
    from cpcompile.serving.vllm_pieces import Model, pass_of

    dist.init_process_group("gloo")
    ours = pass_of(config.compilation_config)
    assert ours is not None
    ours.model = Model({"tp": dist.group.WORLD})
    manager = resolve_obj_by_qualname(current_platform.get_pass_manager_cls())()
    manager.configure(config)
    manager.add(ours)
    compiler = resolve_obj_by_qualname(current_platform.get_compile_backend())()
    compiler.compute_hash(config)
    tokens = Range(1, 4096)

    def backend(gm: Any, example_inputs: Any) -> Any:
        names = [str(node.target) for node in gm.graph.find_nodes(op="placeholder")]
        ours.piece = Piece(names, ["own" not in name for name in names], tokens.end)
        with pass_context(tokens):
            return compiler.compile(gm, example_inputs, {current_platform.pass_key: manager}, tokens, "layer")[0]

    layer, errors = Layer(), {}
    run = torch.compile(layer, backend=backend, dynamic=True, fullgraph=True)
    for count in TOKENS:
        x, residual = (torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(s)) for s in (count, 99))
        with torch.no_grad():
            pairs = zip(run(x, residual), layer(x, residual), strict=True)
            errors[count] = max((found - wanted).abs().max().item() for found, wanted in pairs)
    return errors


if __name__ == "__main__":
    main()
