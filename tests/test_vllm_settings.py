"""What vLLM's configuration says to us, as far as no vLLM is needed to read it; the rest is in tests/serving."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cpcompile.errors import GroupError
from cpcompile.serving.vllm_settings import asks_for_us, check_ranks


def parallel(dp: int = 1, pp: int = 1, cp: int = 1, tp: int = 1) -> Any:
    return SimpleNamespace(
        data_parallel_size=dp,
        pipeline_parallel_size=pp,
        prefill_context_parallel_size=cp,
        tensor_parallel_size=tp,
    )


def test_ranks_are_laid_out_as_vllm_does() -> None:
    """(ExternalDP, DP, PP, PCP, TP), row-major: tensor-parallel ranks are neighbours."""
    for first in range(0, 16, 2):
        check_ranks(parallel(dp=2, pp=2, cp=2, tp=2), 16, [first, first + 1])
    check_ranks(parallel(), 1, [0])
    message = r"^vLLM's tensor-parallel ranks \[0, 2\]: expected one of \[\[0, 1\], \[2, 3\]\]$"
    with pytest.raises(GroupError, match=message):
        check_ranks(parallel(dp=2, tp=2), 4, [0, 2])
    with pytest.raises(GroupError, match="nearest that work"):
        check_ranks(parallel(dp=2, tp=2), 6, [0, 1])


@pytest.mark.parametrize("named", ["cpcompile", "cpcompile.backend.cpcompile_backend"])
def test_the_backend_is_named_in_a_dict_or_an_object(named: str) -> None:
    assert asks_for_us({"backend": named}) and asks_for_us(SimpleNamespace(backend=named))
    assert not asks_for_us({"backend": "inductor"}) and not asks_for_us({}) and not asks_for_us(None)
