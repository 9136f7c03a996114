"""Two layers of full size on the meta device, spread over 16 ranks: every op has a form in rank 0's GE graph.

``python -m bench.lower_time`` does the same with 61 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing import Pipe
from typing import Any

import pytest
from ascend_process import AscendProcess

from bench.lower_time import lowered, trace_and_lower

TOKENS = 16384


def rows(kind: str, strategies: Sequence[str]) -> list[dict[str, Any]]:
    """Two for each strategy: for any T, and for one."""
    receiver, sender = Pipe(duplex=False)
    trace_and_lower(sender, kind, 2, strategies, 16, TOKENS)
    sender.close()
    found = []
    while True:
        try:
            found.append(receiver.recv())
        except EOFError:
            return found


@pytest.mark.parametrize(
    ("kind", "strategies"),
    [
        ("v3", ["off"]),
        ("v32", ["tp"]),
        ("v32", ["cp", "modules"]),
        ("serving", ["tp"]),
        ("serving", ["cp", "modules"]),
    ],
    ids=lambda given: given if isinstance(given, str) else "+".join(given),
)
def test_every_op_is_lowered(ascend: AscendProcess, kind: str, strategies: list[str]) -> None:
    found = ascend(rows, kind, strategies)
    assert [(row["strategy"], row.get("tokens")) for row in found] == [
        (name, tokens) for name in strategies for tokens in ("any", TOKENS)
    ], found
    for row in found:
        assert lowered(row), row
        assert row["collectives"] > 2 and row["ge_ops"] > 100 * row["layers"]


FAULTS = {"unsupported": ["a"], "unproven": ["a"], "kept": ["a"], "refused": {"tp": "a"}, "error": "a"}


def test_what_counts_as_lowered() -> None:
    row = {"strategy": "tp", "unsupported": [], "unproven": [], "kept": [], "refused": {}}
    assert lowered(row) and lowered({**row, "strategy": "off", "refused": {"tp": "strategy='off'"}})
    for name, fault in FAULTS.items():
        assert not lowered({**row, name: fault})
