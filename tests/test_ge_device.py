"""Targets torchair and npugraph_ex as far as a host goes; no NPU was there: see ``ge_devices`` for what is mocked."""

from __future__ import annotations

import ge_targets
import pytest
import torch
from ascend_process import AscendProcess
from ge_devices import captured, configured, on_device, transposed

from cpcompile.errors import AscendError

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


def test_what_needs_no_host_is_captured(ascend: AscendProcess) -> None:
    assert ascend(captured, "neg") == ["x", "aten.neg.default", "output"]


@pytest.mark.parametrize("remove_noop_ops", [False, True])
def test_a_transposition_before_a_reshape_is_kept(ascend: AscendProcess, remove_noop_ops: bool) -> None:
    """Torchair's default removes the copy between them, and then loses the transposition."""
    assert ascend(transposed, remove_noop_ops) == 0
