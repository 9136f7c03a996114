"""vLLM's server on two ranks with this backend and no option: 64 requests get what each gets from transformers."""

from __future__ import annotations

from pathlib import Path

from expected import prompt, rewritten, transformers_says
from model_folder import make_folder
from processes import COMPILED, end
from server import SEQUENCES, Server

REQUESTS, NEW_TOKENS = 64, 8
LENGTHS = (6, 10, 18, 31)


def test_many_requests_at_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "v3", hidden_size=1024)
    server = Server(folder, tmp_path, {"compilation-config": COMPILED})
    try:
        server.wait_until_ready()
        answers = server.ask_at_once([prompt(LENGTHS[n % len(LENGTHS)]) for n in range(REQUESTS)], NEW_TOKENS)
    finally:
        end(server.process)
    wanted = transformers_says(folder, [prompt(length) for length in LENGTHS], NEW_TOKENS)
    assert answers == [wanted[n % len(LENGTHS)]["tokens"] for n in range(REQUESTS)]
    for rank in range(2):
        small, large = rewritten(server.said(), rank)
        # A step that decodes has a token of each sequence, one that prefills the longest prompt has all of that.
        assert small == (0, 0, 7) and large[1:] == (7, 7) and SEQUENCES < large[0] <= max(LENGTHS)
