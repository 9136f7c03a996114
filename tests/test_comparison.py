"""The table of strategies: JSON, text, memory, break-even points and the command line."""

from __future__ import annotations

import json
import math

import pytest
from transformers import DeepseekV3Config, DeepseekV32Config
from typer.testing import CliRunner, Result

from bench.calibration import V3, V32
from cpcompile.cli import app
from cpcompile.comparison import LARGEST_STEP, Cost, best_strategies, compare, memory, step_cost
from cpcompile.costs import profile
from cpcompile.layer_costs import TERMS
from cpcompile.strategies import KERNELS, Step, Strategy, candidates, impossible

A3 = profile("ascend-a3")
STEP = Step(65536, A3, KERNELS["fused"])


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, args)], catch_exceptions=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v32")
    DeepseekV32Config().save_pretrained(folder)
    return folder


def test_terms_sum_to_the_step() -> None:
    cost = step_cost(V32, Strategy("cp", 32, 1), STEP)
    assert set(cost.terms) == set(TERMS) and min(cost.terms.values()) > 0
    assert cost.seconds == pytest.approx(sum(cost.terms.values()))
    assert cost.terms["collectives"] == pytest.approx(sum(c.seconds(A3) for c in cost.collectives))


def test_collectives_of_a_step_are_counted() -> None:
    counted = {name: sum(c.count for c in step_cost(V32, s, STEP).collectives) for name, s in by_name(V32, 32).items()}
    assert counted["off"] == 2 * 61
    assert counted["tp"] == 4 * 61
    assert counted["tp, indexer sharded"] == 5 * 61
    assert counted["cp zigzag"] == 3 * 61


def by_name(model, ranks: int) -> dict[str, Strategy]:
    return {s.name: s for s in candidates(model, ranks)}


def test_weights_on_one_rank_are_the_model() -> None:
    """671 billion parameters (the published count), and attention's 11.4 billion whole under context parallelism."""
    whole = memory(V3, Strategy("off", 1, 1), STEP).weights / 2
    assert whole == pytest.approx(671e9, rel=0.001)
    tp, cp = (memory(V3, s, STEP).weights / 2 for s in (Strategy("tp", 1, 32), Strategy("cp", 32, 1)))
    headed = 61 * 128 * (1536 * 192 + 512 * 256 + 128 * 7168)
    assert cp - tp == pytest.approx(headed * 31 / 32)


def test_weights_equal_the_library_s_model() -> None:
    import torch
    from transformers import AutoModelForCausalLM

    for config, model in ((DeepseekV3Config(), V3), (DeepseekV32Config(), V32)):
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        count = sum(p.numel() for p in built.parameters())
        assert memory(model, Strategy("off", 1, 1), STEP).weights / 2 == pytest.approx(count, rel=1e-4)


def test_cache_is_latents_and_indexer_keys() -> None:
    assert memory(V32, Strategy("cp", 32, 1), Step(1000, A3, KERNELS["fused"], 24)).cache == 1024 * 704 * 2 * 61


def test_context_parallelism_holds_fewer_activations() -> None:
    found = {n: memory(V3, s, STEP).activations for n, s in by_name(V3, 8).items()}
    assert found["tp"] < found["off"]


@pytest.mark.parametrize("name", ["v3", "v32"])
def test_the_best_strategy_changes_where_it_says(name: str) -> None:
    model = {"v3": V3, "v32": V32}[name]
    found = best_strategies(model, 8, STEP)
    assert found[0] == (1, "off") and len(found) > 1
    for first, strategy in found[1:]:
        before, after = (fastest(model, t) for t in (first - 1, first))
        assert after == strategy != before
    assert fastest(model, LARGEST_STEP) == found[-1][1]


def fastest(model, tokens: int) -> str:
    step = Step(tokens, A3, KERNELS["fused"])
    possible = [s for s in candidates(model, 8) if not impossible(model, s, tokens)]
    return min(possible, key=lambda s: step_cost(model, s, step).seconds).name


def test_no_strategy_is_found_best_where_none_is_possible() -> None:
    found = compare(V3, 24, [4096], STEP)
    assert found.best == [] and not any(isinstance(row, Cost) for row in found.rows[4096])


def test_the_issue_s_command(config) -> None:
    arguments = ("--config", config, "--ranks", 32, "--tokens", 65536, "--profile", "ascend-a3", "--compare")
    text = run(*arguments)
    assert text.exit_code == 0, text.stderr
    for word in ("off", "tp, indexer sharded", "cp zigzag", "hybrid cp8 x tp4", "weights", "Fastest", *TERMS):
        assert word in text.stdout
    data = json.loads(run(*arguments, "--json").stdout)
    (step,) = data["steps"]
    rows = {r["strategy"]: r for r in step["strategies"]}
    assert step["tokens"] == 65536 and data["ranks"] == 32 and data["kernels"] == "fused"
    assert 3 < rows["off"]["seconds"] / rows["cp zigzag"]["seconds"] < 12
    assert all(math.isclose(r["seconds"], sum(r["terms"].values())) for r in rows.values())
    assert f"{rows['off']['seconds'] * 1e3:,.2f}" in text.stdout
    assert data["best"][0] == {"from_tokens": 1, "strategy": "off"}


def test_several_token_counts_a_prefix_and_kernels(config) -> None:
    arguments = ("--config", config, "--ranks", 8, "--tokens", "16, 8192", "--profile", "h200-nvlink", "--compare")
    first = json.loads(run(*arguments, "--json").stdout)
    assert [s["tokens"] for s in first["steps"]] == [16, 8192] and first["kernels"] == "eager"
    other = json.loads(run(*arguments, "--json", "--prefix", 65536, "--kernels", "fused").stdout)
    assert other["prefix"] == 65536 and other["kernels"] == "fused"
    assert other["steps"][1]["strategies"][0]["terms"]["indexer"] > 5 * 2 * 64 * 128 * 8192**2 / 2 * 61 / 593e12


def test_impossible_strategies_stay_in_the_table_with_their_reason(config) -> None:
    result = run("--config", config, "--ranks", 256, "--tokens", 4096, "--compare")
    assert result.exit_code == 0
    assert "128 heads do not divide by 256 ranks" in result.stdout
    rows = json.loads(run("--config", config, "--ranks", 256, "--compare", "--json").stdout)["steps"][0]["strategies"]
    assert {"strategy": "off", "impossible": "128 heads do not divide by 256 ranks"} in rows
    assert any("seconds" in row for row in rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--config": "/nonexistent"}, "cannot read /nonexistent/config.json: No such file or directory"),
        ({"--tokens": "8192,x"}, "--tokens '8192,x': expected positive integers, such as 8192,65536; found 'x'"),
        ({"--tokens": "0"}, "--tokens '0': expected positive integers, such as 8192,65536; found '0'"),
        ({"--profile": "ascend"}, "unknown hardware profile 'ascend'"),
        ({"--kernels": "fussed"}, "unknown kernels 'fussed' (did you mean 'fused'?)"),
    ],
)
def test_errors_are_one_line(config, changes: dict[str, str], message: str) -> None:
    options = {"--config": str(config), "--ranks": "8", **changes}
    result = run(*[word for pair in options.items() for word in pair], "--compare")
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith(f"cpcompile: error: {message}") and result.stderr.count("\n") == 1


def test_without_compare_it_says_what_to_give(config) -> None:
    for arguments in (("--config", config), ("--compare",)):
        result = run(*arguments)
        assert result.exit_code == 2 and "--compare" in result.stderr and result.stderr.count("\n") == 1


def test_diff_still_works(tmp_path) -> None:
    result = run("diff", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2 and "cannot read the plan" in result.stderr
