"""What steps share: the main stream with its features last, whatever its form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher

from fuzzing.programs import Maker

F = torch.nn.functional


def rows_last(m: Maker) -> Tensor:
    """The main stream with features last."""
    last = m.last
    return last.tensor if last.dims.endswith("H") else last.tensor.transpose(0, 1)


def push_like(m: Maker, x: Tensor) -> None:
    """Push ``x``, features last, in the form of the main stream."""
    m.push(x if m.last.dims.endswith("H") else x.transpose(0, 1))


def padded(x: Tensor, pad: list[int], value: float) -> Tensor:
    with enable_python_dispatcher():  # type: ignore[no-untyped-call]  # else a symbolic size becomes a number
        return F.pad(x, pad, value=value)
