"""GE's attention and indexer against loops over rows and against the paged ops; ops that write caches, too."""

from __future__ import annotations

from typing import Any

import npu_ops
import pytest
import torch
from ge_build import run_op
from torch import Tensor

from cpcompile.lowering.ge import GeError
from cpcompile.paged_ops import paged_lightning_indexer, paged_sparse_attention

COVERED = {"LightningIndexer", "SparseFlashAttention"}

HEADS, WIDTH, ROPE, SIZE, BLOCKS = 3, 8, 4, 4, 9
QUERY_ENDS, KEY_LENGTHS = (
    [5, 5, 8],
    [9, 4, 3],
)  # a request whose rows follow a prefix, one without rows, one without a prefix
SCALE = 0.3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


ROWS = QUERY_ENDS[-1]
QUERY, QUERY_ROPE = rand(ROWS, HEADS, WIDTH), rand(ROWS, HEADS, ROPE)
CACHE, ROPES = rand(BLOCKS, SIZE, 1, WIDTH, seed=3), rand(BLOCKS, SIZE, 1, ROPE, seed=3)
WEIGHTS = rand(ROWS, HEADS, seed=5)
# Behind a request's blocks is anything: the indices of no block, too.
TABLE = torch.tensor([[7, 2, 5], [1, -1, BLOCKS], [4, -1, BLOCKS]], dtype=torch.int32)


def request_of(row: int) -> int:
    return next(number for number, end in enumerate(QUERY_ENDS) if row < end)


def keys_seen(row: int, causal: bool) -> int:
    number = request_of(row)
    return KEY_LENGTHS[number] - (QUERY_ENDS[number] - 1 - row if causal else 0)


def key_at(cache: Tensor, row: int, place: int) -> Tensor:
    return cache[TABLE[request_of(row), place // SIZE], place % SIZE, 0]


def scores_of(row: int, causal: bool) -> list[float]:
    """Term by term, as the paper writes it."""
    return [
        sum(float(WEIGHTS[row, h]) * max(0.0, float(QUERY[row, h] @ key_at(CACHE, row, place))) for h in range(HEADS))
        for place in range(keys_seen(row, causal))
    ]


def indexed(count: int, **attrs: Any) -> Tensor:
    inputs = {
        "query": QUERY, "key": CACHE, "weights": WEIGHTS, "actual_seq_lengths_query": i32(*QUERY_ENDS),
        "actual_seq_lengths_key": i32(*KEY_LENGTHS), "block_table": TABLE,
    }  # fmt: skip
    layouts = {"layout_query": "TND", "layout_key": "PA_BSND", "sparse_count": count}
    inputs |= attrs.pop("inputs", {})
    return run_op("LightningIndexer", inputs, 2, **{**layouts, **attrs})[0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("count", [1, 4, 20])
def test_the_indexer_takes_the_best_keys_that_a_row_sees(count: int, causal: bool) -> None:
    found = indexed(count, sparse_mode=3 if causal else 0)
    assert found.shape == (ROWS, 1, count)
    for row in range(ROWS):
        scores = scores_of(row, causal)
        best = sorted(range(len(scores)), key=lambda k: -scores[k])[:count]
        assert found[row, 0].tolist() == best + [-1] * (count - len(best))


def test_the_indexer_takes_the_first_of_equal_keys() -> None:
    inputs = {"query": torch.ones(1, 1, 2, 4), "key": torch.ones(1, 99, 1, 4), "weights": torch.ones(1, 1, 2)}
    assert run_op("LightningIndexer", inputs, 2, sparse_count=4)[0].flatten().tolist() == [0, 1, 2, 3]


def test_the_indexer_reads_batches_of_whole_sequences() -> None:
    query, key, weights = rand(2, 5, HEADS, WIDTH), rand(2, 5, 1, WIDTH, seed=1), rand(2, 5, HEADS, seed=2)
    found = run_op("LightningIndexer", {"query": query, "key": key, "weights": weights}, 2, sparse_count=3)[0]
    assert found.shape == (2, 5, 1, 3)
    for b in range(2):
        for s in range(5):
            scores = torch.stack([(query[b, s] @ key[b, k, 0]).clamp(min=0) @ weights[b, s] for k in range(s + 1)])
            best = scores.argsort(descending=True)[:3].tolist()
            assert found[b, s, 0].tolist() == best + [-1] * (3 - len(best))


BATCHES = rand(2, 5, HEADS, WIDTH), rand(2, 6, 1, WIDTH, seed=1), rand(2, 5, HEADS, seed=2)


def flattened(batched: Tensor, lengths: list[int]) -> Tensor:
    """``TND`` of ``BSND``."""
    return torch.cat([rows[:length] for rows, length in zip(batched, lengths, strict=True)])


def test_lengths_leave_out_rows_and_keys_of_batches() -> None:
    """And the same requests as rows one behind another, whose lengths are ends, give the same."""
    rows, keys = [3, 5], [4, 5]
    query, key, weights = BATCHES
    lengths = {"actual_seq_lengths_query": i32(*rows), "actual_seq_lengths_key": i32(*keys)}
    whole = {"query": query, "key": key, "weights": weights}
    found = run_op("LightningIndexer", {**whole, **lengths}, 2, sparse_count=3)[0]
    for b in range(2):
        for s in range(rows[b]):
            seen = keys[b] - rows[b] + s + 1
            scores = torch.stack([(query[b, s] @ key[b, k, 0]).clamp(min=0) @ weights[b, s] for k in range(seen)])
            best = scores.argsort(descending=True)[:3].tolist()
            assert found[b, s, 0].tolist() == best + [-1] * (3 - len(best))
    flat = {
        "query": flattened(query, rows), "key": flattened(key, keys), "weights": flattened(weights, rows),
        "actual_seq_lengths_query": i32(3, 8), "actual_seq_lengths_key": i32(4, 9),
    }  # fmt: skip
    again = run_op("LightningIndexer", flat, 2, sparse_count=3, layout_query="TND", layout_key="TND")[0]
    assert torch.equal(again, flattened(found, rows))


@pytest.mark.parametrize("causal", [True, False])
def test_sparse_attention_reads_batches_and_rows_one_behind_another(causal: bool) -> None:
    rows, keys, mode = [3, 5], [4, 5], 3 if causal else 0
    query, key, _ = BATCHES
    rope, key_rope, value = rand(2, 5, HEADS, ROPE), rand(2, 6, 1, ROPE, seed=1), rand(2, 6, 1, WIDTH, seed=9)
    indices = torch.stack([INDICES[:5], INDICES[3:]])[:, :, None].int()
    whole = {"query": query, "key": key, "value": value, "query_rope": rope, "key_rope": key_rope}
    lengths = {"actual_seq_lengths_query": i32(*rows), "actual_seq_lengths_kv": i32(*keys)}
    attrs = {"scale_value": SCALE, "attention_mode": 2, "sparse_mode": mode}
    found = run_op("SparseFlashAttention", {**whole, "sparse_indices": indices, **lengths}, 3, **attrs)[0]
    for b in range(2):
        assert found[b, rows[b] :].isnan().all()  # undefined: whatever reads it shows
        for s in range(rows[b]):
            seen = keys[b] - rows[b] + s + 1 if causal else keys[b]
            places = sorted({k for k in indices[b, s, 0].tolist() if 0 <= k < seen})
            scores = query[b, s] @ key[b, places, 0].T + rope[b, s] @ key_rope[b, places, 0].T
            expected = (SCALE * scores).softmax(-1) @ value[b, places, 0] if places else torch.zeros(HEADS, WIDTH)
            torch.testing.assert_close(found[b, s], expected, rtol=1e-5, atol=1e-5)
    flat = {name: flattened(part, rows if "query" in name else keys) for name, part in whole.items()}
    flat |= {"sparse_indices": flattened(indices, rows), "actual_seq_lengths_query": i32(3, 8)}
    layouts = {"layout_query": "TND", "layout_kv": "TND"}
    inputs = {**flat, "actual_seq_lengths_kv": i32(4, 9)}
    again = run_op("SparseFlashAttention", inputs, 3, **attrs, **layouts)[0]
    torch.testing.assert_close(again, flattened(found, rows))


def test_a_row_whose_indices_name_no_key_is_zero() -> None:
    found = attended(indices=torch.full((ROWS, 2), -1))
    assert found.shape == (ROWS, HEADS, WIDTH) and not found.any()


def test_the_indexer_is_the_paged_op_of_one_request_a_row() -> None:
    lengths = i32(*(keys_seen(row, True) for row in range(ROWS)))
    table = torch.stack([TABLE[request_of(row)] for row in range(ROWS)])
    expected = paged_lightning_indexer(QUERY, CACHE, WEIGHTS, lengths, table, 4)
    assert torch.equal(indexed(4), expected)


INDICES = torch.stack([torch.randperm(10, generator=torch.Generator().manual_seed(r))[:6] - 1 for r in range(ROWS)])


def attended(op_type: str = "SparseFlashAttention", indices: Tensor = INDICES, **attrs: Any) -> Tensor:
    inputs = {
        "query": QUERY, "key": CACHE, "value": CACHE, "sparse_indices": indices[:, None].int(), "block_table": TABLE,
        "actual_seq_lengths_query": i32(*QUERY_ENDS), "actual_seq_lengths_kv": i32(*KEY_LENGTHS),
        "query_rope": QUERY_ROPE, "key_rope": ROPES,
    }  # fmt: skip
    said = {"scale_value": SCALE, "layout_query": "TND", "layout_kv": "PA_BSND", "attention_mode": 2}
    inputs |= attrs.pop("inputs", {})
    return run_op(op_type, inputs, 3, **{**said, **attrs})[0]


def dense(row: int, places: list[int]) -> Tensor:
    """Attention of one row over the keys at ``places``, head by head; zeros over none."""
    if not places:
        return torch.zeros(HEADS, WIDTH)
    latents = torch.stack([key_at(CACHE, row, place) for place in places])
    ropes = torch.stack([key_at(ROPES, row, place) for place in places])
    out = []
    for h in range(HEADS):
        scores = SCALE * (latents @ QUERY[row, h] + ropes @ QUERY_ROPE[row, h])
        weights = (scores - scores.max()).exp()
        out.append((weights / weights.sum()) @ latents)
    return torch.stack(out)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [1, 2])
def test_sparse_attention_is_dense_attention_over_the_keys_that_are_named_and_seen(causal: bool, block: int) -> None:
    found = attended(sparse_mode=3 if causal else 0, sparse_block_size=block)
    for row in range(ROWS):
        named = {i * block + j for i in INDICES[row].tolist() if i >= 0 for j in range(block)}
        places = sorted(place for place in named if place < keys_seen(row, causal))
        torch.testing.assert_close(found[row], dense(row, places), rtol=1e-5, atol=1e-5)


def test_sparse_attention_is_the_paged_op_of_one_request_a_row() -> None:
    lengths = i32(*(keys_seen(row, True) for row in range(ROWS)))
    table = torch.stack([TABLE[request_of(row)] for row in range(ROWS)])
    indices = INDICES[:, None].int()
    expected = paged_sparse_attention(QUERY, CACHE, indices, QUERY_ROPE, ROPES, lengths, table, SCALE)
    torch.testing.assert_close(attended(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: indexed(4, sparse_mode=1), "attribute 'sparse_mode': expected 0 or 3, found 1"),
        (lambda: indexed(4, return_values=True), "attribute 'return_values': expected False, found True"),
        (lambda: indexed(4, layout_key="BSND"), "expected a block_table for paged keys, and for those alone"),
        (lambda: attended(attention_mode=0), "attribute 'attention_mode': expected 2, found 0"),
        (lambda: attended(return_softmax_lse=True), "attribute 'return_softmax_lse': expected False, found True"),
        (lambda: attended(inputs={"sinks": torch.ones(HEADS)}), "input 'sinks' is not part of the reference"),
        (lambda: attended(inputs={"query_rope": None}), "expected query_rope and key_rope in attention mode 2"),
        (lambda: attended(indices=INDICES[:1]), r"indices: found \[1, 1, 6\]"),
        (lambda: attended(inputs={"actual_seq_lengths_kv": i32(9, -1, 3)}), "key lengths that are not negative"),
        (lambda: attended(inputs={"actual_seq_lengths_kv": i32(9, 5, 3)}), "block_table names blocks beyond 9"),
        (lambda: attended(inputs={"actual_seq_lengths_kv": i32(9, 3)}), "expected a key length for each of 3 requests"),
        (lambda: attended(inputs={"actual_seq_lengths_query": i32(5, 3, 8)}), r"expected ends of 8 rows, found \[5, 3"),
        (lambda: attended(inputs={"actual_seq_lengths_query": i32(5, 5, 7)}), r"expected ends of 8 rows, found \[5, 5"),
        (lambda: attended(inputs={"actual_seq_lengths_query": None}), "expected actual_seq_lengths_query, found none"),
        (lambda: attended(inputs={"key": CACHE.repeat(1, 1, 2, 1)}), "keys: expected one head, found"),
        (lambda: attended(inputs={"key": CACHE[..., 0, :]}), "keys: expected PA_BSND, found"),
        (lambda: attended(layout_query="BNSD"), "layout of queries: expected TND or BSND, found 'BNSD'"),
        (lambda: attended(layout_kv="PA_NZ"), "layout of keys: expected PA_BSND, TND or BSND, found 'PA_NZ'"),
        (lambda: indexed(4, inputs={"weights": WEIGHTS[:, :1]}), r"weights: expected \[8, 3\], found \[8, 1\]"),
        (lambda: indexed(4, inputs={"weights": WEIGHTS.half(), "key": CACHE.half()}), "input 'key': expected float32"),
    ],
)
def test_modes_that_the_reference_does_not_have_are_errors(call: Any, message: str) -> None:
    with pytest.raises(GeError, match=message):
        call()


def test_a_block_beyond_the_cache_is_an_error() -> None:
    inputs = {
        "query": QUERY[:1], "key": CACHE, "weights": WEIGHTS[:1], "actual_seq_lengths_query": i32(1),
        "actual_seq_lengths_key": i32(1), "block_table": i32(BLOCKS)[None],
    }  # fmt: skip
    with pytest.raises(GeError, match="block_table names blocks beyond 9"):
        run_op("LightningIndexer", inputs, 2, layout_query="TND", layout_key="PA_BSND")


def test_the_stand_ins_of_the_other_tests_agree() -> None:
    """Written apart from these: the same numbers from both."""
    out, _ = npu_ops._indexer(
        QUERY, CACHE, WEIGHTS, actual_seq_lengths_query=i32(*QUERY_ENDS), actual_seq_lengths_key=i32(*KEY_LENGTHS),
        block_table=TABLE.clamp(0, BLOCKS - 1), layout_query="TND", layout_key="PA_BSND", sparse_count=4,
    )  # fmt: skip
    assert torch.equal(out, indexed(4))
