"""What vLLM's configuration says to us, as far as no vLLM is needed to read it; the rest is in tests/serving."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cpcompile.errors import GroupError
from cpcompile.serving import vllm_ascend
from cpcompile.serving.vllm_settings import IDENTITY, asks_for_us, check_ranks


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
        check_ranks(parallel(dp=2, pp=2, cp=2, tp=2), 16, {"tp": [first, first + 1]})
    check_ranks(parallel(), 1, {"tp": [0], "dp": [0]})
    check_ranks(parallel(dp=2, tp=2), 4, {"dp": [1, 3], "tp": [2, 3]})
    for kind, ranks, ours in (("tp", [0, 2], "[[0, 1], [2, 3]]"), ("dp", [0, 1], "[[0, 2], [1, 3]]")):
        with pytest.raises(GroupError) as raised:
            check_ranks(parallel(dp=2, tp=2), 4, {kind: ranks})
        assert str(raised.value) == f"vLLM's {kind} ranks {ranks}: expected one of {ours}"
    with pytest.raises(GroupError, match="nearest that work"):
        check_ranks(parallel(dp=2, tp=2), 6, {"tp": [0, 1]})


@pytest.mark.parametrize("named", ["cpcompile", "cpcompile.backend.cpcompile_backend"])
def test_the_backend_is_named_in_a_dict_or_an_object(named: str) -> None:
    assert asks_for_us({"backend": named}) and asks_for_us(SimpleNamespace(backend=named))
    assert not asks_for_us({"backend": "inductor"}) and not asks_for_us({}) and not asks_for_us(None)


def test_our_words_are_hidden_from_vllm_ascends_configuration_and_stay() -> None:
    """It refuses words that are not its own since 0.29, whatever becomes of the call."""
    config = SimpleNamespace(additional_config={"cpcompile": {"strategy": "tp"}, IDENTITY: {}, "refresh": True})
    before = dict(config.additional_config)

    def refuse(found: Any) -> None:
        raise ValueError(sorted(found.additional_config))

    with pytest.raises(ValueError, match=r"^\['refresh'\]$"):
        vllm_ascend.without_our_options(refuse, config)
    assert config.additional_config == before
    without = SimpleNamespace(additional_config=None)
    assert vllm_ascend.without_our_options(lambda found: found.additional_config, without) is None
