"""DeepSeek-V3.2 in real SGLang on two gloo ranks: the keys that its indexer picks, and what transformers says."""

from __future__ import annotations

import re
from pathlib import Path

import model_folder
import pytest
from answers import arrivals, checked, job, transformers_says
from expected import LENGTHS, same
from ranks import Done, run
from safetensors.torch import load_file, save_file

TOPK = 16  # fewer keys than all prompts but two have
# With few heads many scores are 0, and which of these is picked is anyone's choice.
HEADS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_folder.INDEXER, "index_topk", TOPK)
        patch.setitem(model_folder.INDEXER, "index_n_heads", HEADS)
        made = model_folder.make_folder(tmp_path_factory.mktemp("model"), "v32")
    weights = load_file(made / "model.safetensors")
    for name in weights:
        if "weights_proj" in name:  # as SGLang keeps them: else other keys are picked, and the tokens are others
            weights[name] = weights[name].bfloat16().float()
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def two_ranks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    work = tmp_path_factory.mktemp("two")
    return checked(run(work, job(folder, arrivals(), {"strategy": "tp"}, compare=True), 2))


def test_tokens_are_those_of_transformers(folder: Path, two_ranks: Done) -> None:
    expected = transformers_says(folder, arrivals(), two_ranks.told[0]["answers"])
    for rank in two_ranks.told:
        same(rank["answers"], expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_hidden_states_are_those_uncompiled(rank: int, two_ranks: Done) -> None:
    steps = two_ranks.told[rank]["steps"]
    assert {max(LENGTHS), 1} <= {tokens for tokens, _ in steps}
    assert max(error for _, error in steps) <= 2e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_every_all_reduce_is_rewritten(rank: int, two_ranks: Done) -> None:
    # Prefill of several requests and of one, decode; decode of one token.
    lines = re.findall(r"(\d+) of (\d+) all-reduces rewritten", two_ranks.logs[rank])
    assert lines == [("7", "7"), ("7", "7"), ("0", "7")]
