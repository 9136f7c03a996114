"""JSON of strangers: what is refused before it is read."""

import json

import pytest

from cpcompile.strict_json import MOST_DEPTH, read_json


@pytest.mark.parametrize(
    "value",
    [{"a": [1, "[[[", {"b": '}\\"'}]}, "[" * 99, {"[" * 99: "\\"}, [[[]] * 3] * 99, "é\n"],
)
def test_brackets_in_strings_are_no_depth(value):
    assert read_json(json.dumps(value)) == value
    assert read_json(json.dumps(value, ensure_ascii=False)) == value


@pytest.mark.parametrize(("opened", "closed"), [("[", "]"), ('{"a":', "}"), ('["[",', "]"), ('{"\\"":[', "]}")])
def test_what_is_too_deep_is_refused(opened, closed):
    levels = MOST_DEPTH // (opened.count("[") + opened.count("{") - ('"[' in opened))
    read_json(opened * levels + "1" + closed * levels)
    with pytest.raises(ValueError, match="nested more than 64 deep"):
        read_json(opened * (levels + 1) + "1" + closed * (levels + 1))


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', '["', '"\\', "[1", "]", ""])
def test_what_is_no_such_json_is_refused(text):
    with pytest.raises(ValueError):
        read_json(text)
