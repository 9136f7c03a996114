"""Lowering: the table of targets, eager, and inductor's one code for every T."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
import torch.fx as fx
from placed import Layer
from simulate import fake_rank
from test_token_dims import Model
from torch._dynamo.utils import counters
from versions import needs_torch

from cpcompile.capture import capture
from cpcompile.errors import OptionError
from cpcompile.lowering.targets import lower

REPLICATED = ["table", "weight"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Kernels are kept by their text, graphs are not: another version may have compiled them otherwise."""
    torch._dynamo.reset()
    counters.clear()
    with torch._inductor.config.patch(fx_graph_cache=False):
        yield
    torch._dynamo.reset()


def ids_of(tokens: int) -> torch.Tensor:
    ids = torch.arange(tokens) * 7 % 32
    if tokens > 1:
        torch._dynamo.mark_dynamic(ids, 0)
    return ids


def test_an_unknown_target() -> None:
    with pytest.raises(OptionError) as caught:
        lower("inductr", fx.GraphModule({}, fx.Graph()), [])
    assert str(caught.value) == "unknown target 'inductr' (did you mean 'inductor'?)"


def test_eager_runs_the_graph_as_it_is() -> None:
    model, ids = Layer(), ids_of(12)
    trace = capture(model, ids)
    fakes = [n.meta["val"] for n in trace.gm.graph.find_nodes(op="placeholder")]
    run = lower("eager", trace.gm, fakes)
    assert run._boxed_call  # type: ignore[attr-defined]
    weights = dict(model.named_parameters())
    inputs: list[Any] = [12 if i.name.endswith("size()[0]") else weights.get(i.name, ids) for i in trace.inputs]
    (output,) = run(inputs)
    assert torch.equal(output, model(ids))


@needs_torch("2.13", "its fake group leaves the results of collectives unwritten")
def test_inductor_serves_every_count_from_two_on_with_one_graph() -> None:
    """No guard on T: 2 is dynamo's least dynamic size, and 3 ranks have one row each at T = 2 and 3."""
    options = {"strategy": "tp", "replicated": REPLICATED, "target": "inductor"}
    eager = {**options, "target": "eager"}
    with fake_rank(0, 3) as mesh, torch.no_grad():
        model = Model(lambda x, group: torch.relu(x) + 1, mesh)
        fast = torch.compile(model, backend="cpcompile", options=options, fullgraph=True)
        plain = torch.compile(model, backend="cpcompile", options=eager, fullgraph=True)
        found = {tokens: fast(ids_of(tokens)) for tokens in (3, 2, 4, 7, 64)}
        assert counters["stats"]["unique_graphs"] == 1
        for tokens, output in found.items():
            assert output.shape == (tokens, 8)
            # In a fake group other ranks' rows are not written: this rank's are the first.
            torch.testing.assert_close(output[: -(-tokens // 3)], plain(ids_of(tokens))[: -(-tokens // 3)])


def test_inputs_that_are_neither_tensors_nor_sizes_stay_out_of_inductor() -> None:
    graph = fx.Graph()
    mesh, x = graph.placeholder("mesh"), graph.placeholder("x")
    double = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2))
    graph.output((double,))
    fake_mode = torch._subclasses.FakeTensorMode()
    fake = fake_mode.from_tensor(torch.ones(3))
    double.meta["val"] = x.meta["val"] = fake
    gm = fx.GraphModule({}, graph)
    with torch.no_grad(), torch._guards.tracing(torch._guards.TracingContext(fake_mode)):
        run = lower("inductor", gm, [object(), fake])
    assert torch.equal(run([object(), torch.ones(3)])[0], torch.full((3,), 2.0))
    assert run._boxed_call  # type: ignore[attr-defined]
    double.args = (mesh, 2)
    with pytest.raises(AssertionError, match="mesh is no tensor and is used"):
        lower("inductor", gm, [object(), fake])
