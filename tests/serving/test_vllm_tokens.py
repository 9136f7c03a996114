"""Real vLLM on two gloo ranks with this backend says what one rank, two uncompiled ranks and transformers say."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from expected import ARRIVALS, BRANCH, LENGTHS, LONG, NEW_TOKENS, STEPS, checked, job, same, transformers_says
from model_folder import LAYERS, make_folder
from processes import COMPILED, IN_PIECES, LIMIT_S, Done, run, start_ranks

KINDS = ("v3", "v32")
BLOCK = 16  # tokens in a block of the cache
#: A step takes the prompt of 65 tokens whole with four that decode, which makes an odd number, but not all that follow.
CHUNKS = {"max_num_batched_tokens": 70, "enable_chunked_prefill": True, "enable_prefix_caching": True}
# What each of two data-parallel replicas is asked: the second has nothing to do before its prompt, nor behind it.
SHARES = ([0, 1, 2, 4], [3])
MODULES = {
    "oproj_tensor_parallel_size": 2,
    "embedding_tensor_parallel_size": 2,
    "mlp_tensor_parallel_size": 2,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: make_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    engines = {kind: {"model": str(folders[kind]), "enforce_eager": True} for kind in KINDS}
    return checked(run(tmp_path_factory.mktemp("alone"), job(engines)))


@pytest.fixture(scope="module")
def two_ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, Path]:
    work = tmp_path_factory.mktemp("two")
    told: list[dict[str, Any]] = [{}, {}]
    log = ""
    for kind in KINDS:
        tp = {"model": str(folders[kind]), "tensor_parallel_size": 2, **CHUNKS}
        options = {"strategy": "tp", "require": ["*"], "dump_dir": str(work / kind)}
        compiled = {**tp, "compilation_config": COMPILED, "additional_config": {"cpcompile": options}}
        for name, engine in ((f"{kind} plain", {**tp, "enforce_eager": True}), (kind, compiled)):
            work_of_one = {**job({name: engine}), "chunks": True}
            folder = work / f"{name}_run".replace(" ", "_")  # inductor's commands break at a space
            folder.mkdir()
            done = checked(run(folder, work_of_one, ranks=2))
            log += done.log
            for mine, theirs in zip(told, done.told, strict=True):
                mine.update(theirs)
    return Done(told, log, 0), work


@pytest.fixture(scope="module")
def second_start(two_ranks: tuple[Done, Path]) -> Done:
    """The compiled V3 once more, with the cache of its first start."""
    folder = two_ranks[1] / "v3_run"
    return checked(run(folder, json.loads((folder / "job.json").read_text()), ranks=2))


@pytest.fixture(scope="module")
def in_pieces(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The same, cut by vLLM at its attention ops, with our pass as inductor's last one on every piece."""
    told: list[dict[str, Any]] = [{}, {}]
    log = ""
    for kind in KINDS:
        options = {"strategy": "tp", "require": ["*"]}
        engine = {"model": str(folders[kind]), "tensor_parallel_size": 2, "compilation_config": IN_PIECES}
        work = {**job({kind: {**engine, "additional_config": {"cpcompile": options}}}), "pieces": True}
        done = checked(run(tmp_path_factory.mktemp("pieces"), work, ranks=2))
        log += done.log
        for mine, theirs in zip(told, done.told, strict=True):
            mine.update(theirs)
    return Done(told, log, 0)


@pytest.fixture(scope="module")
def shared(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Done], Path]:
    """V3's modules shared by two data-parallel replicas; V3.2's o_proj by two tensor-parallel ranks, layer by layer."""
    work = tmp_path_factory.mktemp("shared")
    over_tp = {"strategy": "tp", "flashcomm2_oproj_tensor_parallel_size": 1, "layer_sharding": ["o_proj"]}
    found = {}
    for kind, sizes, options, more in (
        ("v3", {"data_parallel_size": 2}, {"finegrained_tp_config": MODULES}, {"shares": SHARES}),
        ("v32", {"tensor_parallel_size": 2}, over_tp, {}),
    ):
        given = {"cpcompile": {**options, "release_weights": True, "dump_dir": str(work / kind)}}
        engine = {"model": str(folders[kind]), **sizes, "compilation_config": COMPILED, "additional_config": given}
        found[kind] = checked(run(tmp_path_factory.mktemp("run"), {**job({kind: engine}), **more}, ranks=2))
    return found, work


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_one_rank_and_of_two_uncompiled_ranks(
    kind: str, alone: Done, two_ranks: tuple[Done, Path]
) -> None:
    for rank in two_ranks[0].told:
        same(rank[kind]["answers"], alone.told[0][kind]["answers"])
        same(rank[kind]["answers"], rank[f"{kind} plain"]["answers"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind: str, folders: dict[str, Path], two_ranks: tuple[Done, Path]) -> None:
    same(
        two_ranks[0].told[0][kind]["answers"],
        transformers_says(folders[kind], [ids for ids, _ in ARRIVALS], NEW_TOKENS),
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_all_reduce_is_rewritten_and_every_rank_says_so(
    kind: str, rank: int, two_ranks: tuple[Done, Path]
) -> None:
    done, work = two_ranks
    count = 1 + 2 * LAYERS
    line = rf"rank {rank} of 2 of axis tp: {count} of {count} all-reduces rewritten"
    assert len(re.findall(line, done.log)) == len(KINDS)
    (report,) = (work / kind / f"rank_{rank}").glob("graph_*/report.json")
    (told,) = json.loads(report.read_text()).values()
    assert told["verify"]["holds"] and told["verify"]["proofs"]
    assert sum(c["decision"] == "scatter" for c in told["collectives"]) == count
    # The latent is gathered, not the hidden state: q_a's 128 and kv_a's 576 elements.
    gathers = [c for c in told["collectives"] if c["decision"] == "gather" and "self_attn" in c["module"]]
    assert gathers and not [c for c in gathers if c["module"].endswith("input_layernorm")]


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_come_in_chunks_and_from_the_cache_while_others_decode(
    kind: str, alone: Done, two_ranks: tuple[Done, Path]
) -> None:
    """What the others are compared with did neither."""
    assert not any(a["cached"] for a in alone.told[0][kind]["answers"])
    for rank in two_ranks[0].told:
        for name in (kind, f"{kind} plain"):
            answers, steps = rank[name]["answers"], rank[name]["steps"]
            # Whole blocks, and at least one token is computed.
            assert [a["cached"] for a in answers] == [0] * len(LENGTHS) + [65 // BLOCK * BLOCK, 40 // BLOCK * BLOCK, 0]
            first, *others = [step for step in steps if "7" in step][:3]
            assert sum(first["7"]) < LONG and first["6"] == [32, len(BRANCH) - 32] and first["4"][1] == 1
            assert sum(others[0]["7"]) < LONG == sum(others[1]["7"]) and others[0]["7"][1] > 1 < others[1]["7"][1]
            assert all(step["4"][1] == step["6"][1] == 1 for step in others)
            assert [0, 65] in [step["4"] for step in steps if "4" in step]
            assert all(rank[name]["steps"] == steps for rank in two_ranks[0].told)


def test_nothing_is_said_to_be_wrong(two_ranks: tuple[Done, Path]) -> None:
    log = two_ranks[0].log
    assert "runs as it came" not in log and "left alone" not in log and "NEVER called" not in log


def test_a_plan_of_another_model_is_one_line_of_each_rank_at_start_up(
    folders: dict[str, Path], two_ranks: tuple[Done, Path], tmp_path: Path
) -> None:
    (plan,) = (two_ranks[1] / "v32" / "rank_0").glob("graph_*/plan.json")
    engine = {"model": str(folders["v3"]), "tensor_parallel_size": 2, "compilation_config": COMPILED}
    given = {**engine, "additional_config": {"cpcompile": {"plan": str(plan)}}}
    with start_ranks(tmp_path, job({"v3": given})) as ranks:
        assert [rank.wait(LIMIT_S) for rank in ranks] == [1, 1]
    for rank in ("0", "1"):
        said = (tmp_path / f"log.{rank}").read_text(errors="replace")
        line = r"cpcompile\.errors\.PlanError: the plan is of another graph \(\w+, this one is \w+\): make a new plan"
        assert len(re.findall(rf"^{line}$|^\[rank{rank}\]: {line}$", said, re.MULTILINE)) == 1, said[-4000:]
        assert "in warming_up_model" in said and "in _generate" not in said and not (tmp_path / f"out.{rank}").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_start_takes_the_code_of_the_first(
    rank: int, two_ranks: tuple[Done, Path], second_start: Done
) -> None:
    assert f"rank {rank}, axis tp: compiles anew: no saved code" in two_ranks[0].log
    (line,) = re.findall(rf"rank {rank}, axis tp: (.*)", second_start.log)
    assert line.startswith("took the code of an earlier start from ")
    count = 1 + 2 * LAYERS
    assert f"rank {rank} of 2 of axis tp: {count} of {count} all-reduces rewritten" in second_start.log
    assert "NEVER called" not in second_start.log
    same(second_start.told[rank]["v3"]["answers"], two_ranks[0].told[rank]["v3"]["answers"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_pieces_are_those_of_one_rank(kind: str, alone: Done, in_pieces: Done) -> None:
    for rank in in_pieces.told:
        same(rank[kind]["answers"], alone.told[0][kind]["answers"])


@pytest.mark.parametrize("rank", [0, 1])
def test_every_all_reduce_of_every_piece_is_rewritten(rank: int, in_pieces: Done) -> None:
    found = re.findall(rf"rank {rank} of 2 of axis tp: (\d) of (\d) all-reduces rewritten", in_pieces.log)
    # The embedding's and the first layer's attention; then those of each layer behind attention.
    assert found == [("1", "1")] + [("2", "2")] * LAYERS + [("1", "1")] + [("2", "2")] * LAYERS
    assert "left alone" not in in_pieces.log and "NEVER called" not in in_pieces.log


def test_tokens_of_replicas_that_share_modules_are_those_of_one_rank(
    alone: Done, shared: tuple[dict[str, Done], Path]
) -> None:
    wanted = alone.told[0]["v3"]["answers"]
    told = [rank["v3"] for rank in shared[0]["v3"].told]
    for mine, numbers in zip(told, SHARES, strict=True):
        same(mine["answers"], [wanted[number] for number in numbers])
    # The second replica: until its prompt comes, and from its last token to that of the prompt that came after it.
    assert [mine["idle"] for mine in told] == [0, STEPS[3] + (STEPS[4] - STEPS[3])]


def test_tokens_of_flashcomm2_and_layers_by_rank_are_those_of_one_rank(
    alone: Done, shared: tuple[dict[str, Done], Path]
) -> None:
    for rank in shared[0]["v32"].told:
        same(rank["v32"]["answers"], alone.told[0]["v32"]["answers"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("kind", "modules", "methods"),
    [
        ("v3", {"embedding": 1, "o_proj": LAYERS, "mlp": 1}, ["modules"]),
        ("v32", {"o_proj": 2 * LAYERS}, ["static", "flashcomm2", "layers"]),
    ],
)
def test_every_rank_reports_what_it_shares_and_proves_it(
    kind: str, modules: dict[str, int], methods: list[str], rank: int, shared: tuple[dict[str, Done], Path]
) -> None:
    done, work = shared[0][kind], shared[1] / kind / f"rank_{rank}"
    (report,) = work.glob("graph_*/report.json")
    (told,) = json.loads(report.read_text()).values()
    assert [p["method"] for p in told["verify"]["proofs"]] == methods and told["verify"]["holds"]
    assert Counter(m["role"] for m in told["modules"] if m["decision"] == "share") == modules
    assert len(told["modules"]) == sum(modules.values())
    assert len(re.findall(r"[1-9]\d* bytes of whole weights released", done.log)) == 2
    assert "stays whole" not in done.log and "no weight is shared" not in done.log
