"""The static proof's own table of row-wise ops: what it claims of every case holds in numbers, and it lags in none.

The cases are the planner's, the oracle is the op run on rows; of the planner's rules nothing is used but which calls
it takes for row-wise, all of which the proof must follow, or what was rewritten would be refused.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import sympy
import torch
from op_calls import Op, X, blocks, positions, take
from op_cases import CASES, OTHERS

from cpcompile.passes.op_call import UNUSED, RowWise
from cpcompile.passes.placement_rules import classify
from cpcompile.passes.token_layout import TokenDim
from cpcompile.passes.verify_arguments import NO_DATA, RESHAPES
from cpcompile.passes.verify_call import Call
from cpcompile.passes.verify_index import Rows
from cpcompile.passes.verify_rules import rows_of

# Followed by their digits, or by the sizes that they name: not by the table.
FOLLOWED = RESHAPES | NO_DATA | {"aten::sym_size", "aten::sym_numel", "aten::expand"}
UNDEFINED = {"aten::empty_like"}
EVERY = {name: calls for name, calls in {**CASES, **OTHERS}.items() if name not in FOLLOWED}
CALLS = [pytest.param(name, call, id=str(call)) for name, calls in EVERY.items() for call in calls]


def rows(place: TokenDim) -> Rows:
    return Rows(place.dim, int(place.outer), int(place.inner))


def place(rows: Rows) -> TokenDim:
    return TokenDim(rows.dim, sympy.Integer(rows.outer), sympy.Integer(rows.inner))


def claimed(call: Op, split: dict[X, TokenDim]) -> Rows | str:
    node, nodes, _ = call.node()
    out = tuple(tuple(o.shape) for o in call.run(call.values()) if isinstance(o, torch.Tensor))
    shapes = {nodes[x]: x.shape for x in call.operands}
    return rows_of(Call(node, shapes, {nodes[x]: rows(p) for x, p in split.items()}, out))


def counts(call: Op) -> list[int]:
    sizes = {s for x in call.operands for s in x.shape if s > 1}
    return sorted(sizes | {s // 2 for s in sizes if s % 2 == 0 and s > 2})


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_what_the_proof_claims_holds_in_numbers(name: str, call: Op) -> None:
    """For every set of operands that may be split, wherever: each shard computes its rows of the whole results."""
    values = call.values()
    wholes = call.run(values)
    for tokens in counts(call):
        for places in itertools.product(*(positions(x, tokens) for x in call.operands)):
            split = {x: p for x, p in zip(call.operands, places, strict=True) if p is not None}
            found = claimed(call, split) if split else "nothing is split"
            if isinstance(found, str):
                continue
            for block in blocks(tokens):
                mine: dict[X, Any] = {x: take(v, split.get(x), tokens, block) for x, v in values.items()}
                for local, whole in zip(call.run(mine), wholes, strict=True):
                    want = take(whole, place(found), tokens, block)
                    assert local.shape == want.shape, (split, found)
                    if name not in UNDEFINED:
                        torch.testing.assert_close(local, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_the_proof_follows_what_the_planner_places(name: str, call: Op) -> None:
    node, nodes, shapes = call.node()
    for tokens in counts(call):
        for places in itertools.product(*(positions(x, tokens) for x in call.operands)):
            known = {nodes[x]: (p,) for x, p in zip(call.operands, places, strict=True) if p is not None}
            outcome = classify(node, sympy.Integer(tokens), known, shapes) if known else None
            if not isinstance(outcome, RowWise) or outcome.identity or UNUSED in outcome.operands.values():
                continue
            split = {x: d for x in call.operands if isinstance(d := outcome.operands.get(nodes[x]), TokenDim)}
            if split:
                assert claimed(call, split) == rows(outcome.outputs[0]), (split, outcome)
