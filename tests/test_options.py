"""Options: every name, every choice, and what a user who mistypes one is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from cpcompile.axes import Axis
from cpcompile.backend import settings_of
from cpcompile.costs import PROFILES
from cpcompile.errors import GroupError, OptionError
from cpcompile.lowering.targets import TARGETS as LOWERINGS
from cpcompile.options import STRATEGIES, TARGETS, VERIFICATIONS, Options
from cpcompile.plan import Plan


@pytest.mark.parametrize("nothing", [None, {}])
def test_nothing_gives_the_defaults(nothing: dict[str, object] | None) -> None:
    options = Options.parse(nothing)
    assert options == Options()
    assert (options.strategy, options.verify, options.deterministic, options.timeout_s) == (
        "auto",
        "static",
        False,
        120,
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("strategy", STRATEGIES),
        ("target", (*TARGETS, "")),
        ("verify", VERIFICATIONS),
        ("profile", (*PROFILES, "", PROFILES["gloo"])),
        ("deterministic", (True, False)),
        ("plan", (None, Plan())),
        ("dump_dir", (None, "out", Path("out"))),
        ("timeout_s", (0.5, 3)),
        ("axes", ({}, {"tp": "0"})),
    ],
)
def test_every_choice_is_taken_as_given(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        needed = {"dump_dir": "out"} if value == "ge-export" else {}
        assert getattr(Options.parse({name: value, **needed}), name) == value


def test_the_path_of_a_plan_is_taken_as_given(tmp_path: Path) -> None:
    """One that is missing, or no plan, is an error: see ``test_backend``."""
    path = tmp_path / "plan.json"
    Plan().save(path)
    assert Options.parse({"plan": path}).plan == path and Options.parse({"plan": str(path)}).plan == str(path)


@pytest.mark.parametrize("name", ["require", "replicated"])
@pytest.mark.parametrize(("given", "taken"), [("*o_proj", ("*o_proj",)), (["a", "b"], ("a", "b")), ((), ())])
def test_patterns_are_one_or_many(name: str, given: object, taken: tuple[str, ...]) -> None:
    """A lone string is one pattern, not its letters."""
    assert getattr(Options.parse({name: given}), name) == taken


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stratgy": "tp"}, "unknown option 'stratgy' (did you mean 'strategy'?)"),
        ({"strategy": "atuo"}, "strategy='atuo' is not known (did you mean 'auto'?)"),
        ({"target": "inductr"}, "target='inductr' is not known (did you mean 'inductor'?)"),
        ({"verify": "statc"}, "verify='statc' is not known (did you mean 'static'?)"),
        ({"profile": "ascend-a9"}, "profile='ascend-a9' is not known (did you mean 'ascend-a3'?)"),
        ({"verify": True}, "verify=True is not known (known: numeric, off, static)"),
        ({"axes": ["tp"]}, "axes is ['tp']: give a dict of axis name to process group"),
    ],
)
def test_a_mistake_is_one_line_with_a_remedy(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        Options.parse(options)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options",
    [
        {"timeout_s": "long"},
        {"timeout_s": 0},
        {"timeout_s": -1.0},
        {"timeout_s": float("nan")},
        {"timeout_s": True},
        {"deterministic": "no"},
        {"plan": 3},
        {"dump_dir": 3},
        {"profile": 3},
        {"profile": None},
        {"require": 3},
        {"require": [3]},
        {"replicated": [None]},
        {"axes": None},
        {3: "tp"},
    ],
    ids=repr,
)
def test_a_value_of_the_wrong_kind_is_refused_at_once(options: dict[str, object]) -> None:
    """Not later, deep inside a pass, and never read as something else (``deterministic="no"`` is true)."""
    with pytest.raises(OptionError) as caught:
        Options.parse(options)
    assert "\n" not in str(caught.value) and str(next(iter(options))) in str(caught.value)


def test_every_target_can_be_lowered_to() -> None:
    assert set(TARGETS) == set(LOWERINGS)


def test_every_option_is_documented() -> None:
    assert Options.__doc__ is not None
    for field in dataclasses.fields(Options):
        assert f"\n        {field.name}: " in Options.__doc__


def test_options_are_not_changed() -> None:
    given = {"require": "*o_proj"}
    Options.parse(given)
    assert given == {"require": "*o_proj"}


def test_dispatch_needs_a_group_of_its_own() -> None:
    with pytest.raises(GroupError, match="moe_dispatch needs the process group 'mc2'"):
        settings_of(Options.parse({"moe_dispatch": True}), None)
    own = Axis("mc2", "own group", 2, 0, (0, 1))
    assert settings_of(Options.parse({"moe_dispatch": True, "groups": {"mc2": own}}), None).moe_dispatch == "own group"
    assert settings_of(Options.parse({"groups": {"mc2": own}}), None).moe_dispatch == ""
