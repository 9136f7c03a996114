"""The ops against dense masked torch, on any rows, lengths, blocks and chunks, and as operators of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cpcompile import ops, paged_ops  # noqa: F401  registers the ops

own = torch.ops.cpcompile
HEADS, WIDTH, ROPE, SIZE, BLOCKS, MOST = 3, 8, 4, 4, 23, 5
INDEXER, SPARSE, DENSE = (
    own.paged_lightning_indexer.default, own.paged_sparse_attention.default, own.paged_attention.default,
)  # fmt: skip


def rows(count: int, seed: int, shared: int = 3) -> tuple[Tensor, Tensor]:
    """Key lengths, of which some are 0 or less, and block tables, which neighbours share, with garbage behind."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(-2, MOST * SIZE + 1, (count,), generator=g, dtype=torch.int32)
    requests = torch.stack([torch.randperm(BLOCKS, generator=g)[:MOST] for _ in range(1 + count // shared)])
    table = requests[torch.arange(count) // shared].int()
    needed = -(-lengths.clamp(min=0) // SIZE)
    longest = [int(needed[i // shared * shared : (i // shared + 1) * shared].max()) for i in range(count)]
    return lengths, table.masked_fill(torch.arange(MOST) >= torch.tensor(longest)[:, None], 1 << 30)


def indexer(count: int, chosen: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    query, weights = torch.randn(count, HEADS, WIDTH, generator=g), torch.randn(count, HEADS, generator=g)
    cache = torch.randn(BLOCKS, SIZE, 1, WIDTH, generator=g)
    return [*(t.to(dtype) for t in (query, cache, weights)), *rows(count, seed), chosen]


def attention(count: int, chosen: int | None, dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Any]:
    g = torch.Generator().manual_seed(seed)
    query, query_rope = torch.randn(count, HEADS, WIDTH, generator=g), torch.randn(count, HEADS, ROPE, generator=g)
    cache, rope = torch.randn(BLOCKS, SIZE, 1, WIDTH, generator=g), torch.randn(BLOCKS, SIZE, 1, ROPE, generator=g)
    made: list[Any] = [query.to(dtype), cache.to(dtype), query_rope.to(dtype), rope.to(dtype), *rows(count, seed), 0.3]
    if chosen is not None:
        order = torch.rand(count, 1, max(chosen, MOST * SIZE), generator=g).argsort(-1)[..., :chosen]
        made.insert(2, order.masked_fill(torch.rand(order.shape, generator=g) < 0.2, -1).int())
    return made


def keys_of(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """``[K, D]`` of one row, key by key."""
    picked = [cache[int(table[k // SIZE]), k % SIZE, 0] for k in range(max(0, length))]
    return torch.stack(picked) if picked else cache.new_zeros(0, cache.shape[-1])


def dense_choice(query: Tensor, cache: Tensor, weights: Tensor, lengths: Tensor, table: Tensor, count: int) -> Tensor:
    out = torch.full((len(query), 1, count), -1, dtype=torch.int32)
    for row in range(len(query)):
        keys = keys_of(cache, table[row], int(lengths[row])).double()
        scores = (weights[row, :, None].double() * (query[row].double() @ keys.T).relu()).sum(0)
        best = sorted(range(len(keys)), key=lambda k, scores=scores: (-scores[k].item(), k))[:count]
        out[row, 0, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return out


def dense_attention(inputs: list[Any], indices: Tensor | None) -> Tensor:
    query, cache, query_rope, rope, lengths, table, scale = inputs
    out = torch.zeros_like(query, dtype=torch.float64)
    for row in range(len(query)):
        length = int(lengths[row])
        latent, turned = keys_of(cache, table[row], length).double(), keys_of(rope, table[row], length).double()
        seen = torch.ones(len(latent), dtype=torch.bool)
        if indices is not None:
            seen = torch.zeros_like(seen)
            seen[[k for k in indices[row, 0].tolist() if 0 <= k < length]] = True
        if not seen.any():
            continue
        scores = scale * (query[row].double() @ latent.T + query_rope[row].double() @ turned.T)
        out[row] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ latent
    return out


@pytest.mark.parametrize("count", [0, 1, 17])
@pytest.mark.parametrize("chosen", [1, 6, MOST * SIZE + 9])
def test_the_indexer_chooses_the_best_visible_keys(count: int, chosen: int) -> None:
    inputs = indexer(count, chosen, seed=chosen)
    assert torch.equal(INDEXER(*inputs), dense_choice(*inputs))


def test_of_equal_scores_the_first_keys_are_chosen() -> None:
    inputs = indexer(9, 6)
    inputs[0] = torch.zeros_like(inputs[0])
    assert torch.equal(INDEXER(*inputs), dense_choice(*inputs))


@pytest.mark.parametrize("count", [0, 1, 17])
@pytest.mark.parametrize("chosen", [None, 1, 6, MOST * SIZE + 9])
def test_attention_is_dense_masked_attention(count: int, chosen: int | None) -> None:
    inputs = attention(count, chosen, seed=count)
    found = (DENSE if chosen is None else SPARSE)(*inputs)
    indices = None if chosen is None else inputs.pop(2)
    torch.testing.assert_close(found, dense_attention(inputs, indices), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    inputs = attention(9, 6, dtype)
    found = SPARSE(*inputs)
    assert found.dtype == dtype
    expected = dense_attention(inputs[:2] + inputs[3:], inputs[2])
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("op", [INDEXER, SPARSE, DENSE])
def test_the_table_of_a_row_without_keys_is_not_read(op: Any) -> None:
    inputs = indexer(5, 6) if op is INDEXER else attention(5, 6 if op is SPARSE else None)
    names = [argument.name for argument in op._schema.arguments]
    inputs[names.index("key_lengths")] = torch.tensor([3, 0, 0, -1, 9], dtype=torch.int32)
    inputs[names.index("block_table")] = torch.tensor(
        [[1, 2, 3]] + [[1 << 30] * 3] * 3 + [[1, 2, 3]], dtype=torch.int32
    )
    found = op(*inputs)
    assert (found[1:4] == (-1 if op is INDEXER else 0)).all() and (found[[0, 4]] != 0).any()


CALLS = [(INDEXER, indexer(17, 6)), (SPARSE, attention(17, 6)), (DENSE, attention(17, None))]
ROWS = {INDEXER: (0, 2, 3, 4), SPARSE: (0, 2, 3, 5, 6), DENSE: (0, 2, 4, 5)}


@pytest.mark.parametrize(("op", "inputs"), CALLS)
def test_any_part_of_the_rows_gives_those_rows_results(op: Any, inputs: list[Any]) -> None:
    whole = op(*inputs)
    for part in (slice(0, 6), slice(5, 17), slice(16, 17)):
        mine = [value[part] if number in ROWS[op] else value for number, value in enumerate(inputs)]
        torch.testing.assert_close(op(*mine), whole[part], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "inputs"), CALLS)
def test_the_size_of_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch, op: Any, inputs: list[Any]) -> None:
    whole = op(*inputs)
    monkeypatch.setattr(ops, "SCRATCH_BYTES", 1)
    torch.testing.assert_close(op(*inputs), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("op", "inputs"), CALLS)
def test_operators_of_torch(op: Any, inputs: list[Any]) -> None:
    torch.library.opcheck(op, tuple(inputs))


@pytest.mark.parametrize(("op", "inputs"), CALLS)
def test_wrong_shapes_and_dtypes_are_refused(op: Any, inputs: list[Any]) -> None:
    names = [argument.name for argument in op._schema.arguments]
    for number, value in enumerate(inputs):
        if isinstance(value, Tensor):
            wrong = [*inputs[:number], value[..., None], *inputs[number + 1 :]]
            with pytest.raises(ValueError, match="expected"):
                op(*wrong)
    for name in ("key_lengths", "block_table"):
        number = names.index(name)
        with pytest.raises(ValueError, match=f"{name}: expected int32, found torch.int64"):
            op(*inputs[:number], inputs[number].long(), *inputs[number + 1 :])
