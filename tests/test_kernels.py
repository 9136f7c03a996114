"""The Triton kernels of sparse attention by Triton's interpreter, on the CPU; bench/kernels.py checks them on a GPU.

In float16: the interpreter multiplies bfloat16 as if it were integers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from sparse_operands import attention_inputs, check_choice, dense_attention, indexer_inputs

from cpcompile import ops
from cpcompile.kernels import lightning_indexer as indexer
from cpcompile.kernels import sparse_attention as attention

pytestmark = pytest.mark.skipif(
    triton.__version__.startswith("3.6."), reason="Triton 3.6's interpreter takes no sizes from NumPy 2.4 and later"
)
# Rows that see no key, fewer keys than are chosen, and several tiles of keys, rows and heads.
SIZES = [(1, 3, 4, 7), (2, 5, 11, 3), (1, 4, 0, 2), (1, 0, 4, 2), (2, 9, 40, 20), (1, 8, 300, 30), (1, 3, 200, 32)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that small operands do not fit."""
    for name, value in {
        "KEY_BLOCK": 16,
        "ROW_BLOCK": 4,
        "LEAST_TILE": 32,
        "MOST_TILE": 64,
        "SCORE_BYTES": 4096,
    }.items():
        monkeypatch.setattr(indexer, name, value)
    monkeypatch.setattr(attention, "HEAD_BLOCK", 16)
    monkeypatch.setattr(attention, "KEY_BLOCK", 16)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("batch", "rows", "keys", "count"), SIZES)
def test_the_indexer_chooses_the_best_visible_keys(batch: int, rows: int, keys: int, count: int, seed: int) -> None:
    inputs = indexer_inputs(batch, rows, keys, torch.float16, seed, heads=5, width=16)
    check_choice(inputs, count, indexer.lightning_indexer(*inputs, count), best_first=False)


@pytest.mark.parametrize("keys", [40, 150])
def test_of_equal_scores_as_many_are_chosen_as_are_wanted(keys: int) -> None:
    """Nothing is written behind a row: what comes after the last one is as it was."""
    lengths = torch.tensor([0, 19, 20, keys], dtype=torch.int32)
    found = torch.full((5, 20), -7, dtype=torch.int32)
    indexer._largest(torch.full((4, keys), 0.5), lengths, found[:4])
    for row, length in zip(found[:4].tolist(), (0, 19, 20, 20), strict=True):
        assert sorted(row[:length]) == list(range(length)) and row[length:] == [-1] * (20 - length)
    assert found[4].tolist() == [-7] * 20


@pytest.mark.parametrize("heads", [5, 16, 37])
@pytest.mark.parametrize(("batch", "rows", "keys", "count"), SIZES[:5])
def test_attention_is_dense_masked_attention(batch: int, rows: int, keys: int, count: int, heads: int) -> None:
    inputs = attention_inputs(batch, rows, keys, count, torch.float16, heads=heads, widths=(32, 16))
    found = attention.sparse_attention(*inputs)
    assert found.dtype == torch.float16 and found.shape == inputs[0].shape
    torch.testing.assert_close(found.double(), dense_attention(inputs), rtol=2**-9, atol=2**-9)


def strided(value: Any) -> Any:
    """The same numbers, with gaps between rows and heads."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    wide = value.new_full((*value.shape[:-1], value.shape[-1] + 3), torch.nan)
    wide[..., :-3] = value
    return wide[..., :-3]


def test_strides_do_not_matter() -> None:
    inputs = indexer_inputs(2, 5, 40, torch.float16, heads=5, width=16)
    expected = indexer.lightning_indexer(*inputs, 8)
    assert torch.equal(indexer.lightning_indexer(*map(strided, inputs), 8), expected)
    inputs = attention_inputs(2, 3, 20, 6, torch.float16, heads=5, widths=(32, 16))
    assert torch.equal(attention.sparse_attention(*map(strided, inputs)), attention.sparse_attention(*inputs))


@pytest.mark.parametrize(
    ("dtype", "width", "fits"),
    [(torch.float16, 16, True), (torch.bfloat16, 128, True), (torch.float32, 16, False), (torch.float16, 24, False)],
)
def test_what_they_take(dtype: torch.dtype, width: int, fits: bool) -> None:
    """The rest runs by the reference."""
    query, key, *_ = indexer_inputs(1, 2, 3, dtype, width=width)
    assert indexer.fits(query, key, 4) == fits and not indexer.fits(query, key, 1 << 20)
    query, key, _, query_rope, key_rope, *_ = attention_inputs(1, 2, 3, 2, dtype, widths=(width, 16))
    assert attention.fits(query, key, query_rope, key_rope) == fits
    assert not attention.fits(query, key.double(), query_rope, key_rope)


@pytest.mark.parametrize(("dtype", "kernels"), [(torch.float16, True), (torch.float32, False)])
def test_what_cuda_runs(dtype: torch.dtype, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels where they take the operands, the reference elsewhere and where there is no Triton."""
    chosen = indexer_inputs(1, 4, 30, dtype, width=16)
    attended = attention_inputs(1, 4, 30, 8, dtype, widths=(32, 16))
    reference = [ops.lightning_indexer(*chosen, 8), ops.sparse_attention(*attended)]
    cuda = torch.device("cuda")
    assert ops.by_triton(cuda) and not ops.by_triton(torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "by_triton", lambda device: True)  # as for operands on CUDA
        both = [ops.lightning_indexer(*chosen, 8), ops.sparse_attention(*attended)]
    assert [torch.equal(*pair) for pair in zip(both, reference, strict=True)] == [not kernels] * 2
    if kernels:
        ours = [indexer.lightning_indexer(*chosen, 8), attention.sparse_attention(*attended)]
        assert all(torch.equal(*pair) for pair in zip(both, ours, strict=True))
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    assert not ops.by_triton(cuda)
