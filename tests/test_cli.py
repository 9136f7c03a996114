import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cpcompile.cli import app
from cpcompile.passes.registry import PASSES
from tests.models import tiny_config

TOY = f"{Path(__file__).parent / 'toy_models.py'}"
TOKENS = "65536"


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in args], catch_exceptions=False)


def explained(*args: object) -> dict:
    result = run("explain", *args, "--tokens", TOKENS, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def config(folder):
    tiny_config("v3").save_pretrained(folder / "tiny")
    return folder / "tiny"


@pytest.fixture(scope="module")
def trace(folder):
    """The toy's trace on rank 1 of 4."""
    path = folder / "toy.pt2"
    result = run("trace", f"{TOY}:toy", "--axis", "tp=4", "--rank", 1, "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


def without_times(data: dict) -> dict:
    data = {**data, "passes": [{**p, "seconds": 0} for p in data["passes"]]}
    del data["capture"]
    return data


# ---- explain -------------------------------------------------------------------------------------------------------


def test_a_configuration_is_sharded_and_explained(config):
    data = explained(config, "--axis", "tp=2")
    rows = {c["module"]: c for c in data["collectives"] if c["kind"] == "all_reduce"}
    assert len(rows) == 6
    assert rows["model.layers.0.self_attn.o_proj"]["decision"] == "scatter"
    assert rows["model.layers.0.self_attn.o_proj"]["elements_before"] == 64 * int(TOKENS)
    assert rows["model.layers.1.mlp.experts"]["decision"] == "merge"
    assert data["verify"]["holds"] and data["verify"]["proofs"]
    assert data["capture"]["dynamo_s"] > 0 and data["capture"]["aot_s"] > 0


def test_a_function_and_its_trace_explain_the_same(trace, tmp_path):
    plans = [tmp_path / "function.json", tmp_path / "trace.json"]
    data = explained(f"{TOY}:toy", "--axis", "tp=4", "--rank", 1, "--save-plan", plans[0])
    assert without_times(explained(trace, "--save-plan", plans[1])) == without_times(data)
    assert plans[0].read_text() == plans[1].read_text()
    assert [c["decision"] for c in data["collectives"]].count("scatter") == 2


def test_json_has_every_key(trace):
    data = explained(trace)
    assert set(data) == {
        "tokens", "axes", "graph", "collectives", "volume", "solver", "passes", "verify", "intervals", "capture",
        "modules",
    }  # fmt: skip
    assert data["axes"] == [{"name": "tp", "size": 4, "rank": 1, "refused": ""}]
    assert data["graph"]["nodes_after"] != data["graph"]["nodes_before"] > 0
    keys = {"name", "kind", "axis", "module", "decision", "becomes", "elements_before", "elements_after", "reason"}
    assert all(keys <= set(c) for c in data["collectives"])
    assert data["volume"]["before"] == sum(c["elements_before"] for c in data["collectives"]) > 0
    assert data["volume"]["after"] == sum(c["elements_after"] for c in data["collectives"])
    assert {"name", "seconds", "rewrites", "refusals"} <= set(data["passes"][0])
    spans = [(i["first"], i["last"]) for i in data["intervals"]]
    assert spans[0][0] == 0 and spans[-1][1] is None
    assert all(b[0] == a[1] + 1 for a, b in itertools.pairwise(spans))
    assert set(data["intervals"][0]) >= {"first", "last", "solver", "cost_s", "bound_s", "unchanged_s", "counts"}
    here = next(i for i in data["intervals"] if i["last"] is None or int(TOKENS) <= i["last"])
    assert sum(here["counts"].values()) == len(data["collectives"])


def test_the_table_has_module_decision_volume_intervals_and_proof(trace):
    result = run("explain", trace, "--tokens", TOKENS)
    assert result.exit_code == 0
    for text in ("layers.0", "scatter", "Collectives at T = 65536", "Intervals of T", "optimal", "Passes", "proven"):
        assert text in result.stdout
    data = explained(trace)["volume"]
    change = f"({100 * (data['after'] - data['before']) / data['before']:+.1f} %)"
    assert f"{data['before']:,} elements before, {data['after']:,} after {change}" in result.stdout


def test_strategy_off_keeps_everything_and_says_so(trace):
    data = explained(trace, "--strategy", "off")
    assert {c["decision"] for c in data["collectives"]} == {"keep"}
    assert data["axes"][0]["refused"] == "strategy='off'"
    assert data["intervals"] == [] and data["graph"]["nodes_before"] == data["graph"]["nodes_after"]


def test_kwargs_of_the_function_reach_the_model():
    data = explained(f"{TOY}:with_kwargs", "--axis", "tp=2")
    assert [c["module"] for c in data["collectives"] if c["kind"] == "all_reduce"] == ["layers.0"]


def test_a_function_without_mesh_needs_no_axis_and_has_no_collective():
    data = explained("tests.toy_models:no_mesh")
    assert data["collectives"] == [] and data["axes"] == []


def test_two_axes_are_explained_one_after_the_other():
    data = explained(f"{TOY}:on_two_axes", "--axis", "tp=2", "--axis", "ep=4")
    assert [(a["name"], a["size"]) for a in data["axes"]] == [("tp", 2), ("ep", 4)]
    assert {c["axis"] for c in data["collectives"] if c["kind"] == "all_reduce"} == {"tp", "ep"}


def test_a_process_prints_only_json_on_stdout(trace):
    command = [sys.executable, "-c", "from cpcompile.cli import app; app()", "explain", str(trace), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 16384


# ---- errors of explain and trace -----------------------------------------------------------------------------------


def fails(text: str, *args: object) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("cpcompile: error: ")
    assert text in result.stderr


@pytest.mark.parametrize(
    ("text", "args"),
    [
        ("--axis 'tp16': expected name=size", ["--axis", "tp16"]),
        ("--axis '=16': expected name=size", ["--axis", "=16"]),
        ("found 'many'", ["--axis", "tp=many"]),
        ("at least 2 ranks, found '1'", ["--axis", "tp=1"]),
        ("at least 2 ranks, found '-4'", ["--axis", "tp=-4"]),
        ("axis 'tp' is given twice", ["--axis", "tp=2", "--axis", "tp=4"]),
        ("--rank 4 is out of range", ["--axis", "tp=4", "--rank", "4"]),
        ("--rank -1 is out of range", ["--axis", "tp=4", "--rank", "-1"]),
        ("toy takes a mesh: name its axes", []),
        ("toy raised", ["--axis", "tpp=4"]),
        ("unknown", ["--axis", "tp=2", "--profile", "ascend-a4"]),
    ],
)
def test_wrong_options(text, args):
    fails(text if text != "unknown" else "did you mean 'ascend-a3'?", "explain", f"{TOY}:toy", *args)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("is no directory, trace, file.py:function or package.module:function", "nothing"),
        ("there is no file missing.py", "missing.py:toy"),
        ("cannot import no_such_package: ModuleNotFoundError", "no_such_package:toy"),
        ("has no function 'tooy' (did you mean 'toy'?)", f"{TOY}:tooy"),
        ("has no function 'HIDDEN'", f"{TOY}:HIDDEN"),
        ("raises raised RuntimeError: no weights here", f"{TOY}:raises"),
        ("expected (model, args) or (model, args, kwargs), found Toy", f"{TOY}:only_a_model"),
        ("found (Toy, Tensor)", f"{TOY}:args_without_a_tuple"),
        ("the model cannot be traced", f"{TOY}:untraceable"),
    ],
)
def test_wrong_targets(text, target):
    fails(text, "explain", target, "--axis", "tp=2")


def test_a_syntax_error_in_the_file(tmp_path):
    (tmp_path / "broken.py").write_text("def f(:\n")
    fails("SyntaxError", "explain", f"{tmp_path / 'broken.py'}:f")


def test_wrong_configurations(tmp_path, config):
    fails("cannot read", "explain", tmp_path)
    path, good = tmp_path / "config.json", json.loads((config / "config.json").read_text())
    path.write_text("{")
    fails("is not JSON", "explain", tmp_path)
    path.write_text("[]")
    fails("has no 'model_type'", "explain", tmp_path)
    path.write_text(json.dumps({**good, "model_type": "deepseek_v33"}))
    fails("unknown model_type 'deepseek_v33' (did you mean 'deepseek_v", "explain", tmp_path)
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "hidden_size"}))
    fails("has no 'hidden_size'", "explain", tmp_path)
    path.write_text(json.dumps({**good, "num_hidden_layers": "two"}))
    fails("num_hidden_layers", "explain", tmp_path)
    fails("over the axis 'tp' only, and whole on the ranks of 'cp'; found 'tpp'", "explain", config, "--axis", "tpp=2")


def test_wrong_uses_of_a_trace(trace, tmp_path):
    fails("cannot read the trace nowhere.pt2: No such file or directory", "explain", "nowhere.pt2")
    fails("has its own axes and rank", "explain", trace, "--axis", "tp=2")
    fails("require='layers.9'", "explain", trace, "--require", "layers.9")
    fails("cannot write", "explain", trace, "--save-plan", tmp_path / "no" / "plan.json")
    fails("cannot write", "trace", trace, "-o", tmp_path / "no" / "x.pt2")
    result = run("trace", trace, "-o", tmp_path / "x.bin")
    assert result.exit_code == 2 and "ends in .pt2" in result.stderr


def test_require_that_is_met(trace):
    assert run("explain", trace, "--tokens", TOKENS, "--require", "layers.0").exit_code == 0


# ---- opt -----------------------------------------------------------------------------------------------------------


def test_opt_prints_the_rewritten_graph(trace):
    passes = f"canonicalise,shard-tokens{{axis=tp,tokens={TOKENS}}},verify-static"
    result = run("opt", "-p", passes, "--time-passes", trace)
    assert result.exit_code == 0
    assert "reduce_scatter_tensor" in result.stdout and "all_gather_into_tensor" in result.stdout
    assert result.stdout.count("class ") == 1
    timed = [line for line in result.stderr.splitlines() if " s  " in line]
    assert [line.split(" s  ")[1].split(":")[0] for line in timed] == ["canonicalise", "shard-tokens", "verify-static"]


def test_print_between_passes(trace):
    result = run("opt", "-p", f"canonicalise,shard-tokens{{tokens={TOKENS}}}", "--print-between-passes", trace)
    before, after = result.stdout.split("class ")[1:]
    assert result.stdout.startswith("# after canonicalise\n")
    assert "all_reduce" in before and "reduce_scatter_tensor" not in before
    assert "reduce_scatter_tensor" in after


def test_list_of_passes():
    lines = run("opt", "--list").stdout.splitlines()
    assert [line.split("{")[0].split()[0] for line in lines] == list(PASSES)
    assert "{axis=tp,tokens=16384,strategy=auto,profile=ascend-a3}" in lines[list(PASSES).index("shard-tokens")]


def test_wrong_uses_of_opt(trace):
    fails("name the passes and the trace", "opt", trace)
    fails("name the passes and the trace", "opt", "-p", "canonicalise")
    fails("unknown pass 'canonicalize' (did you mean 'canonicalise'?)", "opt", "-p", "canonicalize", trace)
    fails("has no field 'token' (did you mean 'tokens'?)", "opt", "-p", "shard-tokens{token=1}", trace)
    fails("the graph has no axis 'tpp' (did you mean 'tp'?)", "opt", "-p", "shard-tokens{axis=tpp}", trace)


# ---- plan, version -------------------------------------------------------------------------------------------------


def test_plan_diff(trace, tmp_path):
    plans = [tmp_path / name for name in ("a.json", "b.json", "c.json")]
    for path, strategy in zip(plans, ("auto", "auto", "tp"), strict=True):
        assert run("explain", trace, "--strategy", strategy, "--save-plan", path).exit_code == 0
    same, differ = run("plan", "diff", plans[0], plans[1]), run("plan", "diff", plans[0], plans[2])
    assert (same.exit_code, same.stdout) == (0, "")
    assert differ.exit_code == 1 and "axis tp: strategy: auto -> tp" in differ.stdout
    fails("cannot read the plan", "plan", "diff", plans[0], tmp_path / "no.json")


def test_version():
    from importlib.metadata import version

    assert run("--version").stdout == f"{version('cpcompile')}\n"


def test_modules_that_replicas_share(trace):
    """The toy model has an embedding and no attention."""
    data = explained(trace, "--modules", "embedding=4,o_proj=2")
    absent, shared = data["modules"]
    assert [(r["role"], r["ranks"], r["decision"]) for r in (absent, shared)] == [
        ("o_proj", 2, "keep"),
        ("embedding", 4, "share"),
    ]
    assert absent["reason"] == "no module of this graph was found to be one"
    assert shared["bytes_before"] == 4 * shared["bytes_after"] > 0
    result = run("explain", trace, "--modules", "oproj=4")
    assert result.exit_code == 2 and "did you mean 'o_proj'" in result.stderr
