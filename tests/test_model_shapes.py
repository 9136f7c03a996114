"""Shapes from configurations: the library's own, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from transformers import DeepseekV3Config, DeepseekV32Config

from bench.calibration import V3, V32
from cpcompile.errors import TraceError
from cpcompile.model_shapes import read_shapes, shapes_of


def test_the_library_s_defaults_are_the_published_models(tmp_path) -> None:
    for config, shapes in ((DeepseekV3Config(), V3), (DeepseekV32Config(), V32)):
        assert shapes_of(config.to_dict()) == shapes
        config.save_pretrained(tmp_path)
        assert read_shapes(tmp_path) == shapes


def test_layer_types_count_before_first_dense_ones() -> None:
    config = {**DeepseekV32Config().to_dict(), "mlp_layer_types": ["dense"] * 11 + ["sparse"] * 50}
    assert shapes_of(config) == replace(V32, dense_layers=11, moe_layers=50)


def test_a_model_without_experts_and_a_quantised_one() -> None:
    config = {**DeepseekV3Config().to_dict(), "n_routed_experts": None, "moe_intermediate_size": None}
    found = shapes_of(config)
    assert (found.dense_layers, found.moe_layers, found.experts, found.shared_experts) == (61, 0, 0, 0)
    assert shapes_of({**DeepseekV3Config().to_dict(), "quantization_config": {"quant_method": "fp8"}}).weight_bytes == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_lora_rank": None}, "has no 'kv_lora_rank'"),
        ({"moe_intermediate_size": None}, "has no 'moe_intermediate_size'"),
        ({"index_topk": None}, "has no 'index_topk'"),
        ({"hidden_size": "7168"}, "expected a positive integer as 'hidden_size', found '7168'"),
        ({"num_attention_heads": 0}, "expected a positive integer as 'num_attention_heads', found 0"),
    ],
)
def test_what_lacks_is_named(tmp_path, change: dict, message: str) -> None:
    data = {k: v for k, v in {**DeepseekV32Config().to_dict(), **change}.items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(TraceError) as caught:
        read_shapes(tmp_path)
    assert message in str(caught.value) and str(tmp_path / "config.json") in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "expected an object, found list")])
def test_files_that_are_no_configuration(tmp_path, text: str, message: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TraceError, match=message):
        read_shapes(tmp_path)
