"""Text from elsewhere on a terminal."""

from __future__ import annotations

import pytest

from duallora_edge.text import UNSAFE, escaped


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ümlaut 猫 🐈‍⬛", "plain ümlaut 猫 🐈‍⬛"),
        ("red\x1b[31m", "red\\x1b[31m"),
        ("bell\x07 and c1 \x9b", "bell\\x07 and c1 \\x9b"),
        ("cat\u202egpj", "cat\\u202egpj"),
        ("two\nlines\r", "two\nlines\\x0d"),
        ("lone \udcff", "lone \\udcff"),
    ],
)
def test_unsafe_characters_are_shown_and_others_stay(text: str, shown: str) -> None:
    assert escaped(text) == shown


def test_a_name_may_not_hold_a_line_end() -> None:
    assert UNSAFE.search("a\nb") and not UNSAFE.search("a b")
