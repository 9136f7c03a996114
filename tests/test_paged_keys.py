"""Paged keys: the same attention and the same choice of keys, over blocks."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile import ops  # noqa: F401
from cpcompile.passes.paged_keys import PagedKeys

own = torch.ops.cpcompile


def attend(query, key, weights, rope, key_rope, lengths):  # type: ignore[no-untyped-def]
    chosen = own.lightning_indexer(query, key, weights, lengths, 5)
    return chosen, own.sparse_attention(query, key, chosen, rope, key_rope, lengths, 0.3)


def given(batch: int, rows: int, keys: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    lengths = torch.randint(0, keys + 1, (batch, rows), dtype=torch.int32)
    sizes = [(batch, rows, 3, 8), (batch, keys, 1, 8), (batch, rows, 3), (batch, rows, 3, 4), (batch, keys, 1, 4)]
    # Positive, for no two keys to have a score of 0: which of equal scores is chosen is left open.
    return (*(torch.rand(size) for size in sizes), lengths)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize(("batch", "rows", "keys"), [(1, 6, 6), (2, 5, 11), (2, 3, 8)])
def test_attention_over_blocks_is_that_over_keys(mode: str, batch: int, rows: int, keys: int) -> None:
    inputs = given(batch, rows, keys)
    gm = make_fx(attend, tracing_mode=mode)(*inputs)
    assert PagedKeys(block=4)(gm).rewrites == 2
    names = [str(node.target) for node in gm.graph.nodes]
    assert "cpcompile.paged_lightning_indexer.default" in names and "cpcompile.sparse_attention.default" not in names
    other = inputs if mode == "fake" else given(batch, rows + 2, keys + 3)
    if mode == "symbolic" and batch == 1:
        other = inputs  # rows and keys are one symbol
    (chosen, out), (expected, reference) = gm(*other), attend(*other)
    assert torch.equal(chosen, expected)
    torch.testing.assert_close(out, reference)
    assert PagedKeys(block=4)(gm).rewrites == 0
