"""Parts of weights that this rank keeps, and the release of the whole weights that they come from.

A part is made once for each parameter and kept for later compilations of the same model, which may come when the whole
weight is gone. A released parameter keeps its shape and has no memory: writing to it is an error, and so is a call of
what was compiled after it was given new contents. (Reading it outside of compiled code is not safe: the same holds for
weights that FSDP has resharded.)
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary

from cpcompile.errors import ParameterChangedError

Key = tuple[object, ...]


@dataclass
class _Entry:
    """What is known of one parameter.

    Args:
        parts: how a part was made, and for which ranks → the part.
        verdicts: ranks that have compared their contents → why they are not shared, empty where they may be.
        fingerprint: of the contents that were released; empty while they are there.
        version: of the tensor when its parts were made; contents written later have other parts.
        kept: why its memory is not released, empty where it may be.
    """

    parts: dict[Key, torch.Tensor] = field(default_factory=dict)
    verdicts: dict[tuple[int, ...], str] = field(default_factory=dict)
    fingerprint: str = ""
    version: tuple[int, int] = (0, 0)
    kept: str = ""


_RELEASED = (0, -1)  # of no tensor: the next contents may lie where these did, on some ranks and not on others
_entries: MutableMapping[torch.Tensor, _Entry] = WeakTensorKeyDictionary()


def local_tensor(value: object) -> torch.Tensor:
    """The memory of a parameter on this rank: that inside a DTensor."""
    assert isinstance(value, torch.Tensor)
    return value._local_tensor if isinstance(value, DTensor) else value


def is_real(value: object) -> bool:
    """Whether ``value`` is a tensor with contents."""
    return isinstance(value, torch.Tensor) and not value.is_meta and not isinstance(local_tensor(value), FakeTensor)


def is_released(tensor: torch.Tensor) -> bool:
    """Whether a parameter's memory was released."""
    return tensor.numel() > 0 and tensor.layout == torch.strided and tensor.untyped_storage().nbytes() == 0


def address(tensor: torch.Tensor) -> int:
    """Where the contents of ``tensor`` lie; 0 where they were released."""
    return 0 if is_released(tensor) else tensor.data_ptr()


def released_fingerprint(tensor: torch.Tensor) -> str:
    """The fingerprint of contents that were released, empty where none were."""
    return _entries[tensor].fingerprint if is_released(tensor) and tensor in _entries else ""


def part_of(tensor: torch.Tensor, key: Key, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The part of ``tensor`` that ``key`` names: the one that exists, or a new one from ``make``.

    Raises:
        ParameterChangedError: the whole weight was released, and that part of it was never made.
    """
    entry = _entry(tensor)
    if key not in entry.parts:
        if is_released(tensor):
            raise ParameterChangedError(
                "a weight is wanted whole or in other parts after its memory was released: call "
                "cpcompile.reallocate_weights(model), load the weights again, and compile again"
            )
        entry.parts[key] = make(tensor.detach())
    return entry.parts[key]


def verdict(tensor: torch.Tensor, ranks: tuple[int, ...]) -> str | None:
    """What ``ranks`` found out in an earlier compilation: why they do not share ``tensor``, or ``""`` if they may."""
    return _entry(tensor).verdicts.get(ranks)


def note_verdict(tensor: torch.Tensor, ranks: tuple[int, ...], reason: str) -> None:
    """Remember what ``ranks`` found out about ``tensor``, all of them alike."""
    _entry(tensor).verdicts[ranks] = reason


def keep(tensor: torch.Tensor, reason: str) -> None:
    """Never release the memory of ``tensor``, for ``reason``: something reads it that is not compiled."""
    _entry(tensor).kept = reason


def why_kept(tensor: torch.Tensor) -> str:
    """Why the memory of ``tensor`` is not released, empty where it may be."""
    return _entry(tensor).kept


def release(tensor: torch.Tensor, fingerprint: Callable[[torch.Tensor], str]) -> int:
    """Release the memory of ``tensor``; return the bytes. A write to it raises from then on.

    Shape, strides and dtype stay, so that guards on it hold.
    """
    storage = tensor.untyped_storage()
    size = storage.nbytes()
    if size > tensor.numel() * tensor.element_size() and not why_kept(tensor):
        keep(tensor, "it is a view of memory that holds more")
    if is_released(tensor) or tensor.numel() == 0 or why_kept(tensor):
        return 0
    entry = _entry(tensor)
    entry.fingerprint, entry.version = fingerprint(tensor), _RELEASED
    storage.resize_(0)
    torch._C._set_throw_on_mutable_data_ptr(tensor)
    return size


def reallocate_weights(model: nn.Module) -> list[str]:
    """Give the parameters and buffers of ``model`` that were released new memory, to load weights into.

    Their contents are NaN (0 for integers) until then. What was compiled before refuses to run on them: call
    ``torch._dynamo.reset()`` after loading.

    Returns:
        Names of what was given memory.
    """
    names = []
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        tensor = local_tensor(value)
        if is_released(tensor):
            fill = float("nan") if tensor.is_floating_point() else 0
            with torch.no_grad():
                tensor.data = torch.full(tensor.shape, fill, dtype=tensor.dtype, device=tensor.device)
            _entries.pop(tensor, None)
            names.append(name)
    return names


def _entry(tensor: torch.Tensor) -> _Entry:
    """The entry of ``tensor``, a new one where its contents were replaced or written since."""
    now = (address(tensor), 0 if tensor.is_inference() else tensor._version)
    if tensor not in _entries or (_entries[tensor].version != now and not is_released(tensor)):
        _entries[tensor] = _Entry(version=now, kept=_entries[tensor].kept if tensor in _entries else "")
    return _entries[tensor]
