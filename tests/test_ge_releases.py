"""Other releases of torch_npu than the one that the tests run: of 2.11, 2.12 and 2.14, their schemas, as text.

``data/torch_npu_schemas.txt`` has lines of releases and a schema as their library registers it. A release of torch_npu
loads with its own release of PyTorch only: CI runs none of these (the README says what was run by hand).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ascend_process import AscendProcess
from ge_devices import calls, files_without_an_options_writer

RELEASES = ("2.11", "2.12", "2.13", "2.14")


def schemas(release: str) -> dict[str, Any]:
    found = {}
    for line in (Path(__file__).parent / "data/torch_npu_schemas.txt").read_text().splitlines():
        releases, _, text = line.partition(" | ")
        if release in releases.split():
            found[text.partition("(")[0]] = torch._C.parse_schema(f"npu::{text}")
    return found


def misfit(schema: Any, run: Any, positional: int, named: tuple[str, ...]) -> str:
    """Why a call that is right with schema ``run`` is wrong with ``schema``; empty if it is right."""
    places = [a.name for a in schema.arguments if not a.kwarg_only]
    given = [a.name for a in run.arguments if not a.kwarg_only][:positional]
    if places[:positional] != given:
        return f"by position it takes {places}, and gets {given}"
    unknown = set(named) - {a.name for a in schema.arguments}
    missing = {a.name for a in schema.arguments if not a.has_default_value()} - {*given, *named}
    if unknown or missing:
        return f"unknown: {sorted(unknown)}, missing: {sorted(missing)}"
    return "" if len(schema.returns) == len(run.returns) else f"it returns {len(schema.returns)} values"


def test_what_is_called_fits_every_release(ascend: AscendProcess) -> None:
    run, found = schemas("2.13"), ascend(calls)
    assert len({name for name, *_ in found}) >= 11
    for release in RELEASES:
        there = schemas(release)
        wrong = [(name, why) for name, *call in sorted(found) if (why := misfit(there[name], run[name], *call))]
        assert not wrong, release


def test_options_are_written_without_the_release_s_own_writer(ascend: AscendProcess) -> None:
    assert "options.json" in ascend(files_without_an_options_writer)


def test_a_misfit_is_seen() -> None:
    old, new = schemas("2.12")["npu_sparse_flash_attention"], schemas("2.13")["npu_sparse_flash_attention"]
    named = ("layout_query", "sinks")
    assert misfit(old, new, 5, named) == "unknown: ['sinks'], missing: []"
    assert misfit(new, new, 5, named) == ""
    assert "missing: ['scale_value']" in misfit(new, new, 4, named[:1])
