"""The passes by name: one ordered table, loaded lazily, and the text form in which a command names them."""

from __future__ import annotations

import dataclasses
import importlib
import re
import typing
from collections.abc import Mapping
from typing import Any

from cpcompile.errors import OptionError, nearest
from cpcompile.passes.base import GraphPass

# In the order in which the pipeline runs them, and then what a target may run on its outcome.
PASSES: Mapping[str, str] = {
    "vllm-ops": "cpcompile.passes.vllm_ops:VllmOps",
    "canonicalise": "cpcompile.passes.canonicalise:Canonicalise",
    "per-token-attention": "cpcompile.passes.per_token_attention:PerTokenAttention",
    "recognise-sparse-attention": "cpcompile.passes.recognise_sparse_attention:RecogniseSparseAttention",
    "recognise-routed-experts": "cpcompile.passes.recognise_routed_experts:RecogniseRoutedExperts",
    "explicit-causal-masks": "cpcompile.passes.explicit_causal_masks:ExplicitCausalMasks",
    "shard-tokens": "cpcompile.passes.shard_tokens:ShardTokens",
    "verify-static": "cpcompile.passes.verify_rewrite:VerifyRewrite",
    "causal-attention": "cpcompile.passes.causal_attention:CausalAttention",
    # For targets on Ascend, in the order in which these run them:
    "inline-composites": "cpcompile.passes.inline_composites:InlineComposites",
    "paged-keys": "cpcompile.passes.paged_keys:PagedKeys",
    "npu-attention": "cpcompile.passes.npu_attention:NpuAttention",
    "npu-moe-dispatch": "cpcompile.passes.npu_moe_dispatch:NpuMoeDispatch",
    "npu-routed-experts": "cpcompile.passes.npu_routed_experts:NpuRoutedExperts",
    "npu-gating": "cpcompile.passes.npu_gating:NpuGating",
    "npu-norms": "cpcompile.passes.npu_norms:NpuNorms",
    "npu-rope": "cpcompile.passes.npu_rope:NpuRope",
    "npu-swiglu": "cpcompile.passes.npu_swiglu:NpuSwiglu",
    "npu-quant": "cpcompile.passes.npu_quant:NpuQuant",
    "npu-mla-prolog": "cpcompile.passes.npu_mla_prolog:NpuMlaProlog",
    "npu-key-cache": "cpcompile.passes.npu_key_cache:NpuKeyCache",
    "npu-mc2": "cpcompile.passes.npu_mc2:NpuMc2",
    "npu-uneven": "cpcompile.passes.npu_uneven:NpuUneven",
    "ge-forms": "cpcompile.passes.ge_forms:GeForms",
}

_ITEM = re.compile(r"\s*([^\s{},]+)\s*(?:\{([^{}]*)\}\s*)?(,|$)")
_BOOLEANS = {"true": True, "false": False}


def pass_class(name: str) -> type[Any]:
    """The class of the pass called ``name``. Raises :class:`OptionError` with the nearest name if there is none."""
    if name not in PASSES:
        raise OptionError(f"unknown pass {name!r}{nearest(name, PASSES)}")
    module, _, attribute = PASSES[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found


def make_pass(name: str, fields: Mapping[str, str]) -> GraphPass:
    """The pass called ``name`` with ``fields`` parsed by their types.

    Raises:
        OptionError: the pass or a field is unknown, or a value is not of the field's type.
    """
    cls = pass_class(name)
    types = field_types(cls)
    for field in fields:
        if field not in types:
            known = nearest(field, types) if types else " (it has none)"
            raise OptionError(f"pass {name!r} has no field {field!r}{known}")
    made: GraphPass = cls(**{field: _value(name, field, text, types[field]) for field, text in fields.items()})
    return made


def field_types(cls: type[Any]) -> dict[str, type[Any]]:
    """Name and type of each field of a pass."""
    types = typing.get_type_hints(cls)
    return {field.name: types[field.name] for field in dataclasses.fields(cls)}


def parse_passes(text: str) -> list[GraphPass]:
    """The passes that ``text`` names, in order: ``name{field=value,field=value},name2``.

    Raises:
        OptionError: the text is not of this form, or names something unknown.
    """
    passes: list[GraphPass] = []
    at = 0
    while at < len(text) or not passes:
        match = _ITEM.match(text, at)
        if match is None or (match[3] and match.end() == len(text)):
            raise OptionError(f"passes {text!r}: expected name{{field=value,...}},name2, found {text[at:]!r}")
        passes.append(make_pass(match[1], _fields(match[1], match[2] or "")))
        at = match.end()
    return passes


def _fields(name: str, text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        field, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise OptionError(f"pass {name!r}: expected field=value, found {item!r}")
        if field in fields:
            raise OptionError(f"pass {name!r}: field {field!r} is given twice")
        fields[field] = value
    return fields


def _value(name: str, field: str, text: str, kind: type[Any]) -> Any:
    try:
        return _BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (ValueError, KeyError) as error:
        raise OptionError(f"pass {name!r}: {field}={text!r} is not of type {kind.__name__}") from error
