"""What a rank's exported graph takes, by the model's names: order of inputs, shared weights, sizes that are packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ge_build import DESCRIPTOR, encode

from cpcompile.lowering.ascend.bound_inputs import RankGraph
from cpcompile.lowering.ge import GeError, interpret

A, B, SIZES = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3) ** 2, [7, 11]
PART = {"dim": 0, "segments": 1, "parts": 2, "index": 1}
ROWS = [
    {"name": "arg0", "source": "a"},
    {"name": "arg1", "source": "b", "part": PART},
    {"name": "sizes", "source": ["n", "m"]},
]
GIVEN = {"m": SIZES[1], "b": B, "n": SIZES[0], "a": A, "more than the graph takes": B}


def _desc(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    dims = {torch.float32: 2, torch.int64: 1}[dtype]
    return {"name": name, "dtype": DESCRIPTOR[dtype], "shape": {"dim": (-1,) * dims}}


def _write(folder: Path, rows: list[dict[str, Any]], order: tuple[str, ...] = ("arg0", "arg1", "sizes")) -> None:
    """``arg0 - arg1`` and the sizes, where GE takes the inputs in this ``order``."""
    ops: list[dict[str, Any]] = []
    for name in ("arg0", "arg1", "sizes"):
        desc = [_desc("y", *([torch.int64] if name == "sizes" else []))]
        ops.append({"name": name, "type": "Data", "attr": {"index": {"i": order.index(name)}}, "output_desc": desc})
    taken = [_desc(name) for name in ("x1", "x2")]
    ops.append({"name": "sub", "type": "Sub", "input": ["arg0:0", "arg1:0"], "input_desc": taken})
    ops[-1]["output_desc"] = [_desc("y")]
    said = [_desc("input0"), _desc("input1", torch.int64)]
    ops.append({"name": "out", "type": "NetOutput", "input": ["sub:0", "sizes:0"], "input_desc": said})
    (folder / "model.pb").write_bytes(encode("ModelDef", {"name": "m", "graph": [{"name": "g", "op": ops}]}))
    (folder / "summary.json").write_text(json.dumps({"inputs": rows}))


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_values_are_bound_by_the_model_s_names(tmp_path: Path, order: tuple[int, ...]) -> None:
    """In whatever order the graph takes them: a shared weight is cut, and sizes that are packed are one tensor."""
    rows = [ROWS[number] for number in order]
    _write(tmp_path, rows, tuple(str(row["name"]) for row in rows))
    difference, sizes = interpret([RankGraph.read(tmp_path).program(GIVEN)])[0]
    assert torch.equal(difference, A - B[2:])
    assert sizes.tolist() == SIZES and sizes.dtype == torch.int64


@pytest.mark.parametrize(
    ("order", "rows", "where"),
    [
        ((1, 0, 2), ROWS, 0),  # a - b would be b - a: shapes and dtypes are the same
        ((0, 2, 1), ROWS, 1),
        ((0, 1, 2), ROWS[:2], 2),
        ((0, 1, 2), ROWS[1:], 0),
        ((0, 1, 2), [*ROWS, ROWS[0]], 3),
    ],
)
def test_inputs_in_another_order_than_the_summary_s_are_refused(
    tmp_path: Path, order: tuple[int, ...], rows: list[dict[str, Any]], where: int
) -> None:
    _write(tmp_path, rows, tuple(str(ROWS[number]["name"]) for number in order))
    with pytest.raises(GeError, match=f"input {where} of the graph is not the one of summary.json: export both again$"):
        RankGraph.read(tmp_path)


@pytest.mark.parametrize("missing", ["a", "b", "m"])
def test_a_value_that_is_not_given_is_named(tmp_path: Path, missing: str) -> None:
    _write(tmp_path, ROWS)
    given = {name: value for name, value in GIVEN.items() if name != missing}
    with pytest.raises(GeError, match=f"its value, '{missing}', is not given"):
        RankGraph.read(tmp_path).program(given)
