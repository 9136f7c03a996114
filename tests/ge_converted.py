"""Functions of torch_npu's ops, and the GE graphs that torchair's own converters make of them: called where it is."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from simulate import fake_rank
from test_ge_forms import traced
from torch import Tensor

RANKS, EXPERTS = 3, 6
ROWS = [1, 0, 3]  # of each rank, where ranks have unlike numbers


def _npu(name: str) -> Any:
    return getattr(torch.ops.npu, name)


def _fused(layout: str, **said: Any) -> Callable[..., Any]:
    def attend(_: int, query: Tensor, key: Tensor, value: Tensor) -> Any:
        op = _npu("npu_fused_infer_attention_score")
        return op(query, key, value, num_heads=4, num_key_value_heads=2, input_layout=layout, scale=0.3, **said)[0]

    return attend


def _through_experts(version: str) -> Callable[..., Any]:
    """Dispatch, a product with the rank's experts, and the way back."""

    def run(rank: int, x: Tensor, expert_ids: Tensor, expert_scales: Tensor, weight: Tensor) -> Any:
        where = ("g", RANKS, rank, EXPERTS)
        sent = _npu(f"npu_moe_distribute_dispatch{version}")(x, expert_ids, *where)
        made = _npu("npu_grouped_matmul")(
            [sent[0]], [weight], group_list=sent[3], split_item=3, group_type=0, group_list_type=1
        )
        back = _npu(f"npu_moe_distribute_combine{version}")
        return back(made[0], expert_ids, sent[2], sent[4], expert_scales, *where, expand_scales=sent[6])

    return run


def _prolog_v3(_: int, *given: Tensor) -> Any:
    """The results that mean something: releases differ in the sizes of the others."""
    *head, index, kv_cache, kr_cache = given
    op = _npu("npu_mla_prolog_v3_functional")
    query, rope, _, norm, _, *caches = op(*head, kv_cache, kr_cache, cache_index=index, query_norm_flag=True)
    return query, rope, *caches, norm


def _routing(_: int, x: Tensor, numbers: Tensor, ids: Tensor, bias: Tensor, scales: Tensor) -> Any:
    rows, places, experts = _npu("npu_moe_init_routing")(x, numbers, ids, x.shape[0])
    tokens = _npu("npu_moe_compute_expert_tokens")(experts, EXPERTS)
    return _npu("npu_moe_finalize_routing")(rows, x, None, bias, scales, places, ids), tokens


def _uneven(rank: int, rows: Tensor, partial: Tensor) -> Any:
    group = ("", list(range(RANKS)), RANKS, [])
    ops = torch.ops.npu_define
    gathered = ops.allgather_in_tensor_uneven(rows, ROWS[rank], ROWS, *group)
    return gathered, ops.reduce_scatter_tensor_uneven(partial, ROWS, ROWS[rank], "sum", *group)


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "npu_mla_prolog": lambda _, *given: _npu("npu_mla_prolog")(*given),
    "npu_mla_prolog_v2": lambda _, *given: _npu("npu_mla_prolog_v2")(*given)[:4],
    "npu_mla_prolog_v3": _prolog_v3,
    "npu_kv_rmsnorm_rope_cache": lambda _, *given: _npu("npu_kv_rmsnorm_rope_cache_v2_functional")(
        *given, cache_mode="PA", is_output_kv=True
    ),
    "npu_moe_distribute": _through_experts(""),
    "npu_moe_distribute_v2": _through_experts("_v2"),
    "npu_moe_init_routing": _routing,
    "npu_moe_re_routing": lambda _, *given: _npu("npu_moe_re_routing")(*given),
    "npu_scatter_nd_update": lambda _, *given: _npu("npu_scatter_nd_update")(*given),
    # The schema's default is "Norm", and the converter's is "PA_NZ": unsaid, the mode changes on the way.
    "npu_scatter_pa_kv_cache": lambda _, *given: _npu("npu_scatter_pa_kv_cache_functional")(*given, cache_mode="Norm"),
    "npu_quant_matmul": lambda _, a, b, scale, per_token: _npu("npu_quant_matmul")(
        a, b, scale, pertoken_scale=per_token, output_dtype=torch.bfloat16
    ),
    "uneven": _uneven,
    **{f"fused {layout}": _fused(layout) for layout in ("BSND", "BNSD", "BSH")},
    "fused TND": _fused("TND", actual_seq_lengths=[5, 10, 15], actual_seq_lengths_kv=[9, 18, 27]),
}


def lowered(name: str, given: Sequence[Sequence[Tensor]]) -> list[bytes]:
    """Each rank's GE graph of ``FUNCTIONS[name]`` on its tensors, serialised."""
    from cpcompile.lowering.ascend.export import export
    from cpcompile.lowering.targets import Settings

    models: list[bytes] = []
    # Meta functions of the first two prologs ask which chip this is, which takes a device: any before 260 has them.
    chip = patch("torch_npu.op_plugin.meta._meta_registrations.get_soc_version", return_value=250)
    for rank, own in enumerate(given):

        def several(*values: Tensor, rank: int = rank) -> tuple[Tensor, ...]:
            out = FUNCTIONS[name](rank, *values)
            return tuple(out) if isinstance(out, tuple | list) else (out,)

        with chip, fake_rank(rank, max(len(given), 2)), tempfile.TemporaryDirectory() as folder, torch.no_grad():
            _, unsupported = export(traced(several, *own, mode="fake"), Path(folder), Settings())
            assert not unsupported, unsupported
            models.append((Path(folder) / "model.pb").read_bytes())
    return models
