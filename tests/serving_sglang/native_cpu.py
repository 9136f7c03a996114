"""What SGLang needs to run on a CPU without its kernels: schemas that torchvision lacks here, and a platform."""

from __future__ import annotations

import torch

# PyTorch's CPU build and torchvision's wheel from PyPI do not go together: without these schemas it cannot be imported.
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")
for _op in ("nms", "qnms"):
    _TORCHVISION.define(f"{_op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def activate() -> str:
    """SGLang's entry point of platforms: where the platform's class is."""
    return "native_cpu_platform.NativeCpu"
