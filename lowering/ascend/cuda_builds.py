"""torch_npu beside a CUDA build of PyTorch: both register the names of their allocators' settings, and that aborts.

A process has one set of such names (``c10::CachingAllocator::AcceleratorAllocatorConfig``, c10/core/AllocatorConfig.h).
Importing torch puts CUDA's in, importing torch_npu some of the same, and the exception that follows ends the process,
as it comes from an initialiser of a library. In host mode neither allocates anything: the set is emptied in between.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

# The function that returns the set, and where it is inline (2.11), the set itself.
_FUNCTION = "_ZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11Ev"
_VARIABLE = "_ZZN3c1016CachingAllocator26AcceleratorAllocatorConfig14getMutableKeysB5cxx11EvE4keys"


class _HashTable(ctypes.Structure):
    """The head of libstdc++'s ``std::unordered_set``: its buckets, how many, the first node, how many of these."""

    _fields_ = (
        ("buckets", ctypes.POINTER(ctypes.c_void_p)),
        ("bucket_count", ctypes.c_size_t),
        ("first", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
    )


def forget_allocator_settings() -> bool:
    """Empty the set, as its ``clear`` does, but for the nodes' memory; False where it cannot be found."""
    table = settings()
    if table is None:
        return False
    ctypes.memset(table.buckets, 0, table.bucket_count * ctypes.sizeof(ctypes.c_void_p))
    table.first, table.size = None, 0
    return True


def settings() -> _HashTable | None:
    """The set of names, None where it cannot be found."""
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libc10.so", "libc10_cuda.so"):
        if not (folder / name).is_file():
            continue
        library = ctypes.CDLL(str(folder / name))
        if hasattr(library, _FUNCTION):
            function = library[_FUNCTION]
            function.restype = ctypes.POINTER(_HashTable)
            return function().contents  # type: ignore[no-any-return]
        try:
            return _HashTable.in_dll(library, _VARIABLE)
        except ValueError:
            continue
    return None
