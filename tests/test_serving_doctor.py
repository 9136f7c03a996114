"""What ``cpcompile doctor`` says of a serving framework, from its metadata and the environment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cpcompile.serving import doctor


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_vllm", lambda: "0.32.0")
    monkeypatch.setattr(doctor, "entry_points", lambda group: [SimpleNamespace(name="cpcompile")])
    for name in ("VLLM_PLUGINS", *doctor.OBSTACLES):
        monkeypatch.delenv(name, raising=False)


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_vllm", lambda: "")
    assert list(doctor.examine()) == ["vllm         not installed: pip install 'cpcompile[vllm]'"]


def test_what_works(installed: None) -> None:
    assert list(doctor.examine()) == ["vllm         0.32.0", "vllm plugin  works"]


def test_what_does_not_work(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_vllm", lambda: "0.40.1")
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    assert list(doctor.examine()) == [
        "vllm         0.40.1",
        "WARNING: vllm 0.40.1 was not tested; 0.32.x was",
        "vllm plugin  not loaded: VLLM_PLUGINS='other' leaves it out; add 'cpcompile'",
        "WARNING: TORCH_COMPILE_DISABLE=1 keeps vLLM from calling cpcompile: unset it",
    ]
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert "not registered" in list(doctor.examine())[2]
