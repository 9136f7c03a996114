"""Module tensor parallelism through the pipeline: data parallel ranks, ranks of several axes, and what is refused."""

from __future__ import annotations

TOLERANCE = 2e-5
