from __future__ import annotations

from pathlib import Path

import pytest

from duallora_edge.errors import DataError
from duallora_edge.learner.data.class_names import ClassNames


@pytest.mark.parametrize("file", ["classes.txt", "classnames.txt"])
def test_names_beside_the_data(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("cat\n\n big dog \r\n")
    names = ClassNames.beside(tmp_path)
    assert [names.of_number(number, "here") for number in (0, 1)] == ["cat", "big dog"]
    assert names.notes() == []


def test_numbers_without_names(tmp_path: Path) -> None:
    names = ClassNames.beside(tmp_path)
    assert names.notes() == []
    assert names.of_number(7, "here") == "7"
    assert names.notes() == ["classes have only numbers; list their names in a file classes.txt beside them"]


@pytest.mark.parametrize(
    ("lines", "number", "message"),
    [
        ("cat\ndog", 2, r"^here has the class number 2, but .*classes\.txt lists 2 classes from 0 on; correct"),
        ("cat\ndog", -1, "has the class number -1"),
        ("", -1, "they start at 0"),
        ("crane\ncat\ncrane", 0, "names the class 'crane' 2 times"),
        ("\udcff", 0, "cannot be read .*; list one class per line in UTF-8"),
        ("x" * 2**21, 0, "larger than"),
    ],
)
def test_wrong_names_and_numbers(tmp_path: Path, lines: str, number: int, message: str) -> None:
    (tmp_path / "classes.txt").write_bytes(lines.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        ClassNames.beside(tmp_path).of_number(number, "here")
