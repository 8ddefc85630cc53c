"""Answers go where they were asked to go: whole lines, within their room, and a full disk ends nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from duallora_edge.errors import ConfigError
from duallora_edge.runtime import Prediction
from duallora_edge.runtime.service.outlets import AnswerFile, Changes, outlets


def line(number: int, width: int = 0) -> str:
    return json.dumps({"schema": 1, "sequence": number, "filler": "x" * width})


def numbers(*paths: Path) -> list[int]:
    return [json.loads(text)["sequence"] for path in paths for text in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ("", []),
        ("aaa", [0]),
        ("aabba", [0, 2, 4]),
        ("aAAa", [0, 1, 3]),  # novel, and known again
        ("?a?", [0, 1, 2]),  # a bundle with a threshold, between two without
    ],
)
def test_what_changes(answers: str, said: list[int]) -> None:
    changes = Changes()
    predictions = [SimpleNamespace(label=a.lower(), is_novel=None if a == "?" else a.isupper()) for a in answers]
    assert [n for n, each in enumerate(predictions) if changes("door", cast(Prediction, each))] == said
    assert all(changes("yard", cast(Prediction, each)) for each in predictions[:1])  # a camera of its own


def test_one_place_or_several(tmp_path: Path) -> None:
    printed: list[str] = []
    with outlets(None, 1, None, printed.append, printed.append) as write:
        write("a")
    with outlets(tmp_path / "answers", 1, None, printed.append, printed.append) as write:
        write(line(1))
    assert printed == ["a"] and numbers(tmp_path / "answers") == [1]


def test_the_room_is_kept_and_the_newest_lines_stay(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    for start in (0, 50):  # continued by a second process
        with closing(AnswerFile(file, 0.01, pytest.fail)) as answers:
            for number in range(start, start + 50):
                answers.write(line(number, 300))
    files = [Path(f"{file}.{number}") for number in range(4, 0, -1)] + [file]
    assert set(tmp_path.iterdir()) == set(files)
    kept = numbers(*files)
    assert kept == list(range(kept[0], 100)) and len(kept) > 20
    assert sum(path.stat().st_size for path in files) <= 10_000


@pytest.mark.parametrize("small_disk", ["64k"], indirect=True)
@pytest.mark.parametrize("room_mb", [1, 0.1])  # the disk is full in the middle of a file, or when it is rotated
def test_a_full_disk(small_disk: Path, room_mb: float) -> None:
    said: list[str] = []
    (small_disk / "other").write_bytes(bytes(40_000))
    with closing(AnswerFile(small_disk / "answers", room_mb, said.append)) as answers:
        for number in range(200):
            answers.write(line(number, 300))
        assert len(said) == 1 and said[0].startswith("answers are left out") and "No space left on device" in said[0]
        (small_disk / "other").unlink()
        for number in range(200, 205):
            answers.write(line(number, 300))
    assert said[1:] == [f"answers are written to {small_disk / 'answers'} again"]
    files = sorted(small_disk.glob("answers*"), reverse=True)
    kept = numbers(*files)  # all of them whole
    assert kept == sorted(kept) and kept[-5:] == [*range(200, 205)] and 200 > len(kept) > 20


def test_a_folder_that_goes_away(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "folder").mkdir()
    with closing(AnswerFile(tmp_path / "folder" / "answers", 0.001, said.append)) as answers:
        answers.write(line(0))
        (tmp_path / "folder").rename(tmp_path / "elsewhere")
        for number in range(1, 9):
            answers.write(line(number))
        (tmp_path / "elsewhere").rename(tmp_path / "folder")
        answers.write(line(9))
    assert len(said) == 2 and numbers(tmp_path / "folder" / "answers")[-1] == 9


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", []),
        (line(1).encode() + b"\n", [line(1)]),
        (line(1).encode() + b"\n" + b'{"schema": 1, "seq', [line(1), '{"schema": 1, "seq']),
        (b'{"sch', ['{"sch']),
        (bytes(9000), ["\0" * 9000]),
    ],
    ids=["empty", "whole", "killed", "killed at once", "power cut"],
)
def test_a_file_that_is_continued(tmp_path: Path, before: bytes, after: list[str]) -> None:
    file = tmp_path / "answers"
    file.write_bytes(before)
    with closing(AnswerFile(file, 1, pytest.fail)) as answers:
        answers.write(line(2))
    assert file.read_text().splitlines() == [*after, line(2)]


def folder(path: Path) -> None:
    path.mkdir()


def text(path: Path) -> None:
    path.write_text("my notes")


def older(path: Path) -> None:
    Path(f"{path}.3").write_text("my notes")


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (text, "answers", "answers does not hold answers of 'run'; name another file in --sink"),
        (older, "answers", r"answers\.3 does not hold answers"),
        (folder, "answers", "does not hold answers"),
        (dangling, "answers", "does not hold answers"),
        (folder, "nothing/answers", "cannot be written to .*nothing/answers .No such file"),
    ],
)
def test_what_is_no_file_for_answers(tmp_path: Path, make: Callable[[Path], None], name: str, message: str) -> None:
    make(tmp_path / "answers")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message):
        AnswerFile(tmp_path / name, 1, pytest.fail)
    assert sorted(tmp_path.iterdir()) == before
