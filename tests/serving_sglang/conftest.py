"""SGLang's stand-in for a platform comes before PyTorch's users; model and prompts are those of tests/serving."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "serving")]

import native_cpu  # noqa: E402, F401
import pytest  # noqa: E402

pytest.register_assert_rewrite("answers", "expected")
