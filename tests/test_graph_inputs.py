"""Graph inputs: names of dynamo's sources, kinds, and the tensors inside a DTensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from simulate import fake_rank
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from cpcompile.graph_inputs import GraphInput, describe_inputs, meshes_of, readable_name


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("L['self']._modules['model']._modules['layers']._modules['0']._parameters['w']", "model.layers.0.w"),
        ("L['self']._parameters['embed']", "embed"),
        ("L['self']._modules['rope']._buffers['inv_freq']", "rope.inv_freq"),
        ("L['self']._modules['norm'].eps", "norm.eps"),
        ("L['ids']", "L['ids']"),
        ("L['ids'].size()[1]", "L['ids'].size()[1]"),
        ("G['table']", "G['table']"),
        ("", ""),
    ],
)
def test_readable_names(source: str, expected: str) -> None:
    assert readable_name(source) == expected


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))
        self.plain = torch.ones(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale + self.plain


def seen(model: Any, *args: torch.Tensor) -> tuple[list[GraphInput], fx.GraphModule]:
    """What a backend is told, and dynamo's graph."""
    found: list[Any] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append((describe_inputs(gm, example_inputs), gm))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True)(*args)
    ((inputs, gm),) = found
    return inputs, gm


def test_names_and_kinds_of_a_model() -> None:
    model, x = Model(), torch.ones(3, 4)
    torch._dynamo.mark_dynamic(x, 0)
    inputs, gm = seen(model, x)
    kinds = {i.name: i.kind for i in inputs}
    assert len(inputs) == len(gm.graph.find_nodes(op="placeholder")) == len(kinds)
    assert kinds == {
        "L['x'].size()[0]": "other",
        "L['x']": "input",
        "inner.weight": "parameter",
        "inner.bias": "parameter",
        "scale": "buffer",
        "L['self'].plain": "input",  # an attribute that the model may set anew before each step
    }
    values = {i.name: i.value for i in inputs}
    assert values["inner.weight"] is model.inner.weight and values["scale"] is model.scale


def test_a_dtensor_is_there_once_for_each_value_that_aot_passes_in_its_place() -> None:
    with fake_rank(0, 2) as mesh:
        weight = DTensor.from_local(torch.ones(4), mesh, [Replicate()])
        graph = fx.Graph()
        graph.output((graph.placeholder("a"), graph.placeholder("w"), graph.placeholder("b")))
        gm = fx.GraphModule({}, graph)
        inputs = describe_inputs(gm, [torch.ones(2), weight, 3])
        leaves = len(weight.__tensor_flatten__()[0])
        assert [i.name for i in inputs] == ["a", *["w"] * leaves, "b"]
        assert [i.kind for i in inputs] == ["input", *["input"] * leaves, "other"]
        assert inputs[1].value is weight
        assert meshes_of(inputs) == [mesh]


def test_meshes_are_found_once_alone_and_in_dtensors() -> None:
    with fake_rank(0, 2) as mesh:
        weight = DTensor.from_local(torch.ones(4), mesh, [Replicate()])
        inputs = [GraphInput("m", mesh, "other"), GraphInput("w", weight, "parameter"), GraphInput("x", 3, "other")]
        assert meshes_of(inputs) == [mesh]
        assert meshes_of(inputs[1:]) == [mesh]
        assert meshes_of(inputs[2:]) == []


def test_an_input_too_many_is_a_bug() -> None:
    graph = fx.Graph()
    graph.output(graph.placeholder("a"))
    with pytest.raises(ValueError, match="zip"):
        describe_inputs(fx.GraphModule({}, graph), [1, 2])
