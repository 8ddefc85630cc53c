"""Splits kept by content: a folder that changes makes no test image of what was learned."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duallora_edge.errors import DataError
from duallora_edge.learner.data import PixelSet, PreparedTask
from duallora_edge.learner.data.fingerprint import resembling
from duallora_edge.learner.data.kept_split import KeptSplit, keep_apart, measurable


def images(numbers: str, label: str = "a") -> PixelSet:
    """One-pixel images, each a letter."""
    pixels = np.array([ord(letter) for letter in numbers], np.uint8).reshape(-1, 1, 1, 1).repeat(3, axis=3)
    return PixelSet(pixels, (label,) * len(numbers))


def task(train: str, validation: str = "", test: str = "", *, given: bool = True) -> PreparedTask:
    return PreparedTask("t", images(train), images(validation), images(test), "", test_given=given)


def letters(part: PixelSet) -> str:
    return "".join(sorted(chr(pixel) for pixel in part.pixels[:, 0, 0, 0]))


def splits(found: PreparedTask) -> tuple[str, str, str]:
    return letters(found.train), letters(found.validation), letters(found.test)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (task("abc", "d", "ef", given=False), ("abc", "d", "ef")),  # nothing has changed
        (task("aef", "b", "cd", given=False), ("acd", "b", "ef")),  # drawn anew: what was learned is learned
        (task("abe", "cx", "dfyz", given=False), ("abd", "cx", "efyz")),  # and new images stay where they are
        (task("aef", "b", "cd"), ("aef", "b", "cd")),  # the source says so
    ],
)
def test_a_task_that_is_learned_again_keeps_its_test(now: PreparedTask, expected: tuple[str, str, str]) -> None:
    assert splits(KeptSplit.of(task("abc", "d", "ef")).extend(now)) == expected


@pytest.mark.parametrize(
    ("now", "every", "expected"),
    [
        (task("abc", "d", "ef", given=False), False, "ef"),
        (task("aef", "b", "cd", given=False), False, "ef"),
        (task("axe", "b", "cydf", given=False), False, "ef"),  # new images are not measured
        (task("axe", "b", "cydf", given=False), True, "efxy"),  # unless every image may be
        (task("abc", "d", "efy"), False, "efy"),  # the source says that y is for the test
        (task("abx", "d", "cefo"), False, "ef"),  # but c was learned, and o by another task
        (task("abe", "d", "f"), False, "ef"),  # e lies among the training images, but nobody learned it
        (task("abc", "d", ""), False, ""),
    ],
)
def test_what_may_be_measured(now: PreparedTask, every: bool, expected: str) -> None:
    own, other = KeptSplit.of(task("abc", "d", "ef")), KeptSplit.of(task("o", "p", "q"))
    assert letters(measurable(now, own, [other], every=every)) == expected


def test_tasks_are_kept_apart() -> None:
    said: list[str] = []
    others = [KeptSplit.of(task("ab", "c", "d")), KeptSplit.of(task("e", "", "f"))]
    assert splits(keep_apart(task("xd", "yf", "zacq"), others, said.append)) == ("x", "y", "qz")
    assert said == [
        "  left out of the test: images that earlier tasks learned (2)",
        "  left out of training: test images of earlier tasks (2)",
    ]
    untouched = task("x", "y", "z")
    assert (
        keep_apart(untouched, others, said.append) is untouched and keep_apart(untouched, [], said.append) is untouched
    )
    with pytest.raises(
        DataError, match="All training images of class 'a' of task 't' are test images of earlier tasks"
    ):
        keep_apart(task("df"), others, said.append)


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        (task("abc", "d", "ef"), ""),
        (task("fdo", "a", "ecb"), ""),  # o is another task's
        (
            task("abcx", "d", "e"),
            "Task t: its images have changed since it was learned (1 new, 1 gone); the split stays, ",
        ),
        (task("abcxy", "d", "ef"), "(2 new); the split stays, 2 images are measured"),
    ],
)
def test_changes_are_said(now: PreparedTask, expected: str) -> None:
    own, other = KeptSplit.of(task("abc", "d", "ef")), KeptSplit.of(task("o", "p", "q"))
    found = own.changes(now, [other], 2)
    assert expected in found and bool(found) == bool(expected)


@given(
    st.lists(st.sampled_from(["train", "validation", "test"]), min_size=12, max_size=12),
    st.lists(st.sampled_from(["train", "validation", "test", ""]), min_size=16, max_size=16),
    st.booleans(),
    st.booleans(),
)
def test_nothing_learned_is_ever_measured(before: list[str], after: list[str], every: bool, given_test: bool) -> None:
    """Whatever becomes of a folder: twelve images are learned, four are new."""

    def divided(names: list[str], *, given: bool) -> PreparedTask:
        parts = [
            "".join(chr(97 + i) for i, name in enumerate(names) if name == split) for split in KeptSplit.__annotations__
        ]
        return task(*parts, given=given)

    own, now = KeptSplit.of(divided(before, given=True)), divided(after, given=given_test)
    measured = measurable(now, own, [], every=every)
    assert not resembling(measured.fingerprints, own.learned).any()
    again = own.extend(now)
    assert sorted("".join(splits(again))) == sorted("".join(splits(now)))
    if not given_test:
        assert not resembling(again.test.fingerprints, own.learned).any()
        assert not resembling(KeptSplit.of(again).learned, own.test).any()


def test_scenes_stay_together_and_apart_in_joined_sets() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)
    video = PixelSet(pixels, ("a", "a", "b", "b"), scenes=np.array([0, 0, 1, 1]))
    joined = PixelSet.joined([video, PixelSet(pixels[:0], ()), video.where(np.array([True, False, True, True])), video])
    assert joined.scenes.tolist() == [0, 0, 1, 1, 2, 3, 3, 4, 4, 5, 5]
    assert PixelSet(pixels, ("a",) * 4).scenes.tolist() == [0, 1, 2, 3]
