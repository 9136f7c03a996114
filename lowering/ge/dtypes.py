"""GE's dtypes: by their number in attributes, by their number in tensor descriptors, as torch's.

Source: torchair's ``ge._ge_graph.DataType`` (attributes) and ``ge_ir.proto``'s ``DataType`` (descriptors).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

_ROWS: tuple[tuple[str, int, int, torch.dtype], ...] = (
    ("DT_FLOAT", 0, 1, torch.float32),
    ("DT_FLOAT16", 1, 2, torch.float16),
    ("DT_INT8", 2, 3, torch.int8),
    ("DT_INT32", 3, 7, torch.int32),
    ("DT_UINT8", 4, 4, torch.uint8),
    ("DT_INT16", 6, 5, torch.int16),
    ("DT_UINT16", 7, 6, torch.uint16),
    ("DT_UINT32", 8, 9, torch.uint32),
    ("DT_INT64", 9, 8, torch.int64),
    ("DT_UINT64", 10, 10, torch.uint64),
    ("DT_DOUBLE", 11, 12, torch.float64),
    ("DT_BOOL", 12, 11, torch.bool),
    ("DT_BF16", 27, 27, torch.bfloat16),
    ("DT_FLOAT8_E5M2", 35, 34, torch.float8_e5m2),
    ("DT_FLOAT8_E4M3FN", 36, 35, torch.float8_e4m3fn),
)

OF_ATTRIBUTE: Mapping[int, torch.dtype] = {number: dtype for _, number, _, dtype in _ROWS}
"""What an attribute such as ``dst_type`` of a Cast means."""

OF_DESCRIPTOR: Mapping[int, torch.dtype] = {number: dtype for _, _, number, dtype in _ROWS}
"""What ``dtype`` of a tensor descriptor means."""

NAMES: Mapping[str, tuple[int, int, torch.dtype]] = {name: row for name, *row in _ROWS}  # type: ignore[misc]


def short(dtype: object) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
