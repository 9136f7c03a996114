"""``cpcompile plan --modules``: table, JSON, the token counts at which a verdict changes, one-line errors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DeepseekV3Config
from typer.testing import CliRunner, Result

from bench.calibration import V3, module
from cpcompile.cli import app
from cpcompile.comparison import LARGEST_STEP
from cpcompile.costs import profile
from cpcompile.module_costs import MODULES, module_cost
from cpcompile.module_report import intervals, plan_modules
from cpcompile.strategies import KERNELS, Step

R1, STEP = replace(V3, weight_bytes=1), Step(24, profile("ascend-a3"), KERNELS["fused"])
ALL = "o_proj=8,lm_head=8,embedding=8,mlp=8,flashcomm2=2,layer_sharding=16"


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, args)], catch_exceptions=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r1")
    DeepseekV3Config().save_pretrained(folder)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, "quantization_config": {"quant_method": "ascend"}}))
    return folder


def test_the_command(config) -> None:
    arguments = ("--config", config, "--modules", ALL, "--tokens", 24, "--profile", "ascend-a3")
    text = run(*arguments)
    assert text.exit_code == 0, text.stderr
    data = json.loads(run(*arguments, "--json").stdout)
    (step,) = data["steps"]
    rows = {row["module"]: row for row in step["modules"]}
    assert set(rows) == set(MODULES) and step["tokens"] == 24
    for name in ("o_proj", "lm_head", "embedding", "mlp"):
        cost = module_cost(name, R1, 8, STEP)
        assert rows[name]["weight_bytes"] == {
            "before": cost.before.weights,
            "after": cost.after.weights,
            "saved": cost.saved,
        }
        assert (
            rows[name]["seconds"]["change"] == cost.change() == module(name).change()
        )  # A2's profile has A3's numbers
        assert rows[name]["pays"] == (name != "o_proj")
        verdict = "pays" if cost.pays else "does not pay"
        assert f"{name} over 8 {verdict}: {cost.reason}." in text.stdout
        assert f"{cost.change() * 1e3:+.2f}" in text.stdout
    assert [(c["kind"], c["count"]) for c in rows["o_proj"]["collectives"]] == [
        ("all_to_all", 61),
        ("reduce_scatter", 61),
    ]
    assert rows["flashcomm2"]["tp"] == 8 and rows["o_proj"]["tp"] == 1
    assert "61 x (all_to_all + reduce_scatter)" in text.stdout and "3 x (all_gather + reduce_scatter)" in text.stdout


def test_several_token_counts_ranks_and_tp(config) -> None:
    arguments = ("--config", config, "--modules", "o_proj=4,flashcomm2=1", "--ranks", 16, "--json")
    data = json.loads(run(*arguments, "--tokens", "24,1024", "--tp", 4).stdout)
    assert [step["tokens"] for step in data["steps"]] == [24, 1024]
    assert [row["tp"] for row in data["steps"][0]["modules"]] == [4, 4]
    data = json.loads(run(*arguments, "--tokens", 24).stdout)
    assert [row["tp"] for row in data["steps"][0]["modules"]] == [1, 16]


def test_verdicts_change_where_the_report_says() -> None:
    sizes = {"o_proj": 8, "lm_head": 8, "mlp": 8, "embedding": 8, "flashcomm2": 2, "layer_sharding": 16}
    for row in plan_modules(R1, sizes, [24], STEP, ranks=16).rows[24]:

        def cost(tokens: int, name: str = row.cost.module, tp: int = row.cost.tp):
            return module_cost(name, R1, sizes[name], replace(STEP, tokens=tokens), tp)

        for runs, holds in ((row.pays_at, lambda t: cost(t).pays), (row.faster_at, lambda t: cost(t).change() < 0)):
            for first, last in runs:
                assert holds(first) and holds(last)
                assert first == 1 or not holds(first - 1)
                assert last == LARGEST_STEP or not holds(last + 1)
    assert row.cost.module == "layer_sharding" and row.pays_at[0][1] == LARGEST_STEP


@settings(max_examples=50, deadline=None, derandomize=True)
@given(low=st.integers(1, 2000), length=st.integers(0, 4000))
def test_intervals_find_a_run_that_spans_a_power_of_two(low: int, length: int) -> None:
    high = low + length
    spans = any(low <= 1 << power <= high for power in range(21))
    expected = ((low, high),) if spans else ()
    assert intervals(lambda t: low <= t <= high) == expected


def test_intervals_at_the_ends() -> None:
    assert intervals(lambda t: True) == ((1, LARGEST_STEP),) and intervals(lambda t: False) == ()
    assert intervals(lambda t: t > 600 or t < 5) == ((1, 4), (601, LARGEST_STEP))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ("oproj=8", "--modules: unknown module 'oproj' (did you mean 'o_proj'?)"),
        ("o_proj", "--modules: o_proj: expected a size of at least 1, such as o_proj=8; found ''"),
        ("o_proj=0", "--modules: o_proj: expected a size of at least 1, such as o_proj=8; found '0'"),
        ("mlp=2,mlp=4", "--modules: mlp is listed twice; list it once"),
        ("lm_head=12", "module groups: lm_head 12: expected ranks / tp % lm_head = 0 with ranks 32, tp 1; nearest"),
    ],
)  # fmt: skip
def test_errors_are_one_line(config, modules: str, message: str) -> None:
    result = run("--config", config, "--modules", modules, "--ranks", 32)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"cpcompile: error: {message}") and result.stderr.count("\n") == 1


def test_modules_and_strategies_are_two_questions(config) -> None:
    result = run("--config", config, "--modules", "mlp=8", "--compare")
    assert result.exit_code == 2 and "--compare or --modules" in result.stderr and result.stderr.count("\n") == 1
