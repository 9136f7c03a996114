"""Capture: one functional graph, symbolic in the tokens, its inputs matched, nothing run; and what cannot be traced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.fx as fx
from torch import nn

from cpcompile.capture import capture, lower_inference, unknown_inputs
from cpcompile.errors import TraceError

IDS = torch.zeros((3, 12), dtype=torch.int64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, ids: torch.Tensor, *, scale: torch.Tensor | None = None) -> torch.Tensor:
        x = self.table(ids)
        return x if scale is None else x * scale


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="placeholder"))


def test_the_graph_is_aten_for_inference_and_its_inputs_are_matched() -> None:
    trace = capture(Model(), IDS)
    calls = trace.gm.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default)
    assert len(calls) == 1 and not any("tangent" in n.name for n in trace.gm.graph.nodes)
    kinds = {i.name: i.kind for i in trace.inputs}
    assert kinds["table.weight"] == "parameter" and kinds["L['ids']"] == "input"
    assert len(trace.inputs) == len(placeholders(trace.gm))
    for node, given in zip(placeholders(trace.gm), trace.inputs, strict=True):
        value = node.meta["val"]
        assert isinstance(value, torch.Tensor) == isinstance(given.value, torch.Tensor)
        assert not isinstance(value, torch.Tensor) or value.dtype == given.value.dtype  # type: ignore[attr-defined]
    assert set(trace.seconds) == {"dynamo", "aot"} and min(trace.seconds.values()) > 0


def symbolic(trace: Any, dtype: torch.dtype) -> list[list[bool]]:
    values = [n.meta.get("val") for n in placeholders(trace.gm)]
    return [
        [isinstance(s, torch.SymInt) for s in v.shape]
        for v in values
        if isinstance(v, torch.Tensor) and v.dtype == dtype
    ]


@pytest.mark.parametrize(
    ("shape", "expected"), [((12,), [True]), ((1, 12), [False, True]), ((3, 12), [True, True]), ((4, 1), [True, False])]
)
def test_dims_of_token_ids_that_are_longer_than_one_are_symbolic(shape: tuple[int, ...], expected: list[bool]) -> None:
    assert symbolic(capture(Model(), torch.zeros(shape, dtype=torch.int64)), torch.int64) == [expected]


def test_token_ids_may_be_a_keyword_and_float_arguments_stay_static() -> None:
    trace = capture(Model(), ids=IDS, scale=torch.ones(4))
    assert symbolic(trace, torch.int64) == [[True, True]]
    assert [False] in symbolic(trace, torch.float32)
    assert {"L['ids']", "L['scale']"} <= {i.name for i in trace.inputs}


def test_nothing_is_run_and_meta_tensors_stay_meta() -> None:
    with torch.device("meta"):
        trace = capture(Model(), torch.zeros((2, 5), dtype=torch.int64))
    assert {n.meta["val"].device.type for n in trace.gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)} == {
        "meta"
    }


def test_input_mutations_are_outputs() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2

    trace = capture(f, torch.ones(4))
    (output,) = trace.gm.graph.find_nodes(op="output")
    assert len(output.args[0]) == 2
    targets = [n.target for n in trace.gm.graph.nodes if n.op == "call_function"]
    assert not any(isinstance(t, torch._ops.OpOverload) and t._schema.is_mutable for t in targets)


def test_training_graphs_go_to_their_own_compiler() -> None:
    heard: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        def note(kind: str) -> Any:
            return lambda aot, _: heard.append(kind) or aot.forward

        return lower_inference(gm, example_inputs, note("inference"), note("training"))

    compiled = torch.compile(nn.Linear(3, 2), backend=backend)
    compiled(torch.ones(4, 3))
    assert heard == ["training"]
    with torch.no_grad():
        compiled(torch.ones(4, 3))
    assert heard == ["training", "inference"]


def branching(x: torch.Tensor) -> torch.Tensor:
    return x + 1 if x.sum() > 0 else x - 1


def raising(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no weights here")


def reshaping(x: torch.Tensor) -> torch.Tensor:
    return x.view(7, 7)


@pytest.mark.parametrize("model", [branching, raising, reshaping])
def test_what_cannot_be_traced_is_one_line(model: Any) -> None:
    with pytest.raises(TraceError) as caught:
        capture(model, torch.ones(4))
    found = str(caught.value)
    assert found.startswith("the model cannot be traced: ") and "\n" not in found and len(found) > 40


def test_a_model_without_tensors() -> None:
    with pytest.raises(TraceError, match="the model has no graph: it runs no tensor operation"):
        capture(lambda x: x, 3)


def test_inputs_by_the_graphs_own_names() -> None:
    trace = capture(Model(), IDS)
    nodes = placeholders(trace.gm)
    found = unknown_inputs(trace.gm)
    assert [i.name for i in found] == [n.name for n in nodes]
    assert [i.kind for i in found] == ["input" if isinstance(n.meta["val"], torch.Tensor) else "other" for n in nodes]
