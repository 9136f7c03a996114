"""What a SGLang user asks cpcompile for, checked before anything is loaded; nothing here imports SGLang."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cpcompile.errors import OptionError
from cpcompile.serving.settings import NAME, check_options

FLAG = "--json-model-override-args"
WHERE = f"{FLAG}[{NAME!r}]"
#: Options that SGLang's own configuration decides, and what decides them.
DECIDED = {"axes": "SGLang's --tp-size", "groups": "SGLang's parallel sizes"}
#: Options that need process groups, of which we make none here.
LACKING = ("moe_dispatch", "finegrained_tp_config", "flashcomm2_oproj_tensor_parallel_size", "layer_sharding")
#: Flags that change who holds which tokens or weights: with any of them the model runs as it came.
UNKNOWN_LAYOUTS = (
    "enable_dp_attention",
    "enable_prefill_cp",
    "enable_attn_tp_input_scattered",
    "enable_two_batch_overlap",
)


def read_options(server_args: Any) -> dict[str, Any] | None:
    """What ``--json-model-override-args '{"cpcompile": {...}}'`` asks for, checked; None if it names no cpcompile.

    Raises:
        OptionError: an option is unknown, malformed, decided by SGLang's configuration, or not offered under SGLang,
            or a flag of SGLang's does not go with cpcompile.
        PlanError: ``plan`` cannot be read, or was made for another tensor-parallel size.
    """
    overrides = _overrides(server_args)
    if NAME not in overrides:
        return None
    options = check_options(overrides[NAME], WHERE, "SGLang", DECIDED, LACKING, ("--tp-size", server_args.tp_size))
    if options.get("strategy") == "off":
        return None
    for name, plain in (*((flag, False) for flag in UNKNOWN_LAYOUTS), ("pp_size", 1)):
        if getattr(server_args, name, plain) not in (plain, None):
            flag = "--" + name.replace("_", "-")
            raise OptionError(f"{flag} is not known to cpcompile: leave it or {WHERE} out")
    return options


def _overrides(server_args: Any) -> Mapping[str, Any]:
    try:
        found = json.loads(server_args.json_model_override_args or "{}")
    except ValueError:
        return {}  # SGLang says so itself
    return found if isinstance(found, Mapping) else {}
