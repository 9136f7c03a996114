"""Layers in their serving form whose keys, or queries and keys, one fused op computes and writes to the caches."""

from __future__ import annotations

from collections.abc import Sequence

import npu_fused_ops  # noqa: F401  defines the ops
import torch
from serving_models import DenseLayer, Layer
from torch import Tensor

npu = torch.ops.npu
EPSILON = 1e-6  # npu_rms_norm's


class FusedKeys(Layer):
    """Keys by ``npu_kv_rmsnorm_rope_cache``."""

    def write_keys(self, kv: Tensor, rope: tuple[Tensor, Tensor], slots: Tensor, caches: Sequence[Tensor]) -> None:
        npu.npu_kv_rmsnorm_rope_cache_v2(
            kv[:, None, None], self.kv_norm, *rope, slots.long(), caches[1], caches[0], epsilon=EPSILON, cache_mode="PA"
        )


class FusedProlog(Layer):
    """Queries and keys by ``npu_mla_prolog``."""

    def project(
        self, h: Tensor, rope: tuple[Tensor, Tensor], slots: Tensor, caches: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        cos, sin = (x[:, 0, 0] for x in rope)
        query_down, kv_down = (w.T for w in self.qkv_a.split([self.sizes.q_lora, self.sizes.latent + self.sizes.rope]))
        query, query_rope, _, q_lora, _ = npu.npu_mla_prolog_v3(
            h, query_down, self.q_b.T, self.k_up, kv_down, self.q_norm, self.kv_norm, sin, cos, caches[0], caches[1],
            cache_index=slots.long(), rmsnorm_epsilon_cq=EPSILON, rmsnorm_epsilon_ckv=EPSILON, query_norm_flag=True,
        )  # fmt: skip
        return (query, query_rope), q_lora


class DenseFusedKeys(FusedKeys, DenseLayer):
    """V3's attention."""


class DenseFusedProlog(FusedProlog, DenseLayer):
    """V3's attention."""
