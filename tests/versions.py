"""Marks for tests that ask for something which an older release that we support does not have."""

from __future__ import annotations

import pytest
import torch


def needs_torch(version: str, why: str) -> pytest.MarkDecorator:
    """Skip below torch ``version``; ``why`` says what that release of PyTorch itself lacks."""
    # A release's own suffix (+cpu, +cu130) does not count.
    too_old = torch.torch_version.TorchVersion(torch.__version__.partition("+")[0]) < version
    return pytest.mark.skipif(too_old, reason=f"torch {torch.__version__}: {why}")
