"""One rank of vLLM: loads a model, generates, and writes what it said; started by ``torchrun`` or alone.

``generate.py JOB.json``: ``engine`` (arguments of ``LLM``), ``rounds`` (lists of prompts, which are generated one list
after the other), ``new_tokens``, ``out`` (rank r writes ``out.r``), ``dense_indexer``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    rank = os.environ.get("RANK", "0")
    began = time.perf_counter()
    from vllm import LLM, SamplingParams

    if job.get("dense_indexer"):
        import dense_indexer

        dense_indexer.install()
    engine = dict(job["engine"])
    if "RANK" in os.environ:
        engine["distributed_executor_backend"] = "external_launcher"
    llm = LLM(
        dtype="float32",
        max_model_len=256,
        max_num_seqs=8,
        kv_cache_memory_bytes=64 << 20,
        seed=0,
        **engine,
    )
    ready = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=job["new_tokens"], logprobs=1, ignore_eos=True)
    rounds = [
        [answer(o) for o in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)]
        for prompts in job["rounds"]
    ]
    told = {"rounds": rounds, "start_up_s": ready - began, "total_s": time.perf_counter() - began}
    Path(f"{job['out']}.{rank}").write_text(json.dumps(told))


def answer(output: Any) -> dict[str, list[Any]]:
    said = output.outputs[0]
    chosen = [step[token].logprob for token, step in zip(said.token_ids, said.logprobs, strict=True)]
    return {"tokens": list(said.token_ids), "logprobs": chosen}


if __name__ == "__main__":
    main()
