"""vLLM's server on two ranks with this backend: 64 requests at once get what each gets from transformers."""

from __future__ import annotations

from pathlib import Path

from expected import prompt, transformers_says
from model_folder import make_folder
from processes import COMPILED, end
from server import Server

REQUESTS, NEW_TOKENS = 64, 8
LENGTHS = (6, 10, 18, 31)


def test_many_requests_at_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "v3")
    options = {"cpcompile": {"strategy": "tp", "require": ["*"]}}
    server = Server(folder, tmp_path, {"compilation-config": COMPILED, "additional-config": options})
    try:
        server.wait_until_ready()
        answers = server.ask_at_once([prompt(LENGTHS[n % len(LENGTHS)]) for n in range(REQUESTS)], NEW_TOKENS)
    finally:
        end(server.process)
    wanted = transformers_says(folder, [prompt(length) for length in LENGTHS], NEW_TOKENS)
    assert answers == [wanted[n % len(LENGTHS)]["tokens"] for n in range(REQUESTS)]
    for rank in range(2):
        assert f"rank {rank} of 2 of axis tp: 7 of 7 all-reduces rewritten" in server.said()
