"""Real vLLM on two gloo ranks with this backend says what one uncompiled rank and transformers say."""

from __future__ import annotations

import functools
import json
import re
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from expected import ARRIVALS, BRANCH, LENGTHS, LONG, STEPS, checked, job, rewritten, right, same, tokens_of
from model_folder import ALL_REDUCES, FIELDS, INDEXER, LAYERS, make_folder
from processes import COMPILED, IN_PIECES, LIMIT_S, Done, run, start_ranks

KINDS = ("v3", "v32")
PROMPTS = [ids for ids, _ in ARRIVALS]
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
ENDED_S = 60.0  # gloo tells a closed connection at once; the rest is Python's way out of vLLM
HIDDEN = 1024  # more than what attention reads of it, down-projected:
Q_LORA, KV, INDEX = FIELDS["q_lora_rank"], 512 + 64, 128 + INDEXER["index_n_heads"]
LATENTS = {"v3": Q_LORA + KV, "v32": Q_LORA + KV + INDEX}


@dataclass(frozen=True)
class Compiled:
    """What each of two ranks told, logged and ended with, and where they ran and dumped."""

    told: list[dict[str, Any]]
    logs: list[str]
    codes: list[int]
    work: Path

    def report(self, rank: int) -> dict[str, Any]:
        """Of the one graph: by the least token count of each interval."""
        (path,) = (self.work / "dump" / f"rank_{rank}").glob("graph_*/report.json")
        told: dict[str, Any] = json.loads(path.read_text())
        return told


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: make_folder(root / kind, kind, hidden_size=HIDDEN) for kind in KINDS}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("small")
    return {kind: make_folder(root / kind, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def alone(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Done:
    engines = {kind: {"model": str(folders[kind]), "enforce_eager": True} for kind in KINDS}
    return checked(run(tmp_path_factory.mktemp("alone"), job(engines)))


@pytest.fixture(scope="module")
def two_ranks(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """Starts a kind, once, without any option. Behind its answers V3 loses a rank."""

    @functools.cache
    def start(kind: str) -> Compiled:
        work = tmp_path_factory.mktemp(kind)
        options = {"cpcompile": {"dump_dir": str(work / "dump")}}
        engine = {"model": str(folders[kind]), "tensor_parallel_size": 2, **CHUNKS}
        engine |= {"compilation_config": COMPILED, "additional_config": options}
        given = {**job({kind: engine}), "chunks": True}
        if kind != "v3":
            done = checked(run(work, given, ranks=2))
            return Compiled([rank[kind] for rank in done.told], [done.log] * 2, [0, 0], work)
        with start_ranks(work, {**given, "die": True}) as ranks:  # torchrun would end the other one
            codes = [ranks[1].wait(LIMIT_S), ranks[0].wait(ENDED_S)][::-1]
        logs = [(work / f"log.{rank}").read_text(errors="replace") for rank in range(2)]
        outs = [work / f"out.{rank}" for rank in range(2)]
        assert all(out.exists() for out in outs), "\n".join(log[-4000:] for log in logs)
        return Compiled([json.loads(out.read_text())[kind] for out in outs], logs, codes, work)

    return start


@pytest.fixture(scope="module")
def second_start(two_ranks: Callable[[str], Compiled]) -> Done:
    """The compiled V3 once more, with the cache of its first start."""
    folder = two_ranks("v3").work
    return checked(run(folder, {**json.loads((folder / "job.json").read_text()), "die": False}, ranks=2))


@pytest.fixture(scope="module")
def in_pieces(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """V3.2, cut by vLLM at its attention ops, with our pass as inductor's last one on every piece."""
    work = tmp_path_factory.mktemp("pieces")
    # Without an option these pieces would be rewritten from 992 tokens on, which are more than the tests have.
    given = {"cpcompile": {"strategy": "tp", "require": ["*"]}}
    engine = {"model": str(small["v32"]), "tensor_parallel_size": 2, "compilation_config": IN_PIECES}
    how = {"pieces": True, "plain_router": False}  # which would name another compiler for the pieces, too
    done = checked(run(work, {**job({"v32": {**engine, "additional_config": given}}), **how}, ranks=2))
    return Compiled([rank["v32"] for rank in done.told], [done.log] * 2, [0, 0], work)


@pytest.fixture(scope="module")
def shared(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Done], Path]:
    """V3's modules shared by two data-parallel replicas; V3.2's o_proj by two tensor-parallel ranks, layer by layer."""
    work = tmp_path_factory.mktemp("shared")
    over_tp = {"flashcomm2_oproj_tensor_parallel_size": 1, "layer_sharding": ["o_proj"]}
    found = {}
    for kind, sizes, options, more in (
        ("v3", {"data_parallel_size": 2}, {"finegrained_tp_config": MODULES}, {"shares": SHARES}),
        ("v32", {"tensor_parallel_size": 2}, over_tp, {}),
    ):
        given = {"cpcompile": {**options, "release_weights": True, "dump_dir": str(work / kind)}}
        engine = {"model": str(small[kind]), **sizes, "compilation_config": COMPILED, "additional_config": given}
        found[kind] = checked(run(tmp_path_factory.mktemp("run"), {**job({kind: engine}), **more}, ranks=2))
    return found, work


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_one_rank_uncompiled(kind: str, alone: Done, two_ranks: Callable[[str], Compiled]) -> None:
    for rank in two_ranks(kind).told:
        same(rank["answers"], alone.told[0][kind]["answers"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(
    kind: str, folders: dict[str, Path], two_ranks: Callable[[str], Compiled]
) -> None:
    right(folders[kind], PROMPTS, two_ranks(kind).told[0]["answers"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_all_reduce_of_large_steps_is_rewritten(
    kind: str, rank: int, two_ranks: Callable[[str], Compiled]
) -> None:
    """And none of small ones: with default options the tokens come of both graphs."""
    done = two_ranks(kind)
    small, *some, large = rewritten(done.logs[rank], rank)
    assert small == (0, 0, ALL_REDUCES) and large[1:] == (ALL_REDUCES, ALL_REDUCES)
    steps = tokens_of(done.told[rank]["steps"])
    assert min(steps) < min(first for first, *_ in (*some, large)) and large[0] <= max(steps)
    kept, told = (done.report(rank)[str(first)] for first, *_ in (small, large))
    assert told["verify"]["holds"] and told["verify"]["proofs"]
    decisions = [[c["decision"] for c in each["collectives"] if c["kind"] == "all_reduce"] for each in (kept, told)]
    assert decisions == [["keep"] * ALL_REDUCES, ["scatter"] * ALL_REDUCES]


@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_gathered_before_attention_and_hidden_states_elsewhere(
    kind: str, two_ranks: Callable[[str], Compiled]
) -> None:
    """Elements of a token that each layer gathers ahead of attention and behind it, and the graph for its result."""
    done = two_ranks(kind)
    told = done.report(0)[str(rewritten(done.logs[0], 0)[-1][0])]
    gathered: Counter[str] = Counter()
    for c in told["collectives"]:
        if c["decision"] == "gather":
            layer, _, inside = c["module"].removeprefix("layers.").partition(".")
            ahead = inside == "input_layernorm" or inside.startswith("self_attn")
            gathered[f"{layer} {'ahead' if ahead else inside}"] += 2 * c["elements_after"] // told["tokens"]
    expected = {"norm ": HIDDEN}
    for layer in range(LAYERS):
        expected |= {f"{layer} ahead": LATENTS[kind], f"{layer} post_attention_layernorm": HIDDEN}
    assert gathered == expected


def test_a_killed_rank_ends_the_other_with_an_error(two_ranks: Callable[[str], Compiled]) -> None:
    done = two_ranks("v3")
    assert done.codes == [1, -signal.SIGKILL]
    assert re.search(r"RuntimeError: .*gloo.*Connection (closed|reset) by peer", done.logs[0][-6000:])


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_come_in_chunks_and_from_the_cache_while_others_decode(
    kind: str, alone: Done, two_ranks: Callable[[str], Compiled]
) -> None:
    """What the others are compared with did neither."""
    assert not any(a["cached"] for a in alone.told[0][kind]["answers"])
    for rank in two_ranks(kind).told:
        answers, steps = rank["answers"], rank["steps"]
        # Whole blocks, and at least one token is computed.
        assert [a["cached"] for a in answers] == [0] * len(LENGTHS) + [65 // BLOCK * BLOCK, 40 // BLOCK * BLOCK, 0]
        first, *others = [step for step in steps if "7" in step][:3]
        assert sum(first["7"]) < LONG and first["6"] == [32, len(BRANCH) - 32] and first["4"][1] == 1
        assert sum(others[0]["7"]) < LONG == sum(others[1]["7"]) and others[0]["7"][1] > 1 < others[1]["7"][1]
        assert all(step["4"][1] == step["6"][1] == 1 for step in others)
        assert [0, 65] in [step["4"] for step in steps if "4" in step]
        assert steps == two_ranks(kind).told[0]["steps"]


def test_nothing_is_said_to_be_wrong(two_ranks: Callable[[str], Compiled]) -> None:
    for kind in KINDS:
        for log in two_ranks(kind).logs:
            assert "cpcompile: options" in log  # what is logged is in here
            assert "runs as it came" not in log and "left alone" not in log and "NEVER called" not in log


def test_a_plan_of_another_model_is_one_line_of_each_rank_at_start_up(
    folders: dict[str, Path], two_ranks: Callable[[str], Compiled], tmp_path: Path
) -> None:
    (plan,) = (two_ranks("v32").work / "dump" / "rank_0").glob("graph_*/plan.json")
    given = {"cpcompile": {"plan": str(plan)}}
    engine = {"model": str(folders["v3"]), "tensor_parallel_size": 2, "compilation_config": COMPILED}
    with start_ranks(tmp_path, job({"v3": {**engine, "additional_config": given}})) as ranks:
        assert [rank.wait(LIMIT_S) for rank in ranks] == [1, 1]
    for rank in ("0", "1"):
        said = (tmp_path / f"log.{rank}").read_text(errors="replace")
        line = r"cpcompile\.errors\.PlanError: the plan is of another graph \(\w+, this one is \w+\): make a new plan"
        assert len(re.findall(rf"^{line}$|^\[rank{rank}\]: {line}$", said, re.MULTILINE)) == 1, said[-4000:]
        assert "in warming_up_model" in said and "in _generate" not in said and not (tmp_path / f"out.{rank}").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_start_takes_the_code_of_the_first(
    rank: int, two_ranks: Callable[[str], Compiled], second_start: Done
) -> None:
    first = two_ranks("v3")
    assert f"rank {rank}, axis tp: compiles anew: no saved code" in first.logs[rank]
    (line,) = re.findall(rf"rank {rank}, axis tp: (.*)", second_start.log)
    assert line.startswith("took the code of an earlier start from ")
    assert rewritten(second_start.log, rank) == rewritten(first.logs[rank], rank)
    assert "NEVER called" not in second_start.log
    same(second_start.told[rank]["v3"]["answers"], first.told[rank]["answers"])


def test_tokens_of_pieces_are_those_of_transformers(small: dict[str, Path], in_pieces: Compiled) -> None:
    first, second = (rank["answers"] for rank in in_pieces.told)
    right(small["v32"], PROMPTS, first)
    same(second, first)


@pytest.mark.parametrize("rank", [0, 1])
def test_every_all_reduce_of_every_piece_is_rewritten(rank: int, in_pieces: Compiled) -> None:
    # The embedding's and the first layer's attention; then those of each layer behind attention.
    assert rewritten(in_pieces.logs[rank], rank) == [(0, 1, 1)] + [(0, 2, 2)] * LAYERS
    assert "left alone" not in in_pieces.logs[rank] and "NEVER called" not in in_pieces.logs[rank]


def test_tokens_of_replicas_that_share_modules_are_those_of_transformers(
    small: dict[str, Path], shared: tuple[dict[str, Done], Path]
) -> None:
    told = [rank["v3"] for rank in shared[0]["v3"].told]
    for mine, numbers in zip(told, SHARES, strict=True):
        right(small["v3"], [PROMPTS[number] for number in numbers], mine["answers"])
    # The second replica: until its prompt comes, and from its last token to that of the prompt that came after it.
    assert [mine["idle"] for mine in told] == [0, STEPS[3] + (STEPS[4] - STEPS[3])]


def test_tokens_of_flashcomm2_and_layers_by_rank_are_those_of_transformers(
    small: dict[str, Path], shared: tuple[dict[str, Done], Path]
) -> None:
    first, second = (rank["v32"]["answers"] for rank in shared[0]["v32"].told)
    right(small["v32"], PROMPTS, first)
    same(second, first)


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
    for told in json.loads(report.read_text()).values():  # of each interval of token counts
        assert list(dict.fromkeys(p["method"] for p in told["verify"]["proofs"])) == methods and told["verify"]["holds"]
        assert Counter(m["role"] for m in told["modules"] if m["decision"] == "share") == modules
        assert len(told["modules"]) == sum(modules.values())
    assert len(re.findall(r"[1-9]\d* bytes of whole weights released", done.log)) == 2
    assert "stays whole" not in done.log and "no weight is shared" not in done.log
