"""GE's attention and indexer against loops over rows and against the paged ops; ops that write caches, too."""

from __future__ import annotations

from typing import Any

import npu_fused_ops
import npu_ops
import pytest
import torch
from ge_build import one_op, run_op
from torch import Tensor

from cpcompile.lowering.ge import GeError, GeProgram, interpret
from cpcompile.paged_ops import paged_lightning_indexer, paged_sparse_attention

COVERED = {
    "LightningIndexer", "SparseFlashAttention", "FusedInferAttentionScore", "KvRmsNormRopeCache", "MlaPrologV3",
}  # fmt: skip

HEADS, WIDTH, ROPE, SIZE, BLOCKS = 3, 8, 4, 4, 9
QUERY_ENDS, KEY_LENGTHS = (
    [5, 5, 8],
    [9, 3, 3],
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
TABLE = torch.tensor([[7, 2, 5], [1, 0, 0], [4, 8, 0]], dtype=torch.int32)


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
    inputs = {"query": torch.ones(1, 1, 2, 4), "key": torch.ones(1, 6, 1, 4), "weights": torch.ones(1, 1, 2)}
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


def test_sparse_attention_over_all_keys_is_the_fused_dense_one() -> None:
    every = torch.arange(max(KEY_LENGTHS)).expand(ROWS, -1)
    torch.testing.assert_close(attended(indices=every), fused(), rtol=1e-5, atol=1e-5)


def test_sparse_attention_is_the_paged_op_of_one_request_a_row() -> None:
    lengths = i32(*(keys_seen(row, True) for row in range(ROWS)))
    table = torch.stack([TABLE[request_of(row)] for row in range(ROWS)])
    indices = INDICES[:, None].int()
    expected = paged_sparse_attention(QUERY, CACHE, indices, QUERY_ROPE, ROPES, lengths, table, SCALE)
    torch.testing.assert_close(attended(), expected, rtol=1e-5, atol=1e-5)


def fused(**attrs: Any) -> Tensor:
    masked = attrs.get("sparse_mode", 3) == 3
    inputs = {
        "query": QUERY, "key": [CACHE.transpose(1, 2).contiguous()], "value": [CACHE.transpose(1, 2).contiguous()],
        "atten_mask": torch.ones(2048, 2048, dtype=torch.bool).triu(1) if masked else None,
        "actual_seq_lengths": torch.tensor(QUERY_ENDS), "actual_seq_lengths_kv": torch.tensor(KEY_LENGTHS),
        "block_table": TABLE, "query_rope": QUERY_ROPE, "key_rope": ROPES.transpose(1, 2).contiguous(),
    }  # fmt: skip
    said = {"num_heads": HEADS, "num_key_value_heads": 1, "input_layout": "TND", "block_size": SIZE, "scale": SCALE}
    return run_op("FusedInferAttentionScore", inputs, 2, **{**said, "sparse_mode": 3, **attrs})[0]


@pytest.mark.parametrize("causal", [True, False])
def test_fused_attention_reads_every_key_that_a_row_sees(causal: bool) -> None:
    found = fused(sparse_mode=3 if causal else 0)
    for row in range(ROWS):
        expected = dense(row, list(range(keys_seen(row, causal))))
        torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-5)


def test_heads_of_queries_share_heads_of_keys_in_groups() -> None:
    query, keys, values = rand(2, 4, 6), rand(1, 2, 4, 6, seed=1), rand(1, 2, 4, 5, seed=2)
    inputs = {
        "query": query, "key": [keys], "value": [values], "actual_seq_lengths": torch.tensor([2]),
        "actual_seq_lengths_kv": torch.tensor([3]), "block_table": i32(0)[None],
    }  # fmt: skip
    said = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND", "block_size": 4}
    found = run_op("FusedInferAttentionScore", inputs, 2, **said)[0]
    for h in range(4):
        weights = (query[:, h] @ keys[0, h // 2, :3].T).softmax(-1)
        torch.testing.assert_close(found[:, h], weights @ values[0, h // 2, :3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: indexed(4, sparse_mode=1), "attribute 'sparse_mode': expected 0 or 3, found 1"),
        (lambda: indexed(4, return_values=True), "attribute 'return_values': expected False, found True"),
        (lambda: indexed(4, layout_key="BSND"), "expected a block_table for paged keys, and for those alone"),
        (lambda: attended(attention_mode=0), "attribute 'attention_mode': expected 2, found 0"),
        (lambda: fused(input_layout="BSND"), "attribute 'input_layout': expected 'TND', found 'BSND'"),
        (lambda: fused(block_size=128), "attribute 'block_size': expected 4, found 128"),
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


# ---- ops that write caches -----------------------------------------------------------------------------------------


def run_writing(
    op_type: str, inputs: dict[str, Tensor], outputs: int, **attrs: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Results, and the inputs afterwards."""
    graph, values = one_op(op_type, {name: value.clone() for name, value in inputs.items()}, outputs, **attrs)
    return interpret([GeProgram(graph, values)])[0], values


def test_keys_are_normed_rotated_and_written_to_the_caches() -> None:
    rows, index = 5, torch.tensor([6, 0, 9, 3, 1])
    inputs = {
        "kv": rand(rows, 1, 1, WIDTH + ROPE), "gamma": rand(WIDTH), "cos": rand(rows, 1, 1, ROPE, seed=1),
        "sin": rand(rows, 1, 1, ROPE, seed=2), "index": index, "k_cache": ROPES, "ckv_cache": CACHE,
    }  # fmt: skip
    rope, latent, k_cache, ckv_cache = npu_fused_ops._keys(**inputs, cache_mode="PA", is_output_kv=True)
    found, values = run_writing("KvRmsNormRopeCache", inputs, 4, cache_mode="PA", is_output_kv=True)
    for ours, theirs in zip(found, (k_cache, ckv_cache, rope, latent), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(values[5], found[0]) and torch.equal(values[6], found[1])


def test_the_prolog_computes_queries_and_writes_keys() -> None:
    tokens, hidden, low, nope = 5, 6, 7, 3
    inputs = {
        "token_x": rand(tokens, hidden), "weight_dq": rand(hidden, low),
        "weight_uq_qr": rand(low, HEADS * (nope + ROPE)), "weight_uk": rand(HEADS, nope, WIDTH),
        "weight_dkv_kr": rand(hidden, WIDTH + ROPE), "rmsnorm_gamma_cq": rand(low),
        "rmsnorm_gamma_ckv": rand(WIDTH), "rope_sin": rand(tokens, ROPE, seed=1), "rope_cos": rand(tokens, ROPE),
        "kv_cache": CACHE, "kr_cache": ROPES, "cache_index": torch.tensor([6, 0, 9, 3, 1]),
    }  # fmt: skip
    *expected, kv_cache, kr_cache = npu_fused_ops._prolog(**inputs, query_norm_flag=True)
    found, values = run_writing("MlaPrologV3", inputs, 7, query_norm_flag=True)
    wanted = [expected[0], expected[1], kv_cache, kr_cache, expected[2], expected[3], expected[4]]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert torch.equal(values[9], kv_cache) or torch.allclose(values[9], kv_cache, atol=1e-5)


def test_the_stand_ins_of_the_other_tests_agree() -> None:
    """Written apart from these: the same numbers from both."""
    out, _ = npu_ops._indexer(
        QUERY, CACHE, WEIGHTS, actual_seq_lengths_query=i32(*QUERY_ENDS), actual_seq_lengths_key=i32(*KEY_LENGTHS),
        block_table=TABLE, layout_query="TND", layout_key="PA_BSND", sparse_count=4,
    )  # fmt: skip
    assert torch.equal(out, indexed(4))
