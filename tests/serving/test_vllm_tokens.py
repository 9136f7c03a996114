"""Real vLLM on two gloo ranks with this backend says what one rank, two uncompiled ranks and transformers say."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folder import LAYERS, VOCAB, make_folder
from processes import COMPILED, IN_PIECES, Done, run

LENGTHS, NEW_TOKENS, TOLERANCE = (6, 10, 18, 31, 65), 16, 1e-4
# Two prompts arrive together, the others while these decode: steps of prefill alone, of both, and of decode alone.
STEPS = (0, 0, 3, 5, 9)
KINDS = ("v3", "v32")
# What each of two data-parallel replicas is asked: the second has nothing to do before its prompt, nor behind it.
SHARES = ([0, 1, 2, 4], [3])
MODULES = {
    "oproj_tensor_parallel_size": 2,
    "embedding_tensor_parallel_size": 2,
    "mlp_tensor_parallel_size": 2,
}


def prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()  # type: ignore[no-any-return]


ARRIVALS = [(prompt(length), step) for length, step in zip(LENGTHS, STEPS, strict=True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: make_folder(root / kind, kind) for kind in KINDS}


def job(engines: dict[str, Any]) -> dict[str, Any]:
    return {"engines": engines, "arrivals": ARRIVALS, "new_tokens": NEW_TOKENS}


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
        tp = {"model": str(folders[kind]), "tensor_parallel_size": 2}
        options = {"strategy": "tp", "require": ["*"], "dump_dir": str(work / kind)}
        compiled = {**tp, "compilation_config": COMPILED, "additional_config": {"cpcompile": options}}
        for name, engine in ((f"{kind} plain", {**tp, "enforce_eager": True}), (kind, compiled)):
            done = checked(run(tmp_path_factory.mktemp("run"), job({name: engine}), ranks=2))
            log += done.log
            for mine, theirs in zip(told, done.told, strict=True):
                mine.update(theirs)
    return Done(told, log, 0), work


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


def checked(done: Done) -> Done:
    assert done.code == 0, done.log[-4000:]
    return done


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [a["tokens"] for a in found] == [a["tokens"] for a in expected]
    assert all(len(a["tokens"]) == NEW_TOKENS for a in found)
    for mine, theirs in zip(found, expected, strict=True):
        difference = torch.tensor(mine["logprobs"]) - torch.tensor(theirs["logprobs"])
        assert difference.abs().max() <= TOLERANCE


@torch.no_grad()
def transformers_says(folder: Path) -> list[dict[str, Any]]:
    """Greedy tokens of each prompt, the whole sequence read again for each of them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for ids, _ in ARRIVALS:
        tokens: list[int] = []
        chosen: list[float] = []
        for _ in range(NEW_TOKENS):
            scores = model(input_ids=torch.tensor([ids + tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
            tokens.append(int(scores.argmax()))
            chosen.append(float(scores.max()))
        answers.append({"tokens": tokens, "logprobs": chosen})
    return answers


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_one_rank_and_of_two_uncompiled_ranks(
    kind: str, alone: Done, two_ranks: tuple[Done, Path]
) -> None:
    for rank in two_ranks[0].told:
        same(rank[kind]["answers"], alone.told[0][kind]["answers"])
        same(rank[kind]["answers"], rank[f"{kind} plain"]["answers"])


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_transformers(kind: str, folders: dict[str, Path], two_ranks: tuple[Done, Path]) -> None:
    same(two_ranks[0].told[0][kind]["answers"], transformers_says(folders[kind]))


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


def test_nothing_is_said_to_be_wrong(two_ranks: tuple[Done, Path]) -> None:
    log = two_ranks[0].log
    assert "runs as it came" not in log and "left alone" not in log and "NEVER called" not in log


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
