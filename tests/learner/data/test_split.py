from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from duallora_edge.learner.data.images import ImageFile, ImageSet
from duallora_edge.learner.data.split import MIN_TO_SPLIT, FoundTask, by_classes, hold_back, order_classes, split_of


def image_set(counts: dict[str, int]) -> ImageSet:
    pairs = [(name, index) for name, count in counts.items() for index in range(count)]
    return ImageSet(
        tuple(ImageFile(Path(f"root/{name}/{index}.png")) for name, index in pairs),
        tuple(name for name, _ in pairs),
    )


counts_of_classes = st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), max_size=6)


@given(counts_of_classes, st.floats(0, 0.99), st.integers(0, 100))
def test_hold_back_laws(counts: dict[str, int], fraction: float, seed: int) -> None:
    images = image_set(counts)
    rest, held = hold_back(images, fraction, seed, "validation")
    assert Counter(rest.images) + Counter(held.images) == Counter(images.images)
    assert Counter(rest.labels) + Counter(held.labels) == Counter(images.labels)
    held_counts = Counter(held.labels)
    for name, count in counts.items():
        assert held_counts[name] < count
        expected = round(fraction * count)
        if count < MIN_TO_SPLIT or fraction == 0:
            assert held_counts[name] == 0
        else:
            assert held_counts[name] == min(max(1, expected), count - 1)


@given(counts_of_classes, st.integers(0, 100), st.randoms())
def test_hold_back_does_not_depend_on_the_order_of_files(counts: dict[str, int], seed: int, random: object) -> None:
    images = image_set(counts)
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    first = hold_back(images, 0.3, seed, "test")[1]
    second = hold_back(images.subset(order), 0.3, seed, "test")[1]
    assert set(first.images) == set(second.images)


def test_seed_and_purpose_change_the_split() -> None:
    images = image_set({"a": 200})
    one = hold_back(images, 0.5, 0, "test")[1]
    assert one.images != hold_back(images, 0.5, 1, "test")[1].images
    assert one.images != hold_back(images, 0.5, 0, "validation")[1].images


@pytest.mark.parametrize("seed", range(5))
def test_neighbours_in_name_are_held_back_together(seed: int) -> None:
    held = hold_back(image_set({"a": 120}), 0.1, seed, "validation")[1]
    numbers = {int(Path(image.name).stem) for image in held.images}
    starts = [number for number in numbers if (number - 1) % 120 not in numbers]
    assert len(numbers) == 12
    assert len(starts) == 1  # one run, which may go over the end


def test_seeded_order_is_numpys_legacy_permutation() -> None:
    names = tuple(f"{index:03d}" for index in range(100))
    order = order_classes(names, "seed:1993")
    # The first classes of the CIFAR-100 order used since iCaRL.
    assert [int(name) for name in order[:10]] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert order_classes(("b", "a"), "alphabetical") == ["a", "b"]


@pytest.mark.parametrize(
    ("classes", "per_task", "names"),
    [
        (5, 2, ["classes-001-002", "classes-003-004", "classes-005-005"]),
        (3, 5, ["classes-001-003"]),
        (1, 1, ["classes-001-001"]),
    ],
)
def test_by_classes(classes: int, per_task: int, names: list[str]) -> None:
    images = image_set({f"c{index}": 2 for index in range(classes)})
    tasks = by_classes(FoundTask("all", images, None, images), per_task, "seed:7", "classes")
    assert [task.name for task in tasks] == names
    learned = [name for task in tasks for name in task.train.classes]
    assert sorted(learned) == list(images.classes)
    for task in tasks:
        assert task.validation is None and task.test is not None
        assert task.train.classes == task.test.classes


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000000", "train"),
        ("imagenet-val-0001", "val"),
        ("validation-00000-of-00001", "val"),
        ("instances_train2017", "train"),
        ("Test", "test"),
        ("latest-0001", ""),
        ("training_set", "train"),
        ("000001", ""),
    ],
)
def test_the_split_that_a_name_tells(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("splits", "has"),
    [
        (["train", "val", "test"], (True, True)),
        (["train", "test"], (False, True)),
        (["train", "val"], (True, True)),
        (["train"], (False, False)),
        ([""], (False, False)),
    ],
)
def test_a_task_of_splits(splits: list[str], has: tuple[bool, bool]) -> None:
    """What a source without a test gives is to be divided, unless it has validation images."""
    task = FoundTask.of("task", {split: image_set({"a": 3}) for split in splits})
    assert (task.validation is not None, task.test is not None) == has
    assert len(task.train) == 3


def test_a_validation_without_images_is_none_given() -> None:
    images = image_set({"a": 3})
    assert FoundTask.of("task", {"train": images, "val": ImageSet(), "test": images}).validation is None
