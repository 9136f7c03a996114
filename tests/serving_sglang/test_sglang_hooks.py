"""What the hooks put in the place of SGLang's own does the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.fx as fx
from sglang.srt.layers.layer_boundary.output import UnreducedOutput
from sglang.srt.utils import common

from cpcompile.errors import OptionError
from cpcompile.passes.vllm_ops import why_whole
from cpcompile.serving import sglang_hooks, sglang_npu
from cpcompile.serving.sglang_hooks import AROUND, Batch, _bmm, _check_rest, _plain_class, _sparse_indexer


def test_a_struct_as_a_dataclass_has_its_fields_defaults_and_methods() -> None:
    plain, group = _plain_class(UnreducedOutput), SimpleNamespace(all_reduce=lambda x: x * 2)
    mine, theirs = plain(torch.ones(2), group=group), UnreducedOutput(torch.ones(2), group=group)
    for name in set(UnreducedOutput.__struct_fields__) - {"partial"}:
        assert getattr(mine, name) is getattr(theirs, name)
    torch.testing.assert_close(mine.complete(), theirs.complete())
    for made in (plain, UnreducedOutput):
        with pytest.raises(ValueError, match="choose a custom sum"):
            made(torch.ones(2), complete_sum=len, reduce_to_dp_local=len)


def test_a_product_into_a_transposed_output() -> None:
    left, right = torch.randn(4, 3, 5), torch.randn(4, 5, 2)
    mine, theirs = torch.empty(3, 8), torch.empty(3, 8)
    for product, out in ((_bmm, mine), (lambda _, a, b, out: torch.bmm(a, b, out=out), theirs)):
        view = out.view(-1, 4, 2).transpose(0, 1)
        assert product(torch.bmm, left, right, out=view) is view
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(_bmm(torch.bmm, left, right), torch.bmm(left, right), rtol=0, atol=0)


def test_all_reduces_in_shared_memory_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "is_amx_tile_supported", True)
    hooked = partial(AROUND["sglang.srt.utils.common.is_shm_available"], common.is_shm_available)
    assert compiled(hooked)(torch.float, 2, 2) is False
    with pytest.raises(torch._dynamo.exc.Unsupported, match="sgl_kernel"):
        compiled(common.is_shm_available)(torch.float, 2, 2)


def compiled(function: Callable[..., bool]) -> Callable[..., bool]:
    return torch.compile(lambda *args: function(*args), backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    ("op", "why"),
    [
        ("attention", "a cache that the batch holds"),
        ("indexer", "scores keys in a cache of the batch's"),
        ("experts", "this rank's part"),
    ],
)
def test_opaque_ops_say_why_they_need_all_rows(op: str, why: str) -> None:
    node = fx.Graph().call_function(getattr(torch.ops.cpcompile_sglang, op).default)
    assert why_whole(node).startswith(f"{sglang_hooks.NAMESPACE}::{op}: ") and why in why_whole(node)


def test_arguments_that_no_op_carries_are_refused() -> None:
    layer = SimpleNamespace(_cpcompile_name="model.layers.0.self_attn.attn_mqa")
    _check_rest(layer, None)
    with pytest.raises(NotImplementedError, match=r"^model\.layers\.0\.self_attn\.attn_mqa: called with arguments"):
        _check_rest(layer, None, False)


def test_the_indexer_is_one_op_by_position_and_by_name() -> None:
    def original(layer: Any, x: Any, q_lora: Any, positions: Any, forward_batch: Any, layer_id: int) -> torch.Tensor:
        assert (forward_batch, layer_id) == ("batch", 3)
        return (x.sum(1) + q_lora.sum(1) + positions).int()[:, None].expand(-1, 2).clone()

    layer = SimpleNamespace(_cpcompile_name="indexer", layer_id=3, topk_output_width=2)
    x, q_lora, positions = torch.ones(4, 5), torch.ones(4, 6), torch.arange(4)
    named = {"x": x, "q_lora": q_lora, "positions": positions, "forward_batch": "batch", "layer_id": 3}
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    with patch.dict(sglang_hooks._MODULES, {"indexer": (layer, original)}), patch.object(Batch, "current", "batch"):
        for args, more in ((tuple(named.values()), {}), ((), named)):
            run = torch.compile(_sparse_indexer, backend=backend, fullgraph=True)
            assert torch.equal(run(original, layer, *args, **more), original(layer, *named.values()))
        assert _sparse_indexer(original, layer, **named).dtype == torch.int32
        for given, why in (({**named, "layer_id": 2}, "called with arguments"), ({**named, "x": (x, x)}, "quantised")):
            with pytest.raises(Exception, match=f"indexer: {why}"):
                torch.compile(_sparse_indexer, backend=backend, fullgraph=True)(original, layer, **given)
    assert [[node.op for node in gm.graph.nodes].count("call_function") for gm in graphs] == [1, 1]


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        (partial(print, compiler_config="theirs"), {"target": "npugraph_ex", "compiler_config": "theirs"}),
        ("inductor", {"target": "inductor"}),
        ("eager", {"target": "eager"}),
    ],
)
def test_our_backend_lowers_as_the_platforms_would(theirs: Any, options: dict[str, Any]) -> None:
    assert sglang_npu.after_us(theirs) == options


@pytest.mark.parametrize("theirs", ["hpu_backend", print])
def test_a_backend_that_is_no_target_is_refused(theirs: Any) -> None:
    with pytest.raises(OptionError, match="which cpcompile cannot lower to: leave --enable-torch-compile out"):
        sglang_npu.after_us(theirs)
