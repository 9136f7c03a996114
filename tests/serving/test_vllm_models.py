"""Other models in real vLLM on two gloo ranks with no option: one in every run, all of them by ``make matrix-vllm``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from expected import TWICE, checked, chosen, rewritten, right, same, tokens_of
from model_folder import ALL_REDUCES, KINDS, LONGEST, make_folder
from processes import COMPILED, run

DENSE = {"attention_backend": "CPU_ATTN"}  # of models whose attention is not MLA


@pytest.mark.parametrize("kind", chosen(KINDS, "qwen3_moe"))
def test_tokens_are_those_uncompiled_and_large_steps_are_rewritten(kind: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", kind, hidden_size=1024)
    engine: dict[str, Any] = {"model": str(folder), "tensor_parallel_size": 2, "compilation_config": COMPILED}
    engine |= {"max_model_len": LONGEST, **({} if "kv_lora_rank" in KINDS[kind][1] else DENSE)}
    job = {"engines": {kind: engine}, "arrivals": TWICE, "new_tokens": 16, "plain_router": True, "plain": True}
    done = checked(run(tmp_path, job, ranks=2))
    if kind != "kimi_k2":  # which transformers does not know
        right(folder, [ids for ids, _ in TWICE], done.told[0][kind]["answers"])
    for rank, told in enumerate(each[kind] for each in done.told):
        same(told["answers"], told["plain"])
        same(told["answers"], done.told[0][kind]["answers"])
        tokens = [answer["tokens"] for answer in told["answers"]]
        assert tokens[:2] == tokens[2:]
        compiled, after = told["runs"]
        assert len([step for step in told["steps"] if step]) <= compiled == after
        small, *some, large = rewritten(done.log, rank)
        assert small == (0, 0, ALL_REDUCES) and large[1:] == (ALL_REDUCES, ALL_REDUCES)
        steps = tokens_of(told["steps"]) - {0}
        assert min(steps) < min(first for first, *_ in (*some, large)) and large[0] <= max(steps)
    assert "runs as it came" not in done.log and "left alone" not in done.log and "NEVER called" not in done.log
