import json
import re

import pytest
from typer.testing import CliRunner, Result

from cpcompile.cli import app
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.mesh.picture import compact, picture

SIZES = ("--pp", 2, "--dp", 4, "--tp", 2, "--o-proj", 4)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["groups", *(str(a) for a in args)], catch_exceptions=False)


def test_table_and_picture():
    result = run("--order", "vllm", *SIZES, "--mc2")
    assert result.exit_code == 0
    lines = {line.split()[1]: line for line in result.stdout.splitlines() if line.startswith("│")}
    assert "{0,4,8,12} {1,5,9,13} {2,6,10,14} {3,7,11,15}" in lines["o_proj"]
    assert "shared with dp" in lines["o_proj"] and "its own" in lines["mc2"]
    assert "16 ranks = dp 4 × pp 2 × attn_tp 2" in result.stdout
    grid = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if re.match(r"\w+ +\d", line)}
    assert grid["rank"] == [str(rank) for rank in range(16)]
    assert grid["pp"] == ["0", "1", "0", "1", "2", "3", "2", "3", "4", "5", "4", "5", "6", "7", "6", "7"]
    assert grid["mc2"] == ["0", "0", "1", "1"] * 4
    assert "cp" not in grid  # each rank alone


def test_json_is_the_data():
    result = run("--order", "vllm", *SIZES, "--json")
    expected = rank_groups(Sizes(pp=2, dp=4, tp=2, o_proj=4))
    data = json.loads(result.stdout)
    assert data == json.loads(json.dumps(expected.to_dict()))
    assert data["kinds"]["o_proj"] == {
        "purpose": "model",
        "size": 4,
        "groups": [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
    }
    assert {"purpose": "model", "ranks": [0, 4, 8, 12], "kinds": ["dp", "o_proj"]} in data["communicators"]
    assert data["sizes"]["world"] == 16 and "lm_head" not in data["sizes"]


def test_every_option_reaches_the_sizes():
    given = {"attn-tp": 4, "flashcomm2-otp": 1, "lm-head": 2, "mlp": 4, "embedding": 2, "moe-ep": 8, "moe-tp": 2}
    given |= {"prefill-tp-ratio": 4, "head-replicas": 2, "world": 32, "external-dp": 2, "pp": 1, "cp": 1, "dp": 4}
    given |= {"attn-dp": 1, "attn-cp": 1, "tp": 4, "moe-dp": 1, "o-proj": 1, "module-along": "dp"}
    flags = ["--shared-weight", "--mc2"]
    result = run(*(part for name, value in given.items() for part in (f"--{name}", value)), *flags, "--json")
    assert result.exit_code == 0, result.stderr
    sizes = json.loads(result.stdout)["sizes"]
    assert sizes == {name.replace("-", "_"): value for name, value in given.items()} | {
        "shared_weight": True,
        "mc2": True,
    }


def test_an_order_of_ones_own():
    result = run("--order", "tp,dp", "--dp", 2, "--tp", 2, "--json")
    assert json.loads(result.stdout)["kinds"]["tp"]["groups"] == [[0, 2], [1, 3]]


def test_one_rank():
    result = run("--order", "sglang", "--tp", 8, "--dp", 2, "--cp", 2, "--rank", 5, "--json")
    data = json.loads(result.stdout)
    assert (data["order"], data["rank"]) == ("sglang", 5)
    assert data["groups"]["attn_cp"] == [5, 7] and data["groups"]["attn_tp"] == [4, 5]
    result = run("--order", "sglang", "--tp", 8, "--dp", 2, "--cp", 2, "--rank", 5)
    assert "rank 5" in result.stdout and "{4,5} (group 2, place 1)" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--dp", 6, "--lm-head", 4), "found 6 % 4 = 2; nearest that work: lm_head 3 or 6, dp 4 or 8"),
        (("--tp", 8, "--rank", 8), "expected a rank from 0 to 7, found 8"),
        (("--order", "megatron"), "found 'megatron' (known: cann-recipes, sglang, vllm)"),
        (("--tp", 2, "--svg", "no/such/folder/x.svg"), "cannot write no/such/folder/x.svg: No such file"),
    ],
)
def test_errors_are_one_line(args, message):
    result = run(*args)
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1 and not result.stdout


def test_svg_holds_the_colours(tmp_path):
    path = tmp_path / "groups.svg"
    assert run(*SIZES, "--svg", path).exit_code == 0
    svg = path.read_text()
    assert svg.startswith("<svg") and "o_proj" in svg
    assert {"#8ecae6", "#ffb703", "#90be6d", "#f28482"} <= set(re.findall(r"#[0-9a-f]{6}", svg))


def test_the_same_colour_is_the_same_group_and_one_rank_colours_its_own():
    groups = rank_groups(Sizes(dp=4, tp=2, o_proj=2))
    text = picture(groups)
    rows = text.split("\n")
    row = next(r for r in rows if r.plain.startswith("o_proj"))
    colours = [span.style for span in row.spans]
    assert len(colours) == 8
    assert [colours[0] == c for c in colours] == [True, False, True, False, False, False, False, False]
    row = next(r for r in picture(groups, rank=1).split("\n") if r.plain.startswith("o_proj"))
    assert [span.style != "dim" for span in row.spans] == [False, True, False, True, False, False, False, False]


def test_a_wide_world_is_broken_into_rows():
    text = picture(rank_groups(Sizes(dp=64, tp=2)))
    assert max(len(line) for line in text.plain.splitlines()) <= 140
    assert [line.split()[1] for line in text.plain.splitlines() if line.startswith("rank")] == ["0", "32", "64", "96"]


@pytest.mark.parametrize(
    ("ranks", "short"),
    [
        ((3,), "{3}"),
        ((0, 1), "{0,1}"),
        ((0, 1, 2, 3), "{0-3}"),
        ((0, 4, 8, 12), "{0,4,8,12}"),
        ((0, 4, 8, 12, 16), "{0,4,…,16}"),
        ((0, 1, 2, 8, 9, 12), "{0-2,8,9,12}"),
    ],
)
def test_ranks_are_written_short(ranks, short):
    assert compact(ranks) == short
