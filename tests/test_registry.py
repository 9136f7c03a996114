import dataclasses
import importlib
from dataclasses import dataclass

import pytest

from cpcompile.errors import OptionError
from cpcompile.passes import registry
from cpcompile.passes.registry import PASSES, make_pass, parse_passes, pass_class
from cpcompile.passes.shard_tokens import ShardTokens


@dataclass(frozen=True)
class AllTypes:
    """Stands for a pass with a field of each type."""

    whole: int = 1
    real: float = 1.0
    text: str = ""
    flag: bool = False

    name = "all-types"

    def __call__(self, gm):
        raise NotImplementedError


@pytest.fixture
def all_types(monkeypatch):
    monkeypatch.setattr(registry, "PASSES", {**PASSES, "all-types": f"{__name__}:AllTypes"})


@pytest.mark.parametrize("name", PASSES)
def test_every_entry_is_a_frozen_dataclass_of_that_name(name):
    cls = pass_class(name)
    assert cls.name == name
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert importlib.import_module(cls.__module__).__doc__


def test_fields_are_parsed_by_their_type(all_types):
    (found,) = parse_passes("all-types{whole=-3, real=2e-3 ,text=a=b,flag=True}")
    assert found == AllTypes(-3, 2e-3, "a=b", True)
    assert type(found.whole) is int
    assert parse_passes("all-types{flag=false}") == [AllTypes()]


def test_several_passes_in_order():
    found = parse_passes(" canonicalise, shard-tokens{axis=ep,tokens=8},shard-tokens{} , verify-static")
    assert [p.name for p in found] == ["canonicalise", "shard-tokens", "shard-tokens", "verify-static"]
    assert found[1:3] == [ShardTokens("ep", 8), ShardTokens()]


def test_nothing_is_imported_before_it_is_named(monkeypatch):
    monkeypatch.setattr(registry, "PASSES", {**PASSES, "absent": "cpcompile.passes.absent:Absent"})
    parse_passes("canonicalise")
    with pytest.raises(ModuleNotFoundError):
        parse_passes("absent")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("shard-token", r"unknown pass 'shard-token' \(did you mean 'shard-tokens'\?\)"),
        (
            "qqq",
            r"unknown pass 'qqq' \(known: canonicalise, causal-attention, explicit-causal-masks, ge-forms, "
            r"inline-composites, npu-attention, npu-gating, npu-key-cache, npu-mc2, npu-mla-prolog, npu-moe-dispatch, "
            r"npu-norms, npu-quant, npu-rope, "
            r"npu-routed-experts, npu-swiglu, npu-uneven, paged-keys, per-token-attention, "
            r"recognise-routed-experts, recognise-sparse-attention, shard-tokens, verify-static, vllm-ops\)",
        ),
        ("shard-tokens{token=3}", r"no field 'token' \(did you mean 'tokens'\?\)"),
        ("canonicalise{x=1}", r"no field 'x' \(it has none\)"),
        ("shard-tokens{tokens=many}", "tokens='many' is not of type int"),
        ("all-types{flag=1}", "flag='1' is not of type bool"),
        ("all-types{real=}", "real='' is not of type float"),
        ("shard-tokens{tokens}", "expected field=value, found 'tokens'"),
        ("shard-tokens{tokens=1,tokens=2}", "'tokens' is given twice"),
        ("shard-tokens{tokens=1", "found '{tokens=1'|expected name"),
        ("canonicalise,", "expected name"),
        ("canonicalise,,canonicalise", "found ',canonicalise'"),
        ("canonicalise verify-static", "expected name"),
        ("", "expected name"),
    ],
)
def test_what_is_wrong_is_named(all_types, text, message):
    if "unknown pass 'qqq'" in message:
        message = message.replace("canonicalise", "all-types, canonicalise")
    with pytest.raises(OptionError, match=message):
        parse_passes(text)


def test_make_pass_takes_text():
    assert make_pass("shard-tokens", {"tokens": "5"}) == ShardTokens(tokens=5)
