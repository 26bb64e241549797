"""Every key's line, through all that TOML allows: quoted keys, arrays, inline tables, comments, kinds of string."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.toml_lines import KeyPath, key_lines

TEXT = '''# top = 0
title = "a # b"   # not = here
[plain]
one = 1
"quoted key" = 'x = [y]'
dotted.inner."k.3" = true
list = [ # comment ]
  1, "]",
  { deep = 2,
    deeper = [ 3 ] },
]
[ "odd [header]" . sub ]
text = """
two = 2
[not.a.header]
escaped \\""" still
"""
raw = \'\'\'it's
\'\'\'\'
after = 1979-05-27T07:32:00Z
inline = { a = 1, b = { c = "}" } }
[[rows]]
n = 1
[rows.more]
m = 1
[[rows]]
n = 2
'''


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("title",), 2),
        (("plain",), 3),
        (("plain", "one"), 4),
        (("plain", "quoted key"), 5),
        (("plain", "dotted", "inner", "k.3"), 6),
        (("plain", "list"), 7),
        (("plain", "list", 1), 8),
        (("plain", "list", 2, "deep"), 9),
        (("plain", "list", 2, "deeper", 0), 10),
        (("odd [header]", "sub"), 12),
        (("odd [header]", "sub", "text"), 13),
        (("odd [header]", "sub", "raw"), 18),
        (("odd [header]", "sub", "after"), 20),
        (("odd [header]", "sub", "inline", "b", "c"), 21),
        (("rows", 0, "n"), 23),
        (("rows", 0, "more", "m"), 25),
        (("rows", 1), 26),
        (("rows", 1, "n"), 27),
    ],
)
def test_line_of_a_key(path: KeyPath, line: int) -> None:
    assert key_lines(TEXT)[path] == line


def test_nothing_inside_strings_or_comments_counts() -> None:
    lines = key_lines(TEXT)
    assert ("top",) not in lines
    assert all("two" not in path and "not" not in path for path in lines)


_KEYS = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters='"\\'), min_size=1)
_SCALARS = st.one_of(st.integers(-9, 9), st.booleans(), st.text("ab\"'#=[]{},\n", max_size=6))


def _written(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    return str(value)


@given(st.dictionaries(_KEYS, st.dictionaries(_KEYS, st.one_of(_SCALARS, st.lists(_SCALARS, max_size=3)), max_size=4)))
def test_any_document_gives_the_line_on_which_it_was_written(document: dict[str, dict[str, object]]) -> None:
    rows, expected = [], {}
    for header, table in document.items():
        rows.append(f'["{header}"]  # [x] = 1')
        expected[(header,)] = len(rows)
        for key, value in table.items():
            written = f"[{', '.join(map(_written, value))}]" if isinstance(value, list) else _written(value)
            rows.append(f'"{key}" = {written} # "')
            expected[(header, key)] = len(rows)
    text = "\n".join(rows)
    assert tomllib.loads(text) == document
    lines = key_lines(text)
    assert {path: lines[path] for path in expected} == expected
