"""The ops against dense masked torch, on any rows, lengths, chunks and dtypes, and as operators of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_operands import attention_inputs, check_choice, dense_attention, indexer_inputs
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cpcompile import ops

INDEXER, ATTENTION = torch.ops.cpcompile.lightning_indexer.default, torch.ops.cpcompile.sparse_attention.default


SIZES = [
    (1, 9, 9, 4),
    (2, 5, 11, 3),
    (1, 3, 4, 7),
    (2, 4, 6, 6),
    (1, 1, 1, 1),
    (1, 0, 0, 4),
    (1, 0, 5, 4),
    (1, 4, 0, 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "rows", "keys", "count"), SIZES)
def test_the_indexer_chooses_the_best_visible_keys(
    batch: int, rows: int, keys: int, count: int, dtype: torch.dtype
) -> None:
    inputs = indexer_inputs(batch, rows, keys, dtype)
    check_choice(inputs, count, ops.lightning_indexer(*inputs, count))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize(("batch", "rows", "keys", "count"), SIZES)
def test_attention_is_dense_masked_attention(
    batch: int, rows: int, keys: int, count: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = attention_inputs(batch, rows, keys, count, dtype)
    found = ops.sparse_attention(*inputs)
    assert found.dtype == dtype and found.shape == inputs[0].shape
    torch.testing.assert_close(found.double(), dense_attention(inputs), rtol=tolerance, atol=tolerance)


@given(st.integers(1, 3), st.integers(0, 12), st.integers(0, 12), st.integers(1, 14), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_any_sizes(batch: int, rows: int, keys: int, count: int, seed: int) -> None:
    inputs = indexer_inputs(batch, rows, keys, seed=seed)
    check_choice(inputs, count, ops.lightning_indexer(*inputs, count))
    inputs = attention_inputs(batch, rows, keys, count, seed=seed)
    torch.testing.assert_close(ops.sparse_attention(*inputs).double(), dense_attention(inputs), rtol=1e-5, atol=1e-5)


def on_rows(op: Callable[..., Tensor], inputs: list[Any], by_row: set[int], part: slice) -> Tensor:
    return op(*[value[:, part] if i in by_row else value for i, value in enumerate(inputs)])


@pytest.mark.parametrize("part", [slice(0, 3), slice(3, 9), slice(8, 9), slice(4, 4)])
def test_a_part_of_the_rows_gives_these_rows(part: slice) -> None:
    """What a rank needs that holds some rows: with whole keys and its rows' lengths, its rows of the result."""
    inputs = [*indexer_inputs(2, 9, 12), 5]
    whole = ops.lightning_indexer(*inputs)
    assert torch.equal(on_rows(ops.lightning_indexer, inputs, {0, 2, 3}, part), whole[:, part])
    inputs = attention_inputs(2, 9, 12, 5)
    whole = ops.sparse_attention(*inputs)
    found = on_rows(ops.sparse_attention, inputs, {0, 2, 3, 5}, part)
    torch.testing.assert_close(found, whole[:, part], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scratch", [1, 700, 2000])
def test_the_size_of_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch, scratch: int) -> None:
    indexer, attention = [*indexer_inputs(2, 9, 12), 5], attention_inputs(2, 9, 12, 5)
    chosen, attended = ops.lightning_indexer(*indexer), ops.sparse_attention(*attention)
    monkeypatch.setattr(ops, "SCRATCH_BYTES", scratch)
    assert torch.equal(ops.lightning_indexer(*indexer), chosen)
    torch.testing.assert_close(ops.sparse_attention(*attention), attended, rtol=1e-6, atol=1e-6)


def test_strides_do_not_matter() -> None:
    inputs = attention_inputs(2, 6, 8, 4)
    strided = [v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, Tensor) else v for v in inputs]
    torch.testing.assert_close(ops.sparse_attention(*strided), ops.sparse_attention(*inputs))
    inputs = [*indexer_inputs(2, 6, 8), 4]
    strided = [v.transpose(0, 1).contiguous().transpose(0, 1) if isinstance(v, Tensor) else v for v in inputs]
    assert torch.equal(ops.lightning_indexer(*strided), ops.lightning_indexer(*inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "rows", "keys", "count"), [(2, 5, 7, 3), (1, 3, 2, 6)])
def test_they_are_proper_operators(batch: int, rows: int, keys: int, count: int, dtype: torch.dtype) -> None:
    torch.library.opcheck(INDEXER, (*indexer_inputs(batch, rows, keys, dtype), count))
    torch.library.opcheck(ATTENTION, tuple(attention_inputs(batch, rows, keys, count, dtype)))


def equalities(traced: fx.GraphModule) -> list[str]:
    """What tracing asked sizes to be equal to."""
    shapes: ShapeEnv = next(iter(traced.graph.nodes)).meta["val"].fake_mode.shape_env
    return [expr for guard in shapes.guards if "Eq" in (expr := str(guard.expr))]


def test_one_trace_serves_every_size() -> None:
    """With symbolic batch, rows and keys; tracing asks nothing of the sizes but what the caller's ops do."""

    def both(query: Tensor, key: Tensor, weights: Tensor, key_lengths: Tensor) -> Tensor:
        indices = ops.lightning_indexer(query, key, weights, key_lengths, 4)
        return ops.sparse_attention(query, key, indices, query, key, key_lengths, 0.5)

    traced = make_fx(both, tracing_mode="symbolic")(*indexer_inputs(2, 5, 7))
    assert not equalities(traced)
    assert equalities(make_fx(lambda x: x * 2 if x.shape[0] == 5 else x, tracing_mode="symbolic")(torch.ones(5)))
    for sizes in ((2, 5, 7), (3, 8, 8), (4, 2, 9)):
        inputs = indexer_inputs(*sizes)
        torch.testing.assert_close(traced(*inputs), both(*inputs))


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (0, lambda t: t[0], r"query: expected \[B, S, H, D\], found \[5, 3, 8\]"),
        (1, lambda t: t[..., :4], r"key: expected \[2, 7, 1, 8\], found \[2, 7, 1, 4\]"),
        (1, lambda t: t[:, :, 0], r"key: expected \[B, K, 1, D\], found \[2, 7, 8\]"),
        (2, lambda t: t[:, :3], r"weights: expected \[2, 5, 3\], found \[2, 3, 3\]"),
        (3, lambda t: t[:1], r"key_lengths: expected \[2, 5\], found \[1, 5\]"),
        (3, lambda t: t.long(), r"key_lengths: expected int32, found torch.int64"),
    ],
)
def test_the_indexer_refuses_other_shapes(number: int, change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = indexer_inputs(2, 5, 7)
    inputs[number] = change(inputs[number])
    with pytest.raises(ValueError, match=message):
        ops.lightning_indexer(*inputs, 4)


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (2, lambda t: t[:, :, 0], r"sparse_indices: expected \[2, 5, 1, 3\], found \[2, 5, 3\]"),
        (3, lambda t: t[:, :4], r"query_rope: expected \[2, 5, 3, 4\], found \[2, 4, 3, 4\]"),
        (4, lambda t: t[..., :2], r"key_rope: expected \[2, 7, 1, 4\], found \[2, 7, 1, 2\]"),
    ],
)
def test_attention_refuses_other_shapes(number: int, change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = attention_inputs(2, 5, 7, 3)
    inputs[number] = change(inputs[number])
    with pytest.raises(ValueError, match=message):
        ops.sparse_attention(*inputs)
