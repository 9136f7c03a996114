"""Row orders other than the tokens' own, as ops that a rewritten graph calls and its proof can name.

Each is a composite of ATen ops (``cpcompile.layout_tensors``): compilers that trace a graph again see views and copies.
All take a batch for one request; ``kind`` is one of ``cpcompile.layouts.KINDS``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpcompile.layout_tensors import restore_rows, split_rows

_COMPOSITE = "CompositeImplicitAutograd"

torch.library.define("cpcompile::own_rows", "(Tensor x, int dim, int rank, int ranks, str kind) -> Tensor")
torch.library.define("cpcompile::deal_rows", "(Tensor x, int dim, int ranks, str kind) -> Tensor")
torch.library.define("cpcompile::collect_rows", "(Tensor x, int dim, int ranks, str kind, SymInt tokens) -> Tensor")


@torch.library.impl("cpcompile::own_rows", _COMPOSITE)
def _own_rows(x: Tensor, dim: int, rank: int, ranks: int, kind: str) -> Tensor:
    """T rows of ``dim`` -> the m rows of ``rank``, pads zero, row-major."""
    # Masks as bytes: torch 2.13's inductor joins masks by C++ code that does not compile.
    bytes_or_x = x.to(torch.uint8) if x.dtype == torch.bool else x
    return split_rows(bytes_or_x, dim, rank, ranks, kind).clone(memory_format=torch.contiguous_format).to(x.dtype)


@torch.library.impl("cpcompile::deal_rows", _COMPOSITE)
def _deal_rows(x: Tensor, dim: int, ranks: int, kind: str) -> Tensor:
    """T rows of ``dim`` -> ``ranks * m`` rows, every rank's one after another, pads zero, row-major."""
    return torch.cat([split_rows(x, dim, rank, ranks, kind) for rank in range(ranks)], dim)


@torch.library.impl("cpcompile::collect_rows", _COMPOSITE)
def _collect_rows(x: Tensor, dim: int, ranks: int, kind: str, tokens: int) -> Tensor:
    """``ranks * m`` rows of ``dim`` in rank order -> T rows in token order, pads dropped."""
    return restore_rows(x, dim, ranks, kind, tokens)


own_rows = torch.ops.cpcompile.own_rows.default
deal_rows = torch.ops.cpcompile.deal_rows.default
collect_rows = torch.ops.cpcompile.collect_rows.default
