"""Annotation of real traces: where tokens are, what is whole on every rank, and why an op is no row-wise one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.distributed._functional_collectives as funcol
import torch.fx as fx
from placed import HIDDEN, Annotated, Layer, annotated, layer, traced
from simulate import fake_rank
from torch import Tensor, nn

from cpcompile.axes import axis_of
from cpcompile.capture import capture
from cpcompile.passes.canonicalise import Canonicalise
from cpcompile.passes.op_call import Mixing, RowWise
from cpcompile.passes.token_counts import Further, further_counts, token_placeholder
from cpcompile.passes.token_dims import annotate
from cpcompile.passes.token_layout import TokenDim


class Model(nn.Module):
    """``f(sum(x @ w), group)`` of embedded token ids ``[..., T]``; ``w`` differs between the ranks."""

    def __init__(self, f: Callable[..., Tensor], group: Any, op: str = "sum") -> None:
        super().__init__()
        self.f, self.group, self.op = f, group, op
        self.table = nn.Parameter(torch.randn(32, HIDDEN), requires_grad=False)
        self.first = nn.Parameter(torch.randn(HIDDEN, HIDDEN), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = nn.functional.embedding(ids, self.table)
        return self.f(funcol.all_reduce(x @ self.first, self.op, self.group), self.group)


def of(f: Callable[..., Tensor], shape: Sequence[int] = (12,), **options: Any) -> Annotated:
    return annotated(*traced(lambda mesh: Model(f, mesh, **options), 4, shape))


def called(found: Annotated, op: Any) -> fx.Node:
    """The last node that calls ``op``."""
    return found.gm.graph.find_nodes(op="call_function", target=op)[-1]


def out(found: Annotated, op: Any) -> TokenDim | None:
    return found.known.layouts.get(called(found, op), (None,))[0]


aten = torch.ops.aten

# ---- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "dim"), [((12,), 0), ((1, 12), 1), ((3, 12), 1), ((12, 1), 0)], ids=repr)
def test_the_last_dim_of_the_ids_that_is_longer_than_one_holds_the_tokens(shape: tuple[int, ...], dim: int) -> None:
    found = layer(shape=shape)
    values = {n: n.meta["val"] for n in found.gm.graph.find_nodes(op="placeholder")}
    (ids,) = (n for n, v in values.items() if isinstance(v, torch.Tensor) and v.dtype == torch.int64)
    assert token_placeholder(found.gm) == (ids, dim)
    assert found.known.tokens == found.known.shapes[ids][0][dim]
    for wait in found.known.all_reduces:
        assert found.known.layouts[wait] == (TokenDim(dim),)


def test_a_single_token_is_static() -> None:
    found = layer(shape=(1, 1))
    assert found.known.tokens == 1 and len(found.known.all_reduces) == 2
    assert all(isinstance(found.known.classes[wait], RowWise) for wait in found.known.all_reduces)


def test_a_batch_is_folded_in_by_a_view_and_unfolded_by_the_next() -> None:
    """``[B, T, H]`` is viewed as ``[B*T, H]`` for each product and back."""
    found = layer(shape=(3, 12))
    batch = found.known.shapes[called(found, aten.embedding.default)][0][0]
    assert isinstance(batch, sympy.Symbol)
    flat = TokenDim(0, batch)
    assert {found.known.layouts[n] for n in found.gm.graph.find_nodes(op="call_function", target=aten.mm.default)} == {
        (flat,)
    }
    views = [found.known.layouts[n][0] for n in found.gm.graph.find_nodes(op="call_function", target=aten.view.default)]
    assert set(views) == {flat, TokenDim(1)} and len(views) >= 6


def test_two_rows_of_tokens_flattened_by_the_model() -> None:
    """``[B, T, H] -> [B*T*2, H/2] -> [B, T, H]``: every row is two of its token's."""

    def f(x: Tensor, group: Any) -> Tensor:
        return torch.relu(x.reshape(-1, HIDDEN // 2)).reshape(x.shape)

    found = of(f, (3, 12))
    batch = found.known.shapes[called(found, aten.embedding.default)][0][0]
    assert out(found, aten.relu.default) == TokenDim(0, batch, sympy.Integer(2))


def test_without_token_ids_the_all_reduced_value_tells_the_tokens() -> None:
    """A model that is given hidden states: rows are the last dim but one."""

    class Given(nn.Module):
        def __init__(self, group: Any) -> None:
            super().__init__()
            self.group = group

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(funcol.all_reduce(x * 2, "sum", self.group))

    with fake_rank(0, 4) as mesh:
        x = torch.ones(12, HIDDEN)
        torch._dynamo.mark_dynamic(x, 0)
        found = annotated(capture(Given(mesh), x), axis_of("tp", mesh))
    assert token_placeholder(found.gm) is None
    assert isinstance(found.known.tokens, sympy.Symbol)
    assert out(found, aten.relu.default) == TokenDim(0)


# ---- what is no row-wise op ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "op", "reason"),
    [
        (lambda x, g: x.cumsum(0), aten.cumsum.default, "works along the token dim"),
        (lambda x, g: x.softmax(0), aten._softmax.default, "works along the token dim"),
        (
            lambda x, g: torch.fft.rfft(x).real,
            aten._fft_r2c.default,
            "aten::_fft_r2c is not in the table of token-wise ops",
        ),
        (lambda x, g: x.t() @ x, aten.mm.default, "multiplies tokens with tokens"),
        (lambda x, g: x.flip(0), aten.flip.default, "works along the token dim"),
    ],
)
def test_what_mixes_rows_or_is_unknown_is_refused_with_a_reason(f: Any, op: Any, reason: str) -> None:
    found = of(f)
    outcome = found.known.classes[called(found, op)]
    assert isinstance(outcome, Mixing)
    assert outcome.reason == reason
    assert called(found, op) not in found.known.layouts


def test_an_unknown_op_hides_the_tokens_from_its_readers() -> None:
    found = of(lambda x, g: torch.relu(x.cumsum(0)))
    outcome = found.known.classes[called(found, aten.relu.default)]
    assert isinstance(outcome, Mixing) and outcome.reason


@pytest.mark.parametrize("op", ["avg", "max"])
def test_only_sums_are_this_axiss_all_reduces(op: str) -> None:
    assert of(lambda x, g: x, op=op).known.all_reduces == {}
    assert len(of(lambda x, g: x).known.all_reduces) == 1


def test_an_all_reduce_of_another_axis_is_not_this_ones() -> None:
    trace, axis = traced(lambda mesh: Layer(mesh, 0, 4), 4, (12,))
    assert annotated(trace, replace(axis, group_name="other", groups={})).known.all_reduces == {}


def test_the_start_of_an_all_reduce_is_not_placed_its_wait_is() -> None:
    found = layer()
    for wait, ar in found.known.all_reduces.items():
        assert found.known.classes[ar.start] == Mixing("is an all-reduce of this axis")
        assert found.known.classes[wait] == RowWise({}, (TokenDim(0),))


def test_a_reduced_value_without_tokens_says_so() -> None:
    found = of(lambda x, g: x + funcol.all_reduce(x.sum(0), "sum", g))
    wait = list(found.known.all_reduces)[-1]
    assert found.known.classes[wait] == Mixing("no dim of the reduced value holds the tokens")


class Batches(nn.Module):
    """Two micro-batches, each with its own count of tokens, through one weight."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        self.one = Model(lambda x, g: torch.relu(x), group)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(first), self.one(second)


def test_an_all_reduce_of_another_count_of_tokens_says_which() -> None:
    with fake_rank(0, 4) as mesh:
        trace, axis = capture(Batches(mesh), torch.arange(12), torch.arange(10)), axis_of("tp", mesh)
        Canonicalise()(trace.gm)
        known = annotate(trace.gm, axis, {})
    one, other = known.all_reduces
    assert isinstance(known.classes[one], RowWise)
    count = known.shapes[other][0][0]
    assert count != known.tokens
    assert known.classes[other] == Mixing(
        f"has {count} rows, a further count of tokens beside {known.tokens}, and 8 at most are placed"
    )
    assert further_counts(known) == {count: {other.name}}


def test_a_further_count_is_annotated_alone_and_only_what_is_told_is_the_same_on_all_ranks() -> None:
    with fake_rank(0, 4) as mesh:
        trace, axis = capture(Batches(mesh), torch.arange(12), torch.arange(10)), axis_of("tp", mesh)
        Canonicalise()(trace.gm)
        first = annotate(trace.gm, axis, {})
        ((count, sums),) = further_counts(first).items()
        known = annotate(trace.gm, axis, {}, further=Further(count, sums, frozenset({"relu"})))
    (wait,) = known.all_reduces
    assert known.tokens == count and isinstance(known.classes[wait], RowWise)
    assert {n.name for n in known.replicated if n.op == "call_function"} <= {"relu", wait.name}


# ---- replication ---------------------------------------------------------------------------------------------------


def test_replication_follows_from_the_inputs_and_ends_at_what_differs() -> None:
    found = layer()
    names = {n.name for n in found.known.replicated if n.op == "call_function"}
    assert {"embedding", "wait_tensor", "rsqrt", "mul_18", "wait_tensor_1", "add_50"} <= names
    assert not {"mm", "mm_1", "relu", "mm_2"} & names


def test_an_input_that_differs_makes_differ_what_reads_it() -> None:
    found = layer(weight=False)
    names = {n.name for n in found.known.replicated}
    assert "mul_15" in names and "mul_18" not in names and "wait_tensor_1" in names


def test_facts_that_are_absent_are_no() -> None:
    found = layer()
    known = annotate(found.gm, found.axis, {})
    assert {n.name for n in known.replicated if n.op == "call_function"} == {
        *("all_reduce", "wait_tensor", "all_reduce_1", "wait_tensor_1")
    }


def test_a_node_whose_constant_differs_between_ranks_is_not_replicated() -> None:
    found = layer()
    facts = {n.name: True for n in found.gm.graph.find_nodes(op="placeholder")}
    assert found.node("rsqrt") in annotate(found.gm, found.axis, facts).replicated
    assert found.node("rsqrt") not in annotate(found.gm, found.axis, facts, ["rsqrt"]).replicated


@pytest.mark.parametrize(
    ("f", "replicated"),
    [
        (lambda x, g: funcol.all_gather_tensor(x[:2] * torch.rand(2, 8), 0, g), True),
        (lambda x, g: funcol.reduce_scatter_tensor(x[:4], "sum", 0, g), False),
        (lambda x, g: x * torch.rand(8), False),
        (lambda x, g: x * 2, True),
    ],
    ids=["gather of what differs", "scatter", "random", "pure"],
)
def test_replication_through_collectives_and_random_numbers(f: Any, replicated: bool) -> None:
    found = of(f)
    (output,) = found.gm.graph.find_nodes(op="output")
    assert (output.all_input_nodes[0] in found.known.replicated) == replicated
