"""Our token layouts against SGLang's own context-parallel strategies: who has which token, and which keys it sees."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.cp.interleave import InterleaveCPStrategy
from sglang.srt.layers.cp.zigzag import ZigzagCPStrategy

from cpcompile.layouts import TokenLayout

SIZES = (2, 3, 4, 8)
BATCHES = 60  # of random lengths, for each number of ranks


class Zigzag(ZigzagCPStrategy):
    cp_rank = 0  # SGLang reads it from its process groups


class Interleave(InterleaveCPStrategy):
    cp_rank = 0


def batches(shortest: int) -> list[tuple[list[int], list[int]]]:
    """Lengths of new tokens and of cached prefixes."""
    draw = random.Random(0)
    found = []
    for _ in range(BATCHES):
        count = draw.randint(1, 5)
        lengths = [draw.randint(shortest, 70) for _ in range(count)]
        found.append((lengths, [draw.choice((0, draw.randint(1, 40))) for _ in range(count)]))
    return found


def seen_by(strategy: Any, rank: int, lengths: list[int], prefixes: list[int]) -> Any:
    strategy.cp_rank = rank
    totals = [length + prefix for length, prefix in zip(lengths, prefixes, strict=True)]
    return SimpleNamespace(attn_cp_metadata=strategy.build_metadata(sum(lengths), totals, lengths))


@pytest.mark.parametrize("ranks", SIZES)
@pytest.mark.parametrize(("kind", "strategy_class"), [("zigzag", Zigzag), ("interleave", Interleave)])
def test_tokens_are_dealt_as_sglang_does(kind: str, strategy_class: type, ranks: int) -> None:
    strategy = strategy_class(ranks)
    for lengths, prefixes in batches(2 * ranks):
        layout = TokenLayout(kind, ranks, tuple(lengths), tuple(prefixes))
        ids = torch.arange(sum(lengths))
        for rank in range(ranks):
            batch = seen_by(strategy, rank, lengths, prefixes)
            owned = layout.owned(rank)
            assert tuple(strategy.local_q_indices(len(ids), batch).tolist()) == owned
            assert batch.attn_cp_metadata.per_rank_actual_token[rank] == len(owned)
            assert tuple(strategy.shard_position_ids(ids, batch).tolist()) == owned
            assert set(batch.attn_cp_metadata.max_rank_len) == {layout.rows_per_rank}


@pytest.mark.parametrize("ranks", SIZES)
def test_zigzag_restores_and_attends_as_sglang_does(ranks: int) -> None:
    strategy = Zigzag(ranks)
    for lengths, prefixes in batches(2 * ranks):
        layout = TokenLayout("zigzag", ranks, tuple(lengths), tuple(prefixes))
        metadata = seen_by(strategy, 0, lengths, prefixes).attn_cp_metadata
        gathered = torch.tensor([token for rank in range(ranks) for token in layout.owned(rank)])
        chunks = torch.split(gathered, metadata.reverse_split_len)
        theirs = torch.cat([chunks[i] for i in metadata.cp_reverse_index])
        assert torch.equal(theirs, gathered[layout.unpadded_restore_index])
        assert torch.equal(theirs, torch.arange(sum(lengths)))
        for rank in range(ranks):
            metadata = seen_by(strategy, rank, lengths, prefixes).attn_cp_metadata
            early, late = layout.attention_calls(rank)
            assert (*early.key_lengths,) == (*metadata.kv_len_prev_list,)
            assert (*late.key_lengths,) == (*metadata.kv_len_next_list,)
            assert (0, *early.query_ends) == (*metadata.cu_seqlens_q_prev_tensor.tolist(),)
            assert (0, *late.query_ends) == (*metadata.cu_seqlens_q_next_tensor.tolist(),)
