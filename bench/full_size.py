"""DeepSeek models of full size on the meta device, traced as rank 0 of ``ranks``: what ``bench.lower_time`` lowers.

``v3`` and ``v32`` are the transformers library's. ``serving`` is V3.2 as serving frameworks on Ascend have it: flat
tokens of three requests, paged caches and torch_npu's ops, with dense MLPs; its model is the tests' own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cpcompile.axes import axis_of
from cpcompile.capture import capture
from cpcompile.compiled import Compiled
from cpcompile.explanation import compile_trace
from cpcompile.model_spec import Target, fake_mesh, trace_target
from cpcompile.module_groups import replica_groups
from cpcompile.options import ROLES, Options

MODELS = {"v3": "DeepSeek-V3", "v32": "DeepSeek-V3.2", "serving": "V3.2, serving form"}
TESTS = Path(__file__).parents[1] / "tests"


@dataclass(frozen=True)
class Strategy:
    """A way to spread a model.

    Args:
        says: what it is called in tables.
        axis: ``"tp"``, over which the traced model is sharded, or ``"cp"``, whose ranks all hold it whole.
        options: the backend's.
        modules: whether the ranks are replicas that share embedding, o_proj, dense MLPs and lm_head.
    """

    says: str
    axis: str
    options: dict[str, Any] = field(default_factory=dict)
    modules: bool = False


STRATEGIES = {
    "off": Strategy("TP", "tp", {"strategy": "off"}),
    "tp": Strategy("TP, RS/AG", "tp", {"strategy": "tp"}),
    "cp": Strategy("CP", "cp", {"strategy": "cp"}),
    "modules": Strategy("module TP", "cp", {"group_tokens": "equal"}, modules=True),
}


@contextmanager
def traced(kind: str, layers: int, axis: str, ranks: int) -> Iterator[Target]:
    """A model of :data:`MODELS`; its process groups live as long as the block."""
    if kind == "serving":
        with fake_mesh({axis: ranks}, 0) as mesh:
            assert mesh is not None
            model, inputs, replicated = _serving(layers, mesh["tp"] if axis == "tp" else None)
            yield Target(capture(model, *inputs), [axis_of(axis, mesh[axis])], replicated)
        return
    with tempfile.TemporaryDirectory() as folder:
        _config(kind, layers).save_pretrained(folder)
        with trace_target(folder, {axis: ranks}) as found:
            yield found


def compiled(found: Target, strategy: Strategy) -> Compiled:
    """What the backend makes of the trace, which is canonicalised in place."""
    given = {"profile": "ascend-a3", "replicated": found.replicated}
    options = Options.parse({**given, **strategy.options})
    if not strategy.modules:
        return compile_trace(found.trace, options, found.axes)
    sizes = dict.fromkeys(set(ROLES) - {"none"}, found.axes[0].size)
    return compile_trace(found.trace, options, [], replica_groups(sizes, 1))


def _config(kind: str, layers: int) -> Any:
    from transformers import DeepseekV3Config, DeepseekV32Config

    dense = min(3, layers - 1)
    if kind == "v3":
        return DeepseekV3Config(num_hidden_layers=layers, dtype="bfloat16", first_k_dense_replace=dense)
    kinds = ["dense"] * dense + ["sparse"] * (layers - dense)
    return DeepseekV32Config(num_hidden_layers=layers, dtype="bfloat16", mlp_layer_types=kinds)


def _serving(layers: int, mesh: Any) -> tuple[Any, Any, tuple[str, ...]]:
    """A model, its inputs, and which of them are the same on all ranks: all of them without a ``mesh`` to shard over.

    Sharded are heads and the MLP, with an all-reduce behind each, as frameworks write it by hand.
    """
    sys.path.insert(0, str(TESTS))
    from serving_models import REAL, Layer, Serving, batch

    class ShardedLayer(Layer):  # type: ignore[misc]
        def attention(self, *args: Any) -> torch.Tensor:
            return _summed(super().attention(*args), mesh)

        def forward(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
            out, residual = super().forward(*args)
            return _summed(out, mesh), residual

    sizes = replace(REAL, layers=layers)
    if mesh is not None:
        sizes = replace(sizes, heads=sizes.heads // mesh.size(), inner=sizes.inner // mesh.size())
    with torch.device("meta"):
        model = Serving(sizes, torch.bfloat16, Layer if mesh is None else ShardedLayer)
        caches = model.caches(9)
    inputs = [t.to("meta") for t in batch([5, 1, 4], [0, 3, 2], 9, sizes)]
    shards = ("q_b", "k_up", "v_up", "o", "up", "down")
    return model, (*inputs, *caches), ("*", *(f"!*.{name}" for name in shards if mesh is not None))


def _summed(value: torch.Tensor, mesh: Any) -> torch.Tensor:
    from torch.distributed._functional_collectives import all_reduce

    result: torch.Tensor = all_reduce(value, "sum", mesh)
    return result
