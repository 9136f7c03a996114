"""What ``cpcompile doctor`` says of a serving framework, from its metadata and the environment."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cpcompile.serving import doctor


def install(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str]) -> None:
    monkeypatch.setattr(doctor, "_version", lambda packages: versions.get(packages[0], ""))
    monkeypatch.setattr(doctor, "entry_points", lambda group: [SimpleNamespace(name="cpcompile")])
    for framework in doctor.FRAMEWORKS.values():
        for name in (framework.chosen, *framework.obstacles):
            monkeypatch.delenv(name, raising=False)


def test_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {})
    assert list(doctor.examine()) == [
        "vllm         not installed: pip install 'cpcompile[vllm]'",
        "sglang       not installed: pip install 'cpcompile[sglang]'",
    ]


def test_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"vllm": "0.32.0", "sglang": "0.5.23"})
    assert list(doctor.examine()) == [
        "vllm         0.32.0",
        "vllm plugin  works",
        "sglang       0.5.23",
        "sglang plugin works",
    ]


@pytest.mark.parametrize(
    ("name", "chosen", "known"), [("vllm", "VLLM_PLUGINS", "0.32.x"), ("sglang", "SGLANG_PLUGINS", "0.5.23")]
)
def test_what_does_not_work(name: str, chosen: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {name: "0.40.1"})
    monkeypatch.setenv(chosen, "other")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    found = [line for line in doctor.examine() if "not installed" not in line]
    assert found[:1] + found[2:] == [
        f"{name:12} 0.40.1",
        f"{name + ' plugin':12} not loaded: {chosen}='other' leaves it out; add 'cpcompile'",
        f"WARNING: TORCH_COMPILE_DISABLE=1 keeps {name} from calling cpcompile: unset it",
    ]
    assert found[1] == f"WARNING: {name} 0.40.1 was not tested; {known} was"
    monkeypatch.setattr(doctor, "entry_points", lambda group: [])
    assert any("not registered" in line for line in doctor.examine())
