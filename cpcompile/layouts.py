"""Which rank owns which token under context parallelism, in which order, and what its attention calls need.

A batch is several requests, flattened one after another; each request may have a cached prefix. A layout gives every
token to exactly one of ``ranks`` ranks. All ranks hold the same number of rows; the rows that hold no token are pads.

``contiguous``  rank r has rows ``[r*m, (r+1)*m)`` of the flattened batch, ``m = ceil(T/ranks)``.
``interleave``  rank r has the tokens whose index in the flattened batch is r modulo ranks.
``zigzag``      every request is cut into ``2*ranks`` blocks, the first ones longer by a token where it does not divide;
                rank r has blocks r and ``2*ranks-1-r``: first all requests' early blocks, then all late ones.
``sp``          every request is cut into ``ranks`` pieces, the first ones longer by a token; rank r has pieces r.

The same layouts as operations inside a graph are in ``cpcompile.layout_tensors``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from cpcompile.errors import LayoutError, nearest

KINDS = ("contiguous", "interleave", "sp", "zigzag")
PAD = -1


class Segment(NamedTuple):
    """Consecutive tokens of one request in consecutive rows of one rank, then pad rows.

    ``offset`` counts the request's tokens, prefix excluded. ``rows - length`` rows are pads.
    """

    request: int
    offset: int
    length: int
    rows: int
    late: bool = False


class AttentionCall(NamedTuple):
    """One causal attention call of a rank (right-down causal: a sequence's last query sees all of its keys).

    Args:
        rows: the rank's local rows that hold the queries, in order; no pad rows.
        query_ends: cumulative query lengths, one entry per sequence, without a leading 0 (as TND wants them).
        key_lengths: keys per sequence, prefix included, pads excluded. A sequence is a request (one token of it if the
            call is per token).
        requests: the request of each sequence.
    """

    rows: tuple[int, ...]
    query_ends: tuple[int, ...]
    key_lengths: tuple[int, ...]
    requests: tuple[int, ...]


@dataclass(frozen=True)
class TokenLayout:
    """Ownership and local order of a batch's tokens, as index maps.

    Args:
        kind: one of ``KINDS``.
        ranks: how many ranks share the batch.
        lengths: new tokens of each request. May be shorter than ``ranks``, or 0.
        prefixes: cached tokens of each request; ``()`` stands for none.
        padded: zigzag only: cut the blocks of each request from this many rows, the last of which are pads, and order a
            rank's rows request by request (early block, late block). ``()`` pads no request, only the ranks' ends.

    Raises:
        LayoutError: an argument is out of range, or the layout does not apply to these lengths.
    """

    kind: str
    ranks: int
    lengths: tuple[int, ...]
    prefixes: tuple[int, ...] = ()
    padded: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check the arguments; make tuples of sequences."""
        check_kind(self.kind, self.ranks)
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "prefixes", tuple(self.prefixes) or (0,) * len(self.lengths))
        object.__setattr__(self, "padded", tuple(self.padded))
        self._check_counts("lengths", self.lengths)
        self._check_counts("prefixes", self.prefixes)
        if self.kind == "interleave" and self.tokens < self.ranks:
            raise LayoutError(
                f"interleave applies if T >= {self.ranks} (the ranks); found T = {self.tokens}: use 'contiguous'"
            )
        if self.padded:
            self._check_padded()

    def _check_counts(self, name: str, counts: Sequence[int]) -> None:
        if len(counts) != len(self.lengths):
            raise LayoutError(f"expected {len(self.lengths)} {name}, one per length; found {len(counts)}: match")
        for request, count in enumerate(counts):
            if count < 0:
                raise LayoutError(f"expected {name} >= 0; found {count} for request {request}: count its tokens again")

    def _check_padded(self) -> None:
        if self.kind != "zigzag":
            raise LayoutError(f"padded requests apply to zigzag; found kind {self.kind!r}: leave `padded` out")
        self._check_counts("padded", self.padded)
        for request, (rows, length) in enumerate(zip(self.padded, self.lengths, strict=True)):
            if rows < length:
                raise LayoutError(
                    f"expected padded >= {length} (the length) for request {request}; found {rows}: see pad_requests"
                )

    @property
    def tokens(self) -> int:
        """T: new tokens in the batch."""
        return sum(self.lengths)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of each request's first token in the flattened batch, [requests]."""
        return tuple(accumulate(self.lengths, initial=0))[:-1]

    @cached_property
    def rows_per_rank(self) -> int:
        """m: rows of every rank, pads included. ``ceil(T/ranks)`` except where sp or zigzag deal short requests."""
        return max(sum(s.rows for s in segments) for segments in self._segments)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """The rank's segments in local order.

        Every request has one per block or piece, perhaps an empty one; in interleave, one per token.
        """
        check_rank(rank, self.ranks)
        return self._segments[rank]

    @cached_property
    def _segments(self) -> list[tuple[Segment, ...]]:
        deal = {"contiguous": self._slices, "interleave": self._singles, "sp": self._pieces, "zigzag": self._blocks}
        return [tuple(deal[self.kind](rank)) for rank in range(self.ranks)]

    def _slices(self, rank: int) -> Iterator[Segment]:
        m = -(-self.tokens // self.ranks)
        for request, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            first, last = (min(max(bound - start, 0), length) for bound in (rank * m, (rank + 1) * m))
            yield Segment(request, first, last - first, last - first)

    def _singles(self, rank: int) -> Iterator[Segment]:
        for request, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            for offset in range((rank - start) % self.ranks, length, self.ranks):
                yield Segment(request, offset, 1, 1)

    def _pieces(self, rank: int) -> Iterator[Segment]:
        for request, length in enumerate(self.lengths):
            yield _cut(request, length, length, rank, self.ranks)

    def _blocks(self, rank: int) -> Iterator[Segment]:
        count = 2 * self.ranks
        totals = self.padded or self.lengths
        sizes = list(enumerate(zip(self.lengths, totals, strict=True)))
        early = [_cut(i, length, total, rank, count) for i, (length, total) in sizes]
        late = [_cut(i, length, total, count - 1 - rank, count)._replace(late=True) for i, (length, total) in sizes]
        return iter([s for pair in zip(early, late, strict=True) for s in pair] if self.padded else early + late)

    def rows(self, rank: int) -> tuple[int, ...]:
        """Index in the flattened batch of the token in each local row, ``PAD`` in pad rows, [m]."""
        rows: list[int] = []
        for segment in self.segments(rank):
            first = self.starts[segment.request] + segment.offset
            rows += range(first, first + segment.length)
            rows += [PAD] * (segment.rows - segment.length)
        return (*rows, *[PAD] * (self.rows_per_rank - len(rows)))

    def owned(self, rank: int) -> tuple[int, ...]:
        """``rows`` without the pads: the rank's part of the unpadded layout."""
        return tuple(token for token in self.rows(rank) if token != PAD)

    def positions(self, rank: int) -> tuple[int, ...]:
        """Position in its sequence, prefix included, of each local row's token; 0 in pad rows, [m]."""
        first = [prefix - start for prefix, start in zip(self.prefixes, self.starts, strict=True)]
        of_token = [first[i] + t for i, n in enumerate(self.lengths) for t in range(self.starts[i], self.starts[i] + n)]
        return tuple(0 if token == PAD else of_token[token] for token in self.rows(rank))

    @cached_property
    def valid(self) -> torch.Tensor:
        """True where a row holds a token, bool [ranks, m]."""
        return self._table != PAD

    @cached_property
    def split_index(self) -> torch.Tensor:
        """Token of each row, int64 [ranks, m]; pad rows say 0: index with it, then zero the rows not ``valid``."""
        return self._table.clamp(min=0)

    @cached_property
    def restore_index(self) -> torch.Tensor:
        """Row of each token among the ``ranks * m`` rows gathered in rank order, int64 [T]."""
        return _inverse(self._table.flatten(), self.tokens)

    @cached_property
    def unpadded_restore_index(self) -> torch.Tensor:
        """Row of each token among all ranks' ``owned`` rows in rank order (a gather of uneven sizes), int64 [T]."""
        return _inverse(self._table[self.valid], self.tokens)

    @cached_property
    def padded_restore_index(self) -> torch.Tensor:
        """``restore_index`` to the padded requests, the pads at each one's end included, int64 [sum(padded)]."""
        return replace(self, lengths=self.padded or self.lengths).restore_index

    @cached_property
    def _table(self) -> torch.Tensor:
        return torch.tensor([self.rows(rank) for rank in range(self.ranks)], dtype=torch.int64)

    def attention_calls(self, rank: int) -> tuple[AttentionCall, ...]:
        """The rank's causal attention calls with one sequence per request; together they hold each of its tokens once.

        contiguous and sp: one call. zigzag: two, of the early blocks ("prev") and of the late blocks ("next"). A
        request with no token in a call has no queries there; its key length is then any that the request reaches.

        Raises:
            LayoutError: interleave: the queries of a request are not consecutive.
        """
        if self.kind == "interleave":
            raise LayoutError("lengths per request apply to consecutive queries; found interleave: use per_token_call")
        halves = (False, True) if self.kind == "zigzag" else (False,)
        return tuple(self._call(rank, late) for late in halves)

    def _call(self, rank: int, late: bool) -> AttentionCall:
        segments = self.segments(rank)
        first = accumulate((s.rows for s in segments), initial=0)
        mine = [(s, row) for s, row in zip(segments, first, strict=False) if s.late == late]
        return AttentionCall(
            rows=tuple(row + i for s, row in mine for i in range(s.length)),
            query_ends=tuple(accumulate(s.length for s, _ in mine)),
            key_lengths=tuple(self.prefixes[s.request] + s.offset + s.length for s, _ in mine),
            requests=tuple(s.request for s, _ in mine),
        )

    def per_token_call(self, rank: int) -> AttentionCall:
        """All the rank's attention as one call with one sequence per token; for every kind of layout."""
        rows = tuple(row for row, token in enumerate(self.rows(rank)) if token != PAD)
        positions = self.positions(rank)
        requests = tuple(s.request for s in self.segments(rank) for _ in range(s.length))
        return AttentionCall(rows, tuple(range(1, len(rows) + 1)), tuple(positions[r] + 1 for r in rows), requests)


def check_kind(kind: str, ranks: int) -> None:
    """Raise LayoutError for an unknown kind or fewer than one rank."""
    if kind not in KINDS:
        raise LayoutError(f"unknown token layout {kind!r}{nearest(kind, KINDS)}")
    if ranks < 1:
        raise LayoutError(f"expected ranks >= 1; found {ranks}: pass the size of the group that shares the tokens")


def blocks_per_rank(kind: str) -> int:
    """Blocks of equal size that a rank holds of one request: two in zigzag, else one."""
    return 2 if kind == "zigzag" else 1


def shard_rows(tokens: int, ranks: int, kind: str) -> int:
    """Rows of each rank when T tokens are split as one request, pads included: ``ceil(T/ranks)``, even in zigzag."""
    each = blocks_per_rank(kind)
    return -(-tokens // (each * ranks)) * each


def check_rank(rank: int, ranks: int) -> None:
    """Raise LayoutError for a rank that the group does not have."""
    if not 0 <= rank < ranks:
        raise LayoutError(f"expected a rank in [0, {ranks}); found {rank}: pass the rank within its group")


def pad_requests(lengths: Sequence[int], ranks: int) -> tuple[int, ...]:
    """Rows per request for ``TokenLayout.padded``: multiples of ``2*ranks``, so that all of its blocks are equal.

    A request of one token (a decode) takes ``ranks`` rows instead: one on each rank, of which rank 0's is the token.
    """
    return tuple(ranks if n == 1 else -(-n // (2 * ranks)) * 2 * ranks for n in lengths)


def attended_keys(layout: TokenLayout, rank: int) -> int:
    """The rank's attention load: keys that its queries attend causally, prefix included, summed over the queries."""
    firsts = ((layout.prefixes[s.request] + s.offset, s.length) for s in layout.segments(rank))
    return sum(n * first + n * (n + 1) // 2 for first, n in firsts)


def _cut(request: int, length: int, total: int, index: int, count: int) -> Segment:
    """Block ``index`` of ``count`` of ``total`` rows, the first ones longer by a row; rows past ``length`` are pads."""
    base, extra = divmod(total, count)
    start, stop = (i * base + min(i, extra) for i in (index, index + 1))
    return Segment(request, min(start, length), min(stop, length) - min(start, length), stop - start)


def _inverse(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Where each of ``count`` tokens stands in ``tokens``, which holds each once and perhaps ``PAD``."""
    held = (tokens != PAD).nonzero().squeeze(1)
    return torch.empty(count, dtype=torch.int64).scatter_(0, tokens[held], held)
