"""Chunked prefill and prefix caching for MLA on vLLM's CPU platform, which turns both off where it does not use AMX.

Only the scheduler's settings are kept. Scheduler, caches and attention are vLLM's own: its reference backend for CPUs
inherits attention over cached context, and vLLM has plain PyTorch for its parts on CPUs.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Patch this process's vLLM to leave the scheduler as it was asked for."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config

    def keep_scheduler(cls: Any, config: Any) -> None:
        scheduler, cache = config.scheduler_config, config.cache_config
        kept = [
            (scheduler, "enable_chunked_prefill", scheduler.enable_chunked_prefill),
            (scheduler, "max_num_batched_tokens", scheduler.max_num_batched_tokens),
            (cache, "enable_prefix_caching", cache.enable_prefix_caching),
        ]
        original(config)
        for owner, name, value in kept:
            setattr(owner, name, value)

    CpuPlatform.check_and_update_config = classmethod(keep_scheduler)
