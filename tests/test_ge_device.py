"""Targets torchair and npugraph_ex as far as a host goes; no NPU was there: see ``ge_devices`` for what is mocked."""

from __future__ import annotations

import contextlib

import ge_targets
import pytest
import torch
import torch.fx as fx
from ascend_process import AscendProcess
from ge_devices import captured, configured, on_device, transposed, turned
from torch._subclasses.fake_tensor import FakeTensorMode

from cpcompile.errors import AscendError
from cpcompile.lowering.ascend import device

TOKENS = [1, 7, 16]


@pytest.mark.parametrize("mode", ["", "max-autotune"])
def test_torchair_compiles_and_runs_the_model(ascend: AscendProcess, mode: str) -> None:
    """With our configuration and with a user's. Torchair's own runner binds the inputs, by their positions."""
    found, asked = ascend(on_device, "v3", TOKENS, mode)
    assert asked["times"] == 1 and asked["given"] == bool(mode)
    assert "npu.npu_add_rms_norm.default" in asked["ops"]
    for tokens, logits in zip(TOKENS, found, strict=True):
        torch.testing.assert_close(logits, ge_targets.logits("v3", tokens), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("target", "mode", "wanted"),
    [("torchair", "npugraph_ex", "max-autotune"), ("npugraph_ex", "max-autotune", "npugraph_ex")],
)
def test_a_configuration_of_another_mode_is_refused(ascend: AscendProcess, target: str, mode: str, wanted: str) -> None:
    with pytest.raises(AscendError, match=f"^compiler_config has mode '{mode}': target '{target}' needs '{wanted}'$"):
        ascend(configured, target, mode)


@pytest.mark.parametrize("op", ["nonzero", "_local_scalar_dense"])
def test_a_value_that_the_host_waits_for_is_not_captured(ascend: AscendProcess, op: str) -> None:
    message = rf"^aten\.{op}\.default \({op}\w*\) brings a value to the host, .* use target 'torchair'$"
    with pytest.raises(AscendError, match=message):
        ascend(captured, op)


@pytest.mark.parametrize(("dtype", "why"), [(torch.long, ""), (torch.int32, ""), (torch.bool, "aten.index.Tensor")])
def test_rows_are_picked_by_numbers_but_not_by_a_mask(dtype: torch.dtype, why: str) -> None:
    graph = fx.Graph()
    table, rows = graph.placeholder("table"), graph.placeholder("rows")
    with FakeTensorMode():
        rows.meta["val"] = torch.ones(3, dtype=dtype)
    graph.output(graph.call_function(torch.ops.aten.index.Tensor, (table, [None, rows])))
    with pytest.raises(AscendError, match=why) if why else contextlib.nullcontext():
        device._check_capturable(fx.GraphModule({}, graph))


def test_what_needs_no_host_is_captured(ascend: AscendProcess) -> None:
    assert ascend(captured, "neg") == ["x", "aten.neg.default", "output"]


@pytest.mark.parametrize("remove_noop_ops", [False, True])
def test_a_transposition_before_a_reshape_is_kept(ascend: AscendProcess, remove_noop_ops: bool) -> None:
    """Torchair's default removes the copy between them, and then loses the transposition."""
    assert ascend(transposed, remove_noop_ops) == 0


@pytest.mark.parametrize("remove_noop_ops", [False, True])
def test_a_transposition_with_a_dim_of_1_has_sizes_of_one_type(ascend: AscendProcess, remove_noop_ops: bool) -> None:
    """Torchair packs int64 constants with an int32 size where no view before it names the size."""
    assert ascend(turned, remove_noop_ops) == 0
