"""Counts of classes in words, and what is to be feared of them."""

from __future__ import annotations

import pytest

from duallora_edge.learner.data.class_counts import concerns, describe_counts


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({"dog": 3, "cat": 20}, "cat 20, dog 3"),
        (
            {f"c{index:02d}": 7 for index in range(100)},
            "100 classes of 7 each: c00, c01, c02, ..., c97, c98, c99",
        ),
        (
            {f"c{index:02d}": 100 + index for index in range(100)},
            "100 classes: most of c99 199, c98 198, c97 197; fewest of c02 102, c01 101, c00 100",
        ),
        ({"x" * 100: 1}, f"{'x' * 39}… 1"),
    ],
)
def test_describe_counts(counts: dict[str, int], expected: str) -> None:
    assert describe_counts(counts) == expected


@pytest.mark.parametrize(
    ("counts", "alone", "expected"),
    [
        ({"a": 50, "b": 400}, False, []),
        ({"images": 50}, False, []),
        ({"images": 50}, True, ["'images' is the only class, so every image is answered with it"]),
        ({"a": 3}, False, ["The class has fewer than 10 images to learn from (a 3)"]),
        ({"a": 3, "b": 4}, False, ["Every class has fewer than 10 images to learn from (a 3, b 4)"]),
        ({"a": 9, "b": 50}, False, ["1 of 2 classes has fewer than 10 images to learn from (a 9)"]),
        ({"a": 10, "b": 201}, False, ["'b' has 201 images and 'a' has 10, so accuracy is mostly that of 'b'"]),
        ({"a": 1, "b": 500}, False, ["1 of 2 classes has fewer", "'b' has 500 images and 'a' has 1"]),
        (
            {f"c{i}": 1 for i in range(9)},
            False,
            ["Every class has fewer than 10 images to learn from (c0 1, c1 1, c2 1, ..."],
        ),
    ],
)
def test_concerns(counts: dict[str, int], alone: bool, expected: list[str]) -> None:
    found = concerns(counts, alone=alone)
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected
