"""DeepSeek-V3.2 in real SGLang on two gloo ranks: the keys that its indexer picks, and what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest
from answers import arrivals, checked, job
from expected import LENGTHS, rewritten, right, same
from model_folder import make_folder
from ranks import Done, run
from safetensors.torch import load_file, save_file

TOPK = 16  # fewer keys than all prompts but two have
# With few heads many scores are 0, and which of these is picked is anyone's choice.
HEADS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 1024, "index_topk": TOPK, "index_n_heads": HEADS}
    made = make_folder(tmp_path_factory.mktemp("model"), "v32", **sizes)
    weights = load_file(made / "model.safetensors")
    for name in weights:
        if "weights_proj" in name:  # as SGLang keeps them: else other keys are picked, and the tokens are others
            weights[name] = weights[name].bfloat16().float()
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    work = tmp_path_factory.mktemp("two")
    return checked(run(work, job(folder, arrivals(), {}, compare=True), 2))


def test_tokens_are_those_of_transformers(folder: Path, two_ranks: Done) -> None:
    first, second = (rank["answers"] for rank in two_ranks.told)
    right(folder, [ids for ids, _ in arrivals()], first)
    same(second, first)


@pytest.mark.parametrize("rank", [0, 1])
def test_hidden_states_are_those_uncompiled(rank: int, two_ranks: Done) -> None:
    steps = two_ranks.told[rank]["steps"]
    assert {max(LENGTHS), 1} <= {tokens for tokens, _ in steps}
    assert max(error for _, error in steps) <= 2e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_every_all_reduce_of_large_steps_is_rewritten(rank: int, two_ranks: Done) -> None:
    # Prefill of several requests and of one, decode; decode of one token.
    found = rewritten(two_ranks.logs[rank], rank)
    least = found[1][0]
    # The first one stays, as the first layer's indexer takes the hidden state whole.
    assert found == [(0, 0, 7), (least, 6, 7)] * 2 + [(0, 0, 7)] and 1 < least <= max(LENGTHS)
