"""What dynamo calls a compiler with, and a trace does not have: a fake mode, and modules' numbers as inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import models
import pytest
import torch
import torch.fx as fx
from functorch.compile import make_boxed_func
from test_expert_shares import traced as traced_experts
from torch import nn

from cpcompile.capture import Trace, capture, lower_inference
from cpcompile.module_floats import fix_module_floats
from cpcompile.options import Options
from cpcompile.passes.materialise import fake_mode_of
from cpcompile.pipeline import compile_graph, copy_graph


def traced_sparse() -> Trace:
    model = models.build(models.tiny_config("v32", layers=1))
    model.set_attn_implementation("eager")  # its mask holds a constant
    return capture(model, input_ids=torch.zeros((1, 10), dtype=torch.long), use_cache=False)


@pytest.mark.parametrize(
    ("trace", "name"),
    [(traced_sparse, "recognise-sparse-attention"), (traced_experts, "recognise-routed-experts")],
    ids=["sparse attention", "experts"],
)
def test_recognisers_read_numbers_under_the_compilers_fake_mode(trace: Any, name: str) -> None:
    """Constants of the graph, and small tensors of their own."""
    found = trace()
    gm = fx.GraphModule(found.gm, copy_graph(found.gm.graph))
    mode = fake_mode_of(gm)
    assert mode is not None
    with mode:
        made = compile_graph(gm, found.inputs, Options(), lambda _: pytest.fail(), [])
    assert {run.name: run.rewrites for run in made.passes}[name] == 1


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.eps = 0.25, 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale * self.scale + self.eps


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.factor = Inner(), 2.5

    def forward(self, x: torch.Tensor, temperature: float) -> torch.Tensor:
        return self.inner(x) * self.factor / temperature


def test_numbers_of_modules_are_constants_and_the_callers_are_not() -> None:
    graphs: list[fx.GraphModule] = []
    traces = 0

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        nonlocal traces
        traces += 1
        fix_module_floats(gm)

        def keep(aot: fx.GraphModule, _: Sequence[Any]) -> Any:
            graphs.append(aot)
            return make_boxed_func(aot.forward)

        return lower_inference(gm, example_inputs, keep, keep)

    torch._dynamo.reset()
    model = Outer()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows, temperature in ((3, 2.0), (5, 3.0)):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(compiled(x, temperature), model(x, temperature))
        assert (traces, len(graphs)) == (1, 1)
        numbers = [arg for node in graphs[0].graph.nodes for arg in node.args if isinstance(arg, float)]
        assert numbers == [0.25, 0.25, 1e-3, 2.5]
        model.inner.scale = 0.5  # a guard of dynamo's compiles again
        torch.testing.assert_close(compiled(x, temperature), model(x, temperature))
        assert len(graphs) == 2
