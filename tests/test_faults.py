"""Seeded faults in rewrites, and who catches them: the table of ``docs/FAULTS.md`` is what this file finds."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_serving_form
import test_verify_modules
import torch
import torch.fx as fx
from conftest import SharedRanks
from test_context_parallel import chunks, prefill

from cpcompile.compiled import Compiled
from cpcompile.layout_ops import collect_rows, own_rows
from cpcompile.passes import verify_numeric
from cpcompile.passes.materialise import materialise
from cpcompile.passes.verify_numeric import check_numerically
from cpcompile.passes.verify_static import prove
from cpcompile.pipeline import copy_graph

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
LAST = torch.iinfo(torch.int64).max
TABLE = Path(__file__).parents[1] / "docs" / "FAULTS.md"


def calls(gm: fx.GraphModule, target: Any) -> list[fx.Node]:
    return list(gm.graph.find_nodes(op="call_function", target=target))


def positions_not_split(gm: fx.GraphModule) -> None:
    """Every rank takes the first rank's rows."""
    own = next(n for n in calls(gm, aten.slice.Tensor) if n.args[2] != 0)
    own.args = (own.args[0], own.args[1], 0, own.args[2])


def prefix_dropped(gm: fx.GraphModule) -> None:
    """Positions start at 0 behind cached tokens, too."""
    found = [n for n in calls(gm, aten.add.Tensor) if isinstance(n.args[1], fx.Node) and "arange" in _root(n).name]
    for node in found:
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        gm.graph.erase_node(node)
    assert found


def _root(node: fx.Node) -> fx.Node:
    while (
        node.all_input_nodes and isinstance(node.meta["val"], torch.Tensor) and node.target is not aten.arange.default
    ):
        node = node.all_input_nodes[0]
    return node


def _dropped_pads(gm: fx.GraphModule) -> fx.Node:
    (cut,) = [u for u in calls(gm, c10d.wait_tensor.default)[0].users if u.target is aten.slice.Tensor]
    return cut


def pad_row_written(gm: fx.GraphModule) -> None:
    """Of the gathered rows the first is dropped instead of the padding."""
    cut = _dropped_pads(gm)
    cut.args = (cut.args[0], cut.args[1], 1, LAST)


def lengths_from_padded_tokens(gm: fx.GraphModule) -> None:
    """Keys are as many as padded rows: the padding is not dropped after the gather."""
    cut = _dropped_pads(gm)
    cut.replace_all_uses_with(cut.args[0])  # type: ignore[arg-type]
    gm.graph.erase_node(cut)


def pieces_swapped(gm: fx.GraphModule) -> None:
    """Latent and rotated keys change places in the gathered row."""
    cat = next(n for n in calls(gm, aten.cat.default) if _is_gathered(n))
    cat.args = ([*reversed(cat.args[0])], *cat.args[1:])  # type: ignore[misc]


def _is_gathered(node: fx.Node) -> bool:
    reader = next(iter(node.users))
    while reader.target is aten.view.default:
        reader = next(iter(reader.users))
    return reader.target is c10d.all_gather_into_tensor.default


def gather_on_the_wrong_group(gm: fx.GraphModule) -> None:
    gather = calls(gm, c10d.all_gather_into_tensor.default)[0]
    gather.args = (gather.args[0], gather.args[1], "another")


def wait_dropped(gm: fx.GraphModule) -> None:
    wait = calls(gm, c10d.wait_tensor.default)[0]
    wait.replace_all_uses_with(wait.all_input_nodes[0])
    gm.graph.erase_node(wait)


def rows_of_another_rank(gm: fx.GraphModule) -> None:
    own = calls(gm, own_rows)[-1]
    own.update_arg(2, 1 - own.args[2])  # type: ignore[operator]


def restore_order_swapped(gm: fx.GraphModule) -> None:
    """Rows that were dealt in zigzag are collected as interleaved ones."""
    calls(gm, collect_rows)[0].update_arg(3, "interleave")


def rows_not_restored(gm: fx.GraphModule) -> None:
    """The first rows of rank order are taken for the tokens in theirs."""
    back = calls(gm, collect_rows)[0]
    x, dim, _, _, tokens = back.args
    with gm.graph.inserting_before(back):
        cut = gm.graph.call_function(aten.slice.Tensor, (x, dim, 0, tokens))
    cut.meta = dict(back.meta)
    back.replace_all_uses_with(cut)
    gm.graph.erase_node(back)


def split_otherwise_than_collected(gm: fx.GraphModule) -> None:
    """Positions are dealt as interleaved rows, and all else in zigzag."""
    calls(gm, own_rows)[-1].update_arg(4, "interleave")


@dataclass(frozen=True)
class Fault:
    """A fault, the rewrite that it is seeded into, and which verifiers refute it."""

    seed: Callable[[fx.GraphModule], None]
    where: str
    caught_by: str


FAULTS = [
    Fault(positions_not_split, "contiguous", "static, numeric"),
    Fault(pad_row_written, "contiguous", "static, numeric"),
    Fault(lengths_from_padded_tokens, "contiguous", "static, numeric"),
    Fault(pieces_swapped, "contiguous", "static, numeric"),
    Fault(gather_on_the_wrong_group, "contiguous", "static, numeric"),
    Fault(wait_dropped, "contiguous", "static"),
    Fault(prefix_dropped, "behind cached tokens", "static, numeric"),
    Fault(rows_of_another_rank, "zigzag", "static, numeric"),
    Fault(restore_order_swapped, "zigzag", "static, numeric"),
    Fault(rows_not_restored, "zigzag", "static, numeric"),
    Fault(split_otherwise_than_collected, "zigzag", "static, numeric"),
]


@functools.cache
def compiled(where: str) -> Compiled:
    """The last rank's rewrite on two ranks: its rows are not the first."""
    made: dict[str, Callable[[], tuple[SharedRanks, dict[str, Any]]]] = {
        "contiguous": lambda: (prefill("v32", 2), {}),
        "zigzag": lambda: (prefill("v3", 2), {"layout": "zigzag"}),
        "behind cached tokens": lambda: (chunks("v3", 2), {"replicated": ["*past*"]}),
    }
    ranks, options = made[where]()
    return ranks.compile(strategy="cp", profile="ascend-a3", verify="off", **options)[1]


def caught_by(found: Compiled, seed: Callable[[fx.GraphModule], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Names of the verifiers that refute every rank's rewritten graph with ``seed`` in it."""
    (variant,) = [v for v in found.variants if v.steps]
    step, known = variant.steps[0], variant.steps[0].graph.known
    before = next(iter(known.shapes)).graph.owning_module
    assert isinstance(before, fx.GraphModule) and known.tokens is not None

    def seeded(*args: Any) -> fx.GraphModule:
        gm = materialise(*args)
        broken = fx.GraphModule(gm, copy_graph(gm.graph))
        seed(broken)
        broken.graph.lint()
        broken.recompile()
        return broken

    proof = prove(before, seeded(before, step.graph, step.interval), known.axis, known.tokens, lambda _: True)
    monkeypatch.setattr(verify_numeric, "materialise", seeded)
    failures = check_numerically(before, step.graph, step.interval, lambda _: True, token_counts=[9])
    return ", ".join(name for name, caught in (("static", not proof.holds), ("numeric", bool(failures))) if caught)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.seed.__name__)
def test_a_fault_in_the_rewrite_is_refuted(fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    assert caught_by(compiled(fault.where), fault.seed, monkeypatch) == fault.caught_by


@pytest.mark.parametrize("where", dict.fromkeys(fault.where for fault in FAULTS))
def test_without_a_fault_nothing_is_refuted(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert caught_by(compiled(where), lambda gm: None, monkeypatch) == ""


def test_the_table_is_what_was_found() -> None:
    rows = re.findall(r"^\| ([a-z ]+) \| (.+?) \| (static.*?|numeric) \|$", TABLE.read_text(encoding="utf-8"), re.M)
    seeded = {(fault.seed.__name__, fault.where, fault.caught_by) for fault in FAULTS}
    seeded |= {(seed.__name__, "paged caches", "static") for seed in test_serving_form.FAULTS}
    modules = [*test_verify_modules.MODEL_FAULTS, *test_verify_modules.HAND_FAULTS]
    seeded |= {(fault.name, fault.where, fault.caught_by) for fault in modules}
    assert {(name.replace(" ", "_"), where, by) for name, where, by in rows} == seeded
