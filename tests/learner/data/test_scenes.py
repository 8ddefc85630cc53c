"""Scenes by names and by camera and time, and that they are held back as a whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from duallora_edge.learner.data.images import ImageFile, ImageSet
from duallora_edge.learner.data.scenes import scenes, scenes_by_class
from duallora_edge.learner.data.split import hold_back


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("1 2 3 10", [0, 1, 2, 3]),  # numbered
        ("IMG_0001 IMG_0002 IMG_0007", [0, 1, 2]),  # the same before the number says nothing
        ("00003_00029 00003_00030 00004_00000", [0, 0, 1]),
        ("20260102_101500 20260102_101502 20260103_090000", [0, 0, 1]),
        ("door-12-a door-13-a gate-1-a", [0, 0, 1]),  # the last number, whatever follows
        ("a1f b2e c3d", [0, 1, 2]),  # nothing is shared
        ("tree lamp", [0, 1]),
        ("", []),
    ],
)
def test_scenes_by_name(names: str, expected: list[int]) -> None:
    assert scenes([ImageFile(Path(f"a/{name}.jpg")) for name in names.split()]) == expected


def test_scenes_by_camera_and_time(tmp_path: Path) -> None:
    taken = [
        ("X1", "2026:05:01 10:00:00"),
        ("X1", "2026:05:01 12:00:00"),
        ("X2", "2026:05:01 10:00:05"),
        ("X1", "2026:05:01 10:00:50"),
        ("X1", "2026:05:01 10:01:45"),
        ("X1", "not a time"),
        ("X2", "2026:05:01 10:01:05"),
    ]
    images = []
    for index, (camera, time) in enumerate(taken):
        exif = Image.Exif()
        exif[0x0110] = camera
        exif.get_ifd(0x8769)[0x9003] = time
        Image.new("RGB", (16, 16)).save(tmp_path / f"{index}.jpg", exif=exif)
        images.append(ImageFile(tmp_path / f"{index}.jpg"))
    found = scenes(images)
    assert found[0] == found[3] == found[4] and found[2] == found[6]
    assert len({found[0], found[1], found[2], found[5]}) == 4


@given(sizes=st.lists(st.integers(1, 6), min_size=3, max_size=30), seed=st.integers(0, 99))
def test_whole_scenes_are_held_back(sizes: list[int], seed: int) -> None:
    names = [f"a/{scene:03d}_{frame:02d}.png" for scene, size in enumerate(sizes) for frame in range(size)]
    images = ImageSet(tuple(ImageFile(Path(name)) for name in names), ("a",) * len(names))
    rest, held = hold_back(images, 0.2, seed, "validation")
    assert len(rest) + len(held) == len(names)
    if len(names) >= 5:
        wanted = max(1, round(0.2 * len(names)))
        small = max(2 * wanted, len(names) // 3)
        assert wanted <= len(held) < wanted + small or max(sizes) > small
        if max(sizes) <= small and max(sizes) > 1:
            held_scenes = {image.name[:5] for image in held.images}
            assert not held_scenes & {image.name[:5] for image in rest.images}


def test_a_few_images_of_another_camera_are_not_all_that_is_held_back() -> None:
    names = [f"a/IMG_{i:04d}.png" for i in range(97)] + [f"a/DSC_{i:04d}.png" for i in range(3)]
    images = ImageSet(tuple(ImageFile(Path(name)) for name in names), ("a",) * len(names))
    assert all(len(hold_back(images, 0.1, seed, "validation")[1]) == 10 for seed in range(5))


def test_one_scene_for_the_whole_class_is_divided() -> None:
    names = [f"a/x_{i}.png" for i in range(20)]
    images = ImageSet(tuple(ImageFile(Path(name)) for name in names), ("a",) * len(names))
    rest, held = hold_back(images, 0.1, 0, "test")
    assert (len(rest), len(held)) == (18, 2)


def test_scenes_are_of_one_class_and_numbered_through() -> None:
    names = ["a/7_1", "b/7_1", "a/7_2", "b/8_1", "a/9_1", "b/7_3"]
    images = ImageSet(tuple(ImageFile(Path(f"{name}.png")) for name in names), tuple(name[0] for name in names))
    found = scenes_by_class(images)
    assert found.tolist() == [0, 2, 0, 3, 1, 2]
    assert scenes_by_class(ImageSet()).shape == (0,)
