"""A platform of SGLang's for CPUs without ``sgl_kernel``: plain PyTorch ops, the ``torch_native`` attention."""

from __future__ import annotations

from typing import Any

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class NativeCpu(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_compile_backend(self, mode: str | None = None) -> str:
        return "eager" if mode else super().get_compile_backend(mode)

    def init_backend(self) -> None:
        """Attend over latents in prefill too: torch_native reads its keys from the cache, which holds latents alone."""
        from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

        AttentionBackendRegistry.register("torch_native", lambda attention, batch: AttnForwardMethod.MLA)
