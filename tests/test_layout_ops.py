"""Row orders as ops: against the index maps, under compilers, and against each other through real moves."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
import torch.fx.experimental._config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._inductor.utils import fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx

from cpcompile.layout_ops import collect_rows, deal_rows, own_rows
from cpcompile.layouts import KINDS, shard_rows

FEW = settings(max_examples=200, deadline=None)


@FEW
@given(st.sampled_from(KINDS), st.integers(1, 8), st.integers(0, 70), st.sampled_from([0, 1, 2]))
def test_dealt_rows_are_every_ranks_own_and_collecting_undoes_dealing(
    kind: str, ranks: int, tokens: int, dim: int
) -> None:
    shape = [2, 3, 2]
    shape[dim] = tokens
    x = torch.rand(shape) + 1
    own = [own_rows(x, dim, rank, ranks, kind) for rank in range(ranks)]
    dealt = deal_rows(x, dim, ranks, kind)
    assert all(part.shape[dim] == shard_rows(tokens, ranks, kind) and part.is_contiguous() for part in own)
    assert dealt.is_contiguous() and dealt.equal(torch.cat(own, dim))
    assert collect_rows(dealt, dim, ranks, kind, tokens).equal(x)
    held = torch.cat([part[part.ne(0)] for part in own])
    assert held.sort().values.equal(x.flatten().sort().values)  # each token once, and pads are zero


@pytest.mark.parametrize("kind", KINDS)
def test_inductor_compiles_them_once(kind: str) -> None:
    """Also of masks, whose join torch's C++ for CPUs does not compile."""

    def there_and_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = own_rows(x.t() > 0.5, 1, 1, 2, kind)
        return mask, collect_rows(deal_rows(x, 0, 2, kind), 0, 2, kind, x.shape[0])

    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    with fresh_cache(), torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        compiled = torch.compile(there_and_back, backend=counted, dynamic=True, fullgraph=True)
        for tokens in (17, 2, 3, 4, 5, 8, 33):
            x = torch.rand(tokens, 3)
            mask, back = compiled(x)
            assert back.equal(x) and mask.equal(own_rows(x.t() > 0.5, 1, 1, 2, kind))
    assert counted.frame_count == 1


@pytest.mark.parametrize("kind", KINDS)
def test_one_symbolic_trace_serves_every_token_count(kind: str) -> None:
    """Traced again as inductor traces it, the ops are ATen views and copies without a guard on T."""

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        own = torch.cat([own_rows(x, 1, rank, 4, kind) for rank in range(4)], 1)
        return collect_rows(own, 1, 4, kind, x.shape[1]) + collect_rows(
            deal_rows(x, 1, 4, kind), 1, 4, kind, x.shape[1]
        )

    with torch.fx.experimental._config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        gm = make_fx(there_and_back, tracing_mode="symbolic")(torch.rand(2, 13, 3))
    assert not [n for n in gm.graph.nodes if "cpcompile" in str(n.target)]
    for tokens in (0, 1, 3, 4, 7, 8, 9, 17, 64):
        x = torch.rand(2, tokens, 3)
        assert gm(x).equal(2 * x)
