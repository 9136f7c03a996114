"""What a user may ask for in each server, as far as no server is needed to read it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from cpcompile.errors import OptionError
from cpcompile.serving import sglang_settings, vllm_settings

IN_VLLM = "additional_config['cpcompile']"
IN_SGLANG = "--json-model-override-args['cpcompile']"
SHARED = {
    "finegrained_tp_config": {"oproj_tensor_parallel_size": 2},
    "flashcomm2_oproj_tensor_parallel_size": 1,
    "layer_sharding": ["o_proj"],
}


def in_vllm(options: dict[str, Any]) -> Any:
    return vllm_settings.read_options({"cpcompile": options}, 2)


def in_sglang(options: dict[str, Any]) -> Any:
    overrides = json.dumps({"cpcompile": options})
    return sglang_settings.read_options(SimpleNamespace(json_model_override_args=overrides, tp_size=2))


@pytest.mark.parametrize(
    ("read", "where", "server", "options"),
    [
        (in_vllm, IN_VLLM, "vLLM", {"moe_dispatch": True}),
        (in_sglang, IN_SGLANG, "SGLang", {"moe_dispatch": True}),
        *((in_sglang, IN_SGLANG, "SGLang", {name: value}) for name, value in SHARED.items()),
    ],
)
def test_what_needs_groups_that_nobody_makes_is_one_line(
    read: Any, where: str, server: str, options: dict[str, Any]
) -> None:
    (name,) = options
    with pytest.raises(OptionError) as raised:
        read(options)
    assert str(raised.value) == f"{where}: {name} needs process groups that nobody makes in {server}: leave it out"


def test_other_options_are_taken() -> None:
    off = {"moe_dispatch": False, "flashcomm2_oproj_tensor_parallel_size": 0}
    assert in_vllm({**SHARED, **off}) == {**SHARED, **off}
    assert in_sglang(off) == off
