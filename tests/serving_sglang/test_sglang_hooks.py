"""What the hooks put in the place of SGLang's own does the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.fx as fx
from sglang.srt.layers.layer_boundary.output import UnreducedOutput

from cpcompile.passes.vllm_ops import why_whole
from cpcompile.serving import sglang_hooks
from cpcompile.serving.sglang_hooks import _bmm, _check_rest, _plain_class


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


@pytest.mark.parametrize(
    ("op", "why"), [("attention", "a cache that the batch holds"), ("experts", "this rank's part")]
)
def test_opaque_ops_say_why_they_need_all_rows(op: str, why: str) -> None:
    node = fx.Graph().call_function(getattr(torch.ops.cpcompile_sglang, op).default)
    assert why_whole(node).startswith(f"{sglang_hooks.NAMESPACE}::{op}: ") and why in why_whole(node)


def test_arguments_that_no_op_carries_are_refused() -> None:
    layer = SimpleNamespace(_cpcompile_name="model.layers.0.self_attn.attn_mqa")
    _check_rest(layer, None)
    with pytest.raises(NotImplementedError, match=r"^model\.layers\.0\.self_attn\.attn_mqa: called with arguments"):
        _check_rest(layer, None, False)
