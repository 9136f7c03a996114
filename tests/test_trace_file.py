import glob
import json
import pickle
import warnings
import zipfile
from pathlib import Path

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
    replicated = context_of(found.trace.gm).replicated["tp"]
    assert replicated and all(replicated.values())
    shards = [
        n for n, i in zip(unique_names(trace.inputs), trace.inputs, strict=True) if type(i.value) is torch.nn.Parameter
    ]
    assert len(shards) == 4
    assert set(map(glob.escape, shards)) <= set(found.replicated)


def test_parameter_values_are_not_stored(captured, saved):
    data = saved.read_bytes()
    shards = [i.value.detach() for i in captured[0].inputs if type(i.value) is torch.nn.Parameter]
    assert shards and all(shard.numpy().tobytes()[:64] not in data for shard in shards)
    header = json.loads(zipfile.ZipFile(saved).read("header.json"))
    assert header["format"] == 2 and header["torch"] == torch.__version__


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
    refused(
        rewrite(saved, tmp_path / "b.pt2", header=b'{"format": 1}'), "expected trace format 2, found 1: trace again"
    )
    refused(rewrite(saved, tmp_path / "c.pt2", header=b"[]"), r"expected trace format 2, found \[\]")
    refused(rewrite(saved, tmp_path / "d.pt2", header=b'{"format": 2, "torch": "9.9"}'), "torch '9.9': trace again")


def test_other_graph(saved, tmp_path):
    refused(rewrite(saved, tmp_path / "a.pt2", graph=b"garbage"), "damaged or not a trace")
    refused(rewrite(saved, tmp_path / "b.pt2", graph=b"{}"), "the graph cannot be read")


def test_files_of_earlier_versions(tmp_path):
    """Their pickles are not even looked at."""

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "PWNED",)

    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("header.json", '{"format": 1}')
        archive.writestr("graph.pkl", pickle.dumps(Evil()))
    refused(tmp_path / "old.pt2", "holds a pickle: trace again with this version")
    assert not (tmp_path / "PWNED").exists()


def test_archives_that_unpack_to_more_than_they_are(saved, tmp_path):
    """Compressed members, members twice, and others: none is read."""
    with zipfile.ZipFile(saved) as source:
        members = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(tmp_path / "a.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refused(tmp_path / "a.pt2", "its members are compressed")
    for name in ("header.json", "more.bin"):
        (tmp_path / "b.pt2").write_bytes(saved.read_bytes())
        with zipfile.ZipFile(tmp_path / "b.pt2", "a") as archive, warnings.catch_warnings(action="ignore"):
            archive.writestr(name, b"{}")
        refused(tmp_path / "b.pt2", "it has other members")


EVIL = "__import__('os').system('touch PWNED')"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda g: g["nodes"][0].update(name="x): pass\nimport os\ndef f(y"), "expected an identifier"),
        (lambda g: g["nodes"][0].update(target=EVIL), "expected an identifier"),
        (lambda g: g["nodes"][-2].update(kwargs={EVIL: 1}), "expected an identifier"),
        (lambda g: g["nodes"][-2].update(target="os.system"), "expected an op or a known function"),
        (lambda g: g["nodes"][-2].update(target="aten::from_file.default"), "is not taken from a file"),
        (lambda g: g["nodes"][-2].update(target="mylib::op.default"), "name its library in CPCOMPILE_TRACE_LIBRARIES"),
        (lambda g: g["nodes"][-2].update(target="aten::no_such_op.default"), "no op aten::no_such_op.default"),
        (lambda g: g["nodes"][-2].update(op="call_module"), "expected a kind of node"),
        (lambda g: g["nodes"][-2].update(args=[]), "expected the arguments of"),
        (lambda g: g["nodes"][-2].update(args=[{"node": "nowhere"}]), "expected the name of an earlier node"),
        (lambda g: g["nodes"].reverse(), "expected the name of an earlier node"),
        (lambda g: g["nodes"].pop(), "expected one output"),
        (lambda g: g["attributes"].update({"forward": {"constant": 0}}), "expected the name of an attribute"),
    ],
)
def test_graphs_that_would_run_something(saved, tmp_path, change, text):
    data = json.loads(zipfile.ZipFile(saved).read("graph.json"))
    change(data["graph"])
    refused(rewrite(saved, tmp_path / "a.pt2", graph=json.dumps(data)), text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (EVIL, "expected a size"),
        (["Pow", 10, 10**9], "expected a small power"),
        (["__import__", "os"], "expected a function of sizes"),
        (["FloorDiv", 1, 0], "the graph cannot be read"),
        (1 << 70, "64 bits"),
        (["Rational", 1, 2], "expected a whole number"),
    ],
)
def test_sizes_are_never_evaluated(saved, tmp_path, size, text):
    data = json.loads(zipfile.ZipFile(saved).read("graph.json"))
    next(v for v in data["values"] if "tensor" in v and len(v["tensor"][0]) == 3)["tensor"][0][1] = size
    refused(rewrite(saved, tmp_path / "a.pt2", graph=json.dumps(data)), text)


def test_ops_of_other_libraries_where_they_are_named(tmp_path, monkeypatch):
    library = torch.library.Library("strangers", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    graph = fx.Graph()
    graph.output(graph.call_function(torch.ops.strangers.twice.default, (graph.placeholder("x"),)))
    trace = Trace(fx.GraphModule({}, graph), [GraphInput("x", None, "input")])
    save_trace(tmp_path / "x.pt2", trace, [])
    refused(tmp_path / "x.pt2", "strangers::twice is not taken from a file")
    monkeypatch.setenv("CPCOMPILE_TRACE_LIBRARIES", "others,strangers")
    assert structure_fingerprint(load_trace(tmp_path / "x.pt2").trace.gm) == structure_fingerprint(trace.gm)


def test_every_kind_of_value_comes_back(tmp_path):
    """Arguments, results, conditions, graphs within graphs, and sizes in expressions."""

    def f(x, y):
        n = x.shape[0]
        halves = x.reshape(n, 2, -1).split([1, 1], 1)
        taken = torch.cond(n > 4, lambda a: a.sin() * float("inf"), lambda a: a.cos(), (halves[1],))
        filled = torch.full((n // 2 * 3 + 1,), -float("inf"), dtype=torch.bfloat16, device="cpu")
        return taken.to(torch.float16), filled, y + n, x[..., 1:3:2], torch.arange(5.0)[: y.shape[0]]

    x, y = torch.ones(6, 8), torch.ones(3, dtype=torch.int64)
    torch._dynamo.mark_dynamic(x, 0)
    trace = capture(f, x, y)
    save_trace(tmp_path / "x.pt2", trace, [])
    found = load_trace(tmp_path / "x.pt2").trace.gm
    assert structure_fingerprint(found) == structure_fingerprint(trace.gm)
    for a, b in zip(trace.gm.graph.nodes, found.graph.nodes, strict=True):
        assert (a.name, a.op, a.target if a.op != "get_attr" else "", str(a.args)) == (
            b.name, b.op, b.target if b.op != "get_attr" else "", str(b.args),
        )  # fmt: skip
        assert str(a.meta.get("val")) == str(b.meta.get("val")), a


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
