import glob
import json
import zipfile

import pytest
import sympy
import torch
import torch.fx as fx

from cpcompile.axes import Axis, axis_of
from cpcompile.capture import Trace, capture
from cpcompile.errors import TraceError
from cpcompile.explanation import explain_trace
from cpcompile.graph_inputs import GraphInput, unique_names
from cpcompile.model_spec import fake_mesh
from cpcompile.options import Options
from cpcompile.passes.context import context_of
from cpcompile.passes.describe import module_of
from cpcompile.pipeline import copy_graph
from cpcompile.replication import structure_fingerprint
from cpcompile.trace_file import load_trace, save_trace
from tests.toy_models import HIDDEN, toy

TOKENS = 65536


@pytest.fixture(scope="module")
def captured():
    """The toy on rank 2 of 4, and its axes; the fake process group stays up for the facts of DTensors."""
    with fake_mesh({"tp": 4}, 2) as mesh:
        model, args = toy(mesh)
        yield capture(model, *args), [axis_of("tp", mesh["tp"])]


@pytest.fixture
def saved(captured, tmp_path):
    save_trace(tmp_path / "toy.pt2", *captured)
    return tmp_path / "toy.pt2"


def explained(trace: Trace, axes, **options):
    copy = Trace(fx.GraphModule(trace.gm, copy_graph(trace.gm.graph)), trace.inputs, trace.seconds)
    return explain_trace(copy, Options.parse({"profile": "ascend-a3", **options}), TOKENS, axes)


def test_the_graph_comes_back_symbolic_and_with_its_modules(captured, saved):
    trace, axes = captured
    found = load_trace(saved)
    assert found.axes == axes == [Axis("tp", axes[0].group_name, 4, 2, (0, 1, 2, 3))]
    assert structure_fingerprint(found.trace.gm) == structure_fingerprint(trace.gm)
    before, after = list(trace.gm.graph.nodes), list(found.trace.gm.graph.nodes)
    assert [n.name for n in after] == [n.name for n in before]
    assert [module_of(n) for n in after] == [module_of(n) for n in before]
    assert "layers.1" in {module_of(n) for n in after}
    ids = next(n for n in after if n.op == "placeholder" and getattr(n.meta.get("val"), "dtype", None) == torch.int64)
    size = ids.meta["val"].shape[1]
    assert isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol)
    wait = next(n for n in after if "wait_tensor" in n.name)
    assert wait.meta["val"].shape[1].node.expr == size.node.expr
    assert len({id(n.meta["val"].fake_mode) for n in after if isinstance(n.meta.get("val"), torch.Tensor)}) == 1


def test_reading_it_back_explains_the_same(captured, saved):
    found, original = load_trace(saved), explained(*captured)
    again = explained(found.trace, found.axes, replicated=found.replicated)
    assert again.report.collectives == original.report.collectives
    assert again.plan == original.plan
    assert "scatter" in {c.decision for c in original.report.collectives}
    # The facts are what makes it so: without them nothing can be known of the parameters.
    assert explained(found.trace, found.axes).plan != original.plan


def test_facts_are_kept_per_axis_and_input(captured, saved):
    trace, _ = captured
    found = load_trace(saved)
    facts = context_of(found.trace.gm).replicated["tp"]
    by_shape = {
        tuple(n.meta["val"].shape): facts[n.name]
        for n in found.trace.gm.graph.find_nodes(op="placeholder")
        if isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].is_floating_point()
    }
    assert by_shape == {(32, HIDDEN): True, (HIDDEN,): True, (HIDDEN, HIDDEN): False}
    assert [i.kind for i in found.trace.inputs] == [i.kind for i in trace.inputs]
    assert [i.name for i in found.trace.inputs] == [i.name for i in trace.inputs]


def test_declared_facts_are_stored_too(captured, tmp_path):
    trace, axes = captured
    save_trace(tmp_path / "x.pt2", trace, axes, ["*"])
    found = load_trace(tmp_path / "x.pt2")
    assert all(context_of(found.trace.gm).replicated["tp"].values())
    shards = [
        n for n, i in zip(unique_names(trace.inputs), trace.inputs, strict=True) if type(i.value) is torch.nn.Parameter
    ]
    assert len(shards) == 4
    assert set(map(glob.escape, shards)) <= set(found.replicated)


def test_parameter_values_are_not_stored(captured, saved):
    with zipfile.ZipFile(saved) as archive:
        data = archive.read("graph.pkl")
    shards = [i.value.detach() for i in captured[0].inputs if type(i.value) is torch.nn.Parameter]
    assert shards and all(shard.numpy().tobytes()[:64] not in data for shard in shards)
    header = json.loads(zipfile.ZipFile(saved).read("header.json"))
    assert header["format"] == 1 and header["torch"] == torch.__version__


def test_saving_leaves_the_trace_as_it_was(captured, tmp_path):
    trace, axes = captured
    metas = [dict(n.meta) for n in trace.gm.graph.nodes]
    save_trace(tmp_path / "x.pt2", trace, axes)
    assert [dict(n.meta) for n in trace.gm.graph.nodes] == metas


def test_constants_of_the_graph_are_stored(tmp_path):
    graph = fx.Graph()
    graph.output(graph.create_node("get_attr", "table"))
    save_trace(tmp_path / "x.pt2", Trace(fx.GraphModule({"table": torch.arange(3.0)}, graph), []), [])
    assert torch.equal(load_trace(tmp_path / "x.pt2").trace.gm.table, torch.arange(3.0))


# ---- errors --------------------------------------------------------------------------------------------------------


def rewrite(path, target, **changes):
    """A copy of the archive with other members; None leaves one out."""
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as copy:
        for name in source.namelist():
            data = changes.get(name.split(".")[0], source.read(name))
            if data is not None:
                copy.writestr(name, data)
    return target


def refused(path, text):
    with pytest.raises(TraceError, match=text) as caught:
        load_trace(path)
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    refused(tmp_path / "no.pt2", "cannot read the trace .*No such file")


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 cut off"])
def test_no_archive(tmp_path, content):
    (tmp_path / "x.pt2").write_bytes(content)
    refused(tmp_path / "x.pt2", "damaged or not a trace")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.99])
def test_truncated(saved, tmp_path, part):
    data = saved.read_bytes()
    (tmp_path / "x.pt2").write_bytes(data[: int(part * len(data))])
    refused(tmp_path / "x.pt2", "damaged")


def test_flipped_byte(saved, tmp_path):
    data = bytearray(saved.read_bytes())
    data[len(data) // 2] ^= 255
    (tmp_path / "x.pt2").write_bytes(data)
    refused(tmp_path / "x.pt2", "damaged")


def test_other_archive(saved, tmp_path):
    refused(rewrite(saved, tmp_path / "a.pt2", header=None), "not a trace")
    refused(rewrite(saved, tmp_path / "b.pt2", graph=None), "not a trace")


def test_other_header(saved, tmp_path):
    refused(rewrite(saved, tmp_path / "a.pt2", header=b"{"), "not a trace")
    refused(rewrite(saved, tmp_path / "b.pt2", header=b'{"format": 2}'), "expected trace format 1, found 2")
    refused(rewrite(saved, tmp_path / "c.pt2", header=b"[]"), r"expected trace format 1, found \[\]")
    refused(rewrite(saved, tmp_path / "d.pt2", header=b'{"format": 1, "torch": "9.9"}'), "torch 9.9: trace again")


def test_other_graph(saved, tmp_path):
    refused(rewrite(saved, tmp_path / "a.pt2", graph=b"garbage"), "the graph cannot be read")
    refused(rewrite(saved, tmp_path / "b.pt2", graph=b"\x80\x04N."), "the graph cannot be read")


def test_inputs_that_do_not_fit_the_graph(saved, tmp_path):
    header = json.loads(zipfile.ZipFile(saved).read("header.json"))
    header["inputs"].pop()
    refused(rewrite(saved, tmp_path / "a.pt2", header=json.dumps(header)), "the graph cannot be read")


def test_what_cannot_be_stored(tmp_path):
    gm = fx.GraphModule({}, fx.Graph())
    gm.hook = lambda: None
    gm.graph.output(gm.graph.placeholder("x"))
    gm.graph.find_nodes(op="placeholder")[0].meta["stack_trace"] = (i for i in ())
    with pytest.raises(TraceError, match="the graph cannot be stored"):
        save_trace(tmp_path / "x.pt2", Trace(gm, [GraphInput("x", None, "other")]), [])
