"""JSON of files that anyone may have written."""

from __future__ import annotations

import json
import re

MOST_DEPTH = 64
_BRACKETS = re.compile(r'(?:"[^"\\]*(?:\\.[^"\\]*)*"?|[^][{}"]+)+|([\[{]+)|([\]}]+)', re.DOTALL)


def read_json(text: str) -> object:
    """The value of ``text``, in which no object has a key twice and nothing is nested over ``MOST_DEPTH`` deep.

    Python's reader keeps to a depth of its own only before 3.12, and a list costs 40 times the bracket that opens it.

    Raises:
        ValueError: it is not such JSON.
    """
    depth = 0
    for part in _BRACKETS.finditer(text):
        depth += len(part[1] or "")
        if depth > MOST_DEPTH:
            raise ValueError(f"nested more than {MOST_DEPTH} deep")
        depth -= len(part[2] or "")
    return json.loads(text, object_pairs_hook=_unique)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has a key twice")
    return found
