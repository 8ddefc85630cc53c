"""The report of the health check: what it lists, and what it only counts."""

from __future__ import annotations

from duallora_edge.learner.data.health import HealthReport, TaskHealth


def test_left_out_images_are_listed_by_task_and_converted_ones_counted_once() -> None:
    files = ["a/1.png", "a/2.png", "a/3.png"]
    report = HealthReport(
        (
            TaskHealth(
                "first", 12, {"train": 5, "validation": 1, "test": 2}, {"grey": 8, "tiny": 4},
                {"grey": files, "tiny": files},
            ),
            TaskHealth("second", 4, {"train": 2, "validation": 1, "test": 1}, {"grey": 4}, {"grey": files}),
        )
    )  # fmt: skip
    assert report.table().splitlines() == [
        "task      train   valid.     test  left out",
        "first         5        1        2         4",
        "        4 tiny: left out (a side under 8 px) (a/1.png, a/2.png, a/3.png, ...)",
        "second        2        1        1         0",
        "12 grey: converted to RGB",
    ]
