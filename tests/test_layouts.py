"""Token layouts against blocks cut by numpy and against a dense causal mask."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cpcompile.errors import CpcompileError, LayoutError
from cpcompile.layouts import KINDS, PAD, AttentionCall, TokenLayout, attended_keys, pad_requests

FEW = settings(max_examples=300, deadline=None)


@st.composite
def layouts(draw: st.DrawFn, kinds: tuple[str, ...] = (*KINDS, "padded")) -> TokenLayout:
    kind = draw(st.sampled_from(kinds))
    ranks = draw(st.integers(1, 8))
    requests = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=5))
    lengths, prefixes = (tuple(r[i] for r in requests) for i in (0, 1))
    if kind == "interleave" and sum(lengths) < ranks:
        lengths, prefixes = (*lengths, ranks), (*prefixes, 3)
    if kind != "padded":
        return TokenLayout(kind, ranks, lengths, prefixes)
    more = draw(st.one_of(st.none(), st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths))))
    padded = pad_requests(lengths, ranks) if more is None else np.add(lengths, more).astype(int).tolist()
    return TokenLayout("zigzag", ranks, lengths, prefixes, padded)


def cut_rows(layout: TokenLayout, rank: int) -> list[int]:
    """The rank's rows, as the definitions of the layouts say, without pads at the rank's end."""
    kind, ranks = layout.kind, layout.ranks
    batch = np.arange(layout.tokens)
    requests = np.split(batch, np.cumsum(layout.lengths)[:-1]) if layout.lengths else []
    if kind == "contiguous":
        m = -(-layout.tokens // ranks)
        return batch[rank * m : (rank + 1) * m].tolist()
    if kind == "interleave":
        return batch[rank::ranks].tolist()
    if kind == "sp":
        return [t for request in requests for t in np.array_split(request, ranks)[rank]]
    if layout.padded:
        whole = [[*r, *[PAD] * (rows - len(r))] for r, rows in zip(requests, layout.padded, strict=True)]
        pairs = [np.array_split(np.array(r, dtype=int), 2 * ranks) for r in whole]
        return [t for blocks in pairs for t in (*blocks[rank], *blocks[2 * ranks - 1 - rank])]
    blocks = [np.array_split(r, 2 * ranks) for r in requests]
    return [t for half in (rank, 2 * ranks - 1 - rank) for b in blocks for t in b[half]]


def causal(layout: TokenLayout) -> torch.Tensor:
    """Which keys (of all requests: prefix, then new tokens) each token attends, bool [T, keys]."""
    numbers = range(len(layout.lengths))
    query = [(i, layout.prefixes[i] + j) for i in numbers for j in range(layout.lengths[i])]
    key = [(i, j) for i in numbers for j in range(layout.prefixes[i] + layout.lengths[i])]
    mask = [[k[0] == q[0] and k[1] <= q[1] for k in key] for q in query]
    return torch.tensor(mask, dtype=torch.bool).reshape(len(query), len(key))


def attended(layout: TokenLayout, call: AttentionCall) -> dict[int, torch.Tensor]:
    """What a right-down causal kernel attends given the lengths of ``call``: local row -> bool [keys]."""
    totals = np.add(layout.prefixes, layout.lengths).astype(int)
    first_key = [0, *np.cumsum(totals)]
    seen, first = {}, 0
    for end, keys, request in zip(call.query_ends, call.key_lengths, call.requests, strict=True):
        assert keys <= totals[request]
        for j, row in enumerate(call.rows[first:end]):
            count = keys - (end - first) + j + 1
            seen[row] = torch.zeros(int(totals.sum()), dtype=torch.bool)
            seen[row][first_key[request] : first_key[request] + count] = True
        first = end
    assert first == len(call.rows)
    return seen


@FEW
@given(layouts())
def test_rows_are_the_definition_and_pads_lie_only_where_it_says(layout: TokenLayout) -> None:
    ranks = range(layout.ranks)
    expected = [cut_rows(layout, rank) for rank in ranks]
    m = max(map(len, expected))
    assert layout.rows_per_rank == m
    assert [list(layout.rows(rank)) for rank in ranks] == [rows + [PAD] * (m - len(rows)) for rows in expected]


@FEW
@given(layouts())
def test_every_token_has_one_owner_and_restore_undoes_split(layout: TokenLayout) -> None:
    owned = [token for rank in range(layout.ranks) for token in layout.owned(rank)]
    assert sorted(owned) == list(range(layout.tokens))
    tokens = torch.arange(layout.tokens) + 100
    assert layout.split_index.shape == layout.valid.shape == (layout.ranks, layout.rows_per_rank)
    assert layout.split_index.dtype == layout.restore_index.dtype == torch.int64
    if layout.tokens:
        rows = tokens[layout.split_index].masked_fill(~layout.valid, -1)
        assert rows.flatten()[layout.restore_index].equal(tokens)
        assert (rows == -1).sum() == rows.numel() - layout.tokens
    assert (torch.tensor(owned, dtype=torch.int64) + 100)[layout.unpadded_restore_index].equal(tokens)


@FEW
@given(layouts())
def test_positions_are_the_original_ones(layout: TokenLayout) -> None:
    original = [p + j for p, n in zip(layout.prefixes, layout.lengths, strict=True) for j in range(n)]
    for rank in range(layout.ranks):
        rows = layout.rows(rank)
        assert layout.positions(rank) == tuple(0 if token == PAD else original[token] for token in rows)


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_lengths_say_the_causal_mask(layout: TokenLayout) -> None:
    mask = causal(layout)
    for rank in range(layout.ranks):
        expected = {row: mask[token] for row, token in enumerate(layout.rows(rank)) if token != PAD}
        assert attended_keys(layout, rank) == sum(int(keys.sum()) for keys in expected.values())
        ways = [(layout.per_token_call(rank),)]
        if layout.kind != "interleave":
            ways.append(layout.attention_calls(rank))
            assert all(call.requests == tuple(range(len(layout.lengths))) for call in ways[-1])
        for calls in ways:
            seen = [attended(layout, call) for call in calls]
            assert sum(map(len, seen)) == len(expected)
            merged = {row: keys for part in seen for row, keys in part.items()}
            assert merged.keys() == expected.keys()
            assert all(merged[row].equal(keys) for row, keys in expected.items())


def test_zigzag_calls_have_their_own_lengths() -> None:
    """Two ranks, blocks of 3, 2, 2, 2 and of 1, 1, 0, 0 tokens."""
    layout = TokenLayout("zigzag", 2, (9, 2), (4, 0))
    early, late = layout.attention_calls(0)
    assert early == AttentionCall((0, 1, 2, 3), (3, 4), (4 + 3, 1), (0, 1))
    assert late == AttentionCall((4, 5), (2, 2), (4 + 9, 2), (0, 1))
    assert layout.attention_calls(1)[0] == AttentionCall((0, 1, 2), (2, 3), (4 + 5, 2), (0, 1))
    assert layout.per_token_call(1).key_lengths == (8, 9, 2, 10, 11)
    assert layout.per_token_call(1).query_ends == (1, 2, 3, 4, 5)


def test_contiguous_key_length_is_what_the_rank_leaves_of_the_request() -> None:
    layout = TokenLayout("contiguous", 2, (3, 7), (0, 5))
    (first,), (second,) = (layout.attention_calls(rank) for rank in (0, 1))
    assert (first.query_ends, first.key_lengths) == ((3, 5), (3, 5 + 2))
    assert (second.query_ends, second.key_lengths) == ((0, 5), (3, 5 + 7))


def test_requests_padded_one_by_one() -> None:
    """The one-token request is a decode: one row on each rank. The other two are padded to multiples of 4."""
    layout = TokenLayout("zigzag", 2, (1, 5, 8), padded=pad_requests((1, 5, 8), 2))
    assert layout.padded == (2, 8, 8)
    expected = [0, 9, 1, 2, 10, 11, 12, 13, 3, 4, 5, 6, 14, 15, 16, 17, 7, 8]
    assert layout.padded_restore_index.tolist() == expected
    real = [True, False] + [True] * 5 + [False] * 3 + [True] * 8
    assert layout.restore_index.tolist() == [row for row, here in zip(expected, real, strict=True) if here]
    assert layout.rows(0) == (0, 1, 2, PAD, PAD, 6, 7, 12, 13)
    assert layout.rows(1) == (PAD, 3, 4, 5, PAD, 8, 9, 10, 11)


def test_sp_layout_with_and_without_padding() -> None:
    layout = TokenLayout("sp", 3, (4, 5, 1))
    assert [layout.owned(rank) for rank in range(3)] == [(0, 1, 4, 5, 9), (2, 6, 7), (3, 8)]
    assert [layout.rows(rank) for rank in range(3)] == [(0, 1, 4, 5, 9), (2, 6, 7, PAD, PAD), (3, 8, PAD, PAD, PAD)]
    assert layout.unpadded_restore_index.tolist() == [0, 1, 5, 8, 2, 3, 6, 7, 9, 4]
    assert layout.restore_index.tolist() == [0, 1, 5, 10, 2, 3, 6, 7, 11, 4]


@FEW
@given(st.sampled_from(KINDS), st.integers(1, 16), st.integers(0, 300))
@example("zigzag", 8, 17).via("24 rows, not 64")
@example("zigzag", 8, 1023).via("128 rows per rank")
def test_one_request_needs_no_more_rows_than_the_ceiling(kind: str, ranks: int, tokens: int) -> None:
    tokens += ranks if kind == "interleave" else 0
    assert TokenLayout(kind, ranks, (tokens,)).rows_per_rank == -(-tokens // ranks)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_is_minimal(kind: str) -> None:
    assert TokenLayout(kind, 8, (17,)).split_index.numel() == 24
    assert TokenLayout(kind, 8, (1023,)).rows_per_rank == 128


def spread(layout: TokenLayout) -> int:
    loads = [attended_keys(layout, rank) for rank in range(layout.ranks)]
    return max(loads) - min(loads)


requests_of = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 2000)), min_size=1, max_size=4)


@FEW
@given(st.integers(1, 16), requests_of)
@example(16, [(17, 0)])
def test_zigzag_balances_the_load_to_less_than_two_rows_and_one_block(
    ranks: int, requests: list[tuple[int, int]]
) -> None:
    """Loads differ by at most the sum over requests of prefix + 2 * length: two queries that attend it whole, at most.

    A request of more than ``2*ranks`` tokens has a block of at least two queries: what it adds to the difference is
    then no more than one block's queries attending the whole request.
    """
    layout = TokenLayout("zigzag", ranks, *zip(*requests, strict=True))
    assert spread(layout) <= sum(prefix + 2 * length for length, prefix in requests)
    long = [(length, prefix) for length, prefix in requests if length > 2 * ranks]
    layout = TokenLayout("zigzag", ranks, tuple(r[0] for r in long), tuple(r[1] for r in long))
    assert spread(layout) <= sum(-(-length // (2 * ranks)) * (prefix + length) for length, prefix in long)


@FEW
@given(st.integers(1, 16), requests_of)
def test_zigzag_balances_equal_blocks_exactly(ranks: int, requests: list[tuple[int, int]]) -> None:
    layout = TokenLayout("zigzag", ranks, tuple(2 * ranks * n for n, _ in requests), tuple(p for _, p in requests))
    assert spread(layout) == 0


def test_contiguous_is_not_balanced() -> None:
    """What zigzag is for: the last of 8 ranks attends 15 times what the first does."""
    loads = [attended_keys(TokenLayout("contiguous", 8, (1024,)), rank) for rank in range(8)]
    assert loads[7] > 14 * loads[0]
    assert spread(TokenLayout("zigzag", 8, (1024,))) == 0


def test_layouts_are_values() -> None:
    layout = TokenLayout("sp", 2, [3, 4])  # type: ignore[arg-type]
    assert layout == TokenLayout("sp", 2, (3, 4), (0, 0)) and len({layout, replace(layout)}) == 1


BAD = {
    "unknown token layout 'zigzga' (did you mean 'zigzag'?)": lambda: TokenLayout("zigzga", 2, (3,)),
    "expected ranks >= 1; found 0": lambda: TokenLayout("sp", 0, (3,)),
    "expected lengths >= 0; found -1 for request 1": lambda: TokenLayout("sp", 2, (3, -1)),
    "expected prefixes >= 0; found -2 for request 0": lambda: TokenLayout("sp", 2, (3,), (-2,)),
    "expected 1 prefixes, one per length; found 2": lambda: TokenLayout("sp", 2, (3,), (1, 2)),
    "interleave applies if T >= 4 (the ranks); found T = 3: use 'contiguous'": lambda: TokenLayout(
        "interleave", 4, (1, 2)
    ),
    "padded requests apply to zigzag; found kind 'sp'": lambda: TokenLayout("sp", 2, (3,), padded=(4,)),
    "expected 1 padded, one per length; found 2": lambda: TokenLayout("zigzag", 2, (3,), padded=(4, 4)),
    "expected padded >= 3 (the length) for request 0; found 2": lambda: TokenLayout("zigzag", 2, (3,), padded=(2,)),
    "expected a rank in [0, 2); found 2": lambda: TokenLayout("sp", 2, (3,)).rows(2),
    "expected a rank in [0, 2); found -1": lambda: attended_keys(TokenLayout("sp", 2, (3,)), -1),
    "found interleave: use per_token_call": lambda: TokenLayout("interleave", 2, (3,)).attention_calls(0),
}


@pytest.mark.parametrize("message", BAD)
def test_errors_are_one_line_and_name_the_remedy(message: str) -> None:
    with pytest.raises(LayoutError) as caught:
        BAD[message]()
    text = str(caught.value)
    assert message in text and "\n" not in text and isinstance(caught.value, CpcompileError)
    assert ": " in text or "did you mean" in text
