"""What a vLLM user asks cpcompile for, checked before anything is loaded; nothing here imports vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpcompile.errors import GroupError
from cpcompile.mesh import Sizes, rank_groups
from cpcompile.serving.settings import NAME, check_options

BACKENDS = (NAME, "cpcompile.backend:cpcompile_backend", "cpcompile.backend.cpcompile_backend")
IDENTITY = "cpcompile_identity"
#: Options that vLLM's own configuration decides, and what decides them.
DECIDED = {"axes": "vLLM's tensor_parallel_size", "groups": "vLLM's parallel sizes"}
#: Options that need process groups which ``vllm_modules`` does not make.
LACKING = ("moe_dispatch",)


def names_us(compilation_config: Any) -> bool:
    """Whether the compilation configuration, an object or a dict, names this backend."""
    backend = compilation_config.get("backend") if isinstance(compilation_config, Mapping) else None
    return (backend or getattr(compilation_config, "backend", "")) in BACKENDS


def asks_for_us(compilation_config: Any) -> bool:
    """Whether the compilation configuration, an object or a dict, names this backend or holds its pass."""
    passes = getattr(compilation_config, "inductor_compile_config", {}).values()
    return names_us(compilation_config) or any(getattr(each, "name", "") == NAME for each in passes)


def read_options(additional_config: Any, tensor_parallel_size: int) -> dict[str, Any]:
    """``additional_config["cpcompile"]``, checked.

    Raises:
        OptionError: an option is unknown, malformed, decided by vLLM's configuration, or not offered under vLLM.
        PlanError: ``plan`` cannot be read, or was made for another tensor-parallel size.
    """
    given = additional_config.get(NAME, {}) if isinstance(additional_config, Mapping) else {}
    where = f"additional_config[{NAME!r}]"
    return check_options(given, where, "vLLM", DECIDED, LACKING, ("tensor_parallel_size", tensor_parallel_size))


def sizes_of(parallel_config: Any, world: int | None = None, **more: Any) -> Sizes:
    """The sizes of vLLM's groups, of ``world`` ranks, and ``more``."""
    return Sizes(
        world=world,
        dp=parallel_config.data_parallel_size,
        pp=parallel_config.pipeline_parallel_size,
        cp=parallel_config.prefill_context_parallel_size,
        tp=parallel_config.tensor_parallel_size,
        **more,
    )


def check_ranks(parallel_config: Any, world: int, found: Mapping[str, Sequence[int]]) -> None:
    """Check that vLLM's groups of this rank, by their kind, are among ours for the same sizes and rank order.

    Raises:
        GroupError: one is not, or the sizes do not fit.
    """
    ours = rank_groups(sizes_of(parallel_config, world), "vllm")
    for kind, ranks in found.items():
        groups = ours[kind].groups
        if tuple(ranks) not in groups:
            raise GroupError(f"vLLM's {kind} ranks {list(ranks)}: expected one of {[list(g) for g in groups]}")
